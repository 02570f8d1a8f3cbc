"""The engine's thread: who waits, who is refused, who leaves, and what an accident costs."""

import threading
import time

import pytest

from model.batching import Batch, Row, Sampling
from model.generate import stream
from scripts.serving.engine import SHUTTING_DOWN, Closed, Engine, QueueFull
from train.checkpoint import open_run


class Heard:
    """Listens to rows, and waits for their ends."""

    def __init__(self) -> None:
        self.events, self.changed = [], threading.Condition()

    def __call__(self, event) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def wait(self, until, seconds: float = 20) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: until(self.events), seconds), (
                f"nothing in {seconds} s: {self.events[-2:]}"
            )

    def ends(self, n: int) -> list[str]:
        self.wait(lambda events: sum(event.finish is not None for event in events) >= n)
        return [event.finish for event in self.events if event.finish]

    def said(self, row: Row) -> list[int]:
        return [event.token.id for event in self.events if event.row is row and event.token]


@pytest.fixture
def engine(random_run):
    """engine(max_batch, max_queue) -> one that runs."""
    made = []

    def make(max_batch=4, max_queue=8):
        made.append(Engine(open_run(random_run(), device="cpu"), max_batch, max_queue))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()
        one.join()


def rows(n, length=20, **options) -> list[Row]:
    return [Row([5 + i, 6, 7], Sampling(length, seed=i, **options)) for i in range(n)]


def test_more_than_fit_take_their_turns(engine):
    busy, heard, asked = engine(max_batch=2, max_queue=8), Heard(), rows(8)
    busy.submit(asked, heard)
    assert heard.ends(8) == ["length"] * 8
    for i, row in enumerate(asked):
        assert heard.said(row) == list(stream(busy.run.model, row.prompt, max_new_tokens=20, seed=i))
    end = time.monotonic() + 20
    while busy.load() != (0, 0):  # the last event comes a moment before
        assert time.monotonic() < end, busy.load()
        time.sleep(0.01)


@pytest.fixture
def go(monkeypatch) -> threading.Event:
    """Until it is set, steps bring nothing: whoever is in the batch stays there."""
    event, step = threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: step(batch) if event.is_set() else time.sleep(0.002) or [])
    return event


def test_a_full_queue_refuses_and_takes_again_later(engine, go):
    busy, heard = engine(max_batch=1, max_queue=2), Heard()
    first = rows(1)
    busy.submit(first, heard)
    heard.wait(lambda events: events)
    busy.submit(rows(2), heard)
    with pytest.raises(QueueFull, match="1 requests are being answered and 2 wait"):
        busy.submit(rows(1), heard)
    busy.abandon(first)
    heard.wait(lambda events: any(event.row is not first[0] for event in events))
    busy.submit(rows(1), heard)
    go.set()
    assert heard.ends(3) == ["length"] * 3


def test_whoever_is_abandoned_leaves_running_or_waiting(engine, go):
    busy, heard = engine(max_batch=1, max_queue=2), Heard()
    running, waiting, last = rows(3)
    busy.submit([running], heard)
    heard.wait(lambda events: events)
    busy.submit([waiting, last], heard)
    busy.abandon([running, waiting])
    heard.wait(lambda events: heard.said(last))
    go.set()
    heard.ends(1)
    assert [event.row for event in heard.events if event.finish] == [last]
    assert (running.said, waiting.said) == (1, 0), "not even unheard"


def test_an_end_tells_everyone_and_takes_nobody_more(engine, go):
    busy, heard = engine(max_batch=1, max_queue=4), Heard()
    busy.submit(rows(3), heard)
    heard.wait(lambda events: events)
    busy.stop()
    heard.ends(3)
    assert [event.error for event in heard.events if event.finish] == [SHUTTING_DOWN] * 3
    busy.join()
    with pytest.raises(Closed):
        busy.submit(rows(1), heard)


def test_an_accident_ends_who_was_there_and_nobody_after(engine, monkeypatch, capfd):
    busy, heard, step = engine(), Heard(), Batch.step
    bad = []
    monkeypatch.setattr(Batch, "step", lambda batch: 1 / 0 if batch.rows and bad else step(batch))
    bad.append(1)
    busy.submit(rows(2), heard)
    assert heard.ends(2) == ["error", "error"] and "the engine failed" in heard.events[-1].error
    bad.clear()
    busy.submit(rows(2), heard)
    assert heard.ends(4)[2:] == ["length"] * 2
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_prompt_that_cannot_join_ends_alone(engine, monkeypatch, capfd):
    busy, heard, join = engine(), Heard(), Batch.join
    monkeypatch.setattr(Batch, "join", lambda batch, row: join(batch, row) if row.prompt[0] != 6 else 1 / 0)
    asked = rows(3)
    busy.submit(asked, heard)
    heard.ends(3)
    assert {event.row: event.finish for event in heard.events if event.finish} == dict(
        zip(asked, ("length", "error", "length"))
    )
