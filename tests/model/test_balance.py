"""Balance losses, z-loss, bias update and load statistics against their formulas, written out with loops."""

import math

import pytest
import torch

from model import balance
from model.gate import MoEGate

LEVELS = ("sequence", "batch", "global")


def random_routing(B=3, T=7, E=5, k=2, scoring="softmax", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, E, generator=generator)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    return logits, scores, scores.topk(k, -1).indices


def f_dot_p(tokens: list[tuple[torch.Tensor, list[int]]], counts: list[float] | None = None) -> float:
    """sum_e f_e P_e of (scores, chosen experts) pairs; `counts` replaces what f is made of."""
    E, T = len(tokens[0][0]), len(tokens)
    if counts is None:
        counts = [sum(e in chosen for _, chosen in tokens) for e in range(E)]
    f = [count * E / sum(counts) for count in counts]
    P = [sum(float(scores[e] / scores.sum()) for scores, _ in tokens) / T for e in range(E)]
    return sum(f[e] * P[e] for e in range(E))


def rows_of(scores, topk_idx, real=None) -> list[list[tuple[torch.Tensor, list[int]]]]:
    """Per row, the (scores, chosen) of its real tokens."""
    B, T, _ = scores.shape
    return [
        [(scores[b, t].double(), topk_idx[b, t].tolist()) for t in range(T) if real is None or real[b, t]]
        for b in range(B)
    ]


def ours(level, scores, topk_idx, real=None, global_counts=None) -> float:
    counts = balance.count_tokens(topk_idx, scores.shape[-1], real)
    return float(balance.balance_loss(level, scores, counts, topk_idx.shape[-1], real, global_counts))


def some_padding(B=3, T=7) -> torch.Tensor:
    real = torch.ones(B, T, dtype=torch.bool)
    real[0, 4:] = False
    real[1, :2] = False
    return real


def test_counts_are_those_of_a_loop():
    _, scores, topk_idx = random_routing()
    real = some_padding()
    for mask in (None, real):
        counts = balance.count_tokens(topk_idx, 5, mask)
        expected = [
            [sum(e in chosen for _, chosen in row) for e in range(5)] for row in rows_of(scores, topk_idx, mask)
        ]
        assert counts.dtype == torch.float32
        assert counts.tolist() == expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_losses_are_their_formulas(scoring, padded):
    _, scores, topk_idx = random_routing(scoring=scoring)
    real = some_padding() if padded else None
    rows = rows_of(scores, topk_idx, real)
    expected = sum(f_dot_p(row) for row in rows) / len(rows)
    assert ours("sequence", scores, topk_idx, real) == pytest.approx(expected, rel=1e-5)
    everything = [token for row in rows for token in row]
    assert ours("batch", scores, topk_idx, real) == pytest.approx(f_dot_p(everything), rel=1e-5)
    window = [11.0, 2.0, 0.0, 7.0, 30.0]
    assert ours("global", scores, topk_idx, real, torch.tensor(window)) == pytest.approx(
        f_dot_p(everything, window), rel=1e-5
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_gate_reads_alpha_at_balance_and_alpha_e_over_k_at_collapse(tiny_config, scoring, level, k):
    """E one-hot tokens through a gate that is an identity: k experts each in turn, or always the same k."""
    E, alpha = 8, 0.3
    gate = MoEGate(
        tiny_config(
            hidden_size=E, n_routed_experts=E, num_experts_per_tok=k, norm_topk_prob=False, scoring_func=scoring,
            aux_loss_level=level, aux_loss_alpha=alpha,
        )
    )  # fmt: skip
    gate.weight.data.copy_(60 * torch.eye(E) if scoring == "softmax" else 200 * torch.eye(E))
    chosen = torch.stack([torch.roll(torch.eye(E)[:k].sum(0), i) for i in range(E)])  # (E, E): token i wants i..i+k-1
    x = chosen - 0.5 if scoring == "sigmoid" else chosen
    balanced = x.unsqueeze(0).repeat(3, 1, 1)
    _, _, aux_loss = gate(balanced)
    assert float(aux_loss.detach()) == pytest.approx(alpha, rel=1e-4)
    gate.reset_counts()
    collapsed = x[:1].expand(8, E).unsqueeze(0).repeat(3, 1, 1)
    _, _, aux_loss = gate(collapsed)
    assert float(aux_loss.detach()) == pytest.approx(alpha * E / k, rel=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_padding_never_counts(tiny_config, enlarge, level, scoring):
    """A batch padded to twice its length, left or right, plus a row of nothing else: the loss and the counts of the batch alone."""
    changes = {"aux_loss_level": level, "scoring_func": scoring, "router_z_loss_coef": 0.1}
    x = torch.randn(3, 6, 32) / 4
    junk = torch.randn(3, 6, 32)
    plain = enlarge(MoEGate(tiny_config(**changes)))
    _, _, expected = plain(x)
    real = torch.ones(3, 6, dtype=torch.bool)
    empty = torch.randn(1, 12, 32), torch.zeros(1, 12, dtype=torch.bool)
    for padded, mask in (
        (torch.cat((x, junk), 1), torch.cat((real, ~real), 1)),
        (torch.cat((junk, x), 1), torch.cat((~real, real), 1)),
    ):
        gate = enlarge(MoEGate(tiny_config(**changes)))
        _, _, aux_loss = gate(torch.cat((padded, empty[0])), torch.cat((mask, empty[1])))
        torch.testing.assert_close(aux_loss, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(gate.tokens_per_expert, plain.tokens_per_expert)
        torch.testing.assert_close(gate.loss_sums, plain.loss_sums, atol=1e-6, rtol=1e-5)
        aux_loss.backward()
        assert gate.weight.grad.isfinite().all()


def test_a_batch_of_nothing_but_padding_is_zero():
    logits, scores, topk_idx = random_routing()
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    for level in ("sequence", "batch"):
        assert ours(level, scores, topk_idx, nothing) == 0
    assert balance.z_loss(logits, nothing) == 0


def test_sequence_level_does_not_depend_on_the_split_and_batch_level_does():
    _, scores, topk_idx = random_routing(B=6)

    def parts_mean(level, size):
        parts = [ours(level, s, i) for s, i in zip(scores.split(size), topk_idx.split(size), strict=True)]
        return sum(parts) / len(parts)

    whole = ours("sequence", scores, topk_idx)
    for size in (1, 2, 3):
        assert parts_mean("sequence", size) == pytest.approx(whole, rel=1e-6)
    assert abs(parts_mean("batch", 1) - ours("batch", scores, topk_idx)) > 1e-2
    assert parts_mean("batch", 1) == pytest.approx(whole, rel=1e-6), "one row a batch: the two are the same"


def test_global_level_over_micro_batches_is_a_running_window(tiny_config, enlarge):
    """Micro-batch i sees f of everything since the step began, P of itself."""
    gate = enlarge(MoEGate(tiny_config(aux_loss_level="global", aux_loss_alpha=1.0)))
    seen = []
    for seed in range(3):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed)) / 4
        routing = gate.route(x)
        here = [t for row in rows_of(routing.scores.detach(), routing.topk_idx) for t in row]
        seen += here
        counts = [float(sum(e in chosen for _, chosen in seen)) for e in range(4)]
        assert float(gate(x)[2].detach()) == pytest.approx(f_dot_p(here, counts), rel=1e-5), f"micro-batch {seed}"
    gate.reset_counts()
    assert float(gate(x)[2].detach()) == pytest.approx(f_dot_p(here), rel=1e-5), "a new step starts a new window"


def test_global_level_over_two_ranks_is_one_process(tiny_config, enlarge):
    """Two gates that exchange counts, averaged, are one gate with all rows: the loss and the router's gradient."""
    config = tiny_config(aux_loss_level="global")
    x = torch.randn(4, 9, 32) / 4
    whole = enlarge(MoEGate(config))
    _, _, expected = whole(x)
    expected.backward()

    halves = (x[:2], x[2:])
    local = [balance.count_tokens(whole.route(half).topk_idx, 4).sum(0) for half in halves]
    losses, gradients = [], []
    for rank, half in enumerate(halves):
        gate = enlarge(MoEGate(config))

        def reduce_counts(counts, rank=rank):
            assert torch.equal(counts, local[rank]), "what is summed over ranks is this micro-batch alone"
            return local[0] + local[1]

        gate.reduce_counts = reduce_counts
        _, _, aux_loss = gate(half)
        aux_loss.backward()
        losses.append(float(aux_loss.detach()))
        gradients.append(gate.weight.grad)
        assert torch.equal(gate.tokens_per_expert, local[rank]), "the logged counts stay local"
    assert sum(losses) / 2 == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(sum(gradients) / 2, whole.weight.grad, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_step_down_the_loss_levels_the_load(tiny_config, level, scoring):
    torch.manual_seed(1)
    gate = MoEGate(tiny_config(aux_loss_level=level, aux_loss_alpha=1.0, scoring_func=scoring))
    direction = torch.randn(32)
    gate.weight.data[2] += 0.5 * direction / direction.norm()
    x = torch.randn(4, 64, 32) + 2 * direction / direction.norm()
    first = None
    optimizer = torch.optim.SGD([gate.weight], lr=1.0)
    for _ in range(30):
        gate.reset_counts()
        _, _, aux_loss = gate(x)
        if first is None:
            first = gate.tokens_per_expert.clone()
        optimizer.zero_grad()
        aux_loss.backward()
        optimizer.step()
    before, after = (balance.load_statistics(c.unsqueeze(0))["max_vio"].item() for c in (first, gate.tokens_per_expert))
    assert after < 0.7 * before, f"max_vio {before:.3f} -> {after:.3f}"


def test_z_loss_is_its_formula():
    logits, _, _ = random_routing()
    real = some_padding()
    for mask in (None, real):
        squares = [
            math.log(sum(math.exp(logit) for logit in logits[b, t].tolist())) ** 2
            for b in range(3)
            for t in range(7)
            if mask is None or mask[b, t]
        ]
        assert float(balance.z_loss(logits, mask)) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_z_loss_and_balance_loss_add_up(tiny_config, enlarge):
    x = torch.randn(2, 6, 32)

    def aux(**changes) -> float:
        return float(enlarge(MoEGate(tiny_config(**changes)))(x)[2].detach())

    both = aux(aux_loss_alpha=0.02, router_z_loss_coef=0.5)
    z_alone = aux(aux_loss_level="none", router_z_loss_coef=0.5)
    assert aux(aux_loss_level="none") == 0
    assert z_alone > 0
    assert both == pytest.approx(aux(aux_loss_alpha=0.02) + z_alone, rel=1e-6)
    assert aux(aux_loss_level="none", router_z_loss_coef=1.0) == pytest.approx(2 * z_alone, rel=1e-6)


def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    bias = torch.tensor([0.0, 1.0, -1.0, 0.5])
    balance.update_bias(bias, torch.tensor([10.0, 0.0, 4.0, 2.0]), 0.01)  # mean 4
    torch.testing.assert_close(bias, torch.tensor([-0.01, 1.01, -1.0, 0.51]))
    balance.update_bias(bias, torch.tensor([10.0, 0.0, 4.0, 2.0]), 0.01, accepted=torch.tensor(False))
    torch.testing.assert_close(bias, torch.tensor([-0.01, 1.01, -1.0, 0.51]), msg="a skipped step moves no bias")
    balance.update_bias(bias, torch.tensor([10.0, 0.0, 4.0, 2.0]), 0.01, accepted=torch.tensor(True))
    torch.testing.assert_close(bias, torch.tensor([-0.02, 1.02, -1.0, 0.52]))


def test_the_bias_alone_balances_a_router(tiny_config, enlarge):
    gate = enlarge(MoEGate(tiny_config(aux_loss_level="none", scoring_func="sigmoid", router_bias_update_rate=0.02)))
    x = torch.randn(8, 64, 32) / 4 + gate.weight[1].detach() / 15
    violations = []
    for _ in range(60):
        gate.reset_counts()
        gate(x)
        violations.append(balance.load_statistics(gate.tokens_per_expert.unsqueeze(0))["max_vio"].item())
        balance.update_bias(gate.expert_bias, gate.tokens_per_expert, 0.02)
    assert violations[0] > 0.3
    assert violations[-1] < 0.1, violations


def test_the_model_updates_each_layers_bias_from_its_own_counts(tiny_model):
    model = tiny_model(router_bias_update_rate=0.5)
    counts = torch.tensor([[4.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 8.0]])
    model.update_router_bias(counts)
    first, second = model.gates()
    assert first.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert second.expert_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    assert not first.expert_bias.requires_grad and first.expert_bias.dtype == torch.float32


def test_load_statistics_are_their_definitions():
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 6, 4, 0], [0, 0, 0, 0]])
    stats = balance.load_statistics(counts)
    assert stats["max_vio"][:3].tolist() == pytest.approx([0.0, 3.0, 1.0])
    assert stats["dead"].tolist() == [0, 3, 1, 4]
    mixed = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)) / math.log(4)
    assert stats["load_entropy"].tolist() == pytest.approx([1.0, 0.0, mixed, 0.0], abs=1e-6)
    assert balance.load_statistics(torch.tensor([[7]]))["load_entropy"].tolist() == [0.0]


def test_router_entropy_is_in_nats():
    scores = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9]])
    expected = [math.log(4), 0.0, math.log(2), math.log(4)]
    assert balance.router_entropy(scores).tolist() == pytest.approx(expected, abs=1e-5)
