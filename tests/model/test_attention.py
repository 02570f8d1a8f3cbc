"""Attention against a reference written out with loops; which keys a query sees; the KV cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import attention as attention_module
from model.attention import Attention, KVCache, attend, attend_by_products, attention_mask_for
from model.layers import RotaryEmbedding, rotate


@torch.no_grad()
def reference_attention(attention: Attention, x, cos, sin, visible) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim)) v, one row, head and query at a time; visible[b][t] lists the keys t may see."""
    config = attention.config
    B, T, _ = x.shape
    H, Hkv, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(linear, norm, n_heads):
        y = linear(x).view(B, T, n_heads, hd)
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * norm.weight
        return y

    q = rotate(project(attention.q_proj, attention.q_norm, H), cos, sin)
    k = rotate(project(attention.k_proj, attention.k_norm, Hkv), cos, sin)
    v = project(attention.v_proj, None, Hkv)
    y = torch.zeros(B, T, H, hd, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            shared = h // (H // Hkv)  # consecutive query heads share a key head
            for t in range(T):
                scores = [(float(q[b, t, h] @ k[b, s, shared]) / math.sqrt(hd), s) for s in visible[b][t]]
                top = max(score for score, _ in scores)
                total = sum(math.exp(score - top) for score, _ in scores)
                for score, s in scores:
                    y[b, t, h] += math.exp(score - top) / total * v[b, s, shared]
    return attention.o_proj(y.view(B, T, H * hd))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True}, {"attention_bias": True}, {"head_dim": 6}], ids=str)
def test_attention_is_its_formula(tiny_config, enlarge, heads, changes):
    config = tiny_config(hidden_size=16, num_attention_heads=heads[0], num_key_value_heads=heads[1], **changes)
    attention = enlarge(Attention(config, 0)).double()
    x = torch.randn(2, 5, 16).double()
    cos, sin = (table.view(1, 5, 1, -1) for table in RotaryEmbedding(config.head_dim, 8, 100.0)(torch.arange(5)))
    causal = [[range(t + 1) for t in range(5)]] * 2
    expected = reference_attention(attention, x, cos, sin, causal)
    torch.testing.assert_close(attention(x, cos, sin, None, None), expected, atol=1e-7, rtol=0)

    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    mask = attention_mask_for(5, x.device, None, documents, None)
    visible = [[[s for s in range(t + 1) if row[s] == row[t]] for t in range(5)] for row in documents.tolist()]
    expected = reference_attention(attention, x, cos, sin, visible)
    torch.testing.assert_close(attention(x, cos, sin, mask, None), expected, atol=1e-7, rtol=0)


def test_the_mask_says_who_sees_whom():
    real = torch.tensor([[False, False, True, True, True], [True, True, True, False, False], [False] * 5])
    documents = torch.tensor([[0, 0, 0, 1, 1], [4, 4, 5, 5, 5], [1, 1, 1, 1, 1]])
    for padding in (None, real):
        for ids in (None, documents):
            mask = attention_mask_for(5, torch.device("cpu"), padding, ids, None)
            if padding is None and ids is None:
                assert mask is None, "plain causal attention needs no mask"
                continue
            mask = mask.expand(3, 1, 5, 5)
            for b in range(3):
                for t in range(5):
                    for s in range(5):
                        sees = (
                            s <= t
                            and (ids is None or ids[b, s] == ids[b, t])
                            and (padding is None or bool(padding[b, s]))
                        )
                        assert mask[b, 0, t, s] == (sees or s == t), f"row {b}, query {t}, key {s}"


def test_a_row_of_padding_stays_finite(tiny_model, random_ids):
    model = tiny_model()
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0] = False
    out = model(random_ids(2, 6), random_ids(2, 6), attention_mask=real)
    (out.loss + out.aux_loss).backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_cache_returns_what_was_written(tiny_config):
    config = tiny_config()
    cache = KVCache(config, 2, 7, torch.device("cpu"), torch.float32)
    keys, values = torch.randn(2, 2, 2, 6, 8), torch.randn(2, 2, 2, 6, 8)  # (layer, B, Hkv, T, head_dim)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        for layer in range(2):
            k, v = cache.append(layer, keys[layer, :, :, start:end], values[layer, :, :, start:end])
            torch.testing.assert_close(k, keys[layer, :, :, :end], atol=0, rtol=0)
            torch.testing.assert_close(v, values[layer, :, :, :end], atol=0, rtol=0)
        cache.length = end
    with pytest.raises(AssertionError, match="7 positions cannot hold 8"):
        cache.append(0, keys[0, :, :, :2], values[0, :, :, :2])


def test_each_layers_cache_is_its_own(tiny_config):
    cache = KVCache(tiny_config(), 1, 4, torch.device("cpu"), torch.float32)
    assert len(cache.layers) == 4 and cache.max_length == 4
    one = torch.ones(1, 2, 1, 8)
    cache.append(1, one, 2 * one)
    assert [float(layer.sum()) for layer in cache.layers] == [0, 0, 16, 32], "keys and values of layer 0, of layer 1"


# Attention written out, against torch's kernel.


def queries_keys_values(H: int, Hkv: int, T: int, S: int, dtype=torch.float32) -> list[torch.Tensor]:
    """As the layer hands them over: heads transposed in front of time, keys of an earlier prefix if S > T."""
    shapes = ((T, H), (S, Hkv), (S, Hkv))
    return [torch.randn(3, n, heads, 8).to(dtype).transpose(1, 2).requires_grad_() for n, heads in shapes]


def reference_attend(q, k, v, mask) -> torch.Tensor:
    """torch's own, in float64, the mask made explicit: the queries are the last T of S positions."""
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    q, k, v = (tensor.double() for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def some_mask(T: int, S: int) -> torch.Tensor:
    """(3, 1, T, S) of two documents and padding on the left, differing by row; each query sees itself."""
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    documents = torch.arange(S) // torch.tensor([3, 4, S]).unsqueeze(1)
    mask = causal & (documents[:, S - T :].unsqueeze(2) == documents.unsqueeze(1))
    mask[2, :, :2] = False
    return (mask | torch.eye(S, dtype=torch.bool)[S - T :]).unsqueeze(1)


@pytest.mark.parametrize("block", [1, 3, 4, 512])
@pytest.mark.parametrize("masked", ["causal", "masked", "one mask for all rows"])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (4, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_attention_by_products_is_torchs(heads, T, S, masked, block, monkeypatch):
    """Blocks of queries that divide the queries or do not, grouped heads, a cached prefix (S > T): values and gradients."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", block)
    q, k, v = queries_keys_values(*heads, T, S)
    mask = None if masked == "causal" else some_mask(T, S)
    if masked == "one mask for all rows":
        mask = mask[:1]
    grad = torch.randn(3, heads[0], T, 8)
    ours, expected = attend_by_products(q, k, v, mask, 0.0), reference_attend(q, k, v, mask)
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
    found = torch.autograd.grad(ours, (q, k, v), grad)
    wanted = torch.autograd.grad(expected, (q, k, v), grad.double())
    for name, a, b in zip("qkv", found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_attention_by_products_in_bfloat16_is_near_float32(heads, masked):
    q, k, v = queries_keys_values(*heads, 40, 40)
    mask = some_mask(40, 40) if masked else None
    grad = torch.randn(3, heads[0], 40, 8)
    expected = attend_by_products(q, k, v, mask, 0.0)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v)]
    ours = attend_by_products(*rounded, mask, 0.0)
    found = torch.autograd.grad(ours, rounded, grad.bfloat16())
    for name, a, b in zip(("output", "q", "k", "v"), (ours, *found), (expected, *wanted), strict=True):
        assert a.dtype == torch.bfloat16
        difference = float(((a.float() - b).norm() / b.norm()).detach())
        assert difference < 0.03, f"{name}: off by {difference:.3f} of its norm"


def test_attention_by_products_drops_shares_in_training_alone():
    """Dropout leaves the mean: over many draws the output is what it is without."""
    q, k, v = (tensor.detach() for tensor in queries_keys_values(4, 2, 6, 6))
    whole = attend_by_products(q, k, v, None, 0.0)
    assert torch.equal(attend_by_products(q, k, v, None, 0.0), whole)
    draws = torch.stack([attend_by_products(q, k, v, None, 0.3) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - whole).abs() / (draws.std(0) / 2000**0.5 + 1e-6)
    assert error.max() < 5, f"{float(error.max()):.1f} standard errors off"


@pytest.mark.parametrize(
    ("dtype", "written_out"), [(torch.float32, False), (torch.float64, False), (torch.bfloat16, True)]
)
def test_only_bfloat16_on_a_cpu_is_written_out(dtype, written_out, monkeypatch):
    calls, function = [], attend_by_products
    monkeypatch.setattr(attention_module, "attend_by_products", lambda *args: calls.append(1) or function(*args))
    q, k, v = (tensor.detach() for tensor in queries_keys_values(4, 2, 6, 6, dtype))
    for mask in (None, some_mask(6, 6)):
        y = attend(q, k, v, mask, 0.0)
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), reference_attend(q, k, v, mask), atol=tolerance, rtol=0)
        assert y.dtype == dtype
    assert len(calls) == (2 if written_out else 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True}, {"attention_bias": True}], ids=str)
def test_attention_under_autocast_is_near_float32(tiny_config, enlarge, changes, masked):
    """Queries and keys, that QK-norm and rotation have made float32, are in autocast's dtype again before their product."""
    attention = enlarge(Attention(tiny_config(**changes), 0))
    cos, sin = (table.view(1, 24, 1, -1) for table in RotaryEmbedding(8, 24, 100.0)(torch.arange(24)))
    x = torch.randn(3, 24, 32, requires_grad=True)
    mask, probe = some_mask(24, 24) if masked else None, torch.randn(3, 24, 32)
    results = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            y = attention(x, cos, sin, mask, None)
        assert y.dtype == (torch.bfloat16 if on else torch.float32)
        gradients = torch.autograd.grad((y * probe).sum(), (x, *attention.parameters()))
        results.append([y.float(), *gradients])
    names = ["output", "x", *(name for name, _ in attention.named_parameters())]
    for name, exact, rounded in zip(names, *results, strict=True):
        assert rounded.dtype == torch.float32
        difference = float((rounded - exact).detach().norm())
        # Softmax does not change if all keys move by one vector: the gradient of their bias is 0 but for rounding.
        size = float((exact if name != "k_proj.bias" else results[0][0]).detach().norm())
        assert difference < 0.03 * size, f"{name}: off by {difference / size:.3f} of its norm"


def test_a_bfloat16_cache_under_autocast_continues_near_float32(tiny_config, enlarge):
    config = tiny_config(use_qk_norm=True)
    attention = enlarge(Attention(config, 0)).eval()
    cos, sin = (table.view(1, 12, 1, -1) for table in RotaryEmbedding(8, 12, 100.0)(torch.arange(12)))
    x = torch.randn(3, 12, 32)
    with torch.no_grad():
        expected = attention(x, cos, sin, None, None)
        cache, parts = KVCache(config, 3, 12, x.device, torch.bfloat16), []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for start, end in ((0, 7), (7, 8), (8, 12)):
                mask = attention_mask_for(end - start, x.device, None, None, cache)
                parts.append(attention(x[:, start:end], cos[:, start:end], sin[:, start:end], mask, cache))
                cache.length = end
    difference = float((torch.cat(parts, 1).float() - expected).norm() / expected.norm())
    assert difference < 0.02, f"off by {difference:.3f}"


def test_keys_are_not_repeated_for_the_query_heads(tiny_config, enlarge, monkeypatch):
    attention = enlarge(Attention(tiny_config(num_key_value_heads=1), 0))
    cos, sin = (table.view(1, 6, 1, -1) for table in RotaryEmbedding(8, 8, 100.0)(torch.arange(6)))
    shapes, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        shapes.append((q.shape[1], k.shape[1], v.shape[1]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention(torch.randn(2, 6, 32), cos, sin, None, None)
    assert shapes == [(4, 1, 1)]


def test_attention_dropout_acts_in_training_alone(tiny_config, enlarge):
    attention = enlarge(Attention(tiny_config(dropout=0.5), 0))
    cos, sin = (table.view(1, 6, 1, -1) for table in RotaryEmbedding(8, 8, 100.0)(torch.arange(6)))
    x = torch.randn(2, 6, 32)
    assert not torch.equal(attention(x, cos, sin, None, None), attention(x, cos, sin, None, None))
    attention.eval()
    assert torch.equal(attention(x, cos, sin, None, None), attention(x, cos, sin, None, None))
