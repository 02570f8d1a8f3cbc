"""The feed-forward network: gated (SwiGLU and its kin, arXiv 2002.05202) or the plain two-matrix kind."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class FeedForward(nn.Module):
    """(..., D) -> (..., D): down(act(gate x) * up x), or down(act(up x)) with `gated` False."""

    def __init__(
        self, hidden_size: int, width: int, hidden_act: str, gated: bool, init_std: float, out_std: float
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
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
