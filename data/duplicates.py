"""Texts that come twice, exactly or nearly, found while they stream by, in bounded memory.

Exact: a 64-bit hash of each text. Beyond MOST_KEYS different ones only those whose hash ends in zeros are kept, one bit more each
time it grows too large, and each counts for as many: all copies of a text share a hash, so the counts stay true on average.

Nearly: two token sequences are near when about four fifths of their runs of five tokens are the same. Measured by MinHash
(Broder 1997) with 24 hash functions, found through six bands of four (nine of ten pairs that share 80 % meet in one), for
the first MOST_COMPARED texts of LEAST_TOKENS tokens or more.
"""

from __future__ import annotations

import hashlib

import numpy as np

MOST_KEYS = 2**21  # about 200 MB
MOST_COMPARED = 100_000  # about 120 MB
LEAST_TOKENS = 20  # shorter texts are alike without being copies
RUN = 5  # tokens
BANDS, ROWS = 6, 4
NEAR = 19 / 24  # share of equal minima from which two texts are near

_RANDOM = np.random.Generator(np.random.PCG64(0))
_FACTORS = _RANDOM.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)


class Duplicates:
    """`add` each text in turn; then `overlap` and `near_overlap` count the held-out ones that are trained on as well."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # hash -> 2 x held-out copies + whether one is trained on
        self._every = 1  # of so many texts one is looked at
        self._near = _NearDuplicates()
        self.overlap = self.near_overlap = 0

    def add(self, text: str, ids: list[int], held_out: bool) -> tuple[int, int]:
        """(copies, near copies) that this text stands for: (0, 0) for one that is new."""
        key = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        copies = self._add_key(key, held_out) if key % self._every == 0 else 0
        if copies:
            return copies, 0
        other = self._near.add(ids, held_out)
        if other is None:
            return 0, 0
        self.near_overlap += other
        return 0, 1

    @property
    def compared(self) -> int:
        """Texts among which near duplicates were looked for."""
        return len(self._near.signatures)

    def _add_key(self, key: int, held_out: bool) -> int:
        before = self._seen.get(key, 0)
        trained_on = before & 1
        if held_out:
            self._seen[key] = before + 2
            self.overlap += trained_on * self._every
        else:
            self._seen[key] = before | 1
            self.overlap += (before >> 1) * (not trained_on) * self._every
        copies = self._every if before else 0
        while len(self._seen) > MOST_KEYS:
            self._every *= 2
            self._seen = {key: value for key, value in self._seen.items() if key % self._every == 0}
        return copies


class _NearDuplicates:
    def __init__(self) -> None:
        self.signatures: list[np.ndarray] = []  # (24,) uint32 of each text
        self._first: dict[int, int] = {}  # band -> the first text that has it
        self._held_out: list[bool] = []
        self._counted: set[int] = set()  # held-out texts already known to be trained on

    def add(self, ids: list[int], held_out: bool) -> int | None:
        """None: unlike everything before. Else 1 where it shows a held-out text to be nearly trained on, 0 where not."""
        if len(ids) < LEAST_TOKENS or len(self.signatures) >= MOST_COMPARED:
            return None
        minima = _minima(np.array(ids, dtype=np.uint64))
        signature = (minima >> np.uint64(32)).astype(np.uint32)
        bands = (_mixed(minima).reshape(BANDS, ROWS) * _FACTORS[:ROWS]).sum(1) + np.arange(BANDS, dtype=np.uint64)
        number, match = len(self.signatures), None
        for band in bands.tolist():
            other = self._first.setdefault(band, number)
            if match is None and other != number and (self.signatures[other] == signature).mean() >= NEAR:
                match = other
        self.signatures.append(signature)
        self._held_out.append(held_out)
        if match is None:
            return None
        if self._held_out[match] == held_out:
            return 0
        shown = number if held_out else match
        new = shown not in self._counted
        self._counted.add(shown)
        return int(new)


def _minima(ids: np.ndarray) -> np.ndarray:
    """(24,) uint64: the least hash of all runs of RUN tokens, by each hash function."""
    runs = np.zeros(len(ids) - RUN + 1, dtype=np.uint64)
    for i in range(RUN):
        runs = _mixed(runs * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - RUN + 1 + i])
    return np.array([(runs * factor + offset).min() for factor, offset in zip(_FACTORS, _OFFSETS)], dtype=np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser: every bit of the result depends on every bit of x."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))
