"""The feed-forward network: gated (SwiGLU and its kin, arXiv 2002.05202) or the plain two-matrix kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.products import Linear

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
DERIVATIVES = {  # (gradient of the result, argument) -> gradient of the argument
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


class Activation:
    """What stands between an expert's two products: act(gate) * up of (M, 2F), gate columns first, or act of (M, F) where
    `gated` is False; times weights (M, 1) float32. -> (M, F), in the dtype of `hidden`."""

    def __init__(self, hidden_act: str, gated: bool) -> None:
        self.hidden_act, self.gated = hidden_act, gated  # the name, because operators cannot be pickled

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.hidden_act]

    def __call__(self, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            activated = self.act(gate) * up
        else:
            activated = self.act(hidden)
        return activated if weights is None else (activated * weights).to(hidden.dtype)

    def with_backward(
        self, hidden: Tensor, weights: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The result, and a function from its gradient (M, F) to those of `hidden` and `weights`. No autograd here."""
        gate, up = hidden.chunk(2, dim=-1) if self.gated else (hidden, None)
        acted = self.act(gate)
        activated = acted * up if self.gated else acted

        derivative = DERIVATIVES[self.hidden_act]

        def backward(grad: Tensor) -> tuple[Tensor, Tensor]:
            grad_weights = (activated * grad).sum(-1, keepdim=True, dtype=weights.dtype)
            grad = (grad * weights).to(hidden.dtype)
            if not self.gated:
                return derivative(grad, hidden), grad_weights
            return torch.cat((derivative(grad * up, gate), grad * acted), dim=-1), grad_weights

        return (activated * weights).to(hidden.dtype), backward


class FeedForward(nn.Module):
    """(..., D) -> (..., D): down(act(gate x) * up x), or down(act(up x)) with `gated` False."""

    def __init__(
        self, hidden_size: int, width: int, hidden_act: str, gated: bool, init_std: float, out_std: float
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False) if gated else None
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)
        self.act = ACTIVATIONS[hidden_act]
        self.init_std, self.out_std = init_std, out_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gate_proj is not None:
            nn.init.normal_(self.gate_proj.weight, std=self.init_std)
        nn.init.normal_(self.up_proj.weight, std=self.init_std)
        nn.init.normal_(self.down_proj.weight, std=self.out_std)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        hidden = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up  # (..., F)
        return self.down_proj(hidden)
