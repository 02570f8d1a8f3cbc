"""Where numbers go: metrics.jsonl (appended, never rewritten), the console with log.txt, and the trackers of the config."""

from __future__ import annotations

import json
import math
import os
import select
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from train.config import RunConfig
from train.files import open_plain, without_home
from train.trackers import Beside, Earlier, start_trackers

HURRIED = 15.0  # seconds that a tracker gets in a run that was asked to stop: who asks often kills after 30


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, without a last line that a kill cut off; empty if there is no file.

    A resumed run may log a step again: a reader keeps the last row of each (kind, step).
    """
    rows = []
    if path.is_file():
        with open(path, "rb") as file:  # bytes: a kill may cut inside a character
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # cut off by a kill; the resumed run wrote it again
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def append_row(path: Path, row: dict) -> None:
    """Adds one JSON line. A line that a kill left unfinished is closed first."""
    line = json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "ab+", opener=open_plain) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode("utf-8"))


def without_nan(value: object) -> object:
    """The same tree of mappings and lists with None for NaN and infinity, as of a skipped step: JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_earlier(run_dir: Path, step: int) -> Earlier:
    """What the run had logged up to `step`, each thing once."""
    rows = {(row.get("kind"), row["step"]): row for row in _up_to(step, run_dir / "metrics.jsonl")}
    samples = {(row.get("prompt"), row["step"]): row for row in _up_to(step, run_dir / "samples.jsonl")}
    return Earlier(step, list(rows.values()), list(samples.values()))


def _up_to(step: int, path: Path) -> list[dict]:
    return [row for row in read_rows(path) if isinstance(row.get("step"), int) and row["step"] <= step]


class Reporter:
    """The run's voice, on rank 0; on other ranks every method does nothing.

    `say` prints and keeps in log.txt, `log` adds a row to metrics.jsonl and tells the trackers (wandb, TensorBoard),
    `progress` moves tqdm's bar. A context manager: leaving it closes the bar and the trackers whatever happened. OSError
    where the disk refuses a line; after the first one nothing more is written, so that the last words of a run that ends
    for it are still printed.
    """

    def __init__(self, config: RunConfig, run_dir: Path, steps: int, start: int, speaks: bool) -> None:
        self.speaks, self.run_dir = speaks, run_dir
        self._bar = None
        self._trackers: list[Beside] = []
        self._disk_refused = False
        self._patience = config.train.stall_timeout / 2 or math.inf  # the watchdog would take more for a stall
        if not speaks:
            return
        self._trackers = start_trackers(config, run_dir, lambda: read_earlier(run_dir, start))
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc=config.name, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def say(self, text: str) -> None:
        """Prints a text, and keeps it in log.txt."""
        if not self.speaks:
            return
        self._show(lambda: self._bar.write(text) if self._bar is not None else print(text, flush=True))
        self._write(append_text, "log.txt", without_home(text) + "\n")

    def log(self, row: dict) -> None:
        """Adds a row to metrics.jsonl and tells the trackers."""
        if not self.speaks:
            return
        self._write(append_row, "metrics.jsonl", row)
        self._tell("log", row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Keeps a sample in samples.jsonl and says it."""
        if self.speaks:
            sample = {"step": step, "prompt": prompt, "text": text}
            self._write(append_row, "samples.jsonl", sample)
            self._tell("sample", sample)
            self.say(f"  {prompt!r} -> {text!r}")

    def progress(self) -> None:
        if self._bar is not None:
            self._show(self._bar.update)

    def close(self, failed: bool = False, hurried: bool = False) -> None:
        """Closes the bar and the trackers, which are told whether the run failed; `hurried` gives them HURRIED seconds at most.
        A second call does nothing."""
        if self._bar is not None:
            self._show(self._bar.close)
        self._bar = None
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close(failed, min(self._patience, HURRIED) if hurried else self._patience)
            self._say_notes(tracker)

    def _show(self, write: Callable[[], object]) -> None:
        """A console that is gone (a closed terminal, a pipe that nobody reads) ends no run: log.txt has every line."""
        try:
            write()
        except OSError:
            self._bar = None
            _leave_dead_console()

    def _write(self, append: Callable[[Path, typing.Any], None], name: str, what: object) -> None:
        if self._disk_refused:
            return
        try:
            append(self.run_dir / name, what)
        except OSError:
            self._disk_refused = True
            raise

    def _tell(self, method: str, *arguments: object) -> None:
        for tracker in self._trackers:
            tracker.tell(method, *arguments)
            self._say_notes(tracker)

    def _say_notes(self, tracker: Beside) -> None:
        """What a tracker's thread wants to be said: said here, because the disk may refuse a line of log.txt."""
        while not tracker.notes.empty():
            self.say(tracker.notes.get())


def _leave_dead_console() -> None:
    """Sends standard output, and standard error if it is gone too, to nowhere: else Python's last flush would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    poll = select.poll()
    poll.register(2, 0)
    os.dup2(null, 1)
    if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
        os.dup2(null, 2)
    os.close(null)


def append_text(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", opener=open_plain) as file:
        file.write(text)
