"""A run in the terminal, running, finished or dead: how far it is, how it learns, what its experts do, what it writes.

    python -m scripts.watch runs/my-run                 until it is finished, or Ctrl-C
    python -m scripts.watch runs/my-run --once          one look, as does a pipe: ... | less

It reads the run's files only (metrics.jsonl, samples.jsonl, log.txt, config.yaml) and touches nothing: training knows nothing of it,
and it may be started and ended at any time. Whether the process lives is known from the lock that a training holds on its
folder. Colours are left out where NO_COLOR is set.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from eval.history import run_folder_of
from scripts.watching.files import Watched
from scripts.watching.screen import frame
from scripts.watching.text import Style
from train import cli

ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l"  # no line is broken by the terminal: a resize may come late
LEAVE = b"\x1b[?7h\x1b[?25h\x1b[?1049l"
SHORTEST, LONGEST = 0.1, 3600.0  # seconds between two looks


def main() -> int:
    parser = cli.parser("Shows a run in the terminal while it goes on.", "python -m scripts.watch runs/my-run")
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--once", action="store_true", help="one look, then end (so does output that is no terminal)")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="between two looks (default: 2)")
    options = parser.parse_args()
    if not SHORTEST <= options.every <= LONGEST:
        raise ValueError(f"--every: {options.every:g} must be {SHORTEST:g} to {LONGEST:g} seconds")
    folder = run_folder_of(Path(options.run))
    if folder is None:
        raise ValueError(
            f"{options.run}: no run folder (neither config.yaml nor metrics.jsonl in it); give one such as runs/NAME"
        )
    run = Watched(folder)
    style = Style.of(sys.stdout)
    if options.once or not sys.stdout.isatty():
        run.look()
        print("\n".join(frame(run, style, *_size(None))))
        return 0
    with contextlib.suppress(KeyboardInterrupt), _screen(), _wakes() as wait:
        while True:
            run.look()
            lines = frame(run, style, *_size(0))
            _draw(lines)
            if run.is_finished:
                break
            wait(options.every)
    print("\n".join(frame(run, style, *_size(None))))  # what was seen last stays in the terminal
    return 0


def _size(rows: int | None) -> tuple[int, int | None]:
    """(columns, rows) of the terminal; rows None: as many as are wanted."""
    size = shutil.get_terminal_size()
    return max(20, size.columns), None if rows is None else max(5, size.lines)


def _draw(lines: list[str]) -> None:
    """From the top, each line to its end, and nothing below."""
    sys.stdout.write("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J")
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The terminal's second screen, without a cursor; the first one comes back whatever happens, a Ctrl-Z too."""

    def suspend(*_: object) -> None:
        os.write(1, LEAVE)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.write(1, ENTER)  # after `fg`

    handlers = {signal.SIGTERM: lambda *_: sys.exit(0), signal.SIGTSTP: suspend}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    os.write(1, ENTER)
    try:
        yield
    finally:
        os.write(1, LEAVE)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _wakes() -> Iterator:
    """A wait(seconds) that a resize of the terminal ends early."""
    reads, writes = os.pipe()
    for end in (reads, writes):
        os.set_blocking(end, False)
    handler = signal.signal(signal.SIGWINCH, lambda *_: None)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

    def wait(seconds: float) -> None:
        if select.select([reads], [], [], seconds)[0]:
            time.sleep(0.05)  # a window that is dragged changes its size many times
            os.read(reads, 4096)

    try:
        yield wait
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGWINCH, handler)
        os.close(reads)
        os.close(writes)


if __name__ == "__main__":
    cli.run(main)
