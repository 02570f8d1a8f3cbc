"""Muon for the matrices inside the layers, AdamW for everything else, as one optimizer (`train.optimizer: muon`).

    optimizer = Muon([{"params": matrices, "momentum": 0.95, "parts": 1}, {"params": others}], products=torch.bfloat16, lr=1e-3)

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) moves a matrix by its momentum with all singular values brought
near one. Scaled by 0.2 sqrt(max(rows, columns)) such a move has about the RMS of one of AdamW's, so that one learning rate and
one weight decay serve both (Moonlight, arXiv 2502.16982, section 2.2). It keeps one moment instead of two.

What counts as a matrix: each expert's own of the stacked tensors, and the gate and the up half of `gate_up_proj` each by itself.
Matrices of one shape go through Newton-Schulz together, whatever layer they are in: a step is a few batched products.

An expert that no token chose has a gradient of zero, and Muon moves it all the same: on along its momentum, and at full speed,
because the length of the momentum does not matter (AdamW's moves shrink instead). Only when the momentum is so small (1e-7) that
it no longer counts does the expert stand still: at 0.95 after about 230 idle steps for gradients of a norm of 0.001, 370 for 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, by Keller Jordan: as in torch.optim.Muon
ITERATIONS = 5
SMALLEST_NORM = 1e-7
MATCH_ADAMW = 0.2  # RMS of AdamW's moves, as measured in Moonlight


class Muon(torch.optim.AdamW):
    """Muon, with Nesterov momentum, for the groups that have `momentum` (and `parts`: how many matrices stand one above another
    in a parameter's last two dimensions); fused AdamW for the others.

    products: dtype of Newton-Schulz, bfloat16 or float32; weights and moments stay as they are. `found_inf` (float32 scalar on the
    parameters' device, see train.optim.step_if) other than 0 leaves weights and moments as they are, without a host sync.
    State of a matrix: `momentum_buffer`, in its shape and dtype.
    """

    def __init__(self, groups: list[dict], products: torch.dtype, **adamw) -> None:
        super().__init__(groups, fused=True, **adamw)
        self.products = products

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step of all groups."""
        assert closure is None, "a closure would be run by AdamW's part alone"
        groups = self.param_groups
        try:  # AdamW is to see its own groups
            self.param_groups = [group for group in groups if "momentum" not in group]
            super().step()
        finally:
            self.param_groups = groups
        alike = defaultdict(list)  # by shape of a matrix
        for group in groups:
            for parameter in group["params"] if "momentum" in group else ():
                if parameter.grad is not None:
                    rows, columns = parameter.shape[-2] // group["parts"], parameter.shape[-1]
                    alike[rows, columns].append((parameter, group))
        for shape, members in alike.items():
            self._step_alike(members, shape)

    def _step_alike(self, members: list[tuple[Tensor, dict]], shape: tuple[int, int]) -> None:
        """The step of (parameter, its group) whose matrices all have this shape."""
        updates = [self._update(*member).view(-1, *shape) for member in members]
        counts = [len(update) for update in updates]
        stacked = torch.cat(updates)
        del updates  # a second copy of every such matrix
        for (parameter, group), direction in zip(members, orthogonalise(stacked).split(counts), strict=True):
            moved = direction.to(parameter.dtype).reshape(parameter.shape) * (group["lr"] * adamw_scale(*shape))
            self._replace(parameter, parameter * (1 - group["lr"] * group["weight_decay"]) - moved)

    def _update(self, parameter: Tensor, group: dict) -> Tensor:
        """Nesterov's look ahead of the momentum, which takes in the gradient; in the parameter's shape, dtype as the products."""
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        moment = state["momentum_buffer"]
        self._replace(moment, moment.lerp(parameter.grad, 1 - momentum))
        return parameter.grad.lerp(moment, momentum).to(self.products)

    def _replace(self, old: Tensor, new: Tensor) -> None:
        """old = new, unless the step is refused."""
        found_inf = getattr(self, "found_inf", None)
        old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, R, C) -> (N, R, C), same dtype: U f(S) V^T of each matrix U S V^T, f(s) near 1 (0.68 to 1.2) for s from 0.002 to 1 of its
    Frobenius norm; a matrix of zeros stays one. Newton-Schulz, Keller Jordan's quintic: f is x -> a x + b x^3 + c x^5, five times."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)  # singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # of the shorter side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adamw_scale(rows: int, columns: int) -> float:
    """What an orthogonal (rows, columns) matrix, whose RMS is 1 / sqrt(max(rows, columns)), is multiplied with to move weights as far
    as AdamW does (Moonlight, arXiv 2502.16982, equation 4)."""
    return MATCH_ADAMW * math.sqrt(max(rows, columns))
