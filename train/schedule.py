"""The learning rate: a pure function of how many steps were taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.config import TrainConfig


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    A linear warm-up, then: `cosine` or `linear` from the peak to min_learning_rate x peak; `wsd` (warm-up, stable, decay:
    arXiv 2404.06395, section 4) holds the peak and falls linearly over the last decay_fraction of the steps; `constant`.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    if config.schedule == "cosine":
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "linear":
        return peak * (1 - (1 - low) * progress)
    if config.schedule == "wsd":
        decay_steps = max(min(round(steps * config.decay_fraction), steps - config.warmup_steps), 1)
        remaining = (steps - step) / decay_steps
        return peak * (low + (1 - low) * min(remaining, 1.0))
    assert config.schedule == "constant", f"unknown schedule {config.schedule}"
    return peak


def learning_rate_table(steps: int, config: TrainConfig, device: torch.device) -> Tensor:
    """(steps,) on the device: the learning rate of each step, float64 on a CPU and float32 elsewhere, as fused AdamW takes it.
    There, because only the device knows at once how many steps were taken: a step that the guard refuses does not move the
    schedule on."""
    rates = [learning_rate_at(step, steps, config) for step in range(steps)]
    return torch.tensor(rates, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
