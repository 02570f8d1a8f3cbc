"""Causal self-attention with grouped queries (arXiv 2305.13245), rotary positions and a preallocated KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import RMSNorm, rotate


class KVCache:
    """Keys and values of every layer, allocated once for `max_length` positions, and which of them are padding.

    `length` positions are filled in every row; rows of a ragged batch are padded on the left.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.real = torch.ones(batch_size, max_length, dtype=torch.bool, device=device)  # False: padding
        self.has_padding = False
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, Hkv, T, head_dim) behind what is there; returns all keys and values so far."""
        end = self.length + key.shape[2]
        assert end <= self.max_length, f"cache of {self.max_length} positions cannot hold {end}"
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention_mask_for(
    T: int, device: torch.device, attention_mask: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
) -> Tensor | None:
    """Which keys each query may see, (B or 1, 1, T, S) bool; None where plain causal attention is enough.

    attention_mask (B, T) bool marks real tokens; document_ids (B, T) int64 keep attention inside a document. Every query
    sees itself at least, so that a row of padding stays finite.
    """
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


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of queries, keys, values and cache: float32 on CPU, where torch's bfloat16 kernel is no faster forward and
    up to twice as slow backward (docs/decisions.md)."""
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D). Keys and values have fewer heads than queries and are never repeated in memory where the
    kernel takes them as they are (`enable_gqa`)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H, Hkv, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * hd, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, Hkv * hd, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, Hkv * hd, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * hd, D, bias=config.attention_bias)
        self.q_norm = RMSNorm(hd, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(hd, config.rms_norm_eps) if config.use_qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std / (2 * self.config.num_hidden_layers) ** 0.5)
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
        dtype = attention_dtype(x.device, v.dtype)
        q, k, v = (
            rotate(q, cos, sin).to(dtype).transpose(1, 2),
            rotate(k, cos, sin).to(dtype).transpose(1, 2),
            v.to(dtype),
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
            # On CUDA grouped heads are for flash, which takes no mask; with both, torch falls to the kernel that stores all
            # scores. Repeated keys and values let the memory-efficient one run.
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        with torch.autocast(x.device.type, enabled=False):  # on CPU it would cast float32 back to bfloat16
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.config.dropout if self.training else 0.0,
                is_causal=mask is None and T > 1,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # (B, H, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))
