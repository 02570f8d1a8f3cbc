"""Each family of configs/families computes what its name means, by an implementation this project did not write.

The model is built from the shipped YAML with smaller sizes alone; weights go to the reference (transformers' class, or the
layer written out in families.py where there is none); logits, choices, balance loss and gradients are compared. The last
test breaks one thing at a time and asks the same comparisons to notice.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model import MoEForCausalLM, balance, feed_forward
from model.gate import Routing
from model.loss import IGNORE

from . import families
from .families import (
    FAMILIES,
    balance_difference,
    gradient_difference,
    logits_difference,
    one_moe_layer,
    our_model,
    random_ids,
    reference_of,
    routing_difference,
    shrunk,
    some_padding,
)

LOGITS = 2e-5  # largest difference, at a spread of logits of 1
WEIGHTS = 1e-5  # of an expert's weight
BALANCE = 1e-5  # relative
GRADIENTS = 1e-4  # relative to the tensor's largest

# Every family as shipped, and the other settings that its name covers.
VARIANTS = {family: (family, {}) for family in FAMILIES} | {
    "qwen3_moe, raw weights": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe, no dense layer": ("qwen3_moe", {"mlp_only_layers": []}),
    "qwen2_moe, normalised": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen2_moe, dense layers": ("qwen2_moe", {"mlp_only_layers": [0, 2]}),
    "deepseek_v3, no QK-norm": ("deepseek_v3", {"use_qk_norm": False}),
    "deepseek_v3, raw weights": ("deepseek_v3", {"norm_topk_prob": False}),
    "minimind, batch level": ("minimind", {"aux_loss_level": "batch"}),
}
TWINS = [f"{family}_dense" for family in FAMILIES]


def pair(family: str, **changes) -> tuple[MoEForCausalLM, torch.nn.Module]:
    ours = our_model(shrunk(family, **changes))
    return ours, reference_of(ours, family.removesuffix("_dense"))


def test_every_family_has_a_twin_a_reference_and_a_row_in_the_document():
    assert set(FAMILIES) == set(families.REFERENCES)
    text = (families.FOLDER.parents[1] / "docs/families.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        assert (families.FOLDER / f"{family}_dense.yaml").is_file()
        assert f"(../configs/families/{family}.yaml)" in text and f"\n| {family} |" in text


@pytest.mark.parametrize("name", [*VARIANTS, *TWINS])
def test_logits_are_those_of_the_reference(name):
    family, changes = VARIANTS.get(name, (name, {}))
    ours, theirs = pair(family, **changes)
    assert 0.5 < families.spread_of_logits(theirs) < 2
    for path in ("train", "eval", "few"):
        difference = logits_difference(ours, theirs, path)
        assert difference <= LOGITS, f"{name}, {path}: logits differ by {difference:.1e}"
    difference = logits_difference(ours, theirs, "eval", some_padding())
    assert difference <= LOGITS, f"{name}, padded: logits differ by {difference:.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_go_to_the_same_experts_with_the_same_weights(name):
    family, changes = VARIANTS[name]
    others, difference = routing_difference(*pair(family, **changes))
    assert others == 0, f"{name}: {others} tokens go elsewhere"
    assert difference <= WEIGHTS, f"{name}: weights differ by {difference:.1e}"


@pytest.mark.parametrize("depth", ["one MoE layer", "all layers"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_balance_loss_is_the_references(name, depth):
    family, changes = VARIANTS[name]
    ours, theirs = pair(family, **changes | (one_moe_layer(family) if depth == "one MoE layer" else {}))
    assert (len(ours.config.moe_layers) == 1) == (depth == "one MoE layer")
    for real in (None, some_padding()):
        difference = balance_difference(ours, theirs, real)
        assert difference <= BALANCE, f"{name}: balance losses differ by {difference:.1e} of themselves"


@pytest.mark.parametrize("name", [*VARIANTS, *TWINS])
def test_gradients_are_those_of_the_reference(name):
    family, changes = VARIANTS.get(name, (name, {}))
    ours, theirs = pair(family, **changes)
    for aux_weight in (0.0, 0.5) if ours.config.n_routed_experts else (0.0,):
        for kind, difference in gradient_difference(ours, theirs, aux_weight).items():
            assert difference <= GRADIENTS, f"{name}, {aux_weight=}: gradients of {kind} differ by {difference:.1e}"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_whole_training_loss_is_transformers_own(family, padded):
    """Their class adds router_aux_loss_coef times its balance loss to the cross-entropy; ours is k times smaller, so that
    aux_loss_alpha is k times the coefficient. Value and gradients, on one MoE layer, where pooling layers changes nothing."""
    ours, theirs = pair(family, **one_moe_layer(family), aux_loss_alpha=0.3)
    labels, real = random_ids(seed=1), some_padding()
    labels[1, :10] = labels[2, :18] = IGNORE
    theirs.train()
    expected = theirs(
        input_ids=random_ids(), labels=labels, attention_mask=real.long() if padded else None, output_router_logits=True
    )
    expected.loss.backward()
    out = ours.train()(random_ids(), labels, attention_mask=real if padded else None)
    torch.testing.assert_close(out.aux_loss, theirs.router_aux_loss_coef * expected.aux_loss, atol=0, rtol=1e-5)
    torch.testing.assert_close(out.loss + out.aux_loss, expected.loss, atol=1e-5, rtol=0)
    (out.loss + out.aux_loss).backward()
    router = ours.gates()[0].weight.grad
    torch.testing.assert_close(
        router, theirs.model.layers[-1].mlp.gate.weight.grad, atol=1e-4 * float(router.abs().max()), rtol=0
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_moe", "deepseek_v3", "minimind"])
def test_grouped_experts_are_the_same_on_both_sides(name):
    ours, theirs = pair(name, expert_backend="grouped")
    theirs.set_experts_implementation("grouped_mm")
    with_loop = our_model(shrunk(name, expert_backend="loop"))
    for path in ("train", "eval"):
        assert logits_difference(ours, theirs, path) <= LOGITS
        assert logits_difference(with_loop, theirs, path) <= LOGITS


def test_mixtrals_jitter_is_drawn_as_transformers_draws_it():
    """In training both multiply the layer's input by U(1-j, 1+j), drawn in the same order from the same generator."""
    ours, theirs = pair("mixtral", router_jitter_noise=0.2)
    plain = ours(random_ids()).logits.detach()
    torch.manual_seed(5)
    logits = ours.train()(random_ids()).logits.detach()
    torch.manual_seed(5)
    expected = theirs.train()(input_ids=random_ids()).logits.detach()
    assert float((logits - expected).abs().max()) <= LOGITS
    assert float((logits - plain).abs().max()) > 0.1, "the noise changed nothing"


@pytest.mark.parametrize("family", ["deepseek_moe", "deepseek_v3", "minimind"])
def test_the_layer_is_deepseeks_own(family):
    """transformers' DeepSeek-V2 and V3 layers: shared experts without a gate, which Qwen2-MoE's class can only imitate."""
    changes = {"norm_topk_prob": False} if family == "minimind" else {}  # V2's layer never normalises
    ours = our_model(shrunk(family, **changes))
    block, layer = families.deepseek_block(ours), ours.layers[-1].mlp
    x = torch.randn(families.B, families.T, 32, requires_grad=True)
    y, _ = layer(x)
    expected = block(x)
    assert float((y - expected).detach().abs().max()) <= LOGITS * float(expected.detach().std())
    probe = torch.randn_like(x)
    own = torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])
    other = dict(block.named_parameters())
    names = [name for name, _ in layer.named_parameters()]
    reference = torch.autograd.grad((expected * probe).sum(), [x, *(other[name] for name in names)])
    for name, a, b in zip(["x", *names], own, reference, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= GRADIENTS, name
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x)[0], y.detach(), atol=1e-5, rtol=0)


def test_the_selection_bias_decides_who_is_chosen_and_not_how_much():
    """That deepseek_v3's comparisons see the bias: it overrules the scores for many tokens, and no weight contains it."""
    ours, theirs = pair("deepseek_v3")
    gate = ours.gates()[0]
    x = torch.randn(1, 200, 32)
    with_bias = gate.route(x)
    by_score = with_bias.scores.topk(gate.config.num_experts_per_tok).indices
    overruled = (with_bias.topk_idx.sort(-1).values != by_score.sort(-1).values).any(-1).float().mean()
    assert 0.2 < overruled < 0.98
    raw = with_bias.scores.gather(-1, with_bias.topk_idx)
    torch.testing.assert_close(with_bias.topk_weight, 2.5 * raw / raw.sum(-1, keepdim=True))


def test_the_bias_moves_as_in_the_papers_algorithm():
    """arXiv 2408.15664, algorithm 1, over five steps of a whole model whose routing the bias itself changes."""
    config = shrunk("deepseek_v3", router_bias_update_rate=0.05)
    ours = our_model(config).train()
    biases = [gate.expert_bias.tolist() for gate in ours.gates()]
    first = [list(bias) for bias in biases]
    for step in range(5):
        ours.reset_counts()
        ours(random_ids(seed=step))
        _, routings = ours._hidden_states(random_ids(seed=step), None, None, None, None)
        for bias, (_, routing) in zip(biases, routings, strict=True):
            c = [int((routing.topk_idx == e).sum()) for e in range(config.n_routed_experts)]
            mean = sum(c) / len(c)
            for e in range(len(c)):
                error = mean - c[e]
                bias[e] += 0.05 * ((error > 0) - (error < 0))
        ours.update_router_bias(ours.routing_counts()[0])
        for bias, gate in zip(biases, ours.gates(), strict=True):
            assert gate.expert_bias.tolist() == pytest.approx(bias, abs=1e-6)
    assert biases != first


def test_eq_18_read_literally_is_ours_only_while_the_bias_is_zero():
    """DeepSeek-V3's eq. 18 ranks the scores without the bias; ours counts where tokens went. docs/families.md says so."""
    for bias, same in ((0.0, True), (1.0, False)):
        ours = our_model(shrunk("deepseek_v3", **one_moe_layer("deepseek_v3"))).train()
        gate = ours.gates()[0]
        gate.expert_bias.mul_(bias)
        _, ((_, routing),) = ours._hidden_states(random_ids(), None, None, None, None)
        by_score = routing.scores.topk(gate.config.num_experts_per_tok).indices
        share = routing.scores / routing.scores.sum(-1, keepdim=True)
        literal = families.sequence_loss(share, by_score, torch.ones(random_ids().shape, dtype=torch.bool))
        value = gate.auxiliary_loss(routing) / gate.config.aux_loss_alpha
        assert (float((value - literal).detach().abs()) < 1e-5) == same


@pytest.mark.parametrize("level", ["sequence", "batch"])
def test_both_of_minimind_losses_are_its_formulas(level):
    """`seq_aux` true and false, added up over layers as MiniMind does; ours is the mean, so layers times ours."""
    config = shrunk("minimind", aux_loss_level=level)
    ours = our_model(config).train()
    ours.reset_counts()
    total = ours(random_ids()).aux_loss * config.num_hidden_layers
    _, routings = ours._hidden_states(random_ids(), None, None, None, None)
    formula = {"sequence": families.sequence_loss, "batch": families.batch_loss}[level]
    everything = torch.ones(random_ids().shape, dtype=torch.bool)
    expected = sum(0.1 * formula(routing.scores, routing.topk_idx, everything) for _, routing in routings)
    torch.testing.assert_close(total, expected, atol=0, rtol=1e-5)


def test_softmax_over_the_chosen_is_the_renormalised_top_k():
    """What lets plain_moe be written with scoring_func softmax and norm_topk_prob true, beyond the comparisons above."""
    gate = our_model(shrunk("plain_moe")).gates()[0]
    routing = gate.route(torch.randn(3, 50, 32))
    over_chosen = routing.logits.gather(-1, routing.topk_idx).softmax(-1)
    torch.testing.assert_close(routing.topk_weight, over_chosen, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------ the tests can fail


def biased_weights(ours, _patch):
    """The selection bias gets into the weights, the mistake that DeepSeek-V3's paper warns of."""
    for gate in ours.gates():
        route = gate.route

        def wrong(x, gate=gate, route=route):
            r = route(x)
            weight = (r.scores + gate.expert_bias).gather(-1, r.topk_idx)
            weight = weight / weight.sum(-1, keepdim=True) * gate.config.routed_scaling_factor
            return Routing(r.topk_idx, weight, r.logits, r.scores)

        gate.route = wrong


def detached_weights(ours, _patch):
    """The router learns nothing from the output: forward, all is as it should be."""
    for gate in ours.gates():
        route = gate.route
        gate.route = lambda x, route=route: (r := route(x))._replace(topk_weight=r.topk_weight.detach())


def config_key(key, value):
    return lambda ours, _patch: setattr(ours.config, key, value)


def weight(path: str, row, factor: float):
    """Multiplies one row or one expert of a parameter."""

    @torch.no_grad()
    def change(ours, _patch):
        ours.get_parameter(path)[row] *= factor

    return change


def patched(name: str, make):
    """Replaces a function of model.balance by make(function), for the test alone."""
    return lambda _ours, patch: patch.setattr(balance, name, make(getattr(balance, name)))


def remove(name: str):
    def change(ours, _patch):
        for module in ours.modules():
            if getattr(module, name, None) is not None:
                setattr(module, name, None)

    return change


def tanh_gelu(ours, patch):
    patch.setitem(feed_forward.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh"))
    return our_model(ours.config)


def no_bias(ours, _patch):
    for gate in ours.gates():
        gate.expert_bias.zero_()


def logits(ours, theirs):
    return logits_difference(ours, theirs) / LOGITS


def eval_logits(ours, theirs):
    return logits_difference(ours, theirs, "eval") / LOGITS


def choices(ours, theirs):
    return float(routing_difference(ours, theirs)[0])


def weights_of_experts(ours, theirs):
    return routing_difference(ours, theirs)[1] / WEIGHTS


def balance_loss(ours, theirs):
    return balance_difference(ours, theirs) / BALANCE


def padded_balance_loss(ours, theirs):
    return balance_difference(ours, theirs, some_padding()) / BALANCE


def gradients_of(kind, aux_weight=0.0):
    return lambda ours, theirs: gradient_difference(ours, theirs, aux_weight)[kind] / GRADIENTS


EXPERT = "layers.3.mlp.experts."
BREAKS = {
    "one expert's down_proj by 1 %": ("mixtral", weight(EXPERT + "down_proj", 2, 1.01), logits),
    "one expert's gate by 1 %, in moe_infer": ("deepseek_v3", weight(EXPERT + "gate_up_proj", 3, 1.01), eval_logits),
    "one expert's weight by 1 %, gradients": ("qwen3_moe", weight(EXPERT + "gate_up_proj", 3, 1.01), gradients_of("experts")),
    "plain expert's up_proj by 1 %": ("plain_moe", weight(EXPERT + "up_proj", 1, 1.01), logits),
    "the router's weight by 1 %": ("mixtral", weight("layers.3.mlp.gate.weight", 0, 1.01), weights_of_experts),
    "the router's weight by 1 %, logits": ("qwen2_moe", weight("layers.3.mlp.gate.weight", 0, 1.01), logits),
    "the router's weight by 10 %, choices": ("qwen3_moe", weight("layers.0.mlp.gate.weight", 0, 1.1), choices),
    "the router's weight by 1 %, balance": ("minimind", weight("layers.0.mlp.gate.weight", 0, 1.01), balance_loss),
    "the shared experts by 1 %": ("deepseek_moe", weight("layers.3.mlp.shared_experts.up_proj.weight", 0, 1.01), logits),
    "shared experts left out": ("minimind", remove("shared_experts"), logits),
    "shared experts not gated": ("qwen2_moe", remove("shared_expert_gate"), logits),
    "the shared gate's weight by 1 %": ("qwen2_moe", weight("layers.3.mlp.shared_expert_gate.weight", 0, 1.01), gradients_of("shared")),
    "top-k normalised": ("deepseek_moe", config_key("norm_topk_prob", True), logits),
    "top-k not normalised": ("mixtral", config_key("norm_topk_prob", False), weights_of_experts),
    "top-k not normalised, plain": ("plain_moe", config_key("norm_topk_prob", False), logits),
    "one expert fewer a token": ("qwen3_moe", config_key("num_experts_per_tok", 3), logits),
    "scaling factor left out": ("deepseek_v3", config_key("routed_scaling_factor", 1.0), logits),
    "softmax for sigmoid": ("deepseek_v3", config_key("scoring_func", "softmax"), weights_of_experts),
    "bias left out of the choice": ("deepseek_v3", no_bias, choices),
    "bias in the weights": ("deepseek_v3", biased_weights, weights_of_experts),
    "QK-norm left out": ("qwen3_moe", remove("q_norm"), logits),
    "approximate GELU": ("plain_moe", tanh_gelu, logits),
    "router without the output's gradient": ("mixtral", detached_weights, gradients_of("router")),
    "batch level for sequence level": ("deepseek_moe", config_key("aux_loss_level", "batch"), balance_loss),
    "sequence level for batch level": ("mixtral", config_key("aux_loss_level", "sequence"), balance_loss),
    "level in the gradients": ("minimind", config_key("aux_loss_level", "batch"), gradients_of("router", 0.5)),
    "f without 1/k": (
        "qwen3_moe", patched("balance_loss", lambda f: lambda *a: a[3] * f(*a)), balance_loss,
    ),
    "sigmoid scores not normalised in P": (
        "deepseek_v3",
        patched("balance_loss", lambda f: lambda level, scores, *a: f(level, scores, *a) * scores.sum(-1).mean()),
        balance_loss,
    ),
    "padding counted in f": (
        "qwen2_moe",
        patched("count_tokens", lambda f: lambda topk_idx, n_experts, mask=None: f(topk_idx, n_experts)),
        padded_balance_loss,
    ),
    "padding counted in P": (
        "deepseek_moe",
        patched("balance_loss", lambda f: lambda level, scores, counts, k, mask, window: f(level, scores, counts, k, None, window)),
        padded_balance_loss,
    ),
    "balance loss without gradient": (
        "deepseek_v3", patched("balance_loss", lambda f: lambda *a: f(*a).detach()), gradients_of("router", 0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_the_comparisons_notice(name, monkeypatch):
    """Each comparison, in units of its tolerance: below 1 before, above 10 after (choices are whole tokens: 0, then some)."""
    family, change, difference = BREAKS[name]
    ours, theirs = pair(family)
    assert difference(ours, theirs) <= 1, "the comparison fails without a mistake"
    ours = our_model(dataclasses.replace(ours.config))
    ours = change(ours, monkeypatch) or ours
    assert difference(ours, theirs) >= (1 if difference is choices else 10), f"{name}: not noticed"


def other_normalisation(ours, _patch):
    ours.config.norm_topk_prob = not ours.config.norm_topk_prob


def other_level(ours, _patch):
    ours.config.aux_loss_level = "batch" if ours.config.aux_loss_level == "sequence" else "sequence"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        pytest.param(weight(EXPERT + "down_proj", 2, 1.01), logits, id="weight"),
        pytest.param(other_normalisation, logits, id="normalisation"),
        pytest.param(other_level, balance_loss, id="balance"),
    ],
)
def test_every_family_notices_a_weight_a_normalisation_and_a_balance_term(family, change, difference, monkeypatch):
    ours, theirs = pair(family)
    assert difference(ours, theirs) <= 1, "the comparison fails without a mistake"
    ours = our_model(dataclasses.replace(ours.config))
    change(ours, monkeypatch)
    assert difference(ours, theirs) >= 10
