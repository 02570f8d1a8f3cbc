"""The Python sources of this machine, as text to train on: the standard library, and what is installed beside it.

Tens of megabytes are on every machine that can run this project, hundreds where notebooks and frameworks are installed, and
no hub is asked. What is of no use is left out and counted: licence headers, bundled copies of other packages, what a program
wrote, tables of data, exact and near copies. Whole packages are held out, by name: those of the standard library are the
same wherever the Python is, so figures on them can be compared across machines. What shares much with them, as a fork does, is
not trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
import site
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.duplicates import Duplicates

HELD_OUT = {
    "stdlib": ("asyncio", "email", "http", "json", "logging", "multiprocessing", "statistics", "xml", "zipfile"),
    "packages": ("Jinja2", "Werkzeug", "anyio", "click", "fsspec", "httpx", "requests", "tqdm"),
}
BUNDLED = frozenset(("_vendor", "_vendored", "vendor", "vendored", "externals", "extern", "third_party", "thirdparty"))
LEAST_BYTES = 200  # of a file's text: an __init__.py with two imports teaches nothing
LARGEST_FILE = 2**20  # bytes; what people write is shorter
# As The Stack leaves out (arXiv 2211.15533, section 4.1, after Codex, arXiv 2107.03374, section 3.1).
LONGEST_LINE, LONGEST_MEAN_LINE = 1000, 100  # characters
LEAST_LETTERS = 0.5  # of all characters that are no space: below, it is a table
LEAST_RATIO = (
    0.07  # compressed by zlib: chardet's language models reach 0.03, code of 5,000 installed files no less than 0.07
)
GENERATED = re.compile(
    r"\b(auto-?\s?generated|automatically (generated|created)|(file|code|module|was|is) generated|generated (by|from|with|using)|do not "
    r"(edit|modify)|machine[- ]generated)\b",
    re.IGNORECASE,
)
LOOKED_AT = 1500  # characters at a file's beginning in which it would say that a program wrote it
LICENCE = re.compile(r"copyright|licen[cs]e|\bspdx\b|all rights reserved", re.IGNORECASE)
HEADER = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)+")  # comments and empty lines at the beginning
WORD = re.compile(r"\w+|[^\w\s]")
# A fork (httpx2 of httpx, typer's click) is changed in too many places to be a near copy, and still gives the held-out text away.
RUN = 8  # words
MOST_SHARED = 0.25  # of a file's runs of RUN words that held-out text may have too


@dataclasses.dataclass
class Source:
    """One file worth training on. `group` is stdlib or packages; `package` a module of the one, a distribution of the other."""

    group: str
    package: str
    path: str  # relative to the folder of its group, with forward slashes
    text: str
    held_out: bool


@dataclasses.dataclass
class Survey:
    """What `sources` met: bytes and files by group, what was left out by reason, packages with their versions."""

    files: Counter = dataclasses.field(default_factory=Counter)  # (group, held_out) -> files
    bytes: Counter = dataclasses.field(default_factory=Counter)  # (group, held_out) -> UTF-8 bytes
    left_out: Counter = dataclasses.field(default_factory=Counter)  # reason -> files
    packages: dict[str, Counter] = dataclasses.field(
        default_factory=lambda: {"stdlib": Counter(), "packages": Counter()}
    )


def is_held_out(group: str, package: str) -> bool:
    """Whether a package is for measuring alone. A distribution's name may be written in several ways: Jinja2, jinja2."""
    return _normal(package) in map(_normal, HELD_OUT[group])


def _normal(name: str) -> str:
    """A name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def sources(survey: Survey, roots: dict[str, list[Path]] | None = None) -> Iterator[Source]:
    """Every file worth training on, held-out packages first, so that a copy of theirs elsewhere is what is left out; then by
    package and path. `survey` is filled on the way; `roots` are the folders of each group, by default this Python's."""
    duplicates, measured = Duplicates(), HeldOutRuns()
    for group, package, root, file in _files(roots or default_roots()):
        held_out = is_held_out(group, package)
        text = _read(file)
        reason = "not UTF-8" if text is None else _by_its_name(file.relative_to(root)) or useless(text)
        if reason is None:
            text = without_licence(text)
            words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORD.findall(text)]
            reason = _copy_of_another(duplicates, text, words, held_out) if len(text) >= LEAST_BYTES else "short"
            if reason is None and held_out:
                measured.add(words)
            elif reason is None and measured.share(words) > MOST_SHARED:
                reason = "like held-out text"
        if reason is not None:
            survey.left_out[reason] += 1
            continue
        size = len(text.encode("utf-8"))
        survey.files[group, held_out] += 1
        survey.bytes[group, held_out] += size
        survey.packages[group][package] += size
        yield Source(group, package, file.relative_to(root).as_posix(), text, held_out)


def default_roots() -> dict[str, list[Path]]:
    """Where this Python keeps its standard library, and what is installed beside it."""
    paths = sysconfig.get_paths()
    installed = dict.fromkeys(
        Path(path).resolve() for path in (paths["purelib"], paths["platlib"], *site.getsitepackages())
    )
    return {"stdlib": [Path(paths["stdlib"]).resolve()], "packages": [path for path in installed if path.is_dir()]}


def useless(text: str) -> str | None:
    """Why a file is not worth training on, None if it is."""
    if len(text) < LEAST_BYTES:
        return "short"
    if len(text) > LARGEST_FILE:
        return "large"
    if GENERATED.search(text[:LOOKED_AT]):
        return "generated"
    lines = text.splitlines()
    if max(map(len, lines)) > LONGEST_LINE or len(text) / len(lines) > LONGEST_MEAN_LINE:
        return "data"
    seen = [character for character in text if not character.isspace()]
    content = text.encode("utf-8", "replace")
    is_table = sum(map(str.isalpha, seen)) < LEAST_LETTERS * len(seen)
    return "data" if is_table or len(zlib.compress(content, 1)) < LEAST_RATIO * len(content) else None


def without_licence(text: str) -> str:
    """The text without comments at its beginning, if they speak of a licence: thousands of files begin with the same ones."""
    header = HEADER.match(text)
    return text[header.end() :] if header and LICENCE.search(header.group()) else text


def manifest(survey: Survey, digests: dict[str, str]) -> dict:
    """What a reader of figures needs to know of the text: what it is made of, and a fingerprint (SHA-256) over its files."""
    return {
        "fingerprint": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
        "files": digests,
        "python": platform.python_version(),
        "groups": {
            group: {
                "train": {"files": survey.files[group, False], "bytes": survey.bytes[group, False]},
                "held_out": {"files": survey.files[group, True], "bytes": survey.bytes[group, True]},
                "held_out_packages": [name for name in sorted(survey.packages[group]) if is_held_out(group, name)],
                "packages": {
                    name: {"bytes": size} | ({"version": _version(name)} if group == "packages" else {})
                    for name, size in sorted(survey.packages[group].items())
                },
            }
            for group in survey.packages
        },
        "left_out": dict(survey.left_out.most_common()),
    }


def _files(roots: dict[str, list[Path]]) -> Iterator[tuple[str, str, Path, Path]]:
    """(group, package, folder of the group, file), in the order of `sources`."""
    distributions = importlib.metadata.packages_distributions()
    found = []
    for group, folders in roots.items():
        for root in folders:
            for file in root.rglob("*.py"):
                parts = file.relative_to(root).parts
                if group == "stdlib" and ({"site-packages", "dist-packages"} & set(parts)):
                    continue
                if file.is_symlink() or not file.is_file():
                    continue
                module = parts[0].removesuffix(".py")
                package = module if group == "stdlib" else sorted(distributions.get(module) or [module])[0]
                found.append((not is_held_out(group, package), group != "stdlib", package, parts, root, file))
    for _, is_package, package, _, root, file in sorted(found, key=lambda each: each[:4]):
        yield "packages" if is_package else "stdlib", package, root, file


def _read(file: Path) -> str | None:
    """The file's text; None where it is no UTF-8 or cannot be read. What is too large to be a source is read no further."""
    try:
        with file.open("rb") as content:
            return content.read(4 * LARGEST_FILE).decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def _by_its_name(path: Path) -> str | None:
    """Why a file is left out that need not be read for it."""
    if not BUNDLED.isdisjoint(path.parts):
        return "bundled copy"
    return "generated" if path.stem.endswith("generated") else None


class HeldOutRuns:
    """All runs of RUN words of the held-out text, as 64-bit hashes: `add` its files first, then ask for others' `share`."""

    def __init__(self) -> None:
        self._added: list[np.ndarray] = []
        self._sorted = np.zeros(0, dtype=np.uint64)

    def add(self, words: list[int]) -> None:
        self._added.append(_runs(words))

    def share(self, words: list[int]) -> float:
        """The part of these words' runs that are held-out text's too, 0 to 1."""
        if self._added:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._added]))
            self._added = []
        runs = _runs(words)
        if not len(runs) or not len(self._sorted):
            return 0.0
        places = np.searchsorted(self._sorted, runs).clip(
            max=len(self._sorted) - 1
        )  # np.isin would sort them all again
        return float((self._sorted[places] == runs).mean())


def _runs(words: list[int]) -> np.ndarray:
    """uint64: a hash of each different run of RUN words."""
    ids = np.array(words, dtype=np.uint64)
    hashes = np.zeros(max(0, len(ids) - RUN + 1), dtype=np.uint64)
    for i in range(RUN if len(hashes) else 0):
        hashes = (
            hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + len(hashes)]
        )  # 2^64 / the golden ratio, modulo 2^64
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def _copy_of_another(duplicates: Duplicates, text: str, words: list[int], held_out: bool) -> str | None:
    copies, near = duplicates.add(text, words, held_out)
    return "copy" if copies else "near copy" if near else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
