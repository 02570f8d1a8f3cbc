"""Causal self-attention with grouped queries (arXiv 2305.13245), rotary positions and a preallocated KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import RMSNorm, rotate
from model.products import Linear, without_autocast

QUERY_BLOCK = 512  # queries whose scores exist at once where attention is written out
LONG = 2048  # tokens from which torch's kernel is as fast, and keeps no scores


class KVCache:
    """Keys and values of every layer, allocated once for `max_length` positions, and which of them are padding.

    `length` positions are filled in every row; rows of a ragged batch are padded on the left. `dtype` is that of the queries:
    autocast's where it is on, else the weights'.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        # Keys and values of layer 0, of layer 1, ...: tensors of their own, so that autograd can follow what is written.
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
        self.max_length = max_length
        self.real = torch.ones(batch_size, max_length, dtype=torch.bool, device=device)  # False: padding
        self.has_padding = False
        self.length = 0
        self.mask: Tensor | None = None  # (B, 1, 1, S) bool, where rows end at different places (model/batching.py)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, Hkv, T, head_dim) behind what is there; returns all keys and values so far."""
        end = self.length + key.shape[2]
        assert end <= self.max_length, f"cache of {self.max_length} positions cannot hold {end}"
        keys, values = self.layers[2 * layer], self.layers[2 * layer + 1]
        keys.narrow(2, self.length, key.shape[2]).copy_(key)
        values.narrow(2, self.length, key.shape[2]).copy_(value)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)


def attention_mask_for(
    T: int, device: torch.device, attention_mask: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
) -> Tensor | None:
    """Which keys each query may see, (B or 1, 1, T, S) bool; None where plain causal attention is enough.

    attention_mask (B, T) bool marks real tokens; document_ids (B, T) int64 keep attention inside a document. Every query
    sees itself at least, so that a row of padding stays finite.
    """
    if cache is not None and cache.mask is not None:
        return cache.mask
    past = cache.length if cache is not None else 0
    padded = attention_mask is not None or (cache is not None and cache.has_padding)
    if not padded and document_ids is None and (past == 0 or T == 1):
        return None
    query, key = torch.arange(past, past + T, device=device), torch.arange(past + T, device=device)
    mask = (key <= query.unsqueeze(1)).unsqueeze(0)  # (1, T, S)
    if document_ids is not None:
        mask = mask & (document_ids.unsqueeze(2) == document_ids.unsqueeze(1))
    if cache is not None:
        mask = mask & cache.real[:, None, : past + T]
    elif attention_mask is not None:
        mask = mask & attention_mask.bool().unsqueeze(1)
    return (mask | (key == query.unsqueeze(1))).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v: q (B, H, T, head_dim), k, v (B, Hkv, S, head_dim) -> (B, H, T, head_dim).

    mask (B or 1, 1, T, S) bool; None is causal, the queries being the last T of S positions (all of them, or one).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] < LONG:
        return attend_by_products(q, k, v, mask, dropout)
    if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
        # On CUDA grouped heads are for flash, which takes no mask; with both, torch falls to the kernel that stores all
        # scores. Repeated keys and values let the memory-efficient one run.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """`attend`, written out: scores of a block of queries, softmax, weighted sum. On CPU in bfloat16 it takes half the time
    of torch's fused kernel, whose small products do not use the bfloat16 instructions (docs/decisions.md)."""
    B, H, T, head_dim = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    groups = H // Hkv
    q = q.reshape(B * Hkv, groups, T, head_dim)
    k, v = k.reshape(B * Hkv, S, head_dim), v.reshape(B * Hkv, S, head_dim)
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        t = min(QUERY_BLOCK, T - start)
        end = S if mask is not None else S - T + start + t  # keys behind the last query of the block are never seen
        queries = q[:, :, start : start + t].reshape(B * Hkv, groups * t, head_dim)
        if mask is None:
            hidden = torch.full((t, end), -torch.inf, dtype=q.dtype).triu(end - t + 1).repeat(groups, 1)
            scores = torch.baddbmm(hidden, queries, k[:, :end].transpose(1, 2), alpha=head_dim**-0.5)
        else:
            scores = torch.baddbmm(q.new_zeros(()), queries, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
            by_head = scores.view(B, H, t, end)
            scores = by_head.masked_fill_(~mask[:, :, start : start + t], -torch.inf).view_as(scores)
        share = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)  # (B*Hkv, groups*t, end)
        outputs.append(torch.bmm(share, v[:, :end]).view(B, H, t, head_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D). Keys and values have fewer heads than queries and are never repeated in memory where the
    kernel takes them as they are (`enable_gqa`)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H, Hkv, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(D, H * hd, bias=config.attention_bias)
        self.k_proj = Linear(D, Hkv * hd, bias=config.attention_bias)
        self.v_proj = Linear(D, Hkv * hd, bias=config.attention_bias)
        self.o_proj = Linear(H * hd, D, bias=config.attention_bias)
        self.q_norm = RMSNorm(hd, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(hd, config.rms_norm_eps) if config.use_qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=self.config.output_std)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.config.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.config.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, Hkv, T, head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, cos, sin).to(v.dtype).transpose(1, 2)  # (B, H, T, head_dim)
        k = rotate(k, cos, sin).to(v.dtype).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        with without_autocast(x.device):  # all three are in the compute dtype already
            y = attend(q, k, v, mask, self.config.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
