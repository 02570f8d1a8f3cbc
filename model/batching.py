"""Continuous batching: requests join a running batch after their own prefill, and leave it when they end.

    batch = Batch(model)
    events = batch.join(Row(prompt, Sampling(max_new_tokens=64, stop_ids=(eos,), seed=1)))
    while batch.rows:
        events = batch.step()  # one more token for every row; others may join in between

Every row has its own options, its own generator and its own place in the cache, so what it says does not depend on who else
is there: alone or in company it draws what `model.generate.stream` draws from the same seed (to float rounding, since
products of one row and of several round differently). A row lies from the left of its slot in the cache: joining and leaving
move nobody else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention import KVCache
from model.config import ModelConfig
from model.decoder import MoEForCausalLM
from model.gate import Routing
from model.generate import NOT_A_NUMBER, cache_dtype, check, penalise, sample, weights_as_they_are

FIRST_POSITIONS = 128  # of each slot at first; doubled when a row needs more


@dataclass(frozen=True)
class Sampling:
    """How a row is continued; the first seven as in `model.generate.generate`."""

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    frequency_penalty: float = (
        0.0  # taken from a token's logit each time it was said before (the prompt does not count)
    )
    presence_penalty: float = 0.0  # taken once from every token said before
    logprobs: int | None = None  # report each token's log-probability, and so many of the likeliest ones'
    experts: bool = False  # report the experts that read each token


@dataclass
class Token:
    """One new token. `logprob` (nats) is the model's own, before penalties, temperature, top_k and top_p."""

    id: int
    logprob: float | None = None
    likeliest: list[tuple[int, float]] = field(default_factory=list)  # (id, logprob), best first
    experts: list[list[int]] | None = None  # [MoE layer] -> the k experts that read this token, best first


@dataclass(eq=False)
class Row:
    """A prompt and what became of it; rows are told apart by identity."""

    prompt: Sequence[int]
    sampling: Sampling
    said: int = 0  # new tokens so far
    last: int = -1  # the newest token, which the next step reads
    held: Token | None = None  # that token, until the experts that read it are known
    finish: str | None = None  # why nothing more will be drawn
    room: int = 0  # new tokens that are allowed
    generator: torch.Generator | None = None
    seen: Tensor | None = None  # (1, V) bool: tokens of prompt and continuation; only where a penalty needs it
    counts: Tensor | None = None  # (1, V) float32: how often each token was said


@dataclass(frozen=True)
class Event:
    """Something to tell about a row: a new token, or that it ended. `finish` is stop, length or error."""

    row: Row
    token: Token | None = None
    finish: str | None = None
    error: str = ""


class SlotCache(KVCache):
    """Keys and values of rows of different lengths: slot i holds `lengths[i]` positions, from its left end.

    It grows by doubling, in slots and in positions. `prepare` says where the next token of each row goes.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, 1, min(FIRST_POSITIONS, config.max_position_embeddings), device, dtype)
        self.most = config.max_position_embeddings
        self.lengths: list[int] = []
        self.slots = self.places = torch.empty(0, dtype=torch.int64, device=device)  # (n,): which row, which position

    def add(self, prefilled: KVCache, positions: int) -> None:
        """A slot for a row of at most `positions`, behind the others; `prefilled` holds its prompt."""
        self._reserve(len(self.lengths) + 1, positions)
        for slot, filled in zip(self.layers, prefilled.layers, strict=True):
            slot[len(self.lengths), :, : prefilled.length] = filled[0]
        self.lengths.append(prefilled.length)

    def remove(self, i: int) -> None:
        """Frees slot i; the last row moves into it. What is left behind is zeroed: a NaN would reach the slot's next row
        through the softmax's zeros."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        for layer in self.layers:
            layer[i, :, : self.lengths[i]] = 0
            if i != last:
                layer[i, :, :length] = layer[last, :, :length]
                layer[last, :, :length] = 0
        self.lengths[i] = length
        self.lengths.pop()

    def prepare(self) -> Tensor:
        """Before a step: positions of the next tokens, (n, 1) int64, and who may see what."""
        device = self.layers[0].device
        self.slots = torch.arange(len(self.lengths), device=device)
        self.places = torch.tensor(self.lengths, device=device)
        self.length = max(self.lengths)
        equal = min(self.lengths) == self.length
        seen = torch.arange(self.length + 1, device=device) <= self.places.unsqueeze(1)  # (n, S)
        self.mask = None if equal else seen[:, None, None]
        return self.places.unsqueeze(1)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes each row's (n, Hkv, 1, head_dim) behind what it has; returns all up to the longest row's."""
        keys, values = self.layers[2 * layer], self.layers[2 * layer + 1]
        keys[self.slots, :, self.places] = key[:, :, 0]
        values[self.slots, :, self.places] = value[:, :, 0]
        n, S = key.shape[0], self.length + 1
        return keys[:n, :, :S], values[:n, :, :S]

    def _reserve(self, slots: int, positions: int) -> None:
        B, Hkv, S, head_dim = self.layers[0].shape
        if slots <= B and positions <= S:
            return
        more_slots = B if slots <= B else max(slots, 2 * B)
        more_positions = S if positions <= S else min(max(positions, 2 * S), self.most)
        grown = [
            old.new_zeros(more_slots, Hkv, more_positions, head_dim) for old in self.layers
        ]  # all, or an error and none
        for new, old in zip(grown, self.layers):
            new[:B, :, :S] = old
        self.layers, self.max_length = grown, more_positions


def cache_bytes(model: MoEForCausalLM, rows: int) -> int:
    """What a `SlotCache` takes once it held so many rows and one filled the context; its slots are a power of two."""
    c = model.config
    slots = 1 << (rows - 1).bit_length()
    values = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * c.max_position_embeddings * slots
    return values * cache_dtype(model).itemsize


class Batch:
    """The rows that are being continued. One thread at a time; call it under the run's autocast, the model in eval mode."""

    def __init__(self, model: MoEForCausalLM) -> None:
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.rows: list[Row] = []
        self.cache = self._empty_cache()

    @torch.inference_mode()
    def join(self, row: Row) -> list[Event]:
        """Reads the row's prompt and draws its first token. ValueError for a prompt or an option that cannot be."""
        o, config = row.sampling, self.model.config
        check(self.model, [row.prompt], o.max_new_tokens, o.temperature, o.top_k, o.top_p, o.repetition_penalty)
        row.room = min(o.max_new_tokens, config.max_position_embeddings - len(row.prompt))
        row.generator = torch.Generator(self.device).manual_seed(o.seed)
        ids = torch.tensor([row.prompt], device=self.device)
        if o.repetition_penalty != 1.0:
            row.seen = torch.zeros(1, config.vocab_size, dtype=torch.bool, device=self.device).scatter_(1, ids, True)
        if o.frequency_penalty or o.presence_penalty:
            row.counts = torch.zeros(1, config.vocab_size, device=self.device)
        prefilled = KVCache(config, 1, len(row.prompt), self.device, self.cache.layers[0].dtype)
        with weights_as_they_are(self.device):
            hidden, _ = self.model._hidden_states(ids, None, None, None, prefilled)
            self.cache.add(prefilled, len(row.prompt) + row.room)
            self.rows.append(row)
            return self._advance([row], hidden, None)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Reads every row's newest token and draws the next: nothing where there are no rows."""
        if not self.rows:
            return []
        rows = list(self.rows)
        ids = torch.tensor([[row.last] for row in rows], device=self.device)
        with weights_as_they_are(self.device):
            positions = self.cache.prepare()
            hidden, routings = self.model._hidden_states(ids, None, None, positions, self.cache)
            self.cache.lengths = [length + 1 for length in self.cache.lengths]
            return self._advance(rows, hidden, routings)

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Takes a row out, wherever it stands; nothing where it has left already."""
        if row in self.rows:
            i = self.rows.index(row)
            self.cache.remove(i)
            self.rows[i] = self.rows[-1]
            self.rows.pop()
        if not self.rows:
            self.cache = self._empty_cache()  # the memory of a busy hour goes back

    def _empty_cache(self) -> SlotCache:
        return SlotCache(self.model.config, self.device, cache_dtype(self.model))

    def _advance(
        self, rows: Sequence[Row], hidden: Tensor, routings: Sequence[tuple[int, Routing]] | None
    ) -> list[Event]:
        """hidden (n, T, D) of the rows' newest tokens -> what happened; `routings` of a step, None for prompts."""
        logits = self.model.lm_head(hidden[:, -1]).float()  # (n, V)
        finite = logits.isfinite().all(-1).tolist()
        drawing = [i for i, row in enumerate(rows) if finite[i] and row.finish is None]
        drawn = [_draw(rows[i], logits[i : i + 1]) for i in drawing]
        ids = dict(zip(drawing, torch.cat(drawn).tolist())) if drawn else {}
        experts = self._experts(routings) if any(row.held for row in rows) else []  # [row][MoE layer][k]
        events = []
        for i, row in enumerate(rows):
            if row.held is not None:
                row.held.experts = experts[i]
                events.append(Event(row, row.held))
                row.held = None
            if row.finish is None and not finite[i]:
                events.append(Event(row, finish="error", error=NOT_A_NUMBER))
                self.leave(row)
            elif row.finish is not None:  # it only waited for its last token's experts
                events.append(self._end(row))
            elif ids[i] in row.sampling.stop_ids:
                row.finish = "stop"
                events.append(self._end(row))
            else:
                events += self._say(row, ids[i], logits[i])
        return events

    def _say(self, row: Row, token_id: int, logits: Tensor) -> list[Event]:
        """Takes a drawn token up; logits (V,)."""
        token = Token(token_id)
        if row.sampling.logprobs is not None:
            logprobs = logits.log_softmax(-1)
            best = logprobs.topk(min(row.sampling.logprobs, len(logprobs)))
            token.logprob = float(logprobs[token_id])
            token.likeliest = list(zip(best.indices.tolist(), best.values.tolist()))
        row.last, row.said = token_id, row.said + 1
        if row.seen is not None:
            row.seen[0, token_id] = True
        if row.counts is not None:
            row.counts[0, token_id] += 1
        if row.said == row.room:
            row.finish = "length"
        if row.sampling.experts and any(layer.is_moe for layer in self.model.layers):
            row.held = token  # the next step reads it, and knows its experts
            return []
        return [Event(row, token)] + ([self._end(row)] if row.finish else [])

    def _end(self, row: Row) -> Event:
        self.leave(row)
        return Event(row, finish=row.finish)

    def _experts(self, routings: Sequence[tuple[int, Routing]] | None) -> list[list[list[int]]]:
        assert routings, "a row that waits for its experts is in a step of a model that has some"
        return torch.stack([routing.topk_idx[:, -1] for _, routing in routings], dim=1).tolist()  # (n, L, k)


def _draw(row: Row, logits: Tensor) -> Tensor:
    """(1, V) -> (1,) int64, by the row's own options and generator."""
    o = row.sampling
    if row.seen is not None:
        logits = penalise(logits, row.seen, o.repetition_penalty)
    if row.counts is not None:
        logits = logits - o.frequency_penalty * row.counts - o.presence_penalty * (row.counts > 0)
    return sample(logits, o.temperature, o.top_k, o.top_p, row.generator)
