"""Exercises about numbers and letters (add, compare, spell backwards), from which `exercises.py` makes conversations.

Sums are answered with their working (`47 + 38`: `7+8=15, 4+3+1=8, so 85.`): one-digit sums are a table that can be
learned from examples, a two-digit sum in one step is not. A word to be spelled backwards is given letter by letter,
because BPE hides the letters of a word. Held out, by hash: unordered pairs of numbers, and words.
"""

from __future__ import annotations

import random
import re

from data.exchange import SEED, Exchange, Split, hash_holds_out, one_per_key, shuffled
from data.verse_exercises import may_train, verses

SUM_QUESTIONS = (
    ("What is {a} + {b}?", "And {a} + {b}?"),
    ("What is {a}+{b}?", "And {a}+{b}?"),
    ("{a} + {b}", "{a} + {b}"),
    ("{a}+{b}", "{a}+{b}"),
    ("Add {a} and {b}.", "Now add {a} and {b}."),
)


def sums() -> Split:
    """Sums of two numbers below 100, answered with their working; both orders of a sum are on the same side of the split."""
    rng = random.Random(f"{SEED}:sums")
    train, held_out = [], []
    for a, b in shuffled("sums", ((a, b) for a in range(100) for b in range(100))):
        key = f"sums:{min(a, b)}+{max(a, b)}"
        question, follow_up = rng.choice(SUM_QUESTIONS)
        exchange = Exchange(key, question.format(a=a, b=b), worked_sum(a, b), follow_up.format(a=a, b=b))
        (held_out if hash_holds_out(key, 5) else train).append(exchange)
    return train[:9000], one_per_key(held_out)


def worked_sum(a: int, b: int) -> str:
    """`a + b`, operands 0 to 99, added as on paper: ones first, then tens with what is carried."""
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{carry}={tens}, so {a + b}."


COMPARE_QUESTIONS = (
    ("Which is {word}, {a} or {b}?", "And which is {word}, {a} or {b}?"),
    ("Which number is {word}: {a} or {b}?", "{a} or {b}, which is {word}?"),
)


def compare() -> Split:
    """Which of two numbers below 100 is larger or smaller; both orders of a pair are on the same side of the split."""
    rng = random.Random(f"{SEED}:compare")
    train, held_out = [], []
    for a, b in shuffled("compare", ((a, b) for a in range(100) for b in range(100) if a != b)):
        key = f"compare:{min(a, b)},{max(a, b)}"
        word = rng.choice(("larger", "smaller"))
        question, follow_up = (text.format(a=a, b=b, word=word) for text in rng.choice(COMPARE_QUESTIONS))
        answer = f"{max(a, b) if word == 'larger' else min(a, b)} is {word}."
        (held_out if hash_holds_out(key, 5) else train).append(Exchange(key, question, answer, follow_up))
    return train[:4000], one_per_key(held_out)


BACKWARDS_QUESTIONS = (
    ("Spell backwards: {word}", "And {word}"),
    ("Say these letters backwards: {word}", "Now {word}"),
    ("Reverse {word}", "Reverse {word}"),
)


def backwards() -> Split:
    """Words of the training books with three to five letters; `s t o n e` -> `e n o t s`."""
    rng = random.Random(f"{SEED}:backwards")
    text = " ".join(
        verse for version in ("web", "kjv") for verse_id, verse in verses(version).items() if may_train(verse_id)
    )
    words = {word for word in re.findall(r"\b[a-z]{3,5}\b", text) if word != word[::-1]}
    train, held_out = [], []
    for word in shuffled("backwards", sorted(words)):
        question, follow_up = rng.choice(BACKWARDS_QUESTIONS)
        spaced = " ".join(word)
        exchange = Exchange(
            f"backwards:{word}", question.format(word=spaced), " ".join(word[::-1]), follow_up.format(word=spaced)
        )
        (held_out if hash_holds_out(f"backwards:{word}", 9) else train).append(exchange)
    return train, one_per_key(held_out)
