"""Signs of life that the processes of a run give each other, through the store of their rendezvous."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

PERIOD = 2.0  # seconds between two signs, at most


@dataclass
class Pulse:
    """What is known of a rank. Times are this process's own, monotonic seconds."""

    place: str = "0 never heard of"  # beats, and what it was doing
    moved: float = 0.0  # when `place` was first heard
    tick: str = ""
    heard: float = 0.0  # when it last said anything at all


class Pulses:
    """A thread that says where this process is, and hears where the others are.

    One of its own: on a link that is cut, a call to the store may never return. `place` gives "BEATS DOING".
    """

    def __init__(self, store: dist.Store, rank: int, size: int, period: float, place) -> None:
        now = time.monotonic()
        self.period = min(period, PERIOD)
        self._ranks = [Pulse(moved=now, heard=now) for _ in range(size)]
        self._store, self._rank, self._place = store, rank, place
        self._over = threading.Event()
        threading.Thread(target=self._exchange, name="pulse", daemon=True).start()

    def __getitem__(self, rank: int) -> Pulse:
        return self._ranks[rank]

    def silence(self, rank: int) -> float:
        """Seconds since a rank last said anything; above 3 periods and a second it is more than a delay."""
        return time.monotonic() - self._ranks[rank].heard

    def is_silent(self, rank: int) -> bool:
        return rank != self._rank and self.silence(rank) > 3 * self.period + 1.0

    def close(self) -> None:
        self._over.set()

    def _exchange(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):  # store lost: then each process speaks for itself
            store = self._store.clone()  # the main thread may be waiting on the other one
            for tick in itertools.count():
                store.set(f"pulse/{self._rank}", f"{tick}|{self._place()}")
                for rank, pulse in enumerate(self._ranks):
                    if rank != self._rank and store.check([f"pulse/{rank}"]):
                        self._hear(pulse, store.get(f"pulse/{rank}").decode("utf-8", "replace"))
                if self._over.wait(self.period):
                    return

    def _hear(self, pulse: Pulse, said: str) -> None:
        tick, _, place = said.partition("|")
        now = time.monotonic()
        if place != pulse.place:
            pulse.place, pulse.moved = place, now
        if tick != pulse.tick:
            pulse.tick, pulse.heard = tick, now
