"""One thread that owns the model and runs the batch; requests come from the server's event loop and go back to it."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from model.batching import Batch, Event, Row
from train.checkpoint import Run

PREFILL_TOKENS = 512  # of prompts between two steps, one prompt at least: what others wait for while newcomers join
SHUTTING_DOWN = "the server is shutting down"


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The server is shutting down, or its engine has died."""


Deliver = Callable[[Event], None]  # called from the engine's thread


class Engine:
    """Continuous batching behind a queue: at most `max_batch` rows are continued at once, `max_queue` wait."""

    def __init__(self, run: Run, max_batch: int, max_queue: int) -> None:
        self.run, self.max_batch, self.max_queue = run, max_batch, max_queue
        self._waiting: deque[Row] = deque()
        self._listeners: dict[Row, Deliver] = {}  # of every row that has not ended
        self._abandoned: list[Row] = []
        self._changed = threading.Condition()  # guards the three above and `_closing`
        self._closing = False
        self._running = 0  # rows in the batch, for `load`
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Takes nothing more, and ends every request with an error that says why. Returns at once."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self) -> None:
        """After `stop`: returns when the thread is gone."""
        if self._thread.is_alive():
            self._thread.join()

    @property
    def closed(self) -> bool:
        return self._closing or not self._thread.is_alive()

    def load(self) -> tuple[int, int]:
        """Rows that are being continued, rows that wait."""
        return self._running, len(self._waiting)

    def submit(self, rows: Sequence[Row], deliver: Deliver) -> None:
        """Queues a request's rows. Raises QueueFull or Closed, and then none of them is queued."""
        with self._changed:
            if self.closed:
                raise Closed(SHUTTING_DOWN)
            free = max(self.max_batch - self._running, 0)
            if len(self._waiting) + len(rows) > free + self.max_queue:
                raise QueueFull(
                    f"{self._running} requests are being answered and {len(self._waiting)} wait; try again later"
                )
            self._listeners.update(dict.fromkeys(rows, deliver))
            self._waiting.extend(rows)
            self._changed.notify()

    def abandon(self, rows: Sequence[Row]) -> None:
        """Nobody listens to these any more: they leave before the next step. Nothing where they have ended."""
        with self._changed:
            rows = [row for row in rows if self._listeners.pop(row, None)]
            self._abandoned += rows
            self._waiting = deque(row for row in self._waiting if row in self._listeners)
            self._changed.notify()

    def _work(self) -> None:
        with self.run.autocast():
            batch = Batch(self.run.model)
            while self._wait_for_work(batch):
                try:
                    for row in self._take_abandoned():
                        batch.leave(row)
                    self._admit(batch)
                    self._tell(batch.step())
                except Exception:  # out of memory, say: who was in the batch is told, and the next ones find it empty
                    traceback.print_exc()
                    self._tell(
                        [Event(row, finish="error", error="the engine failed; see its log") for row in batch.rows]
                    )
                    batch = Batch(self.run.model)
                self._running = len(batch.rows)
        self._tell([Event(row, finish="error", error=SHUTTING_DOWN) for row in list(self._listeners)])
        self._running = 0

    def _wait_for_work(self, batch: Batch) -> bool:
        """Returns when there is something to do; False at the end."""
        with self._changed:
            while not (self._closing or self._waiting or self._abandoned or batch.rows):
                self._changed.wait()
            return not self._closing

    def _take_abandoned(self) -> list[Row]:
        with self._changed:
            rows, self._abandoned = self._abandoned, []
            return rows

    def _admit(self, batch: Batch) -> None:
        """Lets waiting rows join. What is wrong with one ends that one."""
        read = 0
        while read < PREFILL_TOKENS and len(batch.rows) < self.max_batch:
            with self._changed:
                if not self._waiting:
                    return
                row = self._waiting.popleft()
                self._running = len(batch.rows) + 1
            read += len(row.prompt)
            try:
                events = batch.join(row)
            except Exception as error:  # a prompt that cannot be, or no memory for it
                traceback.print_exc()
                batch.leave(row)
                events = [Event(row, finish="error", error=f"the engine refused this request: {error}".split("\n")[0])]
            self._tell(events)

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            with self._changed:
                ended = event.finish is not None
                deliver = self._listeners.pop(event.row, None) if ended else self._listeners.get(event.row)
            if deliver is not None:
                deliver(event)
