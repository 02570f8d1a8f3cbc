"""Exercises about Bible verses (modern English, testament, book, go on), from which `exercises.py` makes conversations.

Verses are short, and lose their quotation marks, which open in one verse and close in another. `modern`, `testament` and
`continue` hold out the verses of the six held-out books. `book` asks for a book by name and cannot ask about a book
it never heard of: it holds out verses of its eight books. Pretraining has read those verses, but no book's name beside
them, and no conversation of any task contains them.
"""

from __future__ import annotations

import functools
import random
import re

from data.corpora import BOOKS, HELD_OUT_BOOKS, bible_verses
from data.exchange import N_HELD_OUT, SEED, Exchange, Split, hash_holds_out, shuffled

ASKED_BOOKS = ("Genesis", "Leviticus", "Psalms", "Proverbs", "Mark", "Acts", "Romans", "Revelation")
OLD_TESTAMENT_BOOKS = 39
MAX_VERSE_CHARACTERS = 120


@functools.cache
def verses(version: str) -> dict[int, str]:
    """Verse id -> text, without the quotation marks that do not close."""
    cleaned = {verse_id: text.replace('"', "").strip() for verse_id, text in bible_verses(version).items()}
    return {verse_id: re.sub(r"(^'|(?<=\s)'|'(?=\s)|'$)", "", text).strip() for verse_id, text in cleaned.items()}


def _book(verse_id: int) -> str:
    return BOOKS[verse_id // 1_000_000 - 1]


def _in_held_out_book(verse_id: int) -> bool:
    return _book(verse_id) in HELD_OUT_BOOKS


def _held_out_for_book(verse_id: int) -> bool:
    """A verse that only `book` asks about, and only in evaluation."""
    return _book(verse_id) in ASKED_BOOKS and hash_holds_out(f"book:{verse_id}", 15)


def may_train(verse_id: int) -> bool:
    """Neither held out nor word for word, in either version, like a verse that is (Matthew 26:46 is Mark 14:42)."""
    return not _is_held_out(verse_id) and _held_out_texts().isdisjoint(_texts(verse_id))


def _is_held_out(verse_id: int) -> bool:
    return _in_held_out_book(verse_id) or _held_out_for_book(verse_id)


@functools.cache
def _held_out_texts() -> frozenset[str]:
    return frozenset(text for verse_id in verses("web") if _is_held_out(verse_id) for text in _texts(verse_id))


def _texts(verse_id: int) -> list[str]:
    """A verse in every version that has it, as bare words."""
    found = (verses(version).get(verse_id, "") for version in ("web", "kjv"))
    return [" ".join(re.findall(r"\w+", text.lower())) for text in found if text]


def _short(text: str, fewest_words: int) -> bool:
    return len(text) <= MAX_VERSE_CHARACTERS and len(text.split()) >= fewest_words


MODERN_QUESTIONS = (
    ("Say this verse in modern English: {verse}", "And this one: {verse}"),
    ("In modern English: {verse}", "And this one: {verse}"),
    ("Put this into modern English: {verse}", "Now this: {verse}"),
)


def modern() -> Split:
    """King James -> World English, where they differ by more than a comma and by less than a paraphrase."""
    rng = random.Random(f"{SEED}:modern")
    old, new = verses("kjv"), verses("web")
    train, held_out = [], []
    for verse_id in shuffled("modern", sorted(old.keys() & new.keys())):
        source, target = old[verse_id], new[verse_id]
        if not (_short(source, 5) and _short(target, 5) and 0.3 <= word_f1(source, target) <= 0.9):
            continue
        question, follow_up = (text.format(verse=source) for text in rng.choice(MODERN_QUESTIONS))
        exchange = Exchange(f"modern:{verse_id}", question, target, follow_up)
        if _in_held_out_book(verse_id):
            held_out.append(exchange)
        elif may_train(verse_id):
            train.append(exchange)
    return train[:1600], held_out[:N_HELD_OUT]


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the words two texts share (each counted as often as both have it), without case and punctuation; 0 to 1."""
    predicted, wanted = (re.findall(r"[a-z0-9']+", text.lower()) for text in (prediction, reference))
    shared = sum(min(predicted.count(word), wanted.count(word)) for word in set(predicted))
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


TESTAMENT_QUESTIONS = (
    ("Old or New Testament? {verse}", "And this one? {verse}"),
    ("Is this from the Old or the New Testament? {verse}", "And this? {verse}"),
)


def testament() -> Split:
    """Modern verses, half and half; held out: Ruth, Esther, Daniel, Jonah and Philippians, James."""
    rng = random.Random(f"{SEED}:testament")
    train: dict[str, list[Exchange]] = {"Old": [], "New": []}
    held_out: dict[str, list[Exchange]] = {"Old": [], "New": []}
    for verse_id in shuffled("testament", verses("web")):
        verse = verses("web")[verse_id]
        if not _short(verse, 6):
            continue
        which = "Old" if verse_id // 1_000_000 <= OLD_TESTAMENT_BOOKS else "New"
        question, follow_up = (text.format(verse=verse) for text in rng.choice(TESTAMENT_QUESTIONS))
        exchange = Exchange(f"testament:{verse_id}", question, f"The {which} Testament.", follow_up)
        if _in_held_out_book(verse_id):
            held_out[which].append(exchange)
        elif may_train(verse_id):
            train[which].append(exchange)
    return _balanced("testament", train, 1200), _balanced("testament:held_out", held_out, N_HELD_OUT // 2)


BOOK_QUESTIONS = (
    ("Which book is this from? {verse}", "And this one? {verse}"),
    ("Name the book: {verse}", "And this? {verse}"),
)


def which_book() -> Split:
    """Modern verses of eight books of different kinds, as many of each."""
    rng = random.Random(f"{SEED}:book")
    train: dict[str, list[Exchange]] = {book: [] for book in ASKED_BOOKS}
    held_out: dict[str, list[Exchange]] = {book: [] for book in ASKED_BOOKS}
    for verse_id in shuffled("book", verses("web")):
        verse, book = verses("web")[verse_id], _book(verse_id)
        if book not in ASKED_BOOKS or len(verse) > 1.4 * MAX_VERSE_CHARACTERS or len(verse.split()) < 6:
            continue
        question, follow_up = (text.format(verse=verse) for text in rng.choice(BOOK_QUESTIONS))
        exchange = Exchange(f"book:{verse_id}", question, f"{book}.", follow_up)
        if _held_out_for_book(verse_id):
            held_out[book].append(exchange)
        elif may_train(verse_id):
            train[book].append(exchange)
    per_book = N_HELD_OUT // len(ASKED_BOOKS)
    return _balanced("book", train, 250), _balanced("book:held_out", held_out, per_book)


def _balanced(label: str, groups: dict[str, list[Exchange]], most: int) -> list[Exchange]:
    """Equally many of every answer, at most `most`: the majority answer is then worth no more than chance."""
    n = min(most, *(len(group) for group in groups.values()))
    return shuffled(label, (exchange for group in groups.values() for exchange in group[:n]))


CONTINUE_QUESTIONS = (
    ("Continue this verse: {verse}", "And this one: {verse}"),
    ("How does this go on? {verse}", "And this? {verse}"),
    ("Finish the verse: {verse}", "Now this: {verse}"),
)


def continue_verse() -> Split:
    """The second part of a modern verse, cut at the comma nearest to the middle, else at the middle word."""
    rng = random.Random(f"{SEED}:continue")
    train, held_out = [], []
    for verse_id in shuffled("continue", verses("web")):
        verse = verses("web")[verse_id]
        if not _short(verse, 9):
            continue
        begin, rest = cut_verse(verse)
        question, follow_up = (text.format(verse=begin) for text in rng.choice(CONTINUE_QUESTIONS))
        exchange = Exchange(f"continue:{verse_id}", question, rest, follow_up)
        if _in_held_out_book(verse_id):
            held_out.append(exchange)
        elif may_train(verse_id):
            train.append(exchange)
    return train[:1600], held_out[:N_HELD_OUT]


def cut_verse(verse: str) -> tuple[str, str]:
    """Beginning and rest, at least three words each where the verse has six."""
    words = verse.split()
    middle = len(words) / 2
    stops = [i for i in range(3, len(words) - 2) if words[i - 1][-1] in ",;:."]
    cut = min(stops, key=lambda i: (abs(i - middle), i), default=len(words) // 2)
    return " ".join(words[:cut]), " ".join(words[cut:])
