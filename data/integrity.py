"""Checksums of what was written, so that a flipped or cut byte is noticed and its file named.

A folder's SHA256SUMS has the format of coreutils: `sha256sum -c SHA256SUMS` inside the folder checks the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

SUMS = "SHA256SUMS"
PIECE = 2**24  # bytes hashed at a time: other threads run meanwhile
LARGEST_SUMS = 2**20  # bytes; a source of a thousand shards has a tenth
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+)")


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:  # not mapped: a disk that fails is then an OSError, and no SIGBUS
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Writes SHA256SUMS over files of `folder`, flushed to the disk."""
    with open(folder / SUMS, "w", encoding="utf-8") as file:
        file.writelines(f"{sha256_of(folder / name)}  {name}\n" for name in names)
        file.flush()
        os.fsync(file.fileno())


def read_checksums(folder: Path) -> dict[str, str]:
    """{file name: SHA-256 (hex)} as written. ValueError if there are none, or they are no checksums."""
    path = folder / SUMS
    try:
        if not path.exists():
            raise ValueError(f"{path}: missing; if these files can be trusted, sha256sum * > SHA256SUMS makes it anew")
        if not path.is_file() or path.stat().st_size > LARGEST_SUMS:  # a pipe would be waited for
            raise ValueError(f"{path}: damaged, it is no list of checksums")
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    matches = [_LINE.fullmatch(line) for line in lines]
    if not lines or rest or not all(matches):
        raise ValueError(f"{path}: damaged, it is no list of checksums")
    return {match[2]: match[1] for match in matches}


def damage(folder: Path, names: Iterable[str]) -> str | None:
    """What is wrong with the first of `names` that is missing or not as it was written, beginning with its path; None if
    all of them are."""
    try:
        sums = read_checksums(folder)
        for name in names:
            if name not in sums:
                return f"{folder / SUMS}: has no checksum of {name}"
            if not (folder / name).is_file():
                return f"{folder / name}: missing"
            if sha256_of(folder / name) != sums[name]:
                return f"{folder / name}: damaged, its bytes are not those that were written (SHA-256)"
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None
