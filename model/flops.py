"""Parameters and floating-point operations, by arithmetic from ModelConfig alone: nothing is built.

    count = count_parameters(config)      {"attention": Count(total, active, matmul), ...}
    flops_per_token(config, 512)          training, forward and backward

Three numbers a part, because three questions are asked of it:
- total: what the memory holds and the checkpoint weighs;
- active: what one token can use, all but the routed experts it did not choose. The usual meaning of "173M, 41M active";
- matmul: parameters that one token is multiplied with. An embedding is a look-up (0), a tied head is a product (V*D)
  although it has no parameters of its own, norms and biases are additions and element-wise products (0).

A token costs 2 operations per matmul parameter forward and 4 backward; attention's scores and weighted sum cost
2*H*head_dim*T each per layer forward, half of that since a token sees T/2 others on average, and three times it with
the backward pass: 6*L*H*head_dim*T (PaLM, arXiv 2204.02311, appendix B, halved for the causal mask). Recomputation
(activation checkpointing) is not counted: it is no work of the model's.
"""

from __future__ import annotations

from typing import NamedTuple

from model.config import ModelConfig


class Count(NamedTuple):
    """Parameters of one part."""

    total: int
    active: int
    matmul: int


def _ffn(config: ModelConfig, width: int) -> int:
    """Parameters of one feed-forward network of this width; none of them is a bias."""
    return (3 if config.gated_ffn else 2) * config.hidden_size * width


def _attention(config: ModelConfig) -> Count:
    """One layer's attention, QK-norm included."""
    d, head = config.hidden_size, config.head_dim
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    matmul = 2 * d * query + 2 * d * key_value
    other = 2 * head if config.use_qk_norm else 0
    if config.attention_bias:
        other += query + 2 * key_value + d
    return Count(matmul + other, matmul + other, matmul)


def count_parameters(config: ModelConfig) -> dict[str, Count]:
    """Counts per part; the parts a config does not have are left out, and the parts add up to the model.

    Parts: embedding, attention, dense FFN, router, routed experts, shared experts, shared expert gate, norms, head.
    """
    d, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    moe = len(config.moe_layers)
    expert = _ffn(config, config.moe_intermediate_size)
    chosen = moe * config.num_experts_per_tok * expert
    norms = (2 * layers + 1) * d
    own_head = 0 if config.tie_word_embeddings else vocabulary * d

    parts = {
        "embedding": Count(vocabulary * d, vocabulary * d, 0),
        "attention": Count(*(layers * n for n in _attention(config))),
        "dense FFN": _same((layers - moe) * _ffn(config, config.intermediate_size)),
        "router": _same(moe * config.n_routed_experts * d),
        "routed experts": Count(moe * config.n_routed_experts * expert, chosen, chosen),
        "shared experts": _same(moe * _ffn(config, config.n_shared_experts * config.moe_intermediate_size)),
        "shared expert gate": _same(moe * d if config.shared_expert_gate else 0),
        "norms": Count(norms, norms, 0),
        "head": Count(own_head, own_head, vocabulary * d),
    }
    return {name: count for name, count in parts.items() if any(count)}


def _same(n: int) -> Count:
    return Count(n, n, n)


def total_count(config: ModelConfig) -> Count:
    """All parts of `count_parameters` together."""
    return Count(*(sum(numbers) for numbers in zip(*count_parameters(config).values(), strict=True)))


def flops_per_token(config: ModelConfig, context_length: int) -> int:
    """Operations of training on one token of a row of `context_length` tokens: forward and backward."""
    heads = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * heads * context_length
    return 6 * total_count(config).matmul + attention
