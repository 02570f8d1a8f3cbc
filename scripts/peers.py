"""The models that the benchmark measures ours against, built at the same sizes: transformers' classes and MiniMind's.

They are heavy imports and no requirement of MiniMoE: each function imports what it needs and raises ValueError, naming
what is missing, where it is absent.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from model import ModelConfig, MoEForCausalLM
from model.flops import total_count

DENSE = "transformers Qwen3"
EXPERTS = {"eager": "transformers eager", "grouped_mm": "transformers grouped_mm"}
MINIMIND = "MiniMind"


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "transformers is not installed, and the peers of the benchmark are its classes: pip install -r "
            "requirements-dev.txt, or leave them out with --no-peers"
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def _shape(config: ModelConfig) -> dict:
    """What every transformers class calls the same."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def dense_peer(config: ModelConfig) -> nn.Module:
    """transformers' Qwen3 with the shape of a dense `config`."""
    transformers = _transformers()
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_shape(config), head_dim=config.head_dim, intermediate_size=config.intermediate_size)
    )


def moe_peer(config: ModelConfig, experts: str) -> nn.Module:
    """transformers' Qwen2-MoE with the shape of `config`: the class that has shared experts and softmax scores. It has no
    QK-norm, a little less work than a model of ours with it. `experts`: how its routed experts run, eager or grouped_mm."""
    transformers = _transformers()
    model = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_shape(config),
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=config.moe_intermediate_size,
            shared_expert_intermediate_size=config.n_shared_experts * config.moe_intermediate_size,
            num_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            qkv_bias=False,
            output_router_logits=False,
        )
    )
    model.set_experts_implementation(experts)
    return model


@torch.no_grad()
def copy_weights(ours: MoEForCausalLM, theirs: nn.Module) -> None:
    """Makes `moe_peer` compute what ours does: its shared experts are gated by sigmoid(0) = 1/2, so they are doubled.

    Ours must have no QK-norm, ungated shared experts and no dense layers.
    """
    state = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        name = name if name.startswith("lm_head") else f"model.{name}"
        name = name.replace("shared_experts", "shared_expert")
        state.pop(name).copy_(2 * weight if name.endswith("shared_expert.down_proj.weight") else weight)
    for name in list(state):
        assert name.endswith("shared_expert_gate.weight"), f"{name} got no weight"
        state[name].zero_()


def minimind_module(checkout: Path):
    """MiniMind's model file, imported from a checkout of github.com/jingyaogong/minimind. ValueError if it has none."""
    file = checkout / "model" / "model_minimind.py"
    if not file.is_file():
        raise ValueError(f"--minimind: {checkout} has no model/model_minimind.py; give a checkout of MiniMind")
    spec = importlib.util.spec_from_file_location("minimind_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimind_model"] = module
    spec.loader.exec_module(module)
    return module


def minimind_peer(config: ModelConfig, checkout: Path) -> nn.Module:
    """MiniMind's own MoE from a checkout of github.com/jingyaogong/minimind, its loop over experts unchanged."""
    module = minimind_module(checkout)
    options = {
        key: getattr(config, key)
        for key in (
            "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "rope_theta", "max_position_embeddings", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
        )
    }  # fmt: skip
    model = module.MiniMindForCausalLM(
        module.MiniMindConfig(
            **options, use_moe=True, intermediate_size=config.moe_intermediate_size, dropout=0.0, flash_attn=True
        )
    )
    count, ours = sum(p.numel() for p in model.parameters()), total_count(config).total
    if abs(count - ours) > 0.01 * ours:  # its config swallows keys it does not know
        raise ValueError(
            f"--minimind: {checkout} builds {count:,} parameters where ours has {ours:,}; use commit 83e52f6"
        )
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """A peer's training loss over (B, T) ids, its own way."""
    try:
        out = model(input_ids=ids, labels=ids, use_cache=False)
    except TypeError:
        out = model(input_ids=ids, use_cache=False)
    loss = getattr(out, "loss", None)
    if loss is None:
        loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss
