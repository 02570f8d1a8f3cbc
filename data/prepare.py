"""Documents -> token shards, once.

    cache/data/prepared/SOURCE-<fingerprint>/
        index.json                 counts, files, what was skipped and why
        SHA256SUMS                 of every file, also index.json: `sha256sum -c SHA256SUMS` checks them too
        train-00000.bin ...        token ids, uint16 or uint32, BOS + text + EOS after one another
        held_out-00000.bin ...     the same for the documents that measure
        *.mask                     chat: uint8 for each token, 1 where it is learned
        *.idx                      int64 first token of each document, and the end (not for text to train on)
        held_out.bytes             int64 UTF-8 bytes of each document (chat: of what is learned)

Each source stands alone: its fingerprint covers its settings and files, the held-out settings and the tokenizer, so a
new source, another weight or an interruption costs nothing that is already done. A folder is written under another
name and renamed when its last file is on the disk. Nothing is written through a link.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import corpora
from data.chat import encode_conversations
from data.config import DataConfig, SourceConfig
from data.dataset import Prepared
from data.index import FORMAT_VERSION, damaged, file_names, read_index
from data.integrity import write_checksums
from data.sources import Conversation, Document, Skipped, files, is_held_out, iterate
from data.tokenizer import Tokenizer, replace_surrogates

SHARD_TOKENS = 2**27  # 256 MiB of uint16
BATCH_CHARACTERS = 4_000_000  # text encoded at a time, on all cores
BATCH_DOCUMENTS = 20_000
READING_VERSION = 2  # of what data/chat.py makes of a record: conversations read otherwise are prepared anew


def prepare(config: DataConfig, tokenizer: Tokenizer, *, progress: bool = True) -> Path:
    """Writes the shards of every source that has none yet and returns the folder they are in.

    Raises ValueError for a source that cannot be read or leaves nothing to train on, and when the disk is full;
    nothing half-written stays behind.
    """
    _check_sources(config)
    folder = Path(config.cache_dir) / "prepared"
    missing = [source for source in config.sources if not (_folder(config, source, tokenizer) / "index.json").exists()]
    if not missing:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: cannot make the folder {folder} ({error.strerror}); choose another"
        ) from None
    with _full_disk_in_one_sentence(folder):
        with _lock(folder / ".lock"):
            for leftover in folder.glob("*.partial"):  # of a process that was killed
                _remove(leftover)
            for source in missing:
                _prepare_source(config, source, tokenizer, progress)
    return folder


def open_prepared(config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """The shards of a config, as rows. ValueError if they are missing, damaged or made with another tokenizer."""
    _check_sources(config)
    indices = []
    for source in config.sources:
        folder = _folder(config, source, tokenizer)
        index = read_index(folder)
        if index is None:
            raise _not_prepared(config, source, tokenizer)
        if index["tokenizer_fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{folder}: these shards were made with another tokenizer ({index['tokenizer_fingerprint'][:8]}, "
                f"not {tokenizer.fingerprint[:8]}); remove the folder and run: python -m scripts.prepare_data CONFIG"
            )
        if (
            index["fingerprint"] != fingerprint(config, source, tokenizer)
            or index["vocab_size"] != tokenizer.vocab_size
        ):
            raise damaged(folder / "index.json", f"not that of source {source.name!r} (was the folder renamed?)")
        indices.append({**index, "name": source.name, "weight": source.weight, "folder": str(folder)})
    return Prepared(indices, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id)


def _check_sources(config: DataConfig) -> None:
    if not config.sources:
        raise ValueError("data.sources: there is no source; name at least one")


def fingerprint(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer | None) -> str:
    """SHA-256 (hex) of everything that decides a source's shards; without a tokenizer, of everything else."""
    settings = dataclasses.asdict(source)
    del settings["weight"]
    for key in ("bad_records", "held_out_key"):
        if settings[key] is None:  # as before there was this key: shards made then stay what they are
            del settings[key]
    if source.held_out_fraction is None:
        settings["held_out_fraction"] = config.held_out_fraction
    content = {
        "version": FORMAT_VERSION,
        "format": config.format,
        "source": settings,
        "held_out_max_tokens": config.held_out_max_tokens,
        "content": _content_stamp(config, source),
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
    }
    if config.format == "chat" and source.kind != "embedded":
        content["reading"] = READING_VERSION
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def _content_stamp(config: DataConfig, source: SourceConfig) -> list:
    """What changes when a source's text does, without reading it."""
    if source.kind == "hub":
        return []
    if source.kind != "embedded":
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files(source)]
    here = Path(__file__).parent
    if config.format == "text":
        code, packages = [here / "corpora.py"], [corpora.version(source.corpus)]
    else:
        code = [here / "corpora.py", here / "exchange.py", *sorted(here.glob("*exercises.py"))]
        packages = [corpora.version("bible-web"), corpora.version("bible-kjv")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in code] + packages


def _folder(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)
    return Path(config.cache_dir) / "prepared" / f"{name}-{fingerprint(config, source, tokenizer)[:16]}"


def _not_prepared(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer) -> ValueError:
    remedy = "run: python -m scripts.prepare_data CONFIG"
    same_but_tokenizer = fingerprint(config, source, None)
    for file in sorted((Path(config.cache_dir) / "prepared").glob("*/index.json")):
        try:
            index = read_index(file.parent) or {}
        except ValueError:  # another source's: no matter here
            continue
        other = index.get("tokenizer_fingerprint") != tokenizer.fingerprint
        if other and index.get("fingerprint_without_tokenizer") == same_but_tokenizer:
            return ValueError(
                f"source {source.name!r}: its shards in {file.parent} were made with another tokenizer "
                f"({index['tokenizer_fingerprint'][:8]}, not {tokenizer.fingerprint[:8]}); {remedy}"
            )
    return ValueError(f"source {source.name!r}: not prepared yet in data.cache_dir {config.cache_dir!r}; {remedy}")


def _prepare_source(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, progress: bool) -> None:
    final = _folder(config, source, tokenizer)
    if (final / "index.json").exists():  # another process made it while this one waited
        return
    _remove(final)  # without its index a folder is nothing
    started = time.perf_counter()
    fingerprints = {  # taken now: a source that changes while it is read is then prepared anew
        "fingerprint": fingerprint(config, source, tokenizer),
        "fingerprint_without_tokenizer": fingerprint(config, source, None),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    chat = config.format == "chat"
    partial = final.with_name(final.name + ".partial")
    partial.mkdir()
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(shutil.rmtree, partial, ignore_errors=True)
        splits = {
            "train": _SplitWriter(partial, "train", _dtype(tokenizer), with_mask=chat, with_offsets=chat),
            "held_out": _SplitWriter(partial, "held_out", _dtype(tokenizer), with_mask=chat, with_offsets=True),
        }
        for split in splits.values():
            at_the_end.callback(split.abandon)
        skipped = _write_shards(config, source, tokenizer, splits, progress)
        if splits["train"].tokens == 0:
            raise ValueError(
                f"source {source.name!r}: nothing to train on: {splits['held_out'].documents} documents are held out and "
                f"{sum(skipped.values())} skipped ({_counted(skipped)}); give it more text or lower held_out_fraction"
            )
        index = {
            "version": FORMAT_VERSION,
            **fingerprints,
            "vocab_size": tokenizer.vocab_size,
            "format": config.format,
            "dtype": np.dtype(_dtype(tokenizer)).name,
            **{name: split.close() for name, split in splits.items()},
            "skipped": dict(skipped),
            "seconds": round(time.perf_counter() - started, 3),
        }
        _write(partial / "index.json", json.dumps(index, indent=2).encode("utf-8"))
        write_checksums(partial, [*file_names(index, "train"), *file_names(index, "held_out"), "index.json"])
        partial.rename(final)


def _write_shards(
    config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, splits: dict[str, _SplitWriter], progress: bool
) -> Counter:
    """Reads the source through; returns {reason: records} of what was left out."""
    skipped: Counter = Counter()
    chat = config.format == "chat"
    quiet = None if progress else True  # None: a bar where there is a terminal to draw it in
    with tqdm(desc=f"preparing {source.name}", unit=" documents", disable=quiet) as bar:
        for batch in batches(iterate(source, config.format), skipped):
            for record, (ids, mask, n_bytes) in zip(batch, encoded(tokenizer, batch, config.format)):
                if n_bytes == 0:
                    skipped["nothing to learn" if chat else "empty text"] += 1
                    continue
                name = "held_out" if is_held_out(record, source, config) else "train"
                limit = config.held_out_max_tokens
                if name == "held_out" and limit is not None and splits[name].tokens >= limit:
                    skipped["held out, beyond held_out_max_tokens"] += 1
                    continue
                splits[name].add(ids, mask, n_bytes)
            bar.update(len(batch))
            bar.set_postfix(tokens=f"{splits['train'].tokens:,}")
    return skipped


def batches(records: Iterator, skipped: Counter) -> Iterator[list[Document | Conversation]]:
    """What is of use, as much at a time as all cores are worth waking for; the reasons of the rest are counted in `skipped`."""
    batch, characters = [], 0
    for record in records:
        if isinstance(record, Skipped):
            skipped[record.reason] += 1
            continue
        batch.append(record)
        characters += sum(map(len, record.texts()))
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    yield batch


def encoded(
    tokenizer: Tokenizer, batch: list[Document] | list[Conversation], format: str
) -> Iterator[tuple[list[int], list[int] | None, int]]:
    """(ids, mask or None, UTF-8 bytes of what is learned) of each record, as the shards have them; 0 bytes: left out."""
    return (_encode_conversations if format == "chat" else _encode_documents)(tokenizer, batch)


def _encode_documents(tokenizer: Tokenizer, batch: list[Document]) -> Iterator[tuple[list[int], None, int]]:
    """(BOS + ids + EOS, no mask, UTF-8 bytes) of each document."""
    for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
        yield [tokenizer.bos_id, *ids, tokenizer.eos_id], None, _utf8_bytes(document.text)


def _encode_conversations(
    tokenizer: Tokenizer, batch: list[Conversation]
) -> Iterator[tuple[list[int], list[int], int]]:
    """(ids, mask, UTF-8 bytes of the assistant's content) of each conversation."""
    encoded = encode_conversations(tokenizer, [conversation.messages for conversation in batch])
    for conversation, (ids, mask) in zip(batch, encoded):
        answers = [turn["content"].strip() for turn in conversation.messages if turn["role"] == "assistant"]
        yield ids, mask, sum(map(_utf8_bytes, answers))


def _counted(skipped: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"


def _utf8_bytes(text: str) -> int:
    return len(replace_surrogates(text).encode("utf-8"))


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


class _SplitWriter:
    """Appends documents to `SPLIT-00000.bin`, ..., each SHARD_TOKENS long but the last; a document may lie across two."""

    def __init__(self, folder: Path, split: str, dtype: type, with_mask: bool, with_offsets: bool):
        self.folder, self.split, self.with_offsets = folder, split, with_offsets
        self.tokens = self.bytes = 0
        self.offsets, self.document_bytes = [0], []
        self.documents = 0
        self.ids = _ShardWriter(folder, split, "bin", dtype)
        self.mask = _ShardWriter(folder, split, "mask", np.uint8) if with_mask else None

    def add(self, ids: list[int], mask: list[int] | None, n_bytes: int) -> None:
        self.ids.add(ids)
        if self.mask:
            self.mask.add(mask)
        self.tokens += len(ids)
        self.bytes += n_bytes
        self.documents += 1
        if self.with_offsets:
            self.offsets.append(self.tokens)
            self.document_bytes.append(n_bytes)

    def close(self) -> dict:
        """Puts everything on the disk; the split's part of index.json."""
        if self.with_offsets:
            _write(self.folder / f"{self.split}.idx", np.array(self.offsets, dtype=np.int64).tobytes())
            _write(self.folder / f"{self.split}.bytes", np.array(self.document_bytes, dtype=np.int64).tobytes())
        written = self.ids.close() + (self.mask.close() if self.mask else [])
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "files": written}

    def abandon(self) -> None:
        self.ids.abandon()
        if self.mask:
            self.mask.abandon()


class _ShardWriter:
    """One array over files of SHARD_TOKENS items."""

    def __init__(self, folder: Path, split: str, ending: str, dtype: type):
        self.folder, self.split, self.ending, self.dtype = folder, split, ending, dtype
        self.file, self.left = None, 0
        self.files: list[dict] = []

    def add(self, items: list[int]) -> None:
        array = np.array(items, dtype=self.dtype)
        while len(array):
            if self.left == 0:
                self._next_file()
            part, array = array[: self.left], array[self.left :]
            self.file.write(part.tobytes())
            self.files[-1]["tokens"] += len(part)
            self.left -= len(part)

    def close(self) -> list[dict]:
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
        return self.files

    def abandon(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):  # a full disk refuses the buffer's rest again
                self.file.close()

    def _next_file(self) -> None:
        self.close()
        name = f"{self.split}-{len(self.files):05d}.{self.ending}"
        self.file, self.left = (self.folder / name).open("wb"), SHARD_TOKENS
        self.files.append({"name": name, "tokens": 0})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the others wait, and then find the work done."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link (never what the link points at), if there is one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def _full_disk_in_one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"data.cache_dir: the disk of {folder} is full; free some space or set data.cache_dir elsewhere"
            ) from None
        raise
