"""Precision by the processor's capability: bfloat16 autocast where it has the instructions, float32 elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Autocast = Callable[[], AbstractContextManager]


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as `bfloat16` or `float32`: from the device's capability alone, so that the same machine decides the same."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def autocast_for(precision: str, device: torch.device) -> Autocast:
    """A factory of the context that forward passes run in; `precision` is resolved."""
    if precision == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def compute_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
