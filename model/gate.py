"""MoEGate: which k experts each token goes to, with what weights, and what keeps the choice balanced.

Everything here is float32 (float64 for gradient checks), whatever the autocast: a router in bfloat16 flips choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import balance
from model.config import ModelConfig
from model.products import linear, without_autocast


class Routing(NamedTuple):
    """What the router decided for (B, T) tokens; B and T are kept, because a row is a sequence to the balance loss."""

    topk_idx: Tensor  # (B, T, k) int64, best first
    topk_weight: Tensor  # (B, T, k) float32
    logits: Tensor  # (B, T, E) float32
    scores: Tensor  # (B, T, E) float32, softmax or sigmoid of the logits, before any bias


class MoEGate(nn.Module):
    """Dropless token-choice router: (B, T, D) -> topk_idx (N, k) int64, topk_weight (N, k), aux_loss ().

    Scores are softmax or sigmoid of a linear map; the k best are chosen (by score + bias where the auxiliary-loss-free
    bias is on), weighted by their scores alone, normalised if `norm_topk_prob`, times `routed_scaling_factor`.
    A token's choice depends on that token only, so the layer is causal and independent of the batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        bias = torch.zeros(E) if config.router_bias_update_rate > 0 else None
        self.register_buffer("expert_bias", bias)  # float32 always: bfloat16 would stall it

        # Set from outside: sums a count tensor over ranks (level `global`); None means one process.
        self.reduce_counts: Callable[[Tensor], Tensor] | None = None
        # Since the last reset, in training: local counts, and the window of level `global`.
        self.register_buffer("tokens_per_expert", torch.zeros(E), persistent=False)
        self.register_buffer("global_window", torch.zeros(E), persistent=False)
        self.register_buffer("loss_sums", torch.zeros(4), persistent=False)  # balance, z, entropy, tokens (see _record)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.config.initializer_range)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        routing = self.route(hidden_states)
        aux_loss = self.auxiliary_loss(routing, token_mask)
        return routing.topk_idx.flatten(0, 1), routing.topk_weight.flatten(0, 1), aux_loss

    def route(self, hidden_states: Tensor) -> Routing:
        """The choice alone: a pure function of the hidden states (B, T, D), safe to recompute."""
        config = self.config
        with without_autocast(hidden_states.device):
            wide = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
            logits = linear(hidden_states.to(wide), self.weight.to(wide))
            scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
            choose_by = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
            topk_idx = choose_by.topk(config.num_experts_per_tok, dim=-1, sorted=True).indices
            topk_weight = scores.gather(-1, topk_idx)
            if config.norm_topk_prob:
                topk_weight = topk_weight / (topk_weight.sum(-1, keepdim=True) + 1e-20)
            return Routing(topk_idx, topk_weight * config.routed_scaling_factor, logits, scores)

    def auxiliary_loss(self, routing: Routing, token_mask: Tensor | None = None) -> Tensor:
        """The weighted balance terms (0 in evaluation), and the counting that goes with them.

        Has side effects (counts, a collective at level `global`): call it once per forward pass, outside any region
        that is recomputed in the backward pass.
        """
        config = self.config
        zero = routing.scores.new_zeros(())
        if not self.training:
            return zero
        counts = balance.count_tokens(routing.topk_idx, config.n_routed_experts, token_mask)  # (B, E)
        window = None
        if config.aux_loss_level == "global":
            here = counts.sum(0)
            self.global_window += here if self.reduce_counts is None else self.reduce_counts(here)
            window = self.global_window.clone()
        raw_balance = raw_z = zero
        if config.aux_loss_level != "none":
            raw_balance = balance.balance_loss(
                config.aux_loss_level, routing.scores, counts, config.num_experts_per_tok, token_mask, window
            )
        if config.router_z_loss_coef > 0:
            raw_z = balance.z_loss(routing.logits, token_mask)
        self._record(routing, counts, token_mask, raw_balance, raw_z)
        return config.aux_loss_alpha * raw_balance + config.router_z_loss_coef * raw_z

    @torch.no_grad()
    def _record(
        self, routing: Routing, counts: Tensor, token_mask: Tensor | None, raw_balance: Tensor, raw_z: Tensor
    ) -> None:
        entropy = balance.router_entropy(routing.scores)  # (B, T)
        if token_mask is not None:
            entropy = entropy * token_mask
        tokens = counts.sum() / self.config.num_experts_per_tok
        self.tokens_per_expert += counts.sum(0)
        self.loss_sums += torch.stack((raw_balance.float(), raw_z.float(), entropy.sum().float(), tokens))

    def reset_counts(self) -> None:
        """Starts a new window: before an optimizer step's first micro-batch."""
        self.tokens_per_expert.zero_()
        self.global_window.zero_()
        self.loss_sums.zero_()
