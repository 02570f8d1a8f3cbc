"""The whole model: causality, independence of the batch, documents, padding, cache, loss, counting.

Most run in float64, where what must not change changes by less than 1e-9 and what must, by more than 1e-3.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from model import MoEForCausalLM
from model.attention import KVCache
from model.loss import IGNORE

MODELS = {
    "default": {},
    "dense": {"n_routed_experts": 0},
    "sigmoid with bias, QK-norm": {"scoring_func": "sigmoid", "router_bias_update_rate": 0.001, "use_qk_norm": True},
    "k=1, no shared, plain": {
        "num_experts_per_tok": 1, "norm_topk_prob": False, "n_shared_experts": 0, "gated_ffn": False,
    },
    "k=E, one dense layer, one KV head": {"num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_key_value_heads": 1},
    "YaRN": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}  # fmt: skip
MODES = {"training": (True, True), "eval with gradients": (False, True), "eval, moe_infer": (False, False)}


@pytest.fixture(params=list(MODELS))
def wide_model(request, tiny_model):
    """A float64 model of each kind, with a router bias that matters where there is one."""
    model = tiny_model(dtype=torch.float64, **MODELS[request.param])
    for gate in model.gates():
        if gate.expert_bias is not None:
            gate.expert_bias.copy_(torch.linspace(-0.2, 0.2, 4))
    return model


def logits_of(model, mode: str, ids, **options) -> torch.Tensor:
    training, gradients = MODES[mode]
    model.train(training)
    with torch.set_grad_enabled(gradients):
        return model(ids, **options).logits.detach()


def assert_same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    assert difference < 1e-9, f"{what}: changed by {difference:.1e}"


def assert_differs(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    difference = (a - b).abs().flatten(1).amax(1).min().item()
    assert difference > 1e-3, f"{what}: changed by {difference:.1e} only"


# Promise 2: causal and independent of the batch.


@pytest.mark.parametrize("mode", list(MODES))
def test_later_tokens_never_change_earlier_logits(wide_model, random_ids, mode):
    ids = random_ids(3, 12)
    whole = logits_of(wide_model, mode, ids)
    for t in (1, 5, 11):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1 + random_ids(3, 12 - t, seed=t, vocab_size=60)) % 61
        other = logits_of(wide_model, mode, changed)
        assert_same(other[:, :t], whole[:, :t], f"logits before position {t}")
        assert_differs(other[:, t], whole[:, t], f"logits at position {t}")
        assert_same(logits_of(wide_model, mode, ids[:, :t]), whole[:, :t], f"logits of the first {t} tokens alone")


@pytest.mark.parametrize("mode", list(MODES))
def test_other_rows_never_change_a_row(wide_model, random_ids, mode):
    ids = random_ids(4, 12)
    whole = logits_of(wide_model, mode, ids)
    for row in range(4):
        assert_same(logits_of(wide_model, mode, ids[row : row + 1]), whole[row : row + 1], f"row {row} alone")
    changed = ids.clone()
    changed[1:] = random_ids(3, 12, seed=9)
    assert_same(logits_of(wide_model, mode, changed)[0], whole[0], "row 0 beside other rows")
    assert_same(logits_of(wide_model, mode, ids.flip(0)).flip(0), whole, "rows in another order")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", list(MODES))
def test_padding_never_changes_real_tokens(wide_model, random_ids, mode, side):
    lengths, T = [12, 7, 1, 0], 12
    ids, real = random_ids(4, T), torch.zeros(4, T, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, (slice(T - length, T) if side == "left" else slice(0, length))] = True
    padded = logits_of(wide_model, mode, ids, attention_mask=real)
    other = logits_of(wide_model, mode, torch.where(real, ids, (ids + 7) % 61), attention_mask=real)
    for row, length in enumerate(lengths):
        alone = (
            logits_of(wide_model, mode, ids[row][real[row]].unsqueeze(0)) if length else padded[row, :0].unsqueeze(0)
        )
        # Left padding shifts positions; only their differences enter, through float32 tables of cos and sin.
        tolerance = 1e-4 if side == "left" else 1e-9
        torch.testing.assert_close(
            padded[row][real[row]], alone[0], atol=tolerance, rtol=0, msg=lambda m, n=length: f"{n} tokens: {m}"
        )
        assert_same(other[row][real[row]], padded[row][real[row]], f"other padding ids, {length} tokens")
    assert_same(logits_of(wide_model, mode, ids, attention_mask=real.long()), padded, "a mask of 0 and 1")


@pytest.mark.parametrize("mode", list(MODES))
def test_packed_documents_are_separate_forward_passes(wide_model, random_ids, mode):
    ids = random_ids(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [7] * 3 + [8] * 9])
    packed = logits_of(wide_model, mode, ids, document_ids=documents)
    for row in range(2):
        for document in documents[row].unique():
            inside = documents[row] == document
            alone = logits_of(wide_model, mode, ids[row][inside].unsqueeze(0))
            assert_same(packed[row][inside], alone[0], f"row {row}, document {int(document)}")
    assert_differs(packed[:, 9:], logits_of(wide_model, mode, ids)[:, 9:], "without documents")


def test_packed_documents_with_padding_behind(wide_model, random_ids):
    ids = random_ids(1, 12)
    documents = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    real = torch.tensor([[True] * 9 + [False] * 3])
    packed = logits_of(wide_model, "training", ids, document_ids=documents, attention_mask=real)
    assert_same(packed[:, :4], logits_of(wide_model, "training", ids[:, :4]), "the first document")
    assert_same(packed[:, 4:9], logits_of(wide_model, "training", ids[:, 4:9]), "the second document")


def test_documents_restart_positions(wide_model, random_ids):
    ids = random_ids(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [3] * 1 + [4] * 8])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
    default = logits_of(wide_model, "training", ids, document_ids=documents)
    assert_same(
        logits_of(wide_model, "training", ids, document_ids=documents, position_ids=positions),
        default,
        "explicit positions",
    )
    spread = logits_of(wide_model, "training", ids, document_ids=documents, position_ids=2 * positions)
    assert_differs(spread[:, 3:], default[:, 3:], "other positions")


def test_position_ids_count_from_zero(wide_model, random_ids):
    ids = random_ids(2, 9)
    positions = torch.arange(9).expand(2, 9)
    default = logits_of(wide_model, "training", ids)
    assert_same(logits_of(wide_model, "training", ids, position_ids=positions), default, "0, 1, 2, ...")
    assert_differs(logits_of(wide_model, "training", ids, position_ids=2 * positions), default, "0, 2, 4, ...")


# The KV cache.


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5] + [1] * 7, [3, 4, 5]], ids=str)
def test_the_cache_continues_where_it_stopped(wide_model, random_ids, pieces):
    ids = random_ids(3, 12)
    whole = logits_of(wide_model, "eval, moe_infer", ids)
    cache = KVCache(wide_model.config, 3, 12, ids.device, torch.float64)
    parts = [logits_of(wide_model, "eval, moe_infer", part, cache=cache) for part in ids.split(pieces, dim=1)]
    assert_same(torch.cat(parts, 1), whole, f"in pieces of {pieces}")
    assert cache.length == 12


@pytest.mark.parametrize("pieces", [[1] * 12, [7] + [1] * 5, [6, 2, 4]], ids=str)
def test_the_cache_of_a_ragged_batch(wide_model, random_ids, pieces):
    """Rows padded on the left: every piece gives what each row alone gives, at its own positions."""
    ids, padding = random_ids(3, 12), [0, 3, 6]
    real = torch.tensor([[False] * p + [True] * (12 - p) for p in padding])
    cache = KVCache(wide_model.config, 3, 12, ids.device, torch.float64)
    parts = [
        logits_of(wide_model, "eval, moe_infer", part, cache=cache, attention_mask=mask)
        for part, mask in zip(ids.split(pieces, 1), real.split(pieces, 1), strict=True)
    ]
    logits = torch.cat(parts, 1)
    for row, p in enumerate(padding):
        assert_same(
            logits[row : row + 1, p:], logits_of(wide_model, "eval, moe_infer", ids[row : row + 1, p:]), f"row {row}"
        )


def test_what_does_not_fit_is_refused(tiny_model, random_ids):
    model = tiny_model()
    with pytest.raises(ValueError, match="65 tokens are more than the 64 positions"):
        model(random_ids(1, 65))
    cache = KVCache(model.config, 1, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="document_ids"):
        model(random_ids(1, 4), cache=cache, document_ids=torch.zeros(1, 4, dtype=torch.int64))


# Promise 8: the reported loss is cross-entropy alone.


@pytest.mark.parametrize("mode", list(MODES))
def test_the_loss_is_the_cross_entropy_of_the_shifted_labels(wide_model, random_ids, mode):
    training, gradients = MODES[mode]
    wide_model.train(training)
    ids, labels = random_ids(3, 12), random_ids(3, 12, seed=1)
    labels[0, 5:] = labels[2] = labels[1, 0] = IGNORE
    with torch.set_grad_enabled(gradients):
        out = wide_model(ids, labels)
        silent = wide_model(ids, labels, return_logits=False)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(out.loss, expected, atol=1e-9, rtol=0)
    assert out.n_targets == 4 + 11 and out.n_targets.dtype == torch.int64
    assert silent.logits is None
    torch.testing.assert_close(silent.loss, out.loss, atol=1e-12, rtol=0)
    assert wide_model(ids).loss is None and wide_model(ids).n_targets == 0
    if not training or not wide_model.gates():
        assert out.aux_loss == 0, "no balance term in evaluation or in a dense model"
    else:
        assert out.aux_loss > 0


def test_the_losses_gradient_is_torchs(tiny_model, random_ids):
    """Through the whole model, tied and separate head: chunked loss against logits and F.cross_entropy."""
    for tied in (True, False):
        ids, labels = random_ids(2, 12), random_ids(2, 12, seed=1)
        labels[1, 4:] = IGNORE
        ours, theirs = (tiny_model(dtype=torch.float64, tie_word_embeddings=tied) for _ in range(2))
        ours(ids, labels, return_logits=False).loss.backward()
        logits = theirs(ids).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE).backward()
        assert (ours.lm_head.weight is ours.embed_tokens.weight) == tied
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_without_targets_the_loss_is_zero_and_so_is_every_gradient(tiny_model, random_ids):
    model = tiny_model(aux_loss_level="none")
    out = model(random_ids(2, 6), torch.full((2, 6), IGNORE))
    (out.loss + out.aux_loss).backward()
    assert out.loss == 0 and out.n_targets == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_every_parameter_gets_a_gradient_though_experts_idle(tiny_model, random_ids):
    model = tiny_model(n_routed_experts=32, moe_intermediate_size=8, use_qk_norm=True, attention_bias=True)
    out = model(random_ids(1, 3), random_ids(1, 3))
    (out.loss + out.aux_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_auxiliary_loss_is_the_mean_over_moe_layers(tiny_model, random_ids):
    model = tiny_model(num_hidden_layers=4, mlp_only_layers=[1], router_z_loss_coef=0.2, aux_loss_alpha=0.5)
    terms = []
    for _, moe in model.moe_layers():
        moe.gate.auxiliary_loss = lambda *args, f=moe.gate.auxiliary_loss: terms.append(f(*args)) or terms[-1]
    out = model(random_ids(2, 9), random_ids(2, 9))
    assert len(terms) == 3
    torch.testing.assert_close(out.aux_loss, sum(terms) / 3)
    assert len({float(term.detach()) for term in terms}) == 3
    out.aux_loss.backward()
    assert all(gate.weight.grad.any() for gate in model.gates())
    assert [i for i, _ in model.moe_layers()] == model.config.moe_layers == [0, 2, 3]


def test_padding_never_counts_in_the_model(tiny_model, random_ids):
    ids = random_ids(2, 6)
    plain, padded = tiny_model(router_z_loss_coef=0.1), tiny_model(router_z_loss_coef=0.1)
    expected = plain(ids).aux_loss
    real = torch.tensor([[True] * 6 + [False] * 6] * 2)
    found = padded(torch.cat((ids, random_ids(2, 6, seed=5)), 1), attention_mask=real).aux_loss
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(padded.routing_counts()[0], plain.routing_counts()[0])


# Counting.


def test_training_counts_and_evaluation_does_not(tiny_model, random_ids):
    model = tiny_model()
    model(random_ids(2, 9))
    counts, sums = model.routing_counts()
    assert counts.shape == (2, 4) and sums.shape == (2, 4)
    assert counts.sum(1).tolist() == [2 * 9 * 2] * 2 and sums[:, 3].tolist() == [18, 18]
    model.eval()
    with torch.no_grad():
        model(random_ids(2, 9))
        assert torch.equal(model.routing_counts()[0], counts), "evaluation did not count"


def test_the_reduction_reaches_every_gate(tiny_model, random_ids):
    model = tiny_model(aux_loss_level="global")
    seen = []
    model.set_count_reduction(lambda counts: seen.append(counts.clone()) or counts * 2)
    model(random_ids(2, 9))
    assert len(seen) == 2 and all(c.sum() == 36 for c in seen)
    assert all(gate.global_window.sum() == 72 for gate in model.gates())
    model.reset_counts()
    assert not any(gate.global_window.any() for gate in model.gates())


@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.2, "router_jitter_noise": 0.1}, {"n_routed_experts": 0}], ids=str
)
def test_activation_checkpointing_changes_memory_and_nothing_else(tiny_model, random_ids, changes):
    """The recomputed forward pass must not count tokens, nor reduce them over ranks, a second time."""
    ids, labels = random_ids(3, 10), random_ids(3, 10, seed=1)
    results = []
    for on in (False, True):
        model = tiny_model(**{"aux_loss_level": "global", **changes})
        model.activation_checkpointing = on
        passes, reductions = [], []
        model.layers[0].register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        model.set_count_reduction(lambda counts, r=reductions: r.append(1) or counts)
        torch.manual_seed(5)
        out = model(ids, labels, return_logits=False)
        (out.loss + out.aux_loss).backward()
        assert len(passes) == (2 if on else 1), "recomputed once, if at all"
        assert len(reductions) == len(model.gates())
        counts = model.routing_counts() if model.gates() else ()
        results.append([out.loss, out.aux_loss, *counts, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# Building.


def test_a_fresh_model_is_near_uniform_and_starts_small(tiny_config):
    config = tiny_config(
        vocab_size=512, hidden_size=128, num_hidden_layers=8, initializer_range=0.02, tie_word_embeddings=False,
        attention_bias=True, mlp_only_layers=[0],
    )  # fmt: skip
    model = MoEForCausalLM(config)
    ids = torch.randint(512, (4, 32))
    assert float(model(ids, ids).loss.detach()) == pytest.approx(math.log(512), abs=0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * 8) if into_residual else 0.02
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.12), name


def test_dropout_is_on_embeddings_attention_and_both_branches(tiny_model, random_ids, monkeypatch):
    model = tiny_model(dropout=0.25)
    calls, dropout = [], F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append((p, training)) or dropout(x, p, training))
    model(random_ids(1, 4))
    assert calls == [(0.25, True)] * (1 + 2 * 2)
    calls.clear()
    model.eval()(random_ids(1, 4))
    assert all(not training for _, training in calls)


def test_dropout_is_off_in_evaluation_and_random_in_training(tiny_model, random_ids):
    model = tiny_model(dropout=0.3)
    ids = random_ids(2, 8)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    torch.testing.assert_close(model(ids).logits, tiny_model().eval()(ids).logits, atol=0, rtol=0)


def test_the_same_step_gives_the_same_bits(tiny_model, random_ids):
    def step() -> list[torch.Tensor]:
        model = tiny_model(n_routed_experts=8)
        out = model(random_ids(4, 30), random_ids(4, 30, seed=1), return_logits=False)
        (out.loss + out.aux_loss).backward()
        return [out.loss, out.aux_loss, *(p.grad for p in model.parameters())]

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


def test_only_parameters_and_bias_are_saved(tiny_model):
    state = tiny_model(router_bias_update_rate=0.01).state_dict()
    assert [name for name in state if "count" in name or "window" in name or "sums" in name or "rotary" in name] == []
    assert "layers.0.mlp.gate.expert_bias" in state and "layers.0.mlp.experts.gate_up_proj" in state


@pytest.mark.parametrize("setting", ["default", "dense"])
def test_bfloat16_autocast_is_near_float32(tiny_model, random_ids, setting):
    """Two layers of 8-bit mantissas: loss within 1 %, gradients within 10 % of their norm."""
    ids, labels = random_ids(4, 30), random_ids(4, 30, seed=1)
    exact, rounded = tiny_model(**MODELS[setting]), tiny_model(**MODELS[setting])
    expected = exact(ids, labels).loss
    expected.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rounded(ids, labels)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected, rtol=0.01, atol=0)
    difference = torch.cat(
        [(a.grad - b.grad).flatten() for a, b in zip(rounded.parameters(), exact.parameters(), strict=True)]
    )
    size = torch.cat([p.grad.flatten() for p in exact.parameters()]).norm()
    assert difference.norm() < 0.1 * size


def test_a_cache_can_be_used_with_gradients_enabled(tiny_model, random_ids):
    model, ids = tiny_model().eval(), random_ids(2, 8)
    cache = KVCache(model.config, 2, 8, torch.device("cpu"), torch.float32)
    parts = [model(ids[:, :5], cache=cache).logits, model(ids[:, 5:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_experts_hold_their_activation_by_name(tiny_model, act):
    """torch's operators and lambdas cannot be handed to another process with the model."""
    for _, moe in tiny_model(hidden_act=act).moe_layers():
        assert vars(moe.experts.activation) == {"hidden_act": act, "gated": True}
