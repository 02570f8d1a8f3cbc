"""MoEGate: the choice and its weights against plain Python, float32 whatever happens, and what counts when."""

import math

import pytest
import torch

from model.gate import MoEGate

D, E, K = 32, 6, 3


@pytest.fixture
def make_gate(tiny_config, enlarge):
    def make(**changes) -> MoEGate:
        return enlarge(MoEGate(tiny_config(**{"n_routed_experts": E, "num_experts_per_tok": K, **changes})))

    return make


def reference_choice(gate: MoEGate, x: torch.Tensor) -> list[tuple[list[int], list[float]]]:
    """Experts and weights of each token, from the definition, in Python floats."""
    config = gate.config
    bias = [0.0] * E if gate.expert_bias is None else gate.expert_bias.tolist()
    choices = []
    for token in x.reshape(-1, D).double():
        logits = (gate.weight.double() @ token).tolist()
        if config.scoring_func == "softmax":
            total = sum(math.exp(logit) for logit in logits)
            scores = [math.exp(logit) / total for logit in logits]
        else:
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        best = sorted(range(E), key=lambda e: scores[e] + bias[e], reverse=True)[: config.num_experts_per_tok]
        weights = [scores[e] for e in best]
        if config.norm_topk_prob:
            weights = [weight / sum(scores[e] for e in best) for weight in weights]
        choices.append((best, [weight * config.routed_scaling_factor for weight in weights]))
    return choices


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_choice_and_weights_are_their_definition(make_gate, scoring, normalised, scaling, biased):
    gate = make_gate(
        scoring_func=scoring, norm_topk_prob=normalised, routed_scaling_factor=scaling,
        router_bias_update_rate=0.001 if biased else 0.0,
    )  # fmt: skip
    if biased:
        gate.expert_bias.copy_(torch.linspace(-0.4, 0.4, E))
    x = torch.randn(2, 20, D) / 4
    topk_idx, topk_weight, _ = gate(x)
    assert topk_idx.shape == topk_weight.shape == (40, K)
    assert topk_idx.dtype == torch.int64
    for token, (experts, weights) in enumerate(reference_choice(gate, x)):
        assert topk_idx[token].tolist() == experts, f"token {token}: best first"
        assert topk_weight[token].tolist() == pytest.approx(weights, rel=1e-4)
    if normalised:
        torch.testing.assert_close(topk_weight.sum(1), torch.full((40,), scaling))


def test_the_bias_chooses_but_does_not_weigh(make_gate):
    gate = make_gate(router_bias_update_rate=0.001, norm_topk_prob=False)
    x = torch.randn(2, 20, D) / 4
    free = gate.route(x)
    gate.expert_bias[4] = 10.0
    forced = gate.route(x)
    assert (forced.topk_idx[..., 0] == 4).all(), "a large bias puts expert 4 first everywhere"
    assert not (free.topk_idx[..., 0] == 4).all()
    torch.testing.assert_close(forced.scores, free.scores, atol=0, rtol=0)
    torch.testing.assert_close(forced.topk_weight[..., 0], free.scores[..., 4], atol=0, rtol=0)


def test_the_router_is_float32_under_autocast(make_gate):
    gate = make_gate()
    x = torch.randn(2, 50, D)
    outside = gate.route(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate.route(x)
    for name, a, b in zip(outside._fields, outside, inside, strict=True):
        assert torch.equal(a, b), f"{name} differs under autocast"
    assert inside.scores.dtype == inside.logits.dtype == inside.topk_weight.dtype == torch.float32


def test_the_router_is_float32_for_bfloat16_weights(make_gate):
    gate = make_gate().to(torch.bfloat16)
    x = torch.randn(2, 50, D, dtype=torch.bfloat16)
    routing = gate.route(x)
    expected = (x.double() @ gate.weight.double().t()).softmax(-1)
    assert routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_weights_give_the_router_a_gradient(make_gate, scoring):
    gate = make_gate(scoring_func=scoring)
    _, topk_weight, _ = gate(torch.randn(2, 20, D) / 4)
    (topk_weight * torch.randn(K)).sum().backward()
    assert gate.weight.grad.abs().min(dim=1).values.max() > 0
    assert gate.weight.grad.norm() > 1e-2


def test_a_tokens_choice_depends_on_that_token_alone(make_gate):
    gate = make_gate().double()
    x = torch.randn(2, 10, D).double()
    whole = gate.route(x)
    for b in range(2):
        for t in range(10):
            alone = gate.route(x[b : b + 1, t : t + 1])
            assert torch.equal(alone.topk_idx[0, 0], whole.topk_idx[b, t])
            torch.testing.assert_close(alone.topk_weight[0, 0], whole.topk_weight[b, t], atol=1e-12, rtol=0)


def test_evaluation_neither_counts_nor_adds_a_loss(make_gate):
    gate = make_gate(router_z_loss_coef=0.1, aux_loss_level="global").eval()
    _, _, aux_loss = gate(torch.randn(2, 20, D))
    assert aux_loss == 0
    assert not gate.tokens_per_expert.any() and not gate.loss_sums.any() and not gate.global_window.any()

    gate.train()
    _, _, aux_loss = gate(torch.randn(2, 20, D))
    assert aux_loss > 0
    before = gate.tokens_per_expert.clone()
    assert before.sum() == 2 * 20 * K
    gate.eval()
    gate(torch.randn(2, 20, D))
    assert torch.equal(gate.tokens_per_expert, before)


def test_sums_and_counts_are_those_of_the_micro_batches(make_gate):
    gate = make_gate(router_z_loss_coef=0.5, aux_loss_alpha=0.25, aux_loss_level="batch")
    counts, entropies, weighted, tokens = torch.zeros(E), 0.0, 0.0, 0
    for seed in range(3):
        x = torch.randn(2, 10, D, generator=torch.Generator().manual_seed(seed)) / 4
        real = torch.rand(2, 10, generator=torch.Generator().manual_seed(seed)) > 0.3
        topk_idx, _, aux_loss = gate(x, real)
        scores = gate.route(x).scores[real].detach()
        counts += torch.bincount(topk_idx[real.flatten()].flatten(), minlength=E)
        entropies += float(-(scores * scores.log()).sum())
        weighted += float(aux_loss.detach())
        tokens += int(real.sum())
    assert torch.equal(gate.tokens_per_expert, counts)
    balance_sum, z_sum, entropy_sum, token_sum = gate.loss_sums.tolist()
    assert 0.25 * balance_sum + 0.5 * z_sum == pytest.approx(weighted, rel=1e-5)
    assert entropy_sum == pytest.approx(entropies, rel=1e-5)
    assert token_sum == tokens
    gate.reset_counts()
    assert not gate.tokens_per_expert.any() and not gate.loss_sums.any() and not gate.global_window.any()


def test_counts_are_not_saved_but_the_bias_is(make_gate):
    assert set(make_gate(router_bias_update_rate=0.001).state_dict()) == {"weight", "expert_bias"}
    assert set(make_gate().state_dict()) == {"weight"}
    assert make_gate(router_bias_update_rate=0.001).expert_bias.dtype == torch.float32
