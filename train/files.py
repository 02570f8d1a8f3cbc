"""Small files written whole or not at all, into folders that may come from a stranger."""

from __future__ import annotations

import os
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
