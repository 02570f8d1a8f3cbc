"""Keeping experts equally busy: the balance losses, the router z-loss, the bias update, and what is measured.

For E experts, k choices a token and T tokens, f_e = E / (k T) * (tokens routed to e) and P_e = mean over tokens of
score_e / sum of the token's scores. sum_e f_e P_e is 1 at perfect balance and E/k at collapse, whatever the level:
`sequence` averages it over rows (DeepSeek-V2, arXiv 2405.04434, eq. 23), `batch` takes it over the micro-batch (Switch,
arXiv 2101.03961, eq. 4-6), `global` takes f over ranks and micro-batches (Qwen, arXiv 2501.11873). Padding never counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_tokens(topk_idx: Tensor, n_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Tokens routed to each expert, row by row: (B, T, k) int64, mask (B, T) -> (B, E) float32 (whole numbers).

    Sums of whole numbers below 2^24 are exact in float32, so the order of the atomics cannot show.
    """
    B, T, k = topk_idx.shape
    ones = torch.ones(B, T, k, device=topk_idx.device)
    if token_mask is not None:
        ones = ones * token_mask.unsqueeze(-1)
    counts = torch.zeros(B, n_experts, device=topk_idx.device)
    return counts.scatter_add_(1, topk_idx.reshape(B, T * k), ones.reshape(B, T * k))


def balance_loss(
    level: str, scores: Tensor, counts: Tensor, k: int, token_mask: Tensor | None, global_counts: Tensor | None
) -> Tensor:
    """sum_e f_e P_e at `level`; unweighted, float32 scalar.

    scores (B, T, E) float32 are the router's, before any bias; counts (B, E) from `count_tokens`;
    token_mask (B, T) bool or None; global_counts (E,), for level `global` alone, sums ranks and micro-batches.
    """
    E = scores.shape[-1]
    share = scores / scores.sum(-1, keepdim=True)  # already 1 for softmax, made so for sigmoid
    if token_mask is not None:
        share = share * token_mask.unsqueeze(-1)
        tokens = token_mask.sum(1, dtype=torch.float32)  # (B,)
    else:
        tokens = torch.full((scores.shape[0],), float(scores.shape[1]), device=scores.device)

    if level == "sequence":
        per_row = tokens.clamp(min=1).unsqueeze(-1)
        f = counts * E / (k * per_row)  # (B, E)
        mean_share = share.sum(1) / per_row
        rows = (tokens > 0).sum().clamp(min=1)
        return (f * mean_share).sum() / rows

    mean_share = share.sum((0, 1)) / tokens.sum().clamp(min=1)  # (E,)
    routed = counts.sum(0) if global_counts is None else global_counts
    f = routed * E / routed.sum().clamp(min=1)  # routed.sum() is k * tokens
    return (f * mean_share).sum()


def z_loss(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5): (B, T, E) float32 -> scalar."""
    squared = logits.logsumexp(-1).square()  # (B, T)
    if token_mask is None:
        return squared.mean()
    return (squared * token_mask).sum() / token_mask.sum().clamp(min=1)


@torch.no_grad()
def update_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float, accepted: Tensor | None = None) -> None:
    """b += rate * sign(mean - count), in place (auxiliary-loss-free balance, arXiv 2408.15664).

    bias and tokens_per_expert (E,); the counts are one optimizer step's over all ranks. `accepted`, a bool scalar
    tensor, gates the update together with a skipped step.
    """
    counts = tokens_per_expert.to(bias.dtype)
    step = rate * torch.sign(counts.mean() - counts)
    bias += step if accepted is None else step * accepted


def load_statistics(tokens_per_expert: Tensor) -> dict[str, Tensor]:
    """What a layer's load looks like: (L, E) counts -> `max_vio`, `load_entropy`, `dead`, each (L,).

    max_vio: how far the busiest expert is above the mean, relative (0 is balance; arXiv 2408.15664, section 4.1).
    load_entropy: entropy of the load over log E (1 is balance). dead: experts that got no token.
    """
    counts = tokens_per_expert.double()
    E = counts.shape[-1]
    total = counts.sum(-1, keepdim=True).clamp(min=1)
    load = counts / total
    entropy = -(load * load.clamp(min=1e-12).log()).sum(-1)
    normaliser = torch.tensor(float(E)).log().item() if E > 1 else 1.0
    return {
        "max_vio": load.amax(-1) * E - 1,
        "load_entropy": entropy / normaliser,
        "dead": (tokens_per_expert == 0).sum(-1),
    }


def router_entropy(scores: Tensor) -> Tensor:
    """Entropy of each token's normalised scores, in nats: (..., E) -> (...). Low: the router has made up its mind."""
    share = scores / scores.sum(-1, keepdim=True)
    return -(share * share.clamp(min=1e-12).log()).sum(-1)
