"""MoEFeedForward: the Mixture-of-Experts layer, read in one sitting.

    hidden (B, T, D) ──┬─> MoEGate ──> k experts and weights per token, balance loss
                       ├─> routed experts (only the chosen k run) ──┐
                       └─> shared experts (always run) ─────────────┴─> sum (B, T, D)

In training the differentiable path runs; in evaluation, without gradients, `moe_infer` does: tokens sorted by expert,
one grouped product per projection (on a CPU a loop over the experts' segments), nothing kept for a backward pass. Both
compute the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import FEW_ASSIGNMENTS, Experts
from model.feed_forward import FeedForward
from model.gate import MoEGate, Routing
from model.permutation import rows_of_tokens, sort_by_expert, sorted_weights, sum_by_token


class MoEFeedForward(nn.Module):
    """(B, T, D), token_mask (B, T) bool or None -> (B, T, D), aux_loss (). True in the mask: a real token, not padding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, F = config.hidden_size, config.moe_intermediate_size
        std, out_std = config.initializer_range, config.output_std
        self.gate = MoEGate(config)
        self.experts = Experts(
            config.n_routed_experts, D, F, config.hidden_act, config.gated_ffn, config.expert_backend, std, out_std
        )
        self.shared_experts = (
            FeedForward(D, config.n_shared_experts * F, config.hidden_act, config.gated_ffn, std, out_std)
            if config.n_shared_experts > 0
            else None
        )
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if config.shared_expert_gate else None
        if self.shared_expert_gate is not None:
            nn.init.normal_(self.shared_expert_gate.weight, std=std)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, routing = self.compute(hidden_states)
        return y, self.gate.auxiliary_loss(routing, token_mask)

    def compute(self, hidden_states: Tensor) -> tuple[Tensor, Routing]:
        """Output and routing, without side effects: this part may be recomputed in the backward pass."""
        B, T, D = hidden_states.shape
        routed_input = self._jitter(hidden_states)
        routing = self.gate.route(routed_input)
        flat = routed_input.reshape(B * T, D)
        topk_idx, topk_weight = routing.topk_idx.flatten(0, 1), routing.topk_weight.flatten(0, 1)  # (N, k)
        if self.training or torch.is_grad_enabled():
            y = self.experts(flat, topk_idx, topk_weight)
        else:
            y = self.moe_infer(flat, topk_idx.flatten(), topk_weight.reshape(-1, 1))
        y = y.view(B, T, D).to(hidden_states.dtype)
        if self.shared_experts is not None:
            y = y + self._shared_output(hidden_states)
        return y, routing

    def _shared_output(self, hidden_states: Tensor) -> Tensor:
        """The shared experts' (B, T, D); with `shared_expert_gate` each token says how much of it it wants (Qwen2-MoE)."""
        y = self.shared_experts(hidden_states)
        return y if self.shared_expert_gate is None else self.shared_expert_gate(hidden_states).sigmoid() * y

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        """The routed experts' weighted sum for inference: (N, D), (N*k,) int64, (N*k, 1) -> (N, D).

        Assignments are flat, token by token: entry a belongs to token a // k.
        """
        N = x.shape[0]
        if N == 0:
            return torch.zeros_like(x)
        k = flat_expert_indices.numel() // N
        topk_weight = flat_expert_weights.view(N, k)
        if N * k <= FEW_ASSIGNMENTS:
            return self.experts.run_few(x, flat_expert_indices.view(N, k), topk_weight).to(x.dtype)
        x_compute = x.to(self.experts.compute_dtype(x))
        # Sort the assignments by expert; order // k is then the token each sorted row comes from.
        align = self.experts.segment_alignment(x_compute, k)
        order, inverse, ends = sort_by_expert(flat_expert_indices, self.config.n_routed_experts, align)
        rows = rows_of_tokens(x_compute, order, k)  # (M', D): expert 0's tokens, expert 1's, ...
        weighted = self.experts.run_segments(rows, ends, sorted_weights(topk_weight, order))  # (M', D)
        return sum_by_token(weighted, inverse, k).to(x.dtype)  # (N, D): each token's k results, wherever they lie

    def _jitter(self, hidden_states: Tensor) -> Tensor:
        """Multiplicative noise U(1-j, 1+j) on what router and routed experts see, in training (Switch, section 2.2)."""
        j = self.config.router_jitter_noise
        if not self.training or j == 0:
            return hidden_states
        return hidden_states * torch.empty_like(hidden_states).uniform_(1 - j, 1 + j)
