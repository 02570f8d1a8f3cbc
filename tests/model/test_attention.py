"""Attention against a reference written out with loops; which keys a query sees; the KV cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.attention import Attention, KVCache, attention_dtype, attention_mask_for
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


def test_attention_runs_in_float32_on_cpu_under_autocast(tiny_config, enlarge, monkeypatch):
    """Autocast recasts the arguments of scaled_dot_product_attention unless it is told not to."""
    attention = enlarge(Attention(tiny_config(), 0))
    cos, sin = (table.view(1, 6, 1, -1) for table in RotaryEmbedding(8, 8, 100.0)(torch.arange(6)))
    results, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **options: results.append(kernel(*args, **options)) or results[-1],
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(torch.randn(2, 6, 32), cos, sin, None, None)
    assert results[0].dtype == attention_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32
    assert y.dtype == torch.bfloat16
    assert attention_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16


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
