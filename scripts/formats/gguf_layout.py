"""A model as llama.cpp reads it: which of its architectures computes a ModelConfig, and tensors and keys under its names.

    architecture   for                                           it computes
    glm4moe        every MoE whose shared experts have no gate   dense layers first, then MoE; softmax or sigmoid
    qwen2moe       shared_expert_gate: true                      MoE layers alone; softmax, not renormalised; no QK-norm
    qwen3          dense, use_qk_norm: true
    llama          dense, use_qk_norm: false                     the only one with biases on all four projections

Read off llama.cpp's sources (src/models/*.cpp, src/llama-graph.cpp: build_moe_ffn) and measured against it, docs/results.md.
llama.cpp's own qwen3moe always renormalises and has no shared experts, so it is not used, although it would do for some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model import ModelConfig

Weights = dict[str, Tensor]  # the run's, by the names of its state dict
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # general.file_type, LLAMA_FTYPE_... of llama.h

MOST_LAYERS, MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS of llama-hparams.h
LARGEST_FLOAT, LARGEST_INT = 3.4e38, 2**32 - 1  # of a key in the file: float32, uint32
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp reads others from no file of these architectures
INSTEAD = "use the run itself (scripts.chat, scripts.serve), or train a model without it"


class Entry(NamedTuple):
    """One tensor of the file: its name, the run's tensors it is made of, and how. `plain`: always float32."""

    name: str
    sources: tuple[str, ...]
    make: Callable[[Weights], Tensor]
    plain: bool


# ------------------------------------------------------------------------------------------------ what can be represented


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name for it. ValueError, naming the first key, where no architecture computes this model."""
    if not config.gated_ffn:
        raise _refusal("gated_ffn: false", "every architecture of llama.cpp with these layers has gated networks")
    if config.hidden_act != "silu":
        raise _refusal(f"hidden_act: {config.hidden_act}", "llama.cpp has these layers with silu alone")
    if config.num_hidden_layers > MOST_LAYERS:
        raise _refusal(f"num_hidden_layers: {config.num_hidden_layers}", f"llama.cpp takes {MOST_LAYERS} at most")
    scaling = config.rope_scaling or {}
    for key, value in YARN_BETAS.items():
        if scaling.get(key) not in (None, value):
            raise _refusal(f"rope_scaling: {key}: {scaling[key]:g}", f"llama.cpp computes with {value:g} here")
    original = scaling.get("original_max_position_embeddings", 1)
    if original != int(original):
        raise _refusal(
            f"rope_scaling: original_max_position_embeddings: {original:g}", "llama.cpp takes a whole number"
        )
    for key, value in _numbers(config).items():
        largest = LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
        if value > largest:
            raise _refusal(f"{key}: {value:g}", f"a GGUF file holds numbers up to {largest:g} here")
    return _moe_architecture(config) if config.moe_layers else _dense_architecture(config)


def _numbers(config: ModelConfig) -> dict[str, int | float]:
    """Those written as keys that a config does not bound itself."""
    values = {key: float(getattr(config, key)) for key in ("rope_theta", "rms_norm_eps", "routed_scaling_factor")}
    for key, value in (config.rope_scaling or {}).items():
        if key == "original_max_position_embeddings":
            values[f"rope_scaling: {key}"] = int(value)
        elif key in ("factor", "attention_factor") and value is not None:
            values[f"rope_scaling: {key}"] = float(value)
    return values


def _dense_architecture(config: ModelConfig) -> str:
    if not config.use_qk_norm:
        return "llama"
    if config.attention_bias:
        raise _refusal("attention_bias: true with use_qk_norm", "llama.cpp's qwen3 has no bias on the o projection")
    return "qwen3"


def _moe_architecture(config: ModelConfig) -> str:
    if config.n_routed_experts > MOST_EXPERTS:
        raise _refusal(f"n_routed_experts: {config.n_routed_experts}", f"llama.cpp takes {MOST_EXPERTS} at most")
    if config.attention_bias:
        raise _refusal("attention_bias: true", "llama.cpp's MoE layers come without a bias on the o projection")
    if not config.shared_expert_gate:
        return "glm4moe"
    why = "llama.cpp's only architecture with shared_expert_gate, qwen2moe, "
    if config.scoring_func != "softmax" or config.router_bias_update_rate > 0:
        key = "scoring_func: sigmoid" if config.scoring_func != "softmax" else "router_bias_update_rate"
        raise _refusal(key, f"{why}chooses by softmax without a bias")
    if config.norm_topk_prob or config.routed_scaling_factor != 1.0:
        key = (
            "norm_topk_prob: true"
            if config.norm_topk_prob
            else f"routed_scaling_factor: {config.routed_scaling_factor:g}"
        )
        raise _refusal(key, f"{why}takes the weights as softmax gave them")
    if config.use_qk_norm:
        raise _refusal("use_qk_norm: true", f"{why}has none")
    if len(config.moe_layers) < config.num_hidden_layers:
        raise _refusal("first_k_dense_replace or mlp_only_layers", f"{why}has experts in every layer")
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise _refusal(f"head_dim: {config.head_dim}", f"{why}has hidden_size / num_attention_heads")
    return "qwen2moe"


def dense_among_experts(config: ModelConfig) -> list[int]:
    """Dense layers behind the first MoE layer. glm4moe knows none: they become MoE layers whose routed experts are zeros and
    whose shared expert is the dense network."""
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.moe_layers and _is_behind(config, layer)
    ]


def _is_behind(config: ModelConfig, layer: int) -> bool:
    return bool(config.moe_layers) and layer > config.moe_layers[0]


def _shared_count(config: ModelConfig) -> int:
    """Shared experts in each MoE layer of a glm4moe file, which has one at least: zeros fill up what the run has not."""
    wide = -(-config.intermediate_size // config.moe_intermediate_size) if dense_among_experts(config) else 0
    return max(config.n_shared_experts, wide, 1)


def _refusal(key: str, why: str) -> ValueError:
    return ValueError(f"{key}: {why}; {INSTEAD}")


# ------------------------------------------------------------------------------------------------ tensors


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of the file, in its order."""
    architecture = architecture_of(config)
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    found = [_copy("token_embd.weight", "embed_tokens.weight"), _copy("output_norm.weight", "norm.weight", plain=True)]
    if not config.tie_word_embeddings or architecture == "qwen2moe":  # which takes no tied head: a copy
        found.append(_copy("output.weight", head))
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}.mlp.", f"blk.{layer}."
        found += _attention(config, architecture, f"layers.{layer}.", theirs)
        if config.is_moe_layer(layer):
            found += _routed(config, architecture, ours, theirs)
            found += _shared(config, architecture, ours, theirs)
        elif _is_behind(config, layer):
            found += _no_routed(config, theirs)
            found += _network(ours, theirs, "_shexp", _shared_count(config) * config.moe_intermediate_size)
        else:
            found += _network(ours, theirs, "")
    return found


def _attention(config: ModelConfig, architecture: str, ours: str, theirs: str) -> Iterator[Entry]:
    second_norm = "post_attention_norm" if architecture == "glm4moe" else "ffn_norm"
    yield _copy(f"{theirs}attn_norm.weight", f"{ours}input_layernorm.weight", plain=True)
    yield _copy(f"{theirs}{second_norm}.weight", f"{ours}post_attention_layernorm.weight", plain=True)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for part in ("q", "k", "v", "o"):
        theirs_part, source = "output" if part == "o" else part, f"{ours}self_attn.{part}_proj"
        turned = heads.get(part) if architecture == "llama" else None  # llama.cpp rotates neighbours there
        yield _copy(f"{theirs}attn_{theirs_part}.weight", f"{source}.weight", heads=turned)
        if config.attention_bias:
            yield _copy(f"{theirs}attn_{theirs_part}.bias", f"{source}.bias", plain=True, heads=turned)
        elif architecture == "qwen2moe" and part != "o":  # older llama.cpp asks for them
            width = config.head_dim * heads.get(part, config.num_key_value_heads)
            yield _zeros(f"{theirs}attn_{part}.bias", (width,), plain=True)
    if config.use_qk_norm:
        yield _copy(f"{theirs}attn_q_norm.weight", f"{ours}self_attn.q_norm.weight", plain=True)
        yield _copy(f"{theirs}attn_k_norm.weight", f"{ours}self_attn.k_norm.weight", plain=True)


def _routed(config: ModelConfig, architecture: str, ours: str, theirs: str) -> Iterator[Entry]:
    F = config.moe_intermediate_size
    yield _copy(f"{theirs}ffn_gate_inp.weight", f"{ours}gate.weight", plain=True)
    if config.router_bias_update_rate > 0:
        yield _copy(f"{theirs}exp_probs_b.bias", f"{ours}gate.expert_bias", plain=True)
    elif architecture == "glm4moe":  # which has it always
        yield _zeros(f"{theirs}exp_probs_b.bias", (config.n_routed_experts,), plain=True)
    both = f"{ours}experts.gate_up_proj"  # (E, 2F, D), gate rows first
    yield Entry(f"{theirs}ffn_gate_exps.weight", (both,), lambda w: w[both][:, :F], False)
    yield Entry(f"{theirs}ffn_up_exps.weight", (both,), lambda w: w[both][:, F:], False)
    yield _copy(f"{theirs}ffn_down_exps.weight", f"{ours}experts.down_proj")


def _no_routed(config: ModelConfig, theirs: str) -> Iterator[Entry]:
    E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    yield _zeros(f"{theirs}ffn_gate_inp.weight", (E, D), plain=True)
    yield _zeros(f"{theirs}exp_probs_b.bias", (E,), plain=True)
    yield _zeros(f"{theirs}ffn_gate_exps.weight", (E, F, D))
    yield _zeros(f"{theirs}ffn_up_exps.weight", (E, F, D))
    yield _zeros(f"{theirs}ffn_down_exps.weight", (E, D, F))


def _shared(config: ModelConfig, architecture: str, ours: str, theirs: str) -> Iterator[Entry]:
    count = _shared_count(config) if architecture == "glm4moe" else config.n_shared_experts
    D, width = config.hidden_size, count * config.moe_intermediate_size
    if config.n_shared_experts > 0:
        yield from _network(f"{ours}shared_experts.", theirs, "_shexp", width)
    else:
        yield _zeros(f"{theirs}ffn_gate_shexp.weight", (width, D))
        yield _zeros(f"{theirs}ffn_up_shexp.weight", (width, D))
        yield _zeros(f"{theirs}ffn_down_shexp.weight", (D, width))
    if config.shared_expert_gate:
        gate = f"{ours}shared_expert_gate.weight"  # (1, D)
        yield Entry(f"{theirs}ffn_gate_inp_shexp.weight", (gate,), lambda w: w[gate][0], True)


def _network(ours: str, theirs: str, suffix: str, width: int | None = None) -> Iterator[Entry]:
    """`width`: hidden units to fill up to with zeros, which add nothing."""
    for part in ("gate", "up", "down"):
        yield _filled(f"{theirs}ffn_{part}{suffix}.weight", f"{ours}{part}_proj.weight", part == "down", width)


def _filled(name: str, source: str, columns: bool, width: int | None) -> Entry:
    def make(w: Weights) -> Tensor:
        missing = 0 if width is None else width - w[source].shape[1 if columns else 0]
        return (
            torch.nn.functional.pad(w[source], (0, missing) if columns else (0, 0, 0, missing))
            if missing
            else w[source]
        )

    return Entry(name, (source,), make, False)


def _copy(name: str, source: str, plain: bool = False, heads: int | None = None) -> Entry:
    """`heads`: the rows of each head, halves that are rotated together, are put in pairs of neighbours."""
    if heads is None:
        return Entry(name, (source,), lambda w: w[source], plain)
    return Entry(name, (source,), lambda w: _interleaved(w[source], heads), plain)


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    rows = tensor.shape[0]
    return tensor.view(heads, 2, rows // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _zeros(name: str, shape: tuple[int, ...], plain: bool = False) -> Entry:
    return Entry(name, (), lambda w: torch.zeros(shape), plain)


# ------------------------------------------------------------------------------------------------ metadata


def metadata(config: ModelConfig, name: str, description: str, wanted: str) -> dict[str, object]:
    """Keys and values but for the tokenizer's. An int is written as uint32, a float as float32."""
    architecture = architecture_of(config)
    values: dict[str, object] = {
        "general.type": "model",
        "general.name": name,
        "general.description": description,
        "general.file_type": FILE_TYPES[wanted],
        "general.quantization_version": 2,
    }
    shape: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.rope_scaling is not None:
        shape |= _yarn(config.rope_scaling)
    if config.moe_layers:
        shape |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if architecture == "glm4moe":
        shape |= {
            "expert_shared_count": _shared_count(config),
            "leading_dense_block_count": config.moe_layers[0],
            "expert_gating_func": {"softmax": 1, "sigmoid": 2}[config.scoring_func],
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": float(config.routed_scaling_factor),
        }
    if architecture == "qwen2moe":
        shape["expert_shared_feed_forward_length"] = config.n_shared_experts * config.moe_intermediate_size
    return values | {f"{architecture}.{key}": value for key, value in shape.items()}


def _yarn(scaling: dict) -> dict[str, object]:
    """llama.cpp multiplies by the usual factor of attention itself: what is written is what differs from it."""
    factor = float(scaling["factor"])
    values: dict[str, object] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
    }
    if scaling.get("attention_factor") is not None:
        values["rope.scaling.attn_factor"] = float(scaling["attention_factor"]) / (0.1 * math.log(factor) + 1.0)
    return values
