"""Says who stands still, and ends the process, so that a job hangs for minutes and not for the night."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time

import torch.distributed as dist

from train.cli import UNFINISHED
from train.distributed import World


class Watchdog:
    """A thread beside the training. When `world.beat` has not been called for `timeout` seconds (0: never), it prints on
    standard error which rank stood still first, since when and at what, with this process's Python stacks, and ends the
    process with exit code UNFINISHED: torchrun --max-restarts, or the same command, goes on from the newest checkpoint.

    Ranks tell each other through the store of the rendezvous. A process that was itself suspended starts counting anew.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self._period = min(timeout / 10, 2.0)
        self._seen = [("", time.monotonic())] * world.size  # what each rank last said, and when it was first heard
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if self.world.store is not None:
                threading.Thread(target=self._exchange, name="pulse", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        now = moved = time.monotonic()
        beats = -1
        while not self._over.wait(self._period):
            before, now = now, time.monotonic()
            suspended = now - before > self._period + self.timeout / 2
            if self.world.beats != beats or suspended:
                beats, moved = self.world.beats, now
            if now - moved > self.timeout:
                self._seen[self.world.rank] = (f"{beats} {self.world.doing}", moved)
                self._end(now)

    def _exchange(self) -> None:
        """A thread of its own: on a link that is cut, a call to the store may never return."""
        world = self.world
        with contextlib.suppress(dist.DistError, RuntimeError):  # store lost: then each process speaks for itself
            store = world.store.clone()  # the main thread may be waiting on the other one
            while not self._over.wait(self._period):
                store.set(f"pulse/{world.rank}", f"{world.beats} {world.doing}")
                for rank in range(world.size):
                    if rank != world.rank and store.check([f"pulse/{rank}"]):
                        said = store.get(f"pulse/{rank}").decode("utf-8", "replace")
                        if said != self._seen[rank][0]:
                            self._seen[rank] = (said, time.monotonic())

    def _end(self, now: float) -> None:
        world, seen = self.world, self._seen
        first = min(range(world.size), key=lambda rank: seen[rank][1])
        lines = [
            f"error: rank {world.rank} of {world.size}: nothing has moved for {self.timeout:g} s (train.stall_timeout); rank {first} "
            f"stood still first, {_place(seen[first], now)}; ending this process: the same command goes on from the newest "
            "checkpoint"
        ]
        if world.size > 1:
            lines += [f"  rank {rank}: {_place(seen[rank], now)}" for rank in range(world.size)]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(UNFINISHED)


def _place(said: tuple[str, float], now: float) -> str:
    doing = said[0].partition(" ")[2] or "never heard of"
    return f"{doing}, for {now - said[1]:.0f} s"
