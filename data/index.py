"""index.json of a prepared source: counts and file names. What is read is checked field by field, whoever wrote it."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path

from data import integrity

FORMAT_VERSION = 2
SPLITS = ("train", "held_out")
LARGEST_INDEX = 2**24  # bytes; 120,000 shards of 2**27 tokens need no more
LARGEST_COUNT = 2**60  # tokens and bytes beyond it are no counts
DTYPES = {"uint16": 2**16, "uint32": 2**32}  # dtype -> ids it can hold

_HEX = re.compile(r"[0-9a-f]{64}")
_FINGERPRINTS = ("fingerprint", "fingerprint_without_tokenizer", "tokenizer_fingerprint")
_KEYS = {"version", *_FINGERPRINTS, "vocab_size", "format", "dtype", *SPLITS, "skipped", "seconds"}


def damaged(path: Path, what: str) -> ValueError:
    """The error for a file of a prepared source, with the remedy."""
    return ValueError(f"{path}: {what}; remove {path.parent} and run: python -m scripts.prepare_data CONFIG")


def check_plain(path: Path, largest: int | None = None) -> None:
    """ValueError unless `path` is a file (we write no links) of at most `largest` bytes."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise damaged(path, "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)) from None
    if not stat.S_ISREG(found.st_mode):
        raise damaged(path, "a link" if stat.S_ISLNK(found.st_mode) else "no plain file")
    if largest is not None and found.st_size > largest:
        raise damaged(path, f"damaged, {found.st_size:,} bytes are too many")


def file_names(index: dict, split: str) -> list[str]:
    """The files of one split, without index.json."""
    with_documents = split == "held_out" or index["format"] == "chat"
    return [file["name"] for file in index[split]["files"]] + [f"{split}.idx", f"{split}.bytes"] * with_documents


def read_index(folder: Path) -> dict | None:
    """A prepared folder's index, every field checked; None if there is none. ValueError naming the file otherwise."""
    path = folder / "index.json"
    if not os.path.lexists(path):
        return None
    check_plain(path, LARGEST_INDEX)
    check_plain(folder / integrity.SUMS, LARGEST_INDEX)
    problem = integrity.damage(folder, ["index.json"])
    if problem:
        raise damaged_by(problem, folder)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not readable ({error})") from None
    problem = _problem(index)
    if problem:
        raise damaged(path, f"not readable ({problem})")
    return index


def damaged_by(problem: str, folder: Path) -> ValueError:
    """`integrity.damage`'s sentence with the remedy."""
    return ValueError(f"{problem}; remove {folder} and run: python -m scripts.prepare_data CONFIG")


def _problem(index: object) -> str | None:
    """What is wrong with the first field that is."""
    if not isinstance(index, dict):
        return "it is no JSON object"
    if index.keys() != _KEYS:
        missing, unknown = sorted(_KEYS - index.keys()), sorted(index.keys() - _KEYS)
        return f"missing: {missing[0]}" if missing else f"unknown key {unknown[0][:40]!r}"
    if index["version"] != FORMAT_VERSION or isinstance(index["version"], bool):
        return f"version is not {FORMAT_VERSION}"
    for key in _FINGERPRINTS:
        if not isinstance(index[key], str) or not _HEX.fullmatch(index[key]):
            return f"{key} is no SHA-256"
    if index["format"] not in ("text", "chat"):
        return "format is neither text nor chat"
    if not isinstance(index["dtype"], str) or index["dtype"] not in DTYPES:
        return "dtype is neither uint16 nor uint32"
    if not _is_count(index["vocab_size"]) or not 0 < index["vocab_size"] <= DTYPES[index["dtype"]]:
        return f"vocab_size is none of {index['dtype']} ids"
    seconds = index["seconds"]
    if not (_is_count(seconds) or isinstance(seconds, float) and math.isfinite(seconds) and seconds >= 0):
        return "seconds is no time"
    skipped = index["skipped"]
    if not isinstance(skipped, dict) or not all(
        reason.isprintable() and _is_count(count) for reason, count in skipped.items()
    ):
        return "skipped is no {reason: count}"
    for split in SPLITS:
        problem = _split_problem(index[split], split, index["format"])
        if problem:
            return f"{split}: {problem}"
    return None if index["train"]["tokens"] else "train: no tokens"


def _split_problem(part: object, split: str, format: str) -> str | None:
    if not isinstance(part, dict) or part.keys() != {"tokens", "documents", "bytes", "files"}:
        return "must have tokens, documents, bytes and files"
    for key in ("tokens", "documents", "bytes"):
        if not _is_count(part[key]):
            return f"{key} is no count"
    if not bool(part["tokens"]) == bool(part["documents"]) or part["documents"] > part["tokens"]:
        return "more documents than tokens, or none"
    files = part["files"]
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and file.keys() == {"name", "tokens"} for file in files
    ):
        return "files must be a list of name and tokens"
    if not all(_is_count(file["tokens"]) and file["tokens"] for file in files):
        return "tokens of a file is no count"
    names = [file["name"] for file in files]
    of_ending = {
        ending: sum(isinstance(n, str) and n.endswith(f".{ending}") for n in names) for ending in ("bin", "mask")
    }
    expected = [f"{split}-{i:05d}.{ending}" for ending, n in of_ending.items() for i in range(n)]
    if names != expected:
        return "names of files are not those of shards"
    for ending in ("bin", "mask") if format == "chat" else ("bin",):
        if sum(file["tokens"] for file in files if file["name"].endswith(f".{ending}")) != part["tokens"]:
            return f"tokens are not those of its {ending} files"
    if format == "text" and of_ending["mask"]:
        return "a mask, but format is text"
    return None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT
