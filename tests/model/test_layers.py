"""RMSNorm, rotary positions and YaRN against transformers' own; the feed-forward networks against their formulas."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.feed_forward import FeedForward
from model.layers import RMSNorm, RotaryEmbedding, rotate


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_is_transformers(eps):
    ours, theirs, weight = RMSNorm(24, eps), LlamaRMSNorm(24, eps), torch.randn(24)
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    x = torch.randn(3, 5, 24) * 7
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_rms_norm_computes_in_float32_and_keeps_the_dtype():
    norm = RMSNorm(64, 1e-6)
    norm.weight.data.uniform_(0.5, 1.5)
    x = 1000 * torch.randn(4, 64, dtype=torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.detach().double()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.to(torch.bfloat16), atol=0, rtol=0)
    assert norm.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm.float()(x.float()).dtype == torch.bfloat16, "cast once here, not once per matrix that reads it"


def llama_rotary(head_dim: int, theta: float, positions: int, scaling: dict | None) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=positions,
        rope_parameters=parameters,
    )  # fmt: skip
    return LlamaRotaryEmbedding(config)


YARN = [
    {"factor": 4.0, "original_max_position_embeddings": 32},
    {"factor": 8.0, "original_max_position_embeddings": 512},
    {"factor": 1.0, "original_max_position_embeddings": 128},
    {"factor": 2.5, "original_max_position_embeddings": 2048, "beta_fast": 8.0},
    {"factor": 2.5, "original_max_position_embeddings": 2048, "beta_slow": 4.0},
    {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    {"factor": 16.0, "original_max_position_embeddings": 4096},
]


@pytest.mark.parametrize("scaling", [None, *YARN], ids=str)
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 10000.0), (64, 10000.0), (32, 1e6)])
def test_rotary_tables_are_transformers(head_dim, theta, scaling):
    scaling = scaling and {"rope_type": "yarn", **scaling}
    positions = torch.tensor([[0, 1, 2, 50, 127], [3, 3, 0, 9, 64]])
    cos, sin = RotaryEmbedding(head_dim, 128, theta, scaling)(positions)
    their_cos, their_sin = llama_rotary(head_dim, theta, 128, scaling)(torch.zeros(1), positions)
    torch.testing.assert_close(cos, their_cos, atol=2e-5, rtol=0)
    torch.testing.assert_close(sin, their_sin, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scaling", YARN, ids=str)
def test_yarn_frequencies_are_transformers(scaling):
    scaling = {"rope_type": "yarn", **scaling}
    embedding = RotaryEmbedding(64, 4, 10000.0, scaling)
    config = llama_rotary(64, 10000.0, 128, scaling).config
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = torch.atan2(embedding.sin[1, :32], embedding.cos[1, :32])  # the angle at position 1, below pi
    torch.testing.assert_close(ours, frequencies, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(embedding.cos[0], torch.full((64,), attention_factor), atol=1e-6, rtol=1e-6)


def test_yarn_keeps_fast_rotations_and_stretches_slow_ones():
    plain = RotaryEmbedding(64, 2, 10000.0)
    yarn = RotaryEmbedding(
        64, 2, 10000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    )
    ratio = (torch.atan2(yarn.sin, yarn.cos) / torch.atan2(plain.sin, plain.cos))[1, :32]
    assert ratio[0] == pytest.approx(1.0, abs=1e-4), "turns 326 times over the context: kept"
    assert ratio[-1] == pytest.approx(0.25, abs=1e-4), "turns less than once: interpolated by the factor"


def test_rotate_is_transformers():
    q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 2, 16)  # (B, T, H, head_dim)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 0, 1, 2]])
    cos, sin = RotaryEmbedding(16, 32, 10000.0)(positions)
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, expected in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rotate(x, cos.unsqueeze(2), sin.unsqueeze(2)), expected, atol=1e-6, rtol=1e-6)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    q, k = torch.randn(16).double(), torch.randn(16).double()
    cos, sin = RotaryEmbedding(16, 64, 100.0)(torch.arange(64))
    rotated_q, rotated_k = (
        rotate(x.expand(1, 64, 1, 16), cos.view(1, 64, 1, 16), sin.view(1, 64, 1, 16))[0, :, 0] for x in (q, k)
    )
    products = rotated_q @ rotated_k.t()  # (64, 64)
    for distance in (0, 1, 7, 40):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)
    assert (products[0, 0] - products[5, 0]).abs() > 1e-2, "and on the distance it does depend"
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(64), atol=1e-5, rtol=0)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@torch.no_grad()
def test_feed_forward_is_its_formula(name, gated):
    ffn = FeedForward(6, 5, name, gated, 0.7, 0.7).double()
    x = torch.randn(2, 3, 6).double()
    act = ACTIVATIONS[name]
    up = x @ ffn.up_proj.weight.t()
    if gated:
        hidden = (x @ ffn.gate_proj.weight.t()).clone().apply_(act) * up
    else:
        hidden = up.clone().apply_(act)
        assert ffn.gate_proj is None
    torch.testing.assert_close(ffn(x), hidden @ ffn.down_proj.weight.t())
