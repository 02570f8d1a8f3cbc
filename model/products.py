"""Matrix products by the fastest library there is: torch's own, or oneDNN's in float32 on AMD processors.

torch multiplies float32 matrices on x86 with MKL, which holds back on processors that are not Intel's: on an EPYC with
AVX-512 it reaches 95 GFLOP/s a core, oneDNN (part of every torch) 140 to 215 (docs/decisions.md). The choice depends on the
processor alone, and `float32_library()` says what it is. Other dtypes, and CUDA, go to torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW_ROWS = 16  # below so many rows a product is bound by reading the weight, which MKL does as fast


_float32_library = ""  # asked for once a process; no functools.cache, which torch.compile looks behind


def float32_library() -> str:
    """`oneDNN`, or `MKL` or `torch`, which are torch's own choice: who multiplies float32 matrices on this processor."""
    global _float32_library
    if not _float32_library:
        cpuinfo = Path("/proc/cpuinfo")
        amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        own = "MKL" if torch.backends.mkl.is_available() else "torch"
        _float32_library = "oneDNN" if amd and wide and torch.backends.mkldnn.is_available() else own
    return _float32_library


def uses_onednn(x: Tensor) -> bool:
    """Whether x's products go to oneDNN, which compiles a kernel for every new shape: always so for bfloat16 on CPU."""
    if x.device.type != "cpu":
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and float32_library() == "oneDNN")


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, without autograd: (N, K), (M, K) -> (N, M). Either may be a transposed view."""
    if x.shape[0] >= FEW_ROWS and x.dtype == torch.float32 and uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, without autograd: (N, K), (K, M) -> (N, M). Either may be a transposed view."""
    return multiply(a, b.t())


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in place."""
    if a.dtype == torch.float32 and uses_onednn(a):
        out.copy_(product(a, b))
    else:
        torch.mm(a, b, out=out)


class _Linear(torch.autograd.Function):
    """x (N, K), weight (M, K) -> x weight^T (N, M), its products and its gradients' by `product`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad.t(), x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, differentiable: (..., K), (M, K), (M,) -> (..., M). F.linear, by whoever is faster at it."""
    few = x.numel() < FEW_ROWS * x.shape[-1]
    if few or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)  # torch.compile cannot trace oneDNN's operator
    if not uses_onednn(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _Linear.apply(rows, weight) if torch.is_grad_enabled() else multiply(rows, weight)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear by `linear`: (..., K) -> (..., M)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """autocast switched off, at no cost where it is off anyway (entering it takes longer than a small product)."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
