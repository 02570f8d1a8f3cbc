"""One question with its known answer, and how such items are kept apart: what the exercise files share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass

SEED = 20
N_HELD_OUT = 200  # items of each task: a score of 80 % is then known to 2.8 points (standard error)


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. `key` names what was asked, whatever the words: it decides train or held-out."""

    key: str
    question: str
    answer: str
    follow_up: str | None = None  # the question in short, when the turn before asked the same kind of thing


Split = tuple[list[Exchange], list[Exchange]]  # (train, held out)


def hash_holds_out(key: str, percent: float) -> bool:
    """True for about `percent` of all keys, always for the same ones."""
    digest = hashlib.blake2b(f"{SEED}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percent / 100 * 2**64


def shuffled(label: str, items: Iterable) -> list:
    """The items in an order that depends on `label` and SEED alone."""
    items = list(items)
    random.Random(f"{SEED}:{label}:order").shuffle(items)
    return items


def one_per_key(exchanges: list[Exchange]) -> list[Exchange]:
    """N_HELD_OUT exchanges, no key twice."""
    kept = list({e.key: e for e in exchanges}.values())
    assert len(kept) >= N_HELD_OUT, f"{len(kept)} held-out items, wanted {N_HELD_OUT}"
    return kept[:N_HELD_OUT]
