"""Where text comes from: the hub, JSONL, Parquet and text files, and what is embedded -> documents and conversations.

`iterate(source, format)` streams a source, record by record. A mistake in a person's own files is an error naming file
and line; a record of a hub set, which a person cannot mend, is skipped, counted and reported.
"""

from __future__ import annotations

import glob
import hashlib
import heapq
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import corpora
from data.chat import Message, to_messages
from data.config import SOURCE_KINDS, DataConfig, SourceConfig
from data.words import listed, one_line, short, short_name


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
    """A record of a hub set that is of no use, and why."""

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


def files(source: SourceConfig) -> list[Path]:
    """The files a local source reads, sorted. ValueError when its path matches none."""
    path = source.path or ""
    if os.path.isfile(path):  # unlike Path's, false for a name too long to be one
        return [Path(path)]
    if os.path.isdir(path):
        example = f"{path.rstrip('/')}/*"
        raise ValueError(f"source {source.name!r}: path: {path!r} is a folder; name its files, such as {example}")
    if not glob.has_magic(path):
        problem = "is no regular file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"source {source.name!r}: path: {path!r} {problem}; give the path of a file or a glob")
    names = set(glob.glob(path, recursive=True))  # two ** find a file more than once
    found = sorted(Path(name) for name in names if os.path.isfile(name))
    if not found:
        raise ValueError(
            f"source {source.name!r}: path: {path!r} matches no file; mend the glob (** reaches into folders)"
        )
    return found


def _training_texts_of(source: SourceConfig, config: DataConfig) -> Iterator[str]:
    for record in iterate(source, config.format):
        if not isinstance(record, Skipped) and not is_held_out(record, source, config):
            yield from record.texts()


def _documents(source: SourceConfig) -> Iterator[Document | Skipped]:
    if source.split_key is not None and source.kind in ("embedded", "text"):
        raise ValueError(
            f"source {source.name!r}: split_key: {source.split_key!r}: kind {source.kind} has no columns; remove it"
        )
    if source.kind == "embedded":
        yield from (Document(*document) for document in corpora.documents(source.corpus))
    elif source.kind == "text":
        for file in files(source):
            text = _decode(_read_bytes(file, source), short_name(file))
            yield Document(text, split_key=text)
    else:
        for record, where in _records(source):
            text = _column(record, source.text_key, where, "text_key")
            if source.kind == "hub" and text is None:
                yield Skipped(f"no text in column {source.text_key!r}")
                continue
            if not isinstance(text, str):
                raise ValueError(f"{where}: text_key: column {source.text_key!r} holds {short(text)}; it must be text")
            yield Document(text, _split_key(record, source, where, default=text))


def _conversations(source: SourceConfig) -> Iterator[Conversation | Skipped]:
    if source.kind == "text":
        raise ValueError(
            f"source {source.name!r}: kind text holds documents; data.format chat takes jsonl, parquet, hub or embedded"
        )
    if source.kind == "embedded":
        from data.exercises import exercises

        yield from exercises(source.corpus)
        return
    for record, where in _records(source):
        try:
            messages = to_messages(record, where)
        except ValueError as error:
            if source.kind != "hub":
                raise
            problem = re.sub(r"\w+\[\d+\]: ", "", str(error).removeprefix(f"{where}: "))
            yield Skipped(re.split(r" \(|[:;]", problem)[0])
            continue
        yield Conversation(messages, _split_key(record, source, where, default=json.dumps(messages, sort_keys=True)))


def _records(source: SourceConfig) -> Iterator[tuple[dict, str]]:
    """(columns, where it stands) of each record of a source with columns."""
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}[source.kind]
    return reader(source)


def _read_jsonl(source: SourceConfig) -> Iterator[tuple[dict, str]]:
    for file in files(source):
        with _open(file, source) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{short_name(file)}:{number}"
                text = _decode(line, where)
                if not text.strip():
                    continue
                try:
                    record = json.loads(text, object_pairs_hook=_once)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not readable as JSON: {error}; mend or remove this line") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{where}: {short(record)} is no JSON object; write one {{...}} a line")
                yield record, where


def _once(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs. ValueError for a key given twice: json itself would drop the first one's value."""
    record = dict(pairs)
    if len(record) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short(twice)} is given twice")
    return record


def _read_parquet(source: SourceConfig) -> Iterator[tuple[dict, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"source {source.name!r}: kind parquet needs pyarrow; run: pip install pyarrow") from None

    for path in files(source):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1000):
                    for record in batch.to_pylist():
                        number += 1
                        yield record, f"{short_name(path)}, row {number}"
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{short_name(path)}: not readable as Parquet: {one_line(error)}; write it anew") from None


def _read_hub(source: SourceConfig) -> Iterator[tuple[dict, str]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"source {source.name!r}: kind hub needs datasets; run: pip install datasets") from None

    try:
        rows = datasets.load_dataset(
            source.path, source.subset, split=source.split, data_files=source.data_files, streaming=source.streaming
        )
        for number, record in enumerate(rows):
            yield record, f"{source.path}, row {number}"
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise their own
        raise ValueError(
            f"source {source.name!r}: the hub set {source.path!r} (subset {source.subset}, split {source.split}) could "
            f"not be read: {one_line(error)}; check the name and the network, or use local files"
        ) from None


def _column(record: dict, key: str, where: str, setting: str) -> object:
    if key not in record:
        raise ValueError(f"{where}: {setting}: no column {key!r}; the columns are {listed(record)}")
    return record[key]


def _split_key(record: dict, source: SourceConfig, where: str, default: str) -> str:
    if source.split_key is None:
        return default
    value = _column(record, source.split_key, where, "split_key")
    try:
        return str(value)
    except RecursionError:
        raise ValueError(f"{where}: split_key: column {source.split_key!r} is nested too deep; use another") from None


def _open(file: Path, source: SourceConfig):
    try:
        return file.open("rb")
    except OSError as error:
        raise _unreadable(file, source, error) from None


def _read_bytes(file: Path, source: SourceConfig) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, source, error) from None


def _unreadable(file: Path, source: SourceConfig, error: OSError) -> ValueError:
    return ValueError(
        f"source {source.name!r}: cannot read {short_name(file)} ({error.strerror}); check path and permissions"
    )


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is {raw[error.start]:#04x}"
        raise ValueError(f"{where}: not UTF-8 text ({byte}); save it as UTF-8") from None
