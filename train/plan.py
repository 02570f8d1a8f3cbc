"""The arithmetic of a run, checked before hours are spent on it: what a step is made of, and how many there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data.chat import encode_prompt
from data.tokenizer import Tokenizer
from model import ModelConfig
from model.flops import total_count
from train import checkpoint
from train.config import MOST_STEPS, RunConfig


@dataclass(frozen=True)
class Plan:
    """How a step's tokens are shared out. rows_per_step = micro_batch_size x accumulation x ranks, exactly."""

    context_length: int
    rows_per_step: int
    micro_batch_size: int
    accumulation: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.context_length


def rows_of_step(config: RunConfig, ranks: int) -> int:
    """Rows of an optimizer step. ValueError, with numbers that would work, if they cannot be divided exactly."""
    train, T = config.train, config.context_length
    rows, left = divmod(train.tokens_per_step, T)
    if left or rows == 0:
        raise ValueError(
            f"train.tokens_per_step: {train.tokens_per_step} is no multiple of the context length {T}; use {max(rows, 1) * T}"
        )
    if rows < ranks:
        raise ValueError(
            f"torchrun: {ranks} processes, but train.tokens_per_step: {train.tokens_per_step} is only {rows} rows of {T} tokens; "
            "start fewer processes or raise it"
        )
    if rows % ranks:
        raise ValueError(
            f"torchrun: {ranks} processes cannot share the {rows} rows of train.tokens_per_step: {train.tokens_per_step} evenly; "
            f"start a number of processes that divides {rows}"
        )
    if rows // ranks % train.micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size: {train.micro_batch_size} does not divide the {rows // ranks} rows that each of {ranks} "
            f"process(es) has in a step of {train.tokens_per_step} tokens; use a divisor of {rows // ranks}"
        )
    return rows


def make_plan(config: RunConfig, rows_per_epoch: int, ranks: int) -> Plan:
    """The run's arithmetic. ValueError as `rows_of_step`."""
    train, rows = config.train, rows_of_step(config, ranks)
    steps = train.steps if train.steps is not None else math.ceil(train.epochs * rows_per_epoch / rows)
    if steps > MOST_STEPS:
        raise ValueError(f"train.epochs: {train.epochs:g} makes {steps:,} steps; at most {MOST_STEPS:,} are taken")
    return Plan(config.context_length, rows, train.micro_batch_size, rows // (train.micro_batch_size * ranks), steps)


def check_settings(config: RunConfig, ranks: int, tokenizer: Tokenizer) -> None:
    """ValueError for what would stop the run later and can be seen now, before hours of preparing data."""
    rows_of_step(config, ranks)
    names = [source.name for source in config.data.sources]
    if config.eval.best_source not in (None, *names):
        raise ValueError(
            f"eval.best_source: {config.eval.best_source!r} is no source of this config; use one of {', '.join(names)}"
        )
    chat = config.data.format == "chat"
    for i, prompt in enumerate(config.eval.prompts):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        room = config.model.max_position_embeddings - 8  # BOS, and a few words of an answer
        if len(ids) > room:
            raise ValueError(
                f"eval.prompts[{i}]: {len(ids)} tokens leave no room in a context of {room + 8}; shorten it"
            )
    if config.train.init_from is not None and not checkpoint.complete_checkpoints(config.run_dir):
        origin = checkpoint.find_checkpoint(config.train.init_from)
        checkpoint.check_intact(origin)
        checkpoint.check_same_shape(config.model, origin)
        own = origin.resolve().parent.parent / "tokenizer"
        if own.is_dir() and Tokenizer.load(own).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"tokenizer.path: {config.tokenizer.path!r} is another tokenizer than the one {config.train.init_from} was trained "
                f"with; use {own}"
            )


BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments (Muon keeps one, and works in more than that)


def check_memory(config: ModelConfig, available: int, processes: int) -> None:
    """ValueError if `processes` models of this config, with what an optimizer keeps of them, exceed the `available` bytes of the
    machine or GPU: building one would end in the system's own way, with SIGKILL."""
    count = total_count(config).total
    needed = count * BYTES_PER_PARAMETER * processes
    if needed > available:
        raise ValueError(
            f"model: {count:,} parameters in {processes} process(es) need {needed / 2**30:,.1f} GiB for weights, gradients and moments, and "
            f"there are {available / 2**30:,.1f} GiB; make the model smaller (python -m scripts.inspect_model shows what it needs)"
        )
