"""The routed experts as stacked tensors, and the two ways to run them: `loop` and `grouped`.

Tokens are sorted by expert (one stable sort), each expert sees its own contiguous segment, and the results are gathered
back and summed. `loop` runs one small matrix product per segment and takes any dtype: it is the reference. `grouped` runs
all segments in one product per projection: `torch.nn.functional.grouped_mm`, or on a CPU `model/segmented_ffn.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import segmented_ffn
from model.feed_forward import Activation
from model.permutation import Combine, Permute, SortWeights, sort_by_expert
from model.products import multiply, uses_onednn

FEW_ASSIGNMENTS = 16  # up to so many (token, expert) pairs, one small product each beats sorting tokens
SHORT_SEGMENT = 8  # rows: the shortest segments of experts that are worth rounding up


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` as `loop` or `grouped`, from device and compute dtype alone, never from a timing.

    grouped_mm is one kernel on CUDA from compute capability 9 in bfloat16; elsewhere on CUDA it is itself a loop with a host
    sync, no worse than ours. On CPU `grouped` is model/segmented_ffn.py: 6 to 13 % faster than `loop` in float32, no faster in
    bfloat16 (docs/results.md).
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
        self.activation = Activation(hidden_act, gated)
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
        """x (N, D), topk_idx (N, k) int64, topk_weight (N, k) -> (N, D): the weighted sum of each token's experts.

        The weights go in between the two products, where they are cheapest: down(w * h) = w * down(h).
        """
        k = topk_idx.shape[1]
        x = x.to(self.compute_dtype(x))
        permutation = sort_by_expert(topk_idx.flatten(), self.n_experts, self.segment_alignment(x, k))
        rows = Permute.apply(x, permutation, k)  # (M', D)
        weights = SortWeights.apply(topk_weight, permutation)  # (M', 1)
        return Combine.apply(self.run_segments(rows, permutation.ends, weights), permutation, k)

    def run_segments(self, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
        """Rows sorted by expert (M', D), segment ends (E,) int32 -> (M', D), times weights (M', 1) float32."""
        into, down = self.into_proj, self.down_proj
        if resolve_backend(self.backend, rows.device, rows.dtype) == "grouped":
            if rows.device.type == "cpu" and rows.dtype in segmented_ffn.DTYPES:
                return segmented_ffn.segmented_ffn(rows, weights, into, down, _sizes(ends), self.activation)
            if self._grouped_mm_takes(rows):
                into, down = into.to(rows.dtype), down.to(rows.dtype)
                hidden = self.activation(F.grouped_mm(rows, into.transpose(-2, -1), offs=ends), weights)
                return F.grouped_mm(hidden, down.transpose(-2, -1), offs=ends)
        sizes = _sizes(ends)
        segments = zip(
            rows.split(sizes),
            weights.split(sizes),
            into.to(rows.dtype).unbind(0),
            down.to(rows.dtype).unbind(0),
            strict=True,
        )
        return torch.cat(
            [F.linear(self.activation(F.linear(segment, w_into), w), w_down) for segment, w, w_into, w_down in segments]
        )

    def run_few(self, x: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
        """The same as `forward`, for a handful of tokens: no sorting, one small product per assignment."""
        k = topk_idx.shape[1]
        if x.device.type == "cpu":  # each expert's weights are read where they lie; `generate` keeps autocast off them
            rows = x.to(self.down_proj.dtype).split(1)  # N of (1, D)
            experts = topk_idx.flatten().tolist()
            hidden = [multiply(rows[a // k], self.into_proj[expert]) for a, expert in enumerate(experts)]
            hidden = self.activation(torch.cat(hidden)).split(1)  # M of (1, F)
            y = torch.cat([multiply(h, self.down_proj[expert]) for h, expert in zip(hidden, experts, strict=True)])
        else:  # the chosen experts' weights are gathered: the host need not know which
            x = x.to(self.compute_dtype(x))
            rows = x.repeat_interleave(k, dim=0).unsqueeze(-1)  # (M, D, 1)
            into, down = (w.index_select(0, topk_idx.flatten()).to(x.dtype) for w in (self.into_proj, self.down_proj))
            hidden = self.activation(torch.bmm(into, rows).squeeze(-1))  # (M, F)
            y = torch.bmm(down, hidden.unsqueeze(-1)).squeeze(-1)  # (M, D)
        return weighted_sum(y, topk_weight)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """autocast's dtype where it is on (grouped_mm and own Functions are blind to it), else the weights'."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype

    def segment_alignment(self, x: Tensor, k: int) -> int:
        """What each expert's segment is rounded up to, for x (N, D) in compute dtype; 1 is no padding.

        On CPU oneDNN compiles a kernel for every new segment length: about half a millisecond and some memory each, tens
        per step. Rounded lengths come back and are compiled once; the padding is 3 % of the rows from a mean of 128, 20 % at
        16. Segments of a few rows, as in generation, have few lengths anyway.
        """
        mean_length = x.shape[0] * k // self.n_experts
        if mean_length < SHORT_SEGMENT or not uses_onednn(x):
            return 1
        return max(SHORT_SEGMENT, min(64, 1 << (mean_length // 16).bit_length() >> 1))

    def _grouped_mm_takes(self, rows: Tensor) -> bool:
        """Whether grouped_mm takes this dtype and these widths: strides must be multiples of 16 bytes."""
        if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16) or rows.shape[0] == 0:
            return False
        step = 16 // rows.element_size()
        return rows.shape[-1] % step == 0 and self.down_proj.shape[-1] % step == 0


def weighted_sum(by_token: Tensor, weights: Tensor) -> Tensor:
    """Expert outputs in token order (N*k, D), weights (N, k) float32 -> (N, D), summed in float32 at least."""
    weighted = by_token.view(*weights.shape, -1) * weights.unsqueeze(-1)  # (N, k, D)
    return weighted.sum(1).to(by_token.dtype)


def _sizes(ends: Tensor) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
