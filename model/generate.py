"""Sampling with a preallocated KV cache: one stream, or a batch of ragged prompts padded on the left."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from model.attention import KVCache
from model.decoder import MoEForCausalLM
from model.products import without_autocast

NOT_A_NUMBER = (
    "the model's output is not a number: its training diverged, or its weights are damaged; use another checkpoint"
)
GREEDY_BELOW = 1e-5  # of temperature: divided by less, logits overflow


def generate(
    model: MoEForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt, up to its first stop token (left out) or the model's context.

    temperature 0 (or below 1e-5) is greedy; top_k 0 and top_p 1 keep everything. Raises ValueError for an empty prompt, one
    that fills the context, or an option out of range. Call in eval mode; the model's mode is not changed.
    """
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    steps = _decode(model, prompts, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    for tokens in steps if prompts else ():
        for row in sorted(open_rows):
            if tokens[row] in stop_ids:
                open_rows.discard(row)
            else:
                results[row].append(tokens[row])
        if not open_rows:
            break
    return results


def stream(
    model: MoEForCausalLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """`generate` for one prompt, token by token."""
    for (token,) in _decode(model, [prompt], max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed):
        if token in stop_ids:
            return
        yield token


def _decode(
    model: MoEForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
) -> Iterator[list[int]]:
    """One new token per prompt and step, until `max_new_tokens` or the context is full."""
    check(model, prompts, max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    device = model.embed_tokens.weight.device
    B, longest = len(prompts), max(len(prompt) for prompt in prompts)
    ids = torch.zeros(B, longest, dtype=torch.int64)
    real = torch.zeros(B, longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        real[row, longest - len(prompt) :] = True
    ids, real = ids.to(device), real.to(device)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.int64, device=device)
    seen = seen.scatter_add_(1, ids, real.long()) > 0  # added, because padding shares its id with a real token

    room = min(max_new_tokens, model.config.max_position_embeddings - longest)
    cache = KVCache(model.config, B, longest + room, device, cache_dtype(model))
    ragged = not bool(real.all())
    generator = torch.Generator(device).manual_seed(seed)
    for step in range(room):
        with torch.inference_mode(), weights_as_they_are(device):
            mask = (real if step == 0 else torch.ones_like(ids, dtype=torch.bool)) if ragged else None
            hidden, _ = model._hidden_states(ids, mask, None, None, cache)
            logits = model.lm_head(hidden[:, -1]).float()  # (B, V)
            logits = penalise(logits, seen, repetition_penalty)
            if not torch.isfinite(logits).all():
                raise ValueError(NOT_A_NUMBER)
            tokens = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            seen.scatter_(1, tokens.unsqueeze(1), True)
            ids = tokens.unsqueeze(1)
        yield tokens.tolist()


def weights_as_they_are(device: torch.device) -> AbstractContextManager:
    """On a CPU a token is bound by reading the weights, and casting them first takes longer than the products: 4.5 ms a
    token under autocast, 2.9 ms without (docs/decisions.md)."""
    return without_autocast(device) if device.type == "cpu" else nullcontext()


def cache_dtype(model: MoEForCausalLM) -> torch.dtype:
    """That of the queries: autocast's where it is on and used, else the weights'."""
    device = model.embed_tokens.weight.device
    autocast = torch.is_autocast_enabled(device.type) and device.type != "cpu"
    return torch.get_autocast_dtype(device.type) if autocast else model.embed_tokens.weight.dtype


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858): scores of seen tokens are divided (if positive) or multiplied."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """(B, V) -> (B,) int64."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # what comes before already holds top_p
        beyond[:, 0] = False  # in float32 a tiny top_p is 0
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def check(
    model: MoEForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> None:
    """ValueError for a prompt that does not fit, or an option out of range, naming it."""
    limit = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < limit:
            raise ValueError(
                f"prompt: {len(prompt)} tokens; it must have at least one and leave room in the context of {limit}"
            )
    for name, value, low in (
        ("max_new_tokens", max_new_tokens, 1),
        ("temperature", temperature, 0),
        ("top_k", top_k, 0),
    ):
        if value < low:
            raise ValueError(f"{name}: {value} must be at least {low}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} must be above 0 and at most 1")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty: {repetition_penalty} must be above 0")
