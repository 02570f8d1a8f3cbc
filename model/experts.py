"""The routed experts as stacked tensors, and the two ways to run them: `loop` and `grouped`.

Tokens are sorted by expert (one stable sort), each expert sees its own contiguous segment, and the results are gathered
back and summed by weight. `loop` runs one small matrix product per segment and takes any dtype: it is the reference.
`grouped` runs all segments in one `torch.nn.functional.grouped_mm` per projection. Nothing here scatters floats: forward
and backward are gathers, so the same step gives the same bits twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.feed_forward import ACTIVATIONS

FEW_ASSIGNMENTS = 16  # up to so many (token, expert) pairs, gathering the experts' weights beats sorting tokens


class Permutation(NamedTuple):
    """Assignments (token, choice) sorted by expert; M = N*k assignments in M' >= M places, some of them padding."""

    order: (
        Tensor  # (M',) int64: the flat assignment (token * k + choice) at each sorted place, M where there is padding
    )
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


class Permute(torch.autograd.Function):
    """`rows_of_tokens`, differentiable: the gradient of a token is the sum over its k places, a gather too."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return rows_of_tokens(x, order, k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        N, D = inverse.numel() // ctx.k, grad.shape[-1]
        by_token = grad.index_select(0, inverse).view(N, ctx.k, D)
        return by_token.sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Weighted sum of each token's k expert outputs: sorted (M', D), weights (N, k) -> (N, D), summed in float32."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, inverse)
        return weighted_sum(y.index_select(0, inverse), weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, inverse = ctx.saved_tensors
        N, k = weights.shape
        wide = _wide(y)
        padded_weights = F.pad(weights.reshape(-1, 1).to(wide), (0, 0, 0, 1))  # the last, 0, is padding's
        grad_y = rows_of_tokens(grad, order, k).to(wide) * padded_weights.index_select(0, order)
        by_token = y.index_select(0, inverse).view(N, k, y.shape[-1]).to(wide)
        grad_weights = torch.bmm(by_token, grad.to(wide).unsqueeze(-1)).squeeze(-1)
        return grad_y.to(y.dtype), grad_weights.to(weights.dtype), None, None


def weighted_sum(by_token: Tensor, weights: Tensor) -> Tensor:
    """Expert outputs in token order (N*k, D), weights (N, k) -> (N, D), summed in float32 at least."""
    N, k = weights.shape
    wide = _wide(by_token)
    with torch.autocast(by_token.device.type, enabled=False):  # it would round the weights to bfloat16 again
        y = torch.bmm(weights.unsqueeze(1).to(wide), by_token.view(N, k, by_token.shape[-1]).to(wide))
    return y.squeeze(1).to(by_token.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` as `loop` or `grouped`, from device and compute dtype alone, never from a timing.

    grouped_mm is one kernel on CUDA from compute capability 9 in bfloat16, and the faster choice on CPU at every size
    measured; elsewhere on CUDA it is itself a loop with a host sync, no worse than ours.
    """
    if backend != "auto":
        return backend
    return "grouped" if dtype in (torch.float32, torch.bfloat16, torch.float16) else "loop"


class Experts(nn.Module):
    """E feed-forward networks in stacked tensors: `gate_up_proj` (E, 2F, D), gate rows first, `down_proj` (E, D, F).

    Without gating, `up_proj` (E, F, D) takes the place of the first. Every expert gets a gradient, zero when idle, so
    that ranks agree on which parameters have one.
    """

    def __init__(
        self,
        n_experts: int,
        hidden_size: int,
        width: int,
        hidden_act: str,
        gated: bool,
        backend: str,
        init_std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        self.n_experts, self.gated, self.backend = n_experts, gated, backend
        self.act = ACTIVATIONS[hidden_act]
        rows = 2 * width if gated else width
        into = nn.Parameter(torch.empty(n_experts, rows, hidden_size))
        self.register_parameter("gate_up_proj" if gated else "up_proj", into)
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, width))
        self.init_std, self.out_std = init_std, out_std
        self.reset_parameters()

    @property
    def into_proj(self) -> Tensor:
        """The first matrices, (E, 2F, D) when gated, else (E, F, D)."""
        return self.gate_up_proj if self.gated else self.up_proj

    def reset_parameters(self) -> None:
        nn.init.normal_(self.into_proj, std=self.init_std)
        nn.init.normal_(self.down_proj, std=self.out_std)

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
        """x (N, D), topk_idx (N, k) int64, topk_weight (N, k) -> (N, D): the weighted sum of each token's experts."""
        k = topk_idx.shape[1]
        x, into, down = self.in_compute_dtype(x)
        permutation = sort_by_expert(topk_idx.flatten(), self.n_experts, self.segment_alignment(x, k))
        rows = Permute.apply(x, permutation.order, permutation.inverse, k)  # (M', D)
        y = self.run_segments(rows, permutation.ends, into, down)
        return Combine.apply(y, topk_weight, permutation.order, permutation.inverse)

    def run_segments(self, rows: Tensor, ends: Tensor, into: Tensor, down: Tensor) -> Tensor:
        """Rows sorted by expert (M', D), segment ends (E,) int32 -> (M', D)."""
        if resolve_backend(self.backend, rows.device, rows.dtype) == "grouped" and self._grouped_mm_takes(rows, into):
            hidden = self._activate(F.grouped_mm(rows, into.transpose(-2, -1), offs=ends))
            return F.grouped_mm(hidden, down.transpose(-2, -1), offs=ends)
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        outputs = [
            F.linear(self._activate(F.linear(segment, w_into)), w_down)
            for segment, w_into, w_down in zip(rows.split(sizes), into.unbind(0), down.unbind(0), strict=True)
        ]
        return torch.cat(outputs)

    def run_few(self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
        """The same as `forward`, for a handful of tokens: gathers the chosen experts' weights, one batched product each."""
        x, into, down = self.in_compute_dtype(x)
        k = topk_idx.shape[1]
        chosen = topk_idx.flatten()
        rows = x.repeat_interleave(k, dim=0).unsqueeze(-1)  # (M, D, 1)
        hidden = self._activate(torch.bmm(into.index_select(0, chosen), rows).squeeze(-1))  # (M, F)
        y = torch.bmm(down.index_select(0, chosen), hidden.unsqueeze(-1)).squeeze(-1)  # (M, D)
        return weighted_sum(y, topk_weight)

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.act(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.act(gate) * up

    def in_compute_dtype(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input and weights in autocast's dtype where it is on (grouped_mm and own Functions are blind to it)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype
        return x.to(dtype), self.into_proj.to(dtype), self.down_proj.to(dtype)

    def segment_alignment(self, x: Tensor, k: int) -> int:
        """What each expert's segment is rounded up to, for x (N, D) in compute dtype; 1 is no padding.

        On CPU in bfloat16, oneDNN compiles a kernel for every new segment length: about a millisecond and some memory
        each, tens per step. Rounded lengths come back and are compiled once; the padding is about 1/16 of the rows, at most
        7 rows where segments are short.
        """
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return 1
        mean_length = x.shape[0] * k // self.n_experts
        return min(64, max(8, 1 << max(mean_length // 8, 1).bit_length() - 1))

    def _grouped_mm_takes(self, rows: Tensor, into: Tensor) -> bool:
        """Whether grouped_mm takes this dtype and these widths: strides must be multiples of 16 bytes."""
        if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16) or rows.shape[0] == 0:
            return False
        step = 16 // rows.element_size()
        return rows.shape[-1] % step == 0 and self.down_proj.shape[-1] % step == 0
