"""Says who stands still, and ends the process, so that a job hangs for minutes and not for the night."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from train.cli import UNFINISHED
from train.distributed import WAITING, World
from train.guard import StopSignals
from train.pulse import PERIOD, Pulse


class Watchdog:
    """A thread beside the training. When `world.beat` has not been called for `timeout` seconds (0: never), it prints on
    standard error which rank stands still, since when and at what, with this process's Python stacks, and ends the
    process with exit code UNFINISHED: torchrun --max-restarts, or the same command, goes on from the newest checkpoint.

    A process that was itself suspended starts counting anew. One that was asked to stop while another one is silent would
    wait for it in vain: it is ended after SIGNAL_PATIENCE seconds without a move.
    """

    SIGNAL_PATIENCE = 25.0  # torchrun sends SIGKILL after 30

    def __init__(self, world: World, timeout: float, signals: StopSignals) -> None:
        self.world, self.timeout, self.signals = world, timeout, signals
        self._period = min(timeout / 10, PERIOD)
        self._own = Pulse()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.timeout > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        own, world = self._own, self.world
        now = time.monotonic()
        while not self._over.wait(self._period):
            before, now = now, time.monotonic()
            suspended = now - before > self._period + self.timeout / 2
            if world.place != own.place or suspended:
                own.place, own.moved = world.place, now
            own.heard = now
            in_vain = self.signals.heard and any(world.pulses.is_silent(rank) for rank in self._others())
            if now - own.moved > (min(self.timeout, self.SIGNAL_PATIENCE) if in_vain else self.timeout):
                self._end(now)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world.size) if rank != self.world.rank]

    def _end(self, now: float) -> None:
        world = self.world
        pulses = {rank: world.pulses[rank] for rank in self._others()} | {world.rank: self._own}

        def blame(rank: int) -> tuple:
            """Least for the rank that holds the others up: one that says nothing any more, or does not wait for others."""
            pulse = pulses[rank]
            silent = rank != world.rank and world.pulses.is_silent(rank)
            return not silent, pulse.place.endswith(WAITING), int(pulse.place.split(" ")[0]), pulse.moved

        first = min(sorted(pulses), key=blame)
        still = now - self._own.moved
        lines = [
            f"error: rank {world.rank} of {world.size}, {world.doing}: nothing has moved for {still:.0f} s (train.stall_timeout: "
            f"{self.timeout:g}); rank {first} stands still, {self._described(first, pulses, now)}; ending this process: the same command goes "
            "on from the newest checkpoint"
        ]
        if world.size > 1:
            lines += [f"  rank {rank}: {self._described(rank, pulses, now)}" for rank in sorted(pulses)]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        os._exit(UNFINISHED)

    def _described(self, rank: int, pulses: dict[int, Pulse], now: float) -> str:
        pulse = pulses[rank]
        silent = ""
        if rank != self.world.rank and self.world.pulses.is_silent(rank):
            silent = f", silent for {self.world.pulses.silence(rank):.0f} s"
        return f"{pulse.place.partition(' ')[2]} for {now - pulse.moved:.0f} s{silent}"
