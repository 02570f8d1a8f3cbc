"""Checkpoints written beside the training: it waits for a copy in memory, not for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from train import checkpoint
from train.config import RunConfig


class CheckpointWriter:
    """Writes a run's checkpoints one after another, in the order they were asked for, in a thread of its own.

    So `best` is pointed at a checkpoint only after that was written whole, and a kill at any moment leaves what a
    writer in line would leave. One copy of the weights and moments is kept in memory and used again. With
    train.async_checkpoint: false every call returns when the disk is done, and there is no thread.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.run_dir = config, config.run_dir
        self._pool = ThreadPoolExecutor(1, "checkpoint") if config.train.async_checkpoint else None
        self._jobs: list[Future] = []
        self._snapshot: checkpoint.Snapshot | None = None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Returns when weights and moments are copied; first waits for the checkpoint before, whose memory this one takes."""
        if self._pool is None:
            checkpoint.save(self.run_dir, step, model, optimizer, state, self.config)
            self._prune()
            return
        self.wait()
        self._snapshot = checkpoint.take_snapshot(model, optimizer, step, state, self.config, self._snapshot)
        self._submit(self._write)

    def point_best(self, step: int) -> None:
        """Makes `best` name the checkpoint of `step`, once that is written."""
        self._submit(lambda: self._point_best(checkpoint.checkpoint_name(step)))

    @property
    def failed(self) -> bool:
        """Whether the disk has refused something: `wait` raises it."""
        return any(job.done() and job.exception() is not None for job in self._jobs)

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises the first OSError there was."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Lets the thread finish what it has begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _write(self) -> None:
        checkpoint.write(self.run_dir, self._snapshot)
        self._prune()

    def _prune(self) -> None:
        checkpoint.prune(self.run_dir, self.config.train.keep_checkpoints, self.config.train.keep_every)

    def _point_best(self, name: str) -> None:
        written = [path.name for path in checkpoint.complete_checkpoints(self.run_dir)]
        if name in written:  # unless the disk refused it
            checkpoint.point(self.run_dir, "best", name)

    def _submit(self, job: Callable[[], object]) -> None:
        if self._pool is None:
            job()
        else:
            self._jobs.append(self._pool.submit(job))
