"""The small parts every decoder has: RMSNorm and rotary positions, with YaRN for longer contexts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (arXiv 1910.07467).

    (..., dim) -> (..., dim), in autocast's dtype where it is on (cast once here, not once per matrix that reads it), else in
    the dtype that came in.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y = F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps)
        device = x.device.type
        return y.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin for rotary positions (arXiv 2104.09864), half-split layout as in transformers.

    forward(position_ids (B, T) or (T,) int64) -> cos, sin, each (..., T, head_dim) float32.
    With `scaling` ({rope_type: yarn, ...}) the frequencies and the attention factor are YaRN's (arXiv 2309.00071, section 3).
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: dict | None = None) -> None:
        super().__init__()
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (head_dim/2,)
        attention_factor = 1.0
        if scaling is not None:
            frequencies, attention_factor = _yarn(frequencies, head_dim, theta, scaling)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)  # (max_positions, head_dim)
        self.register_buffer("cos", angles.cos() * attention_factor, persistent=False)
        self.register_buffer("sin", angles.sin() * attention_factor, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]


def _yarn(frequencies: Tensor, head_dim: int, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """YaRN: slow rotations are interpolated by `factor`, fast ones kept, those between blended linearly."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(dimension_of(scaling.get("beta_slow") or 1.0)), head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return blended, attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (B, T, H, head_dim) by its positions; cos, sin broadcast over heads: (B or 1, T, 1, head_dim) float32.

    The result has the wider of the two dtypes.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)
