"""How far a run is: what a checkpoint says of it beside weights and moments, and the seconds spent training."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch

from train.guard import GuardState


@dataclass
class Progress:
    """How far a run is, and which of its checkpoints was the best."""

    step: int = 0  # optimizer steps done, skipped ones too
    tokens: int = 0  # tokens seen, over all ranks
    train_seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


@dataclass
class TrainingState:
    """A checkpoint's state.json."""

    step: int
    ranks: int  # processes that trained
    progress: Progress
    guard: GuardState
    data: dict  # {source: SHA-256 of its prepared training data}
    tokenizer: str  # SHA-256 of tokenizer.json


class Clock:
    """Seconds of training, without those spent saving and evaluating."""

    def __init__(self, device: torch.device, seconds_before: float, tokens_before: int) -> None:
        self.device, self._before, self._since = device, seconds_before, time.perf_counter()
        self.logged_seconds, self.logged_tokens = seconds_before, tokens_before  # at the last logged step

    def seconds(self) -> float:
        """Seconds so far; waits for the device, so that its queue counts."""
        if self._since is None:
            return self._before
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self._before + time.perf_counter() - self._since

    @contextlib.contextmanager
    def paused(self):
        """A context whose seconds do not count."""
        self._before, self._since = self.seconds(), None
        yield
        self._since = time.perf_counter()
