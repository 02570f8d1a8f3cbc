"""Sorting tokens by expert and back: the permutation, and its three uses as gathers whose gradients are gathers.

Nothing here scatters floats, so there are no atomics, and the same step gives the same bits twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Permutation(NamedTuple):
    """Assignments (token, choice) sorted by expert; M = N*k assignments in M' >= M places, some of them padding."""

    order: Tensor  # (M',) int64: the flat assignment (token * k + choice) at each sorted place; M: padding
    inverse: Tensor  # (M,) int64: inverse[a] is the sorted place of flat assignment a
    ends: Tensor  # (E,) int32: where each expert's segment ends, its padding included


def sort_by_expert(flat_expert_indices: Tensor, n_experts: int, align: int = 1) -> Permutation:
    """(M,) int64 expert of each assignment -> Permutation, stable. Segments are padded to multiples of `align`; with 1
    there is no padding (M' = M) and no host sync."""
    M, device = flat_expert_indices.numel(), flat_expert_indices.device
    sorted_experts, order = flat_expert_indices.sort(stable=True)
    experts = torch.arange(n_experts, device=device)
    ends = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    places = torch.arange(M, device=device)
    if align > 1:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1))
        padded_sizes = (sizes + align - 1) // align * align
        padded_ends = padded_sizes.cumsum(0, dtype=torch.int32)
        shift = (padded_ends - padded_sizes) - (ends - sizes)  # how far padding moves each segment's start
        places = places + shift[sorted_experts]
        ends = padded_ends
    inverse = torch.empty_like(order)
    inverse[order] = places
    if align > 1:
        order = torch.full((int(ends[-1]),), M, device=device).index_copy_(0, places, order)
    return Permutation(order, inverse, ends)


def rows_of_tokens(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Each token's row at its sorted places: (N, D) -> (M', D). Padding repeats the last token; nobody reads its result."""
    return x.index_select(0, (order // k).clamp(max=x.shape[0] - 1))


def sum_by_token(y: Tensor, inverse: Tensor, k: int) -> Tensor:
    """The sum of each token's k rows, wherever they were sorted to: (M', D) -> (N, D), summed in float32 at least."""
    if y.device.type == "cpu" and y.dtype in (torch.float32, torch.bfloat16):
        return F.embedding_bag(inverse.view(-1, k), y, mode="sum")  # gathers and sums in one go: ten times faster
    return y.index_select(0, inverse).view(-1, k, y.shape[-1]).sum(1)  # where it is compiled, one kernel too


class Permute(torch.autograd.Function):
    """`rows_of_tokens`, differentiable: the gradient of a token is the sum over its k places, a gather too."""

    @staticmethod
    def forward(ctx, x: Tensor, permutation: Permutation, k: int) -> Tensor:
        ctx.save_for_backward(permutation.inverse)
        ctx.k = k
        return rows_of_tokens(x, permutation.order, k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_by_token(grad, *ctx.saved_tensors, ctx.k), None, None


class Combine(torch.autograd.Function):
    """`sum_by_token`, differentiable: the mirror of Permute. What padding gets as gradient is not 0: its weight is."""

    @staticmethod
    def forward(ctx, y: Tensor, permutation: Permutation, k: int) -> Tensor:
        ctx.save_for_backward(permutation.order)
        ctx.k = k
        return sum_by_token(y, permutation.inverse, k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return rows_of_tokens(grad, *ctx.saved_tensors, ctx.k), None, None


class SortWeights(torch.autograd.Function):
    """The weight of each sorted place, 0 where there is padding: (N, k) -> (M', 1)."""

    @staticmethod
    def forward(ctx, weights: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(permutation.inverse)
        ctx.shape = weights.shape
        return sorted_weights(weights, permutation.order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, *ctx.saved_tensors).view(ctx.shape), None


def sorted_weights(weights: Tensor, order: Tensor) -> Tensor:
    """(N, k) -> (M', 1): the weight of the assignment at each sorted place, 0 where there is padding."""
    return F.pad(weights.reshape(-1), (0, 1)).index_select(0, order).unsqueeze(1)
