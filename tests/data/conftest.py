"""A small tokenizer and small files of the kinds a person has."""

import json

import pytest

from data import corpora
from data.config import DataConfig, SourceConfig
from data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def manual():
    """Python's manual: 79 real documents that are always there."""
    return [text for text, _, _ in corpora.documents("python-docs")]


@pytest.fixture(scope="session")
def tokenizer(manual):
    return Tokenizer.train(manual[:40], vocab_size=600)


@pytest.fixture(scope="session")
def bibles():
    """version -> {book: text}"""
    return {version: corpora.bible_books(version) for version in ("bbe", "web", "kjv")}


@pytest.fixture
def jsonl(tmp_path):
    """Writes records, or raw lines, as a JSONL file in tmp_path and returns its path."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def config(tmp_path):
    """A DataConfig of sources given as keyword arguments of SourceConfig, with its cache in tmp_path."""

    def build(*sources, **settings):
        sources = [SourceConfig(**{"name": f"s{i}", "kind": "jsonl", **source}) for i, source in enumerate(sources)]
        return DataConfig(cache_dir=str(tmp_path / "cache"), sources=sources, **{"held_out_fraction": 0.0, **settings})

    return build


@pytest.fixture
def chats():
    """Makes n conversations of 1 to 3 exchanges; number i holds the words `question i` and `answer i`."""

    def make(n):
        return [
            {
                "messages": [
                    {"role": role, "content": f"{word} {i} " + "and so on " * (i * 7 % 5)}
                    for _ in range(i % 3 + 1)
                    for role, word in (("user", "question"), ("assistant", "answer"))
                ]
            }
            for i in range(n)
        ]

    return make
