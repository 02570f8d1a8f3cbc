"""The decoder: embedding, layers of attention and (MoE) feed-forward, norm, head, loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import balance
from model.attention import Attention, KVCache, attention_mask_for
from model.config import ModelConfig
from model.feed_forward import FeedForward
from model.gate import MoEGate, Routing
from model.layers import RMSNorm, RotaryEmbedding
from model.loss import IGNORE, chunked_cross_entropy
from model.moe import MoEFeedForward
from model.products import Linear, float32_library


@dataclass
class CausalLMOutput:
    """loss: mean cross-entropy over the `n_targets` targets, nats, () float32 (0 without targets; None without labels).
    aux_loss: what the balance terms add, weighted, averaged over MoE layers, () float32 (0 in evaluation).
    logits: (B, T, V), or None with return_logits=False. n_targets: () int64."""

    loss: Tensor | None
    aux_loss: Tensor
    logits: Tensor | None
    n_targets: Tensor


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): (B, T, D) -> (B, T, D) and the routing, None in a dense layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        std, out_std = config.initializer_range, config.output_std
        self.mlp = (
            MoEFeedForward(config)
            if self.is_moe
            else FeedForward(
                config.hidden_size, config.intermediate_size, config.hidden_act, config.gated_ffn, std, out_std
            )
        )
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Routing | None]:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + F.dropout(attended, self.dropout, self.training)
        normed = self.post_attention_layernorm(x)
        y, routing = self.mlp.compute(normed) if self.is_moe else (self.mlp(normed), None)
        return x + F.dropout(y, self.dropout, self.training), routing


class MoEForCausalLM(nn.Module):
    """A decoder-only language model; `n_routed_experts: 0` makes it dense.

    forward(input_ids (B, T) int64, labels (B, T) int64 or None, ...): labels are aligned with input_ids and shifted
    inside, -100 is ignored. attention_mask (B, T) bool marks real tokens; document_ids (B, T) int64 keep attention inside
    a document and restart its positions; position_ids (B, T) override the positions; cache holds earlier tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(
            config.head_dim, config.max_position_embeddings, config.rope_theta, config.rope_scaling
        )
        nn.init.normal_(self.embed_tokens.weight, std=config.initializer_range)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.activation_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool = True,
    ) -> CausalLMOutput:
        B, T = input_ids.shape
        limit = self.config.max_position_embeddings if cache is None else cache.max_length
        if T > limit:
            raise ValueError(f"input_ids: {T} tokens are more than the {limit} positions there are; cut the input")
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids: a cache does not know its documents; give either document_ids or cache")
        x, routings = self._hidden_states(input_ids, attention_mask, document_ids, position_ids, cache)

        aux_loss = x.new_zeros((), dtype=torch.float32)
        if routings:
            token_mask = None if attention_mask is None else attention_mask.bool()
            terms = [self.layers[i].mlp.gate.auxiliary_loss(routing, token_mask) for i, routing in routings]
            aux_loss = torch.stack(terms).mean()

        loss, n_targets = None, torch.zeros((), dtype=torch.int64, device=x.device)
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position should say next
            n_targets = (targets != IGNORE).sum()
            nats = chunked_cross_entropy(x.view(B * T, -1), self.lm_head.weight, targets.reshape(-1))
            loss = nats / n_targets.clamp(min=1)
        logits = self.lm_head(x) if return_logits else None
        return CausalLMOutput(loss, aux_loss, logits, n_targets)

    def _hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, list[tuple[int, Routing]]]:
        B, T = input_ids.shape
        if cache is not None and attention_mask is not None:
            cache.real[:, cache.length : cache.length + T] = attention_mask
            cache.has_padding = True
        if position_ids is None:
            position_ids = _positions(T, cache, document_ids, input_ids.device)
        mask = attention_mask_for(T, input_ids.device, attention_mask, document_ids, cache)
        cos, sin = self.rotary(position_ids)  # (T, head_dim) or (B, T, head_dim)
        cos, sin = (table.view(-1, T, 1, self.config.head_dim) for table in (cos, sin))

        x = F.dropout(self.embed_tokens(input_ids), self.config.dropout, self.training)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        routings = []
        for i, layer in enumerate(self.layers):
            if recompute:
                x, routing = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x, routing = layer(x, cos, sin, mask, cache)
            if routing is not None:
                routings.append((i, routing))
        if cache is not None:
            cache.length += T
        return self.norm(x), routings

    # What the training loop and the evaluation ask of the routers.

    def moe_layers(self) -> list[tuple[int, MoEFeedForward]]:
        """(layer index, module) of every MoE layer."""
        return [(i, layer.mlp) for i, layer in enumerate(self.layers) if layer.is_moe]

    def gates(self) -> list[MoEGate]:
        return [moe.gate for _, moe in self.moe_layers()]

    def compile_layers(self) -> None:
        """torch.compile, in place, of what has the same shapes in every step: the layers; on a CPU of MoE layers the attention
        alone, because the experts' segments there are loops over lengths that change."""
        float32_library()  # known before tracing, which could not open a file
        on_cpu = self.embed_tokens.weight.device.type == "cpu"
        for layer in self.layers:
            (layer.self_attn if on_cpu and layer.is_moe else layer).compile(dynamic=False)

    def set_count_reduction(self, reduce_counts: Callable[[Tensor], Tensor]) -> None:
        """Hands the routers a sum over ranks of a float32 tensor, for balance at level `global`."""
        for gate in self.gates():
            gate.reduce_counts = reduce_counts

    def reset_counts(self) -> None:
        """Before an optimizer step's first micro-batch."""
        for gate in self.gates():
            gate.reset_counts()

    def routing_counts(self) -> tuple[Tensor, Tensor]:
        """Since the last reset, on this rank: tokens per expert (L, E) float32, and sums (L, 4) float32 of: balance loss
        and z-loss over micro-batches (raw), router entropy in nats over tokens, tokens."""
        gates = self.gates()
        return torch.stack([g.tokens_per_expert for g in gates]), torch.stack([g.loss_sums for g in gates])

    def update_router_bias(self, tokens_per_expert: Tensor, accepted: Tensor | None = None) -> None:
        """The auxiliary-loss-free step, from (L, E) counts of an optimizer step over all ranks."""
        for gate, counts in zip(self.gates(), tokens_per_expert, strict=True):
            if gate.expert_bias is not None:
                balance.update_bias(gate.expert_bias, counts, self.config.router_bias_update_rate, accepted)


def _positions(T: int, cache: KVCache | None, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """0, 1, 2, ... behind what the cache holds; from each document's start with document_ids: (T,) or (B, T) int64."""
    past = cache.length if cache is not None else 0
    if cache is not None and cache.has_padding:
        return (cache.real[:, : past + T].long().cumsum(1) - 1).clamp(min=0)[:, past:]
    places = torch.arange(past, past + T, device=device)
    if document_ids is None:
        return places
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = torch.where(is_start, places, 0).cummax(1).values
    return places - starts
