"""TensorBoard: RUN/tensorboard/ for `tensorboard --logdir runs`, several runs side by side. Needs the packages tensorboard and pillow.

    tensorboard: true           in the config

Numbers under the names of train.trackers.flat, pictures of the experts' load, samples and bad steps as text, the config as
text and as hyperparameters. A resumed run hides what earlier files have from its step on, so that no step is drawn twice;
turned on later, the files begin with what metrics.jsonl has.
"""

from __future__ import annotations

import json
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from train.cli import need
from train.config import RunConfig
from train.files import open_plain
from train.load_picture import Loads
from train.trackers import AXES, Earlier, Tracker, described, flat

if typing.TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "tensorboard"
LONGEST_TEXT = 2000  # characters of a text that is shown


class TensorBoardTracker(Tracker):
    """RUN/tensorboard/: scalars, texts and pictures, each step once."""

    name = "tensorboard"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        for package in ("tensorboard", "PIL"):  # PIL: pictures
            need(package, "tensorboard: true")
        self._config, self._folder, self._loads = config, run_dir / FOLDER, Loads()
        if self._folder.is_symlink():
            raise ValueError(f"{self._folder}: is a link, and a run writes to plain files alone; remove it")
        self._told: set[tuple] = set()

    def start(self, earlier: Earlier, note: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import summary

        self._make = summary
        self._folder.mkdir(exist_ok=True)
        files = sorted(self._folder.glob("events.out.tfevents.*"))
        self._file = EventFile(self._folder, files[-1].name if files else "", earlier.step)
        self._describe(earlier.step)
        for row in earlier.rows:
            if not files or row["step"] == earlier.step:  # from this step on, what older files have is hidden
                self.log(row)
                self._told.add((row.get("kind"), row["step"]))
            else:
                self._loads.add(row)
        for sample in earlier.samples:
            if not files or sample["step"] == earlier.step:
                self.sample(sample)
                self._told.add((sample["prompt"], sample["step"]))

    def log(self, row: dict) -> None:
        kind, step = row.get("kind"), row["step"]
        if (kind, step) in self._told:  # a resumed run evaluates the step of its checkpoint again
            return
        self._loads.add(row)
        axes = AXES if kind != "train" else ("step",)
        self._file.add_numbers({name: number for name, number in flat(row).items() if name not in axes}, step)
        if kind == "bad_step":
            self._text("bad_step", json.dumps(row, default=str), step)
        if kind == "held_out":
            self._pictures(step)

    def sample(self, sample: dict) -> None:
        if (sample["prompt"], sample["step"]) not in self._told:
            tag = " ".join(sample["prompt"].split())[:60]
            self._text(f"samples/{tag}", sample["prompt"] + sample["text"], sample["step"])

    def idle(self) -> None:
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()

    def _describe(self, step: int) -> None:
        """The config, as text and as the table by which runs are compared."""
        config = described(self._config)
        self._text("config", json.dumps(config, indent=1, ensure_ascii=False), step, limit=100_000)
        chosen = {key: config[key] for key in ("model", "train", "size", "seed")}  # not where things lie
        values = {key: value for key, value in _leaves(chosen) if value is not None}
        for part in self._make.hparams(values, {"held_out/loss": 0, "train/loss": 0}):
            self._file.add(part, step)

    def _pictures(self, step: int) -> None:
        for name, picture in self._loads.pictures().items():
            self._file.add(self._make.image(name, np.asarray(picture), dataformats="HWC"), step)

    def _text(self, tag: str, text: str, step: int, limit: int = LONGEST_TEXT) -> None:
        """The text as it is: four blanks tell Markdown so."""
        shown = "".join(f"    {line}\n" for line in text[:limit].splitlines())
        self._file.add(self._make.text(tag, shown), step)


class EventFile:
    """A new file of events, under a name that sorts after `last` and has no host name in it, as SummaryWriter's would."""

    def __init__(self, folder: Path, last: str, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summaries = event_pb2, summary_pb2
        number = max(int(time.time()), _number(last) + 1)
        path = folder / f"events.out.tfevents.{number:010d}.minimoe"
        self._records = RecordWriter(open(path, "xb", opener=open_plain))
        self._write(event_pb2.Event(file_version="brain.Event:2"), 0)
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides what older files have from `step` on
        self._write(event_pb2.Event(session_log=started), step)

    def add(self, summary: Summary, step: int) -> None:
        self._write(self._events.Event(summary=summary), step)

    def add_numbers(self, numbers: dict[str, float], step: int) -> None:
        """Scalars of one step."""
        value = self._summaries.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in numbers.items() if number is not None]
        self.add(self._summaries.Summary(value=values), step)

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        self._records.write(event.SerializeToString())


def _number(name: str) -> int:
    """The number in the name of one of our files, 0 for another's."""
    parts = name.split(".")
    return int(parts[3]) if len(parts) > 3 and parts[3].isdecimal() else 0


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The texts and numbers of nested mappings under a.b names; lists, of sources and prompts, are no hyperparameters."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", value
