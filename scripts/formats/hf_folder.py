"""A model as a folder that transformers opens without remote code: which class, its config.json, its tensors.

Written for transformers 4.57 and 5 alike (one tensor per expert, rope_theta in both places where they look for it). Each choice was
read in the sources of both versions, models/*/modeling_*.py:

    dense                                     LlamaForCausalLM, with QK-norm Qwen3ForCausalLM
    softmax, no QK-norm, no shared expert     MixtralForCausalLM if weights are normalised and all layers MoE, else Qwen2Moe with a
                                              shared expert of zeros
    softmax, no QK-norm, shared experts       Qwen2MoeForCausalLM; where they are ungated its gate is made 1/2 and their output doubled
    softmax, QK-norm                          Qwen3MoeForCausalLM; shared experts become part of every routed one, exact because the
                                              chosen weights sum to 1
    sigmoid                                   Glm4MoeForCausalLM

What no class computes is refused, naming the key. scripts/formats/hf_reading.py is the way back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
EXPERT_NAMES = {  # gate, up and down projection of one expert
    "mixtral": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight", "block_sparse_moe.experts.{}.w2.weight"),
    "other": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight"),
}  # fmt: skip
HALF_GATE = 1e-20  # sigmoid of it is exactly 1/2; a true 0 becomes 0/0 in llama.cpp
ZERO_WIDTH = 32  # hidden units of a shared expert that is not there, where the class insists on one


class Layout(NamedTuple):
    """How a model is put into a class."""

    model_type: str  # a key of CLASSES
    shared: (
        str  # "none", "own" (as it is), "gated", "halved" (a gate of 1/2), "folded" (into the routed experts), "zeros"
    )

    @property
    def architecture(self) -> str:
        return CLASSES[self.model_type]


def choose_layout(config: ModelConfig) -> Layout:
    """The plainest class that computes exactly this model. ValueError, naming the key, if none does."""
    if not config.gated_ffn:
        raise _refusal("gated_ffn", "false", "every class there has gated networks of three matrices")
    if not config.moe_layers:
        return _dense_layout(config)
    if config.scoring_func == "sigmoid":
        return _sigmoid_layout(config)
    if config.router_bias_update_rate > 0:
        raise _refusal(
            "router_bias_update_rate",
            config.router_bias_update_rate,
            "a selection bias beside softmax scores is in no class (Glm4Moe has it beside sigmoid scores)",
        )
    return _qk_norm_layout(config) if config.use_qk_norm else _plain_layout(config)


def _dense_layout(config: ModelConfig) -> Layout:
    if config.use_qk_norm:
        return Layout("qwen3", "none")
    if config.hidden_size % config.num_attention_heads:
        raise _refusal(
            "num_attention_heads",
            config.num_attention_heads,
            f"Llama's configuration of transformers 5 wants a divisor of hidden_size: {config.hidden_size}",
        )
    return Layout("llama", "none")


def _sigmoid_layout(config: ModelConfig) -> Layout:
    if config.shared_expert_gate:
        raise _refusal(
            "shared_expert_gate", "true", "Glm4Moe, the class with sigmoid scores, does not gate its shared experts"
        )
    if _leading_dense_layers(config) is None:
        raise _refusal(
            "mlp_only_layers",
            config.mlp_only_layers,
            "in Glm4Moe, the class with sigmoid scores, only the first layers are dense",
        )
    if config.n_routed_experts == 1:
        raise _refusal("n_routed_experts", 1, "Glm4Moe, the class with sigmoid scores, needs two at least")
    return Layout("glm4_moe", "own" if config.n_shared_experts else "zeros")


def _qk_norm_layout(config: ModelConfig) -> Layout:
    if config.n_shared_experts == 0:
        return Layout("qwen3_moe", "none")
    if config.shared_expert_gate:
        raise _refusal(
            "shared_expert_gate", "true", "the class with such a gate, Qwen2Moe, has no QK-norm (use_qk_norm)"
        )
    if not config.norm_topk_prob:
        raise _refusal(
            "norm_topk_prob",
            "false",
            "with QK-norm and softmax scores, shared experts fit into the routed ones alone, whose weights must then sum to 1",
        )
    return Layout("qwen3_moe", "folded")


def _plain_layout(config: ModelConfig) -> Layout:
    every_layer = len(config.moe_layers) == config.num_hidden_layers
    mixtral = config.norm_topk_prob and every_layer and not config.attention_bias
    if config.n_shared_experts == 0 and mixtral:
        return Layout("mixtral", "none")
    if config.head_dim * config.num_attention_heads == config.hidden_size:  # transformers 4 insists
        if config.n_shared_experts == 0:
            return Layout("qwen2_moe", "zeros")
        return Layout("qwen2_moe", "gated" if config.shared_expert_gate else "halved")
    if mixtral and not config.shared_expert_gate:
        return Layout("mixtral", "folded")
    raise _refusal(
        "head_dim",
        config.head_dim,
        f"Qwen2Moe, the class for the rest, wants head_dim * num_attention_heads = hidden_size: {config.hidden_size}",
    )


def _leading_dense_layers(config: ModelConfig) -> int | None:
    """How many layers before the first MoE layer are dense; None if later ones are too."""
    first = config.moe_layers[0]
    return first if len(config.moe_layers) == config.num_hidden_layers - first else None


def _refusal(key: str, value: object, why: str) -> ValueError:
    return ValueError(
        f"model.{key}: {value}: no class of transformers computes this model ({why}); it stays usable here, with scripts.chat, "
        "scripts.serve and eval.evaluate"
    )


# ------------------------------------------------------------------------------------------------ config.json


def config_json(config: ModelConfig, layout: Layout, dtype: str, bos: int, eos: int, pad: int) -> dict:
    """What transformers reads as the class's configuration; token ids as in the tokenizer."""
    tree = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": min(config.initializer_range, 1.0),  # transformers 5 takes no larger one
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        **_rope_json(config, layout),
    }
    if layout.model_type != "qwen2_moe" and layout.model_type != "mixtral":
        tree["attention_bias"] = config.attention_bias
    if layout.model_type in ("qwen3", "qwen2_moe", "qwen3_moe"):
        tree |= {"use_sliding_window": False, "sliding_window": None}
    if config.moe_layers:
        tree |= _moe_json(config, layout)
    return tree


def _rope_json(config: ModelConfig, layout: Layout) -> dict:
    """transformers 4 reads rope_theta and rope_scaling, 5 reads rope_parameters."""
    scaling = None
    if config.rope_scaling is not None:
        original = config.rope_scaling["original_max_position_embeddings"]
        scaling = {
            key: float(value) for key, value in config.rope_scaling.items() if key != "rope_type" and value is not None
        }
        scaling["original_max_position_embeddings"] = int(original) if original == int(original) else original
        scaling["rope_type"] = "yarn"
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    tree = {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}
    if layout.model_type == "glm4_moe":  # which turns half of each head otherwise
        parameters["partial_rotary_factor"] = tree["partial_rotary_factor"] = 1.0
    return tree


def _moe_json(config: ModelConfig, layout: Layout) -> dict:
    width = config.moe_intermediate_size
    if layout.shared == "folded":
        width *= 1 + config.n_shared_experts
    tree = {
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": width,
        "output_router_logits": False,
    }
    if layout.model_type == "glm4_moe":
        return tree | {
            "n_routed_experts": config.n_routed_experts,
            "n_shared_experts": max(config.n_shared_experts, 1),
            "first_k_dense_replace": _leading_dense_layers(config),
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.routed_scaling_factor,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": config.use_qk_norm,
            "num_nextn_predict_layers": 0,
        }
    # Their balance loss is k times ours (FACTS of tests/model/families.py); it matters only to who trains on.
    tree["router_aux_loss_coef"] = (
        config.aux_loss_alpha / config.num_experts_per_tok if config.aux_loss_level != "none" else 0.0
    )
    if layout.model_type == "mixtral":
        del tree["moe_intermediate_size"]
        return tree | {
            "intermediate_size": width,
            "num_local_experts": config.n_routed_experts,
            "router_jitter_noise": config.router_jitter_noise,
            "sliding_window": None,
        }
    tree |= {
        "num_experts": config.n_routed_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.num_hidden_layers) if not config.is_moe_layer(layer)],
    }
    if layout.model_type == "qwen2_moe":
        shared = ZERO_WIDTH if layout.shared == "zeros" else config.n_shared_experts * config.moe_intermediate_size
        tree |= {"shared_expert_intermediate_size": shared, "qkv_bias": True}  # vLLM has these biases whatever it says
    return tree


# ------------------------------------------------------------------------------------------------ tensors


def to_tensors(config: ModelConfig, layout: Layout, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class's tensors, float32 on the CPU, from our model's state. ValueError where they have no place for one."""
    state = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    theirs = {"model.embed_tokens.weight": state["embed_tokens.weight"], "model.norm.weight": state["norm.weight"]}
    if not config.tie_word_embeddings:
        theirs["lm_head.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        parts = _attention_tensors(config, layout, own)
        parts |= _moe_tensors(config, layout, own) if config.is_moe_layer(layer) else _named(own, "mlp.")
        theirs |= {f"model.{prefix}{name}": tensor for name, tensor in parts.items()}
    return theirs


def _named(own: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in own.items() if name.startswith(prefix)}


def _attention_tensors(config: ModelConfig, layout: Layout, own: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = _named(own, "self_attn.") | {name: own[name] for name in own if name.endswith("layernorm.weight")}
    if layout.model_type in ("qwen2_moe", "glm4_moe"):
        bias = parts.pop("self_attn.o_proj.bias", None)
        if bias is not None and bias.any():
            raise _refusal(
                "attention_bias", "true", f"{layout.architecture} has no bias on o_proj, and this one is not zero"
            )
    if layout.model_type == "qwen2_moe" and not config.attention_bias:
        for name in ("q_proj", "k_proj", "v_proj"):
            parts[f"self_attn.{name}.bias"] = torch.zeros(own[f"self_attn.{name}.weight"].shape[0])
    return parts


def _moe_tensors(config: ModelConfig, layout: Layout, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Router, experts one by one, shared experts of one layer."""
    D = config.hidden_size
    gate, up = own["mlp.experts.gate_up_proj"].chunk(2, dim=1)  # (E, F, D) each
    down = own["mlp.experts.down_proj"]  # (E, D, F)
    if layout.model_type != "glm4_moe" and config.routed_scaling_factor != 1.0:  # which the others do not know
        down = down * config.routed_scaling_factor
    shared = [own.get(f"mlp.shared_experts.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")]
    if layout.shared == "folded":
        shared_gate, shared_up, shared_down = (tensor.expand(len(down), *tensor.shape) for tensor in shared)
        gate, up = torch.cat((gate, shared_gate), 1), torch.cat((up, shared_up), 1)
        down = torch.cat((down, shared_down), 2)
    elif layout.shared == "halved":
        shared[2] = 2 * shared[2]
    elif layout.shared == "zeros":
        width = ZERO_WIDTH if layout.model_type == "qwen2_moe" else config.moe_intermediate_size
        shared = [torch.zeros(width, D), torch.zeros(width, D), torch.zeros(D, width)]

    router = "block_sparse_moe.gate" if layout.model_type == "mixtral" else "mlp.gate"
    parts = {f"{router}.weight": own["mlp.gate.weight"]}
    names = EXPERT_NAMES.get(layout.model_type, EXPERT_NAMES["other"])
    for tensors, name in zip((gate, up, down), names, strict=True):
        parts |= {name.format(expert): tensor for expert, tensor in enumerate(tensors.unbind(0))}
    if layout.model_type == "glm4_moe":
        bias = own.get("mlp.gate.expert_bias")
        parts["mlp.gate.e_score_correction_bias"] = torch.zeros(len(down)) if bias is None else bias
    if layout.shared in ("own", "gated", "halved", "zeros"):
        place = "mlp.shared_experts" if layout.model_type == "glm4_moe" else "mlp.shared_expert"
        parts |= {
            f"{place}.{name}.weight": t for name, t in zip(("gate_proj", "up_proj", "down_proj"), shared, strict=True)
        }
    if layout.model_type == "qwen2_moe":
        weight = own.get("mlp.shared_expert_gate.weight")
        parts["mlp.shared_expert_gate.weight"] = torch.full((1, D), HALF_GATE) if weight is None else weight
    return parts
