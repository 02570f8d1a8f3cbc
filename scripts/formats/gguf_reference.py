"""What llama.cpp computes from a GGUF file, written out plainly from the file alone: the judge of what was exported.

It follows llama.cpp's sources (src/models/{llama,qwen3,qwen2moe,glm4-moe}.cpp, build_moe_ffn of src/llama-graph.cpp, the rotary
positions of ggml-cpu/ops.cpp) down to its names and defaults, and imports nothing of model/. Slow: experts run token by token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.formats.gguf_file import GGUFFile

SMALLEST_WEIGHT_SUM = 6.103515625e-5  # llama.cpp's lower bound before it divides by the sum of the chosen weights


@torch.no_grad()
def logits_of(file: GGUFFile, ids: list[int]) -> Tensor:
    """Logits (T, V) float32 of a text, all its tokens at once."""
    return _Reference(file).logits(torch.tensor(ids))


class _Reference:
    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.metadata["general.architecture"]
        self.eps = self.value("attention.layer_norm_rms_epsilon")

    def value(self, key: str, default: object = None) -> object:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def logits(self, ids: Tensor) -> Tensor:
        embedding = self.file.tensor("token_embd.weight")
        x = embedding[ids]  # (T, D)
        for layer in range(self.value("block_count")):
            at = f"blk.{layer}."
            x = x + self.attention(self.norm(x, f"{at}attn_norm.weight"), at)
            second = "post_attention_norm" if self.architecture == "glm4moe" else "ffn_norm"
            normed = self.norm(x, f"{at}{second}.weight")
            dense = self.value("expert_count", 0) == 0 or layer < self.value("leading_dense_block_count", 0)
            x = x + (self.network(normed, at, "") if dense else self.experts(normed, at))
        head = self.file.tensor("output.weight")
        return self.norm(x, "output_norm.weight") @ (embedding if head is None else head).t()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.file.tensor(name)

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.file.tensor(f"{name}.bias")
        y = x @ self.file.tensor(f"{name}.weight").t()
        return y if bias is None else y + bias

    # attention

    def attention(self, x: Tensor, at: str) -> Tensor:
        T, heads, kv_heads = x.shape[0], self.value("attention.head_count"), self.value("attention.head_count_kv")
        q, k, v = (
            self.linear(x, f"{at}attn_{part}").view(T, n, -1)
            for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if self.file.tensor(f"{at}attn_q_norm.weight") is not None:
            q, k = self.norm(q, f"{at}attn_q_norm.weight"), self.norm(k, f"{at}attn_k_norm.weight")
        q, k = self.rotated(q), self.rotated(k)
        outputs = []
        for head in range(heads):
            own = head * kv_heads // heads
            scores = q[:, head] @ k[:, own].t() / math.sqrt(self.value("attention.key_length"))
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            outputs.append(scores.softmax(-1) @ v[:, own])
        y = torch.cat(outputs, dim=-1) @ self.file.tensor(f"{at}attn_output.weight").t()
        # glm4moe's graph adds no bias here, whatever the file holds
        bias = self.file.tensor(f"{at}attn_output.bias") if self.architecture == "llama" else None
        return y if bias is None else y + bias

    def rotated(self, x: Tensor) -> Tensor:
        """(T, heads, head_dim): neighbours are turned together in `llama`, halves in the others."""
        T, _, n = x.shape
        angles, scale = self.rotation(n)
        angles = torch.arange(T, dtype=torch.float32).unsqueeze(1) * angles  # (T, n/2)
        cos, sin = angles.cos().unsqueeze(1) * scale, angles.sin().unsqueeze(1) * scale
        if self.architecture == "llama":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        a, b = x[..., : n // 2], x[..., n // 2 :]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def rotation(self, n: int) -> tuple[Tensor, float]:
        """Angle per position of each pair (n/2,), and what cos and sin are multiplied by (ggml's rope_yarn)."""
        base = self.value("rope.freq_base")
        angles = base ** (-torch.arange(0, n, 2, dtype=torch.float32) / n)
        if self.value("rope.scaling.type") != "yarn":
            return angles, 1.0
        factor, original = self.value("rope.scaling.factor"), self.value("rope.scaling.original_context_length")

        def pair_of(rotations: float) -> float:
            return n * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(pair_of(32.0))), min(n - 1, math.ceil(pair_of(1.0)))
        kept = 1 - ((torch.arange(n // 2) - low) / max(0.001, high - low)).clamp(0, 1)
        scale = self.value("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
        return angles / factor * (1 - kept) + angles * kept, scale

    # networks

    def network(self, x: Tensor, at: str, suffix: str) -> Tensor:
        gate, up = (self.linear(x, f"{at}ffn_{part}{suffix}") for part in ("gate", "up"))
        return self.linear(F.silu(gate) * up, f"{at}ffn_down{suffix}")

    def experts(self, x: Tensor, at: str) -> Tensor:
        scores = x @ self.file.tensor(f"{at}ffn_gate_inp.weight").t()  # (T, E)
        is_sigmoid = self.architecture == "glm4moe" and self.value("expert_gating_func", 2) == 2
        scores = scores.sigmoid() if is_sigmoid else scores.softmax(-1)
        bias = self.file.tensor(f"{at}exp_probs_b.bias")
        chosen = (scores if bias is None else scores + bias).topk(self.value("expert_used_count")).indices  # (T, k)
        weights = scores.gather(-1, chosen)
        if self.architecture == "glm4moe" and self.value("expert_weights_norm", False):
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=SMALLEST_WEIGHT_SUM)
        scale = self.value("expert_weights_scale", 0.0) if self.architecture == "glm4moe" else 0.0
        weights = weights * (scale or 1.0)
        gate, up, down = (self.file.tensor(f"{at}ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
        y = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, weight in zip(chosen[token].tolist(), weights[token]):
                hidden = F.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
                y[token] += weight * (down[expert] @ hidden)
        return y + self.shared(x, at)

    def shared(self, x: Tensor, at: str) -> Tensor:
        y = self.network(x, at, "_shexp")
        if self.architecture != "qwen2moe":
            return y
        gate = x @ self.file.tensor(f"{at}ffn_gate_inp_shexp.weight").unsqueeze(1)  # (T, 1)
        return y * (F.silu(gate) / gate)  # its sigmoid: not a number at 0
