"""Small files written whole or not at all, and files that grow, in folders that may come from a stranger."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Puts a new file with this text at `path`, in one rename: a link that stands there is replaced, never followed.

    OSError where the disk or the folder refuses; what was at `path` is then as before.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.unlink(missing_ok=True)  # left behind by a kill, or a link that someone laid here
    try:
        with open(unfinished, "x", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def open_plain(path: str, flags: int) -> int:
    """An opener for files of a run: a plain file, never what a link leads to, nor a pipe that would wait for a reader."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a pipe or a socket
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise ValueError(f"{path}: is a link or a device, and a run writes to plain files alone; remove it")


def without_home(text: str) -> str:
    """The text with ~ for the home folder: logs and reports are passed on, and need not tell whose they are."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def flush_to_disk(path: Path) -> None:
    """Forces a file's or folder's content to disk, so that a rename never outlives what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
