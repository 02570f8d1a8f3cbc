"""Services that show a run while it trains: Weights & Biases and TensorBoard, behind one interface.

    wandb: {mode: online}       in the config: the run at wandb's, or offline beside the run
    tensorboard: true           RUN/tensorboard/, for `tensorboard --logdir runs`

metrics.jsonl is the record, a tracker is a guest: it is told each row in a thread of its own, so that training neither
waits for it nor ends with it, whatever happens to a network, a disk or a service. What goes wrong is said once.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import threading
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.flops import flops_per_token, total_count
from train.config import RunConfig, to_dict
from train.files import without_home

MOST_WAITING = 5000  # rows that a tracker may be behind before it is given up; with hundreds of experts 25 KB each
AXES = ("step", "tokens", "train_seconds")  # what a row's other numbers may be drawn against


@dataclass
class Earlier:
    """What the run had logged up to the step it goes on from."""

    step: int
    rows: list[dict]  # of metrics.jsonl
    samples: list[dict]  # of samples.jsonl


class Tracker:
    """What a service is told of a run. An exception ends the tracker, and nothing else.

    The constructor is called by the training itself: ValueError for what the user can mend. Everything else is called
    in one thread beside it.
    """

    name = "tracker"
    patience = 30.0  # seconds that the end of a run waits for `close`

    def start(self, earlier: Earlier, note: Callable[[str], None]) -> None:
        """Opens the service, which may take a while. `note` has a text said by the run."""

    def log(self, row: dict) -> None:
        """A row of metrics.jsonl: of kind train, held_out or bad_step."""

    def sample(self, sample: dict) -> None:
        """A row of samples.jsonl."""

    def idle(self) -> None:
        """There is nothing more to tell for now: a good moment to flush."""

    def close(self, failed: bool) -> None:
        """The run ends; `failed` if it does with an error."""


class Beside:
    """A tracker in a thread of its own. `notes` are texts that the run should say, in its own time."""

    def __init__(self, tracker: Tracker, earlier: Callable[[], Earlier]) -> None:
        self.tracker, self.ended = tracker, False
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waiting: queue.Queue[tuple] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(earlier,), name=tracker.name, daemon=True)
        self._thread.start()

    def tell(self, method: str, *arguments: object) -> None:
        """Has tracker.method(*arguments) called soon; never waits."""
        if not self.ended:
            try:
                self._waiting.put_nowait((method, *arguments))
            except queue.Full:
                self._give_up(f"is {MOST_WAITING} rows behind")

    def close(self, failed: bool, at_most: float = math.inf) -> None:
        """Tells the end, and waits for it as long as the tracker's patience says, or `at_most` seconds. Processes that it leaves
        behind are killed."""
        patience = min(self.tracker.patience, at_most)
        self.tell("close", failed)
        self._thread.join(patience if not self.ended else 1.0)
        if self._thread.is_alive():
            self._give_up(f"did not finish within {patience:.0f} s")
            deadline = time.monotonic() + min(5.0, patience)
            while self._thread.is_alive() and time.monotonic() < deadline:
                kill_children(self._thread)  # wandb's exit hook would wait for its process for ever
                self._thread.join(0.2)

    def _work(self, earlier: Callable[[], Earlier]) -> None:
        try:
            self.tracker.start(earlier(), self._note)
            method = ""
            while method != "close":
                if self._waiting.empty():
                    self.tracker.idle()
                method, *arguments = self._waiting.get()
                getattr(self.tracker, method)(*arguments)
        except (Exception, SystemExit) as error:  # of a service's own kinds: its failure is no failure of the run
            self._give_up(one_line(error))
        self.ended = True

    def _note(self, text: str) -> None:
        if not self.ended:  # who was given up has nothing more to say
            self.notes.put(text)

    def _give_up(self, why: str) -> None:
        if not self.ended:
            self.ended = True
            self.notes.put(f"{self.tracker.name}: {why}; the run goes on without it, metrics.jsonl has every row")


def kill_children(thread: threading.Thread) -> None:
    """Ends the processes that a thread has started, where the system tells them (Linux)."""
    children = Path(f"/proc/self/task/{thread.native_id}/children")
    try:
        for child in children.read_text(encoding="ascii").split():
            os.kill(int(child), signal.SIGKILL)
    except OSError:  # the thread, or the process, has just ended
        pass


def start_trackers(config: RunConfig, run_dir: Path, earlier: Callable[[], Earlier]) -> list[Beside]:
    """The trackers that the config asks for, each at work. ValueError where one is not installed or its files are no plain ones."""
    trackers: list[Tracker] = []
    if config.wandb.mode != "disabled":
        from train.wandb_tracker import WandbTracker

        trackers.append(WandbTracker(config, run_dir))
    if config.tensorboard:
        from train.tensorboard_tracker import TensorBoardTracker

        trackers.append(TensorBoardTracker(config, run_dir))
    return [Beside(tracker, earlier) for tracker in trackers]


def publish(run_dir: str | Path, files: Sequence[str | Path]) -> str:
    """Adds files, such as the report, to the run's wandb run: an artifact, and HTML as a page of it. Returns a sentence
    that says where they are.

    The mode is the config's, online where that is disabled; online without a key is offline, and the sentence says so.
    ValueError if wandb is not installed or does not take them, or while the run is being trained.
    """
    from train.wandb_tracker import publish as publish_to_wandb

    return publish_to_wandb(Path(run_dir), [Path(file) for file in files])


def flat(row: dict) -> dict[str, float]:
    """A row's numbers by name: step, tokens, train/loss, held_out/SOURCE/bits_per_byte, routing/max_vio/layer_2,
    load/layer_2/expert_05 (the share of the layer's tokens), bad_step/grad_norm."""
    kind, numbers = row.get("kind", "train"), {}
    for key, value in row.items():
        if key in AXES:
            numbers[key] = value
        elif key == "routing":
            numbers |= _routing(value)
        else:
            numbers |= _numbers(value, kind if key == "sources" else f"{kind}/{key}")
    return numbers


def _routing(routing: dict) -> dict[str, float]:
    numbers, layers = {}, routing["layers"]
    for key, values in routing.items():
        for layer, value in zip(layers, values, strict=True):
            if key == "load":
                digits = len(str(len(value) - 1))
                numbers |= {f"load/layer_{layer}/expert_{e:0{digits}}": share for e, share in enumerate(value)}
            elif key != "layers":
                numbers[f"routing/{key}/layer_{layer}"] = value
    return numbers


def _numbers(value: object, name: str) -> dict[str, float]:
    """The numbers of a mapping by name/key; a bare number by its name. Texts and lists are for tables."""
    if isinstance(value, dict):
        return {key: number for at, item in value.items() for key, number in _numbers(item, f"{name}/{at}").items()}
    return {name: value} if isinstance(value, int | float) else {}


def described(config: RunConfig) -> dict:
    """The config as a service shows it, with what follows from it and runs are compared by."""
    count = total_count(config.model)
    size = {
        "parameters": count.total,
        "active_parameters": count.active,
        "flops_per_token": flops_per_token(config.model, config.context_length),
    }
    return {**_map_texts(to_dict(config), without_home), "size": size}


def _map_texts(value: object, change: Callable[[str], str]) -> typing.Any:
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
