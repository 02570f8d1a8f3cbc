"""Models of every shape for the tests of export and import, and processes with either transformers that look at their folders."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from model import ModelConfig
from tests import random_runs
from tests.configs import ROOT
from train.config import load_config

TRANSFORMERS_4 = ROOT / ".venv/transformers4"
SMALL = {**random_runs.SMALL, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# What no shipped config has, and the class it must become.
VARIANTS: dict[str, tuple[str, dict]] = {
    "untied": ("MixtralForCausalLM", {"n_shared_experts": 0, "tie_word_embeddings": False}),
    "gelu": ("MixtralForCausalLM", {"n_shared_experts": 0, "hidden_act": "gelu"}),
    "relu": ("LlamaForCausalLM", {"n_routed_experts": 0, "hidden_act": "relu"}),
    "one expert": (
        "MixtralForCausalLM",
        {"n_shared_experts": 0, "n_routed_experts": 1, "num_experts_per_tok": 1},
    ),
    "one of four": (
        "Qwen2MoeForCausalLM",
        {"n_shared_experts": 0, "num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
    "no shared, a dense layer": ("Qwen2MoeForCausalLM", {"n_shared_experts": 0, "mlp_only_layers": [1]}),
    "all layers dense": ("LlamaForCausalLM", {"first_k_dense_replace": 3}),
    "sigmoid, no shared": (
        "Glm4MoeForCausalLM",
        {"scoring_func": "sigmoid", "n_shared_experts": 0, "norm_topk_prob": False},
    ),
    "scaled": ("MixtralForCausalLM", {"n_shared_experts": 0, "routed_scaling_factor": 2.5}),
    "scaled and folded": ("Qwen3MoeForCausalLM", {"use_qk_norm": True, "routed_scaling_factor": 1.7, "n_shared_experts": 2}),
    "wide heads, folded": ("MixtralForCausalLM", {"head_dim": 12}),
    "wide heads, sigmoid": ("Glm4MoeForCausalLM", {"head_dim": 12, "scoring_func": "sigmoid"}),
    "wide heads, dense": ("LlamaForCausalLM", {"head_dim": 12, "n_routed_experts": 0}),
    "biases, QK-norm": ("Qwen3MoeForCausalLM", {"attention_bias": True, "use_qk_norm": True}),
    "biases, dense": ("LlamaForCausalLM", {"attention_bias": True, "n_routed_experts": 0}),
    "yarn": ("Qwen2MoeForCausalLM", {"rope_scaling": YARN}),
    "yarn, sigmoid": ("Glm4MoeForCausalLM", {"rope_scaling": {**YARN, "factor": 3.0}, "scoring_func": "sigmoid"}),
    "yarn, all keys": (
        "Qwen3ForCausalLM",
        {"n_routed_experts": 0, "use_qk_norm": True, "rope_scaling": {**YARN, "factor": 4, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3}},
    ),
}  # fmt: skip


def scaled_down(path: Path) -> dict:
    """The model keys of a shipped config with small sizes: what decides class and routing is as shipped."""
    model = load_config(path).model
    groups = model.num_attention_heads // model.num_key_value_heads
    sizes = {**SMALL, "num_key_value_heads": max(1, 4 // groups)}
    layers = [layer for layer in model.mlp_only_layers if layer < sizes["num_hidden_layers"]]
    first = min(model.first_k_dense_replace, 1)
    small = dataclasses.replace(model, **sizes, mlp_only_layers=layers, first_k_dense_replace=first)
    return {key: value for key, value in dataclasses.asdict(small).items() if key != "rope_scaling" or value}


def key_of(model_keys: dict) -> str:
    """Equal for models whose folders are equal: several shipped configs train the same model."""
    config = ModelConfig(**{**SMALL, **model_keys})
    without = {
        "aux_loss_level",
        "aux_loss_alpha",
        "router_z_loss_coef",
        "router_jitter_noise",
        "dropout",
        "initializer_range",
        "expert_backend",
    }
    if not config.moe_layers:
        without |= {
            "moe_intermediate_size",
            "n_routed_experts",
            "n_shared_experts",
            "shared_expert_gate",
            "num_experts_per_tok",
            "scoring_func",
        }
        without |= {
            "norm_topk_prob",
            "routed_scaling_factor",
            "router_bias_update_rate",
            "first_k_dense_replace",
            "mlp_only_layers",
        }
    return json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in without}, sort_keys=True)


def in_transformers(version: int, jobs: list[dict], folder: Path) -> None:
    """One process with transformers 4 or 5 does all jobs (see transformers_worker.py)."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["PYTHONPATH"] = str(TRANSFORMERS_4) if version == 4 else ""
    path = folder / f"jobs-{version}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("transformers_worker.py")), str(path)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
