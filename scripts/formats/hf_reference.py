"""What transformers computes from an exported folder, written out plainly and on its own: the export is checked against it.

Reads config.json and model.safetensors as transformers does (models/*/modeling_*.py of 4.57 and 5, which agree), and nothing of
this project: no import of model/, no knowledge of how the folder was made. Everything is float64 but the rotary tables, which
are float32 there too; so two experts with nearly equal scores are not told apart by rounding. Slow: one row, one expert at a time.

    logits = Reference(Path("OUT")).logits(ids)       ids (T,) int64 -> (T, V) float64
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}  # ACT2FN; gelu is the exact one


class Reference:
    """A folder of one of the six classes of scripts/formats/hf_folder.py. KeyError or ValueError where a file lacks something."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / "model.safetensors")
        self.kind = self.config["model_type"]
        self.read: set[str] = set()  # names of the tensors that a forward pass has used

    def logits(self, ids: Tensor) -> Tensor:
        """(T,) int64 -> (T, V) float64, from the files alone."""
        config = self.config
        cos, sin = self._rotary(len(ids))
        x = self._tensor("model.embed_tokens.weight")[ids]  # (T, D)
        for layer in range(config["num_hidden_layers"]):
            place = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, place + "input_layernorm"), place + "self_attn.", cos, sin)
            normed = self._norm(x, place + "post_attention_layernorm")
            x = x + (
                self._experts(normed, place) if self._has_experts(layer) else self._network(normed, place + "mlp.")
            )
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        return self._norm(x, "model.norm") @ self._tensor(head).T

    def _tensor(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name].double()

    def _norm(self, x: Tensor, place: str) -> Tensor:
        return (
            x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self._tensor(place + ".weight")
        )

    def _linear(self, x: Tensor, place: str, bias: bool = False) -> Tensor:
        y = x @ self._tensor(place + ".weight").T
        return y + self._tensor(place + ".bias") if bias else y

    # -------------------------------------------------------------------------------------------- attention

    def _attention(self, x: Tensor, place: str, cos: Tensor, sin: Tensor) -> Tensor:
        config, T = self.config, len(x)
        d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        bias = config.get("attention_bias", False) or config.get("qkv_bias", False)
        q, k, v = (self._linear(x, place + name, bias).view(T, -1, d) for name in ("q_proj", "k_proj", "v_proj"))
        if self.kind in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
            q, k = self._norm(q, place + "q_norm"), self._norm(k, place + "k_norm")
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        groups = config["num_attention_heads"] // config["num_key_value_heads"]
        unseen = torch.ones(T, T, dtype=torch.bool).triu(1)
        heads = []
        for head in range(config["num_attention_heads"]):
            scores = q[:, head] @ k[:, head // groups].T / math.sqrt(d)
            heads.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, head // groups])
        o_bias = config.get("attention_bias", False) and self.kind != "glm4_moe"
        return self._linear(torch.cat(heads, -1), place + "o_proj", o_bias)

    def _rotary(self, T: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (T, 1, head_dim), as both versions of transformers find them in the file; ValueError if those differ."""
        config = self.config
        old = {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
        if "partial_rotary_factor" in config:
            old["partial_rotary_factor"] = config["partial_rotary_factor"]
        rope = config["rope_parameters"]
        if rope != old:
            raise ValueError(f"config.json: rope_parameters {rope} and, for transformers 4, {old} are not the same")
        if self.kind == "glm4_moe" and rope.get("partial_rotary_factor") != 1.0:
            raise ValueError("config.json: glm4_moe without partial_rotary_factor 1.0 turns half of each head")
        d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        powers = rope["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
        frequencies, factor = 1.0 / powers, 1.0
        if rope["rope_type"] == "yarn":
            frequencies, factor = _yarn(powers, d, rope)
        angles = torch.outer(torch.arange(T).float(), frequencies)
        angles = torch.cat((angles, angles), -1)[:, None]
        return (angles.cos() * factor).double(), (angles.sin() * factor).double()

    # -------------------------------------------------------------------------------------------- feed-forward

    def _network(
        self, x: Tensor, place: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> Tensor:
        gate, up, down = (place + name for name in names)
        act = ACTIVATIONS[self.config["hidden_act"]]
        return self._linear(act(self._linear(x, gate)) * self._linear(x, up), down)

    def _has_experts(self, layer: int) -> bool:
        config = self.config
        if self.kind == "glm4_moe":
            return layer >= config["first_k_dense_replace"]
        if self.kind in ("qwen2_moe", "qwen3_moe"):
            step = config["decoder_sparse_step"]
            return layer not in config["mlp_only_layers"] and config["num_experts"] > 0 and (layer + 1) % step == 0
        return self.kind == "mixtral"

    def _experts(self, x: Tensor, place: str) -> Tensor:
        place += "block_sparse_moe." if self.kind == "mixtral" else "mlp."
        names = ("w1", "w3", "w2") if self.kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        chosen, weights = self._routed(self._linear(x, place + "gate"), place)
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, rank = torch.where(chosen == expert)
            y[token] += weights[token, rank, None] * self._network(x[token], f"{place}experts.{expert}.", names)
        if self.kind == "glm4_moe":
            y += self._network(x, place + "shared_experts.")
        if self.kind == "qwen2_moe":
            y += self._linear(x, place + "shared_expert_gate").sigmoid() * self._network(x, place + "shared_expert.")
        return y

    def _routed(self, logits: Tensor, place: str) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights, (T, k) each."""
        config = self.config
        if self.kind == "glm4_moe":
            scores = logits.sigmoid()
            bias = self._tensor(place + "gate.e_score_correction_bias")
            chosen = (scores + bias).topk(config["num_experts_per_tok"], -1).indices
        else:
            scores = logits.softmax(-1)
            chosen = scores.topk(config["num_experts_per_tok"], -1).indices
        weights = scores.gather(-1, chosen)
        if self.kind == "mixtral" or config["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * (config["routed_scaling_factor"] if self.kind == "glm4_moe" else 1.0)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _yarn(powers: Tensor, d: int, rope: dict) -> tuple[Tensor, float]:
    """transformers' _compute_yarn_parameters, in its own order of operations."""

    def dimension_of(rotations: float) -> float:
        ratio = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return d * math.log(ratio) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(dimension_of(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_of(rope.get("beta_slow") or 1)), d - 1)
    high = high + 0.001 if high == low else high
    kept = 1 - ((torch.arange(d // 2).float() - low) / (high - low)).clamp(0, 1)
    factor, attention_factor = rope["factor"], rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, attention_factor
