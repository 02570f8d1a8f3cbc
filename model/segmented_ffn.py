"""All experts' feed-forward networks over tokens sorted by expert, on a CPU: forward and gradients by hand.

torch's grouped_mm is a loop over experts there too, but one that autograd surrounds with copies: weights cast as whole
stacks, their gradients transposed, concatenated and cast back. Those cost more than the products (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.feed_forward import Activation
from model.products import product, product_into

DTYPES = (torch.float32, torch.bfloat16)


def segmented_ffn(
    rows: Tensor, weights: Tensor, into: Tensor, down: Tensor, sizes: list[int], activation: Activation
) -> Tensor:
    """`SegmentedFFN`, as a function."""
    return SegmentedFFN.apply(rows, weights, into, down, sizes, activation)


class SegmentedFFN(torch.autograd.Function):
    """rows (M', D) in compute dtype, weights (M', 1) float32, into (E, 2F, D) or (E, F, D) and down (E, D, F) in their own
    dtype, the sizes of the E segments -> (M', D) in the rows' dtype, each row times its weight.

    An expert's matrices are cast when its turn comes, and its gradients written where they belong while they are in cache.
    With y = down (w a), the gradient of the weight w is <a, down^T grad y>, so that y need not be kept for it (SonicMoE,
    arXiv 2512.14080).
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, weights: Tensor, into: Tensor, down: Tensor, sizes: list[int], activation: Activation
    ) -> Tensor:
        y = torch.empty_like(rows)
        hiddens = []
        by_expert = rows.split(sizes), weights.split(sizes), y.split(sizes), into.unbind(0), down.unbind(0)
        for row, weight, place, w_into, w_down in zip(*by_expert, strict=True):
            if not len(row):
                continue
            hidden = product(row, w_into.to(row.dtype).t())  # (n, 2F)
            product_into(place, activation(hidden, weight), w_down.to(row.dtype).t())
            hiddens.append(hidden)
        ctx.save_for_backward(rows, weights, into, down, *hiddens)
        ctx.sizes, ctx.activation = sizes, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        rows, weights, into, down, *hiddens = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (rows, weights, into, down)]
        by_expert = [tensor.split(ctx.sizes) for tensor in (grad, rows, weights, *grads[:2])]
        by_expert += [tensor.unbind(0) for tensor in (into, down, *grads[2:])]
        hidden = iter(hiddens)
        for g, row, weight, to_row, to_weight, w_into, w_down, to_into, to_down in zip(*by_expert, strict=True):
            if not len(row):
                to_into.zero_()
                to_down.zero_()
                continue
            activated, backward = ctx.activation.with_backward(next(hidden), weight)
            to_down.copy_(product(g.t(), activated))
            grad_hidden, grad_weight = backward(product(g, w_down.to(g.dtype)))
            to_weight.copy_(grad_weight)
            to_into.copy_(product(grad_hidden.t(), row))
            product_into(to_row, grad_hidden, w_into.to(g.dtype))
        return *grads, None, None
