"""Cross-entropy straight from hidden states, in chunks: the (N, V) logits never exist at once.

The gradient is made chunk by chunk during the forward pass, so nothing is recomputed: three matrix products per chunk,
as many as the plain way, and peak memory of one chunk instead of the vocabulary times the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.products import product

CHUNK_ROWS = {"cpu": 1024, "cuda": 8192}  # rows of logits alive at once; on a GPU a chunk must be worth its launches
IGNORE = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies: hidden (N, D), head (V, D), targets (N,) int64 -> () float32 (float64 for float64)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), device=hidden.device, dtype=wide)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_head = torch.zeros(head.shape, device=head.device, dtype=wide) if with_gradient else None
        chunk_rows = CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cuda"])
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            target = targets[rows]
            learned = (target != IGNORE).to(wide).unsqueeze(1)
            safe_target = target.clamp(min=0).unsqueeze(1)
            logits = product(hidden[rows], head.t()).to(wide)
            logits -= logits.amax(-1, keepdim=True)
            of_target = logits.gather(1, safe_target)
            exponentials = logits.exp_()
            normaliser = exponentials.sum(-1, keepdim=True)
            total += ((normaliser.log() - of_target) * learned).sum()
            if with_gradient:
                grad_logits = exponentials.mul_(learned / normaliser)  # softmax, 0 where there is no target
                grad_logits.scatter_add_(1, safe_target, -learned)
                grad_logits = grad_logits.to(hidden.dtype)
                grad_hidden[rows] = product(grad_logits, head)
                grad_head += product(grad_logits.t(), hidden[rows])
        if with_gradient:
            ctx.save_for_backward(grad_hidden, grad_head)
            ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype), None, None


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats, float32, over the targets that are not -100.

    hidden (N, D), head (V, D), targets (N,) int64. Under autocast the products run in its dtype, the rest in float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, head, targets, with_gradient)
