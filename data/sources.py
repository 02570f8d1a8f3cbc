"""Where text comes from: the hub, JSONL, Parquet and text files, and what is embedded -> documents and conversations.

`iterate(source, format)` streams a source, record by record. A mistake in a person's own files is an error naming file
and line; a record of a hub set, which a person cannot mend, is skipped, counted and reported. A source's `bad_records`
(stop or skip) decides otherwise.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data import corpora
from data.chat import Message, to_messages
from data.config import SOURCE_KINDS, DataConfig, SourceConfig
from data.readers import files, read_text, records
from data.words import listed, short


@dataclass
class Document:
    """One text. `held_out` None: decided by the hash of `split_key` against the source's held-out fraction."""

    text: str
    split_key: str
    held_out: bool | None = None

    def texts(self) -> list[str]:
        return [self.text]


@dataclass
class Conversation:
    """One conversation, checked by `data.chat.check_messages`; the rest as in Document."""

    messages: list[Message]
    split_key: str
    held_out: bool | None = None

    def texts(self) -> list[str]:
        return [message["content"] for message in self.messages]


@dataclass
class Skipped:
    """A record that is of no use and left out, and why."""

    reason: str


def iterate(source: SourceConfig, format: str) -> Iterator[Document | Conversation | Skipped]:
    """The records of one source, in a fixed order; format is `text` or `chat`.

    Raises ValueError (one sentence: the source, the file and line, the remedy) for anything that cannot be read.
    """
    if source.kind not in SOURCE_KINDS:
        raise ValueError(f"source {source.name!r}: kind: {source.kind!r} is none of {', '.join(SOURCE_KINDS)}")
    records = {"text": _documents, "chat": _conversations}[format](source)
    found = False
    for record in itertools.islice(records, source.max_documents):
        found = True
        yield record
    if not found:
        where = source.corpus or source.path
        raise ValueError(f"source {source.name!r}: {where!r} is empty; give it some text or remove the source")


def is_held_out(record: Document | Conversation, source: SourceConfig, config: DataConfig) -> bool:
    """Whether a record is for measuring alone: its own word, or the hash of its split key (stable when data is added)."""
    if record.held_out is not None:
        return record.held_out
    fraction = config.held_out_fraction if source.held_out_fraction is None else source.held_out_fraction
    digest = hashlib.sha256(record.split_key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def training_texts(config: DataConfig, max_bytes: int) -> Iterator[str]:
    """Texts of all sources' training records for the tokenizer to learn from, `max_bytes` UTF-8 bytes at most.

    Each source's share follows its weight; where one runs dry the others go on.
    """
    if not config.sources:
        raise ValueError("data.sources: there is no source; name at least one")
    left = max_bytes
    queue = [(0.0, i, _training_texts_of(source, config)) for i, source in enumerate(config.sources)]
    while queue and left > 0:
        share, i, texts = heapq.heappop(queue)
        text = next(texts, None)
        if text is None:
            continue
        encoded = text.encode("utf-8", "replace")[:left]
        left -= len(encoded)
        heapq.heappush(queue, (share + len(encoded) / config.sources[i].weight, i, texts))
        yield encoded.decode("utf-8", "ignore")


def _training_texts_of(source: SourceConfig, config: DataConfig) -> Iterator[str]:
    for record in iterate(source, config.format):
        if not isinstance(record, Skipped) and not is_held_out(record, source, config):
            yield from record.texts()


def _documents(source: SourceConfig) -> Iterator[Document | Skipped]:
    for setting in ("split_key", "held_out_key"):
        if getattr(source, setting) is not None and source.kind in ("embedded", "text"):
            raise ValueError(
                f"source {source.name!r}: {setting}: {getattr(source, setting)!r}: kind {source.kind} has no columns; remove it"
            )
    if source.kind == "embedded":
        yield from (Document(*document) for document in corpora.documents(source.corpus))
    elif source.kind == "text":
        for file in files(source):
            text = read_text(file, source)
            yield Document(text, split_key=text)
    else:

        def document(record: dict, where: str) -> Document | Skipped:
            text = _column(record, source.text_key, where, "text_key")
            if source.kind == "hub" and text is None:
                return Skipped(f"no text in column {source.text_key!r}")
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: text_key: column {source.text_key!r} is no text (but {short(text)}); name another"
                )
            return Document(text, _split_key(record, source, where, default=text), _held_out(record, source, where))

        # A wrong column is a mistake of the config, in every record: it ends the reading of a hub set too.
        yield from _made(source, document, by_itself="stop")


def _conversations(source: SourceConfig) -> Iterator[Conversation | Skipped]:
    if source.kind == "text":
        raise ValueError(
            f"source {source.name!r}: kind text holds documents; data.format chat takes jsonl, parquet, hub or embedded"
        )
    if source.kind == "embedded":
        from data.exercises import exercises

        yield from exercises(source.corpus)
        return

    def conversation(record: dict, where: str) -> Conversation:
        messages = to_messages(record, where)
        split_key = _split_key(record, source, where, default=json.dumps(messages, sort_keys=True))
        return Conversation(messages, split_key, _held_out(record, source, where))

    yield from _made(source, conversation, by_itself="skip" if source.kind == "hub" else "stop")


def _made(source: SourceConfig, make: Callable, by_itself: str) -> Iterator:
    """What `make` makes of each record. One that it refuses is skipped or ends it as `bad_records` says, or else `by_itself`;
    one that cannot be read, of a hub set, is skipped."""
    for record, where in records(source):
        readable = not isinstance(record, ValueError)
        try:
            if not readable:
                raise record
            yield make(record, where)
        except ValueError as error:
            if (source.bad_records or ("skip" if source.kind == "hub" and not readable else by_itself)) == "stop":
                raise
            yield Skipped(_reason(error, where))


def _reason(error: ValueError, where: str) -> str:
    """What is wrong, without where and with what: few different texts for many records."""
    problem = re.sub(r"(\w+\[\d+\]|text_key|split_key|held_out_key): ", "", str(error).removeprefix(f"{where}: "))
    problem = re.sub(r".* is no JSON object", "a record is no JSON object", problem)
    problem = re.sub(r"^role .* is none of", "a role is none of", problem)
    problem = re.sub(r"(no conversation in the columns) .*", r"\1", problem)
    return re.split(r" \(|[:;]", problem)[0]


def _column(record: dict, key: str, where: str, setting: str) -> object:
    if key not in record:
        raise ValueError(f"{where}: {setting}: no column {key!r}; the columns are {listed(record)}")
    return record[key]


def _held_out(record: dict, source: SourceConfig, where: str) -> bool | None:
    if source.held_out_key is None:
        return None
    value = _column(record, source.held_out_key, where, "held_out_key")
    if not isinstance(value, bool):
        raise ValueError(
            f"{where}: held_out_key: column {source.held_out_key!r} is neither true nor false (but {short(value)}); name another"
        )
    return value


def _split_key(record: dict, source: SourceConfig, where: str, default: str) -> str:
    if source.split_key is None:
        return default
    value = _column(record, source.split_key, where, "split_key")
    try:
        return str(value)
    except RecursionError:
        raise ValueError(f"{where}: split_key: column {source.split_key!r} is nested too deep; use another") from None
