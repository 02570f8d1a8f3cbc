"""A run folder read again and again: what was added since the last look, whether the process lives, since when nothing moved."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from eval.history import HELD_OUT_ROW, ROWS_LIMIT, SAMPLE, TRAIN_ROW, fitting, open_plain, read_config, routed

CHUNK = 2**20  # bytes read at a time
LONGEST_LINE = 16 * 2**20  # bytes; a longer one is no row of ours
LOG_END = 2**15  # bytes of log.txt that are read
LAST_ROWS = 10  # of training, whose mean is the load now
QUIET, USUAL_TIMES = 30.0, 5.0  # nothing new for so many seconds, and so many times the usual, is a stall
STEP_IN_LOG = re.compile(r"^step +(\d{1,15})/(\d{1,15}) ", re.MULTILINE)


class Tail:
    """The rows of a JSONL file that were added since the last look. A line that is still being written is left for the next."""

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, 0.0  # when the file was last written to
        self._at, self._rest, self._inode, self._skipping = 0, b"", None, False

    def rows(self) -> Iterator[dict]:
        """New rows. `restarted` tells before whether the file is another one."""
        file = open_plain(self.path, ROWS_LIMIT)
        if file is None:
            return
        with file:
            about = os.fstat(file.fileno())
            self.changed, self._inode = about.st_mtime, about.st_ino
            file.seek(self._at)
            while chunk := file.read(CHUNK):
                self._at += len(chunk)
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                for line in lines:
                    row = None if self._skipping else _row(line)
                    self._skipping = False
                    if row is not None:
                        yield row
                if len(self._rest) > LONGEST_LINE:
                    self._rest, self._skipping = b"", True

    def restarted(self) -> bool:
        """Whether the file was replaced or cut since the last look: then a new Tail reads it from its start."""
        try:
            about = os.stat(self.path, follow_symlinks=False)
        except OSError:
            about = None
        return self._at > 0 and (about is None or about.st_ino != self._inode or about.st_size < self._at)


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None  # torn by a kill
    return row if isinstance(row, dict) else None


class Watched:
    """A run as it is known after the last `look`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics, self._samples = Tail(folder / "metrics.jsonl"), Tail(folder / "samples.jsonl")
        self._forget()
        self.config: dict = {}
        self._config_changed = 0.0
        self.log: list[str] = []  # its last lines
        self.alive: bool | None = None  # None: cannot be told
        self.process, self.now = "", time.time()

    def _forget(self) -> None:
        self.losses: dict[int, float] = {}  # by step, rising
        self.held_out: dict[int, dict] = {}
        self.newest: dict = {}  # the newest row of training
        self.recent: deque[dict] = deque(maxlen=LAST_ROWS)
        self.samples: list[dict] = []  # of the newest step that has any
        self.skipped_at: int | None = None

    def look(self) -> None:
        """Reads what is new."""
        if self._metrics.restarted() | self._samples.restarted():
            self._metrics, self._samples = Tail(self._metrics.path), Tail(self._samples.path)
            self._forget()
        self.alive, self.process = lock_holder(
            self.folder / ".lock"
        )  # first: what it wrote before its end is read below
        if (changed := _changed(self.folder / "config.yaml")) != self._config_changed:
            self.config, self._config_changed = read_config(self.folder), changed
        for row in self._metrics.rows():
            self._take(row)
        for row in self._samples.rows():
            sample = fitting(row, SAMPLE)
            if sample.get("step", -1) >= 0:
                same = [
                    s for s in self.samples if s["step"] == sample["step"] and s.get("prompt") != sample.get("prompt")
                ]
                self.samples = [*same, sample]
        self.log = _last_lines(self.folder / "log.txt")
        self.now = time.time()

    def _take(self, row: dict) -> None:
        kind = row.get("kind")
        if kind == "train":
            row = routed(fitting(row, TRAIN_ROW))
            if row.get("step", -1) >= 0:
                for known in (self.losses, self.held_out):  # a resumed run goes back, and logs again what came after
                    while known and next(reversed(known)) >= row["step"] + (known is self.held_out):
                        known.popitem()
                self.losses[row["step"]] = row.get("loss", float("nan"))
                self.newest = row
                self.recent.append(row)
        elif kind == "held_out":
            row = fitting(row, HELD_OUT_ROW)
            if row.get("step", -1) >= 0:
                self.held_out[row["step"]] = row
        elif kind == "bad_step" and isinstance(row.get("step"), int):
            self.skipped_at = row["step"]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """The newest step of which the files tell."""
        return max(self.newest.get("step", 0), max(self.held_out, default=0) if not self.newest else 0)

    @property
    def steps(self) -> int | None:
        """How many there are to be: the log says so where the config counts epochs."""
        wanted = (self.config.get("train") or {}).get("steps")
        if found := STEP_IN_LOG.findall("\n".join(self.log)):
            wanted = int(found[-1][1])
        return wanted if isinstance(wanted, int) and wanted > 0 else None

    @property
    def is_finished(self) -> bool:
        """All steps are done and the process has ended; where that cannot be told, the log has said so."""
        last_words = self.log[-1] if self.log else ""
        if self.alive is None or not self.steps:
            return not self.alive and last_words.startswith("finished: ")
        return not self.alive and self.step >= self.steps

    @property
    def heard_at(self) -> float:
        """When one of the files was last written to, never later than now; 0 where there is none."""
        times = [self._metrics.changed, self._samples.changed, _changed(self.folder / "log.txt")]
        return max(0.0, min(max(times), self.now))  # a file may bear any date, one that no clock can show too

    @property
    def usual_pause(self) -> float:
        """Seconds between two rows of training."""
        times = [row["train_seconds"] for row in self.recent if "train_seconds" in row]
        pauses = sorted(b - a for a, b in zip(times, times[1:], strict=False) if b >= a)
        return pauses[len(pauses) // 2] if pauses else 0.0

    @property
    def silence(self) -> float:
        """Seconds without anything new; 0 where there never was anything."""
        return max(0.0, self.now - self.heard_at) if self.heard_at else 0.0

    @property
    def stalled(self) -> bool:
        """Whether the process lives and has said nothing for much longer than usual."""
        return bool(self.alive) and self.silence > max(QUIET, USUAL_TIMES * self.usual_pause)

    @property
    def speed(self) -> float | None:
        """Tokens a second: the median of the newest rows."""
        rates = sorted(row["tokens_per_second"] for row in self.recent if row.get("tokens_per_second", 0) > 0)
        return rates[len(rates) // 2] if rates else None

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the present speed; without evaluations."""
        per_step = (self.config.get("train") or {}).get("tokens_per_step")
        if not per_step or not self.speed or not self.steps:
            return None
        return max(0, self.steps - self.step) * per_step / self.speed

    def load(self) -> tuple[list[int], list[list[float]]]:
        """(layers, load as multiples of the fair share (L, E)), mean of the newest rows; ([], []) of a dense run."""
        rows = [row["routing"] for row in self.recent if row.get("routing")]
        if not rows:
            return [], []
        last = rows[-1]
        rows = [r for r in rows if (r["layers"], len(r["load"][0])) == (last["layers"], len(last["load"][0]))]
        layers, n = last["layers"], len(last["load"][0])
        return layers, [
            [n * sum(r["load"][i][e] for r in rows) / len(rows) for e in range(n)] for i in range(len(layers))
        ]


def lock_holder(path: Path) -> tuple[bool | None, str]:
    """(whether a training holds the lock of its folder, its process number as text); None where locks do not work.

    The lock is tried for an instant, shared, so that two watchers do not see each other.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return (False if error.errno in (errno.ENOENT, errno.ENOTDIR) else None), ""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None, ""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            digits = re.match(rb"\d{1,10}", os.read(descriptor, 20))
            return True, digits.group().decode() if digits else ""
        return False, ""
    except OSError:
        return None, ""
    finally:
        os.close(descriptor)  # which gives the lock back


def _changed(path: Path) -> float:
    try:
        about = os.stat(path, follow_symlinks=False)
    except OSError:
        return 0.0
    return about.st_mtime if stat.S_ISREG(about.st_mode) else 0.0


def _last_lines(path: Path) -> list[str]:
    file = open_plain(path, ROWS_LIMIT)
    if file is None:
        return []
    with file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - LOG_END))
        text = file.read(LOG_END).decode("utf-8", "replace")
    return [line for line in text.split("\n") if line.strip()]
