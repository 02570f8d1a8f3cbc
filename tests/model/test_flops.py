"""The arithmetic of model/flops.py against models that are really built."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, MoEForCausalLM, experts, products
from model.flops import count_parameters, flops_per_token, total_count

SHAPES = {
    "tied MoE": {},
    "untied": {"tie_word_embeddings": False},
    "QK-norm": {"use_qk_norm": True},
    "biases": {"attention_bias": True},
    "own head_dim": {"head_dim": 24},
    "all heads": {"num_key_value_heads": None},
    "plain FFN": {"gated_ffn": False},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "gated shared experts": {"n_shared_experts": 2, "shared_expert_gate": True},
    "some dense layers": {"first_k_dense_replace": 1, "mlp_only_layers": [2]},
    "dense twin": {"n_routed_experts": 0},
    "router bias": {"router_bias_update_rate": 0.001, "scoring_func": "sigmoid"},
    "default widths": {"intermediate_size": None, "moe_intermediate_size": None},
}


def small(**changes) -> ModelConfig:
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
    }
    return ModelConfig(**{**shape, **changes})


def part_of(name: str) -> str:
    """Which part of `count_parameters` a parameter belongs to, by its name."""
    if ".mlp." in name:
        kind = name.split(".mlp.")[1].split(".")[0]
        parts = {
            "gate": "router",
            "experts": "routed experts",
            "shared_experts": "shared experts",
            "shared_expert_gate": "shared expert gate",
        }
        return parts.get(kind, "dense FFN")
    if ".self_attn." in name:
        return "attention"
    return {"embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, "norms")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_part_has_the_parameters_of_the_built_model(shape):
    config = small(**SHAPES[shape])
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    built: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        built[part_of(name)] = built.get(part_of(name), 0) + parameter.numel()
    counted = {part: count.total for part, count in count_parameters(config).items() if count.total}
    assert counted == built
    assert total_count(config).total == sum(built.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_active_leaves_out_exactly_the_experts_not_chosen(shape):
    config = small(**SHAPES[shape])
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    idle = 0
    for _, layer in model.moe_layers():
        one_expert = sum(p.numel() for p in layer.experts.parameters()) // config.n_routed_experts
        idle += one_expert * (config.n_routed_experts - config.num_experts_per_tok)
    count = total_count(config)
    assert count.total - count.active == idle


@pytest.mark.parametrize(
    "shape",
    [
        "tied MoE",
        "untied",
        "plain FFN",
        "some dense layers",
        "dense twin",
        "two shared experts",
        "gated shared experts",
    ],
)
@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_operations_are_those_of_the_products_in_a_forward_pass(shape, library, monkeypatch):
    """A third of the training operations, attention's counted by hand, is what torch's own counter sees forward."""
    if library == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "float32_library", lambda: library)
    # No padding of segments, which is there for oneDNN's speed alone: its rows are multiplied too.
    monkeypatch.setattr(experts, "uses_onednn", lambda x: False)
    config = small(**SHAPES[shape], expert_backend="loop")
    model, T = MoEForCausalLM(config), 16
    by_onednn = []

    def linear_flops(x_shape, weight_shape, *_, **__) -> int:
        by_onednn.append(1)
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: linear_flops})
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randint(0, config.vocab_size, (2, T)))
    assert bool(by_onednn) == (library == "oneDNN")
    seen = counter.get_total_flops()
    # The counter knows no causal mask.
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T
    ours = (flops_per_token(config, T) - attention * 3 // 2) // 3 + attention
    assert seen / (2 * T) == ours


def test_published_sizes_come_out():
    """Hidden 512, 12 layers, 16 experts top-2 + 1 shared, vocabulary 6400: 173M, 41M active, 0.284 GFLOP per token."""
    config = ModelConfig(
        vocab_size=6400,
        hidden_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )
    count = total_count(config)
    assert (round(count.total / 1e6), round(count.active / 1e6)) == (173, 41)
    assert flops_per_token(config, 1024) / 1e9 == pytest.approx(0.2845, abs=1e-4)
