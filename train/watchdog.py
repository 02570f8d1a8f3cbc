"""Says who stands still, and ends the process, so that a job hangs for minutes and not for the night."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from train.cli import UNFINISHED
from train.distributed import WAITING, World
from train.guard import StopSignals


@dataclass
class Pulse:
    """What is known of a rank. Times are this process's own, monotonic seconds."""

    place: str = "0 never heard of"  # beats, and what it was doing
    moved: float = 0.0  # when `place` was first heard
    tick: str = ""
    heard: float = 0.0  # when it last said anything at all


class Watchdog:
    """A thread beside the training. When `world.beat` has not been called for `timeout` seconds (0: never), it prints on
    standard error which rank stands still, since when and at what, with this process's Python stacks, and ends the
    process with exit code UNFINISHED: torchrun --max-restarts, or the same command, goes on from the newest checkpoint.

    Ranks tell each other through the store of the rendezvous. A process that was itself suspended starts counting anew. One
    of several that was asked to stop while it waits for a lost one cannot obey: it is ended after SIGNAL_PATIENCE seconds.
    """

    SIGNAL_PATIENCE = 25.0  # torchrun sends SIGKILL after 30

    def __init__(self, world: World, timeout: float, signals: StopSignals) -> None:
        self.world, self.timeout, self.signals = world, timeout, signals
        self._period = min(timeout / 10, 2.0)
        now = time.monotonic()
        self._pulses = [Pulse(moved=now, heard=now) for _ in range(world.size)]
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
        own = self._pulses[self.world.rank]
        now = time.monotonic()
        while not self._over.wait(self._period):
            before, now = now, time.monotonic()
            suspended = now - before > self._period + self.timeout / 2
            place = f"{self.world.beats} {self.world.doing}"
            if place != own.place or suspended:
                own.place, own.moved = place, now
            own.heard = now
            hurry = self.world.size > 1 and self.signals.heard()
            if now - own.moved > (min(self.timeout, self.SIGNAL_PATIENCE) if hurry else self.timeout):
                self._end(now)

    def _exchange(self) -> None:
        """A thread of its own: on a link that is cut, a call to the store may never return."""
        world = self.world
        with contextlib.suppress(dist.DistError, RuntimeError):  # store lost: then each process speaks for itself
            store = world.store.clone()  # the main thread may be waiting on the other one
            for tick in itertools.count():
                if self._over.wait(self._period):
                    return
                store.set(f"pulse/{world.rank}", f"{tick}|{world.beats} {world.doing}")
                for rank in range(world.size):
                    if rank != world.rank and store.check([f"pulse/{rank}"]):
                        self._hear(self._pulses[rank], store.get(f"pulse/{rank}").decode("utf-8", "replace"))

    def _hear(self, pulse: Pulse, said: str) -> None:
        tick, _, place = said.partition("|")
        now = time.monotonic()
        if place != pulse.place:
            pulse.place, pulse.moved = place, now
        if tick != pulse.tick:
            pulse.tick, pulse.heard = tick, now

    def _end(self, now: float) -> None:
        world = self.world

        def blame(rank: int) -> tuple:
            """Least for the rank that holds the others up: one that says nothing any more, or does not wait for others."""
            pulse = self._pulses[rank]
            silent = now - pulse.heard > 3 * self._period + 1.0
            return not silent, pulse.place.endswith(WAITING), int(pulse.place.split(" ")[0]), pulse.moved

        first = min(range(world.size), key=blame)
        still = now - self._pulses[world.rank].moved
        lines = [
            f"error: rank {world.rank} of {world.size}, {world.doing}: nothing has moved for {still:.0f} s (train.stall_timeout: "
            f"{self.timeout:g}); rank {first} stands still, {self._described(first, now)}; ending this process: the same command goes "
            "on from the newest checkpoint"
        ]
        if world.size > 1:
            lines += [f"  rank {rank}: {self._described(rank, now)}" for rank in range(world.size)]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(UNFINISHED)

    def _described(self, rank: int, now: float) -> str:
        pulse = self._pulses[rank]
        silence = now - pulse.heard
        silent = f", silent for {silence:.0f} s" if silence > 3 * self._period + 1.0 else ""
        return f"{pulse.place.partition(' ')[2]} for {now - pulse.moved:.0f} s{silent}"
