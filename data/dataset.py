"""Token shards -> rows and batches.

Text: a source is one long stream of tokens; a row is T of them, and the next row begins with the last token of this
one, so that every token is a target exactly once. Conversations: whole ones, packed into rows of T.

Which row comes when is a pure function of (seed, epoch, position): the order does not depend on world size,
micro-batch or workers, and resuming is a seek. A source's weight is its repetitions per epoch.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import integrity
from data.index import SPLITS, check_plain, damaged, damaged_by, file_names
from data.packing import pack

IGNORED = -100  # label of a position that is no target, as in torch's cross_entropy

Row = dict[str, np.ndarray]  # the keys of a batch -> (T,)


class Prepared:
    """The prepared sources of one config; made by `data.prepare.open_prepared`.

    names: the sources, in the config's order. index: format, tokenizer_fingerprint, ..., and `sources`: a list with
    each one's name, weight, folder, train and held_out (tokens, documents, bytes, files), skipped {reason: documents}.
    """

    def __init__(self, sources: list[dict], pad_id: int, bos_id: int):
        self.index = {
            **{key: sources[0][key] for key in ("version", "format", "dtype", "vocab_size", "tokenizer_fingerprint")},
            "seconds": sum(source["seconds"] for source in sources),
            "sources": sources,
        }
        self.names = [source["name"] for source in sources]
        self._pad_id, self._bos_id = pad_id, bos_id

    def verify(self, split: str | None = None) -> None:
        """Reads every file of `split` (None: of both) and compares its SHA-256 with what was written.

        ValueError, naming the file and the remedy, for the first one that is missing or another.
        """
        splits = SPLITS if split is None else (split,)
        for source in self.index["sources"]:
            folder = Path(source["folder"])
            names = [name for part in splits for name in file_names(source, part)]
            for name in names:
                check_plain(folder / name)
            problem = integrity.damage(folder, ["index.json", *names])
            if problem:
                raise damaged_by(problem, folder)

    def content_digests(self) -> dict[str, str]:
        """{source: SHA-256 (hex)} of what is trained on; the same wherever and whenever the shards were written.

        Taken from the files' checksums: `verify` tells whether the files are those.
        """
        digests = {}
        for source in self.index["sources"]:
            folder = Path(source["folder"])
            try:
                sums = integrity.read_checksums(folder)
            except ValueError as error:
                raise damaged_by(str(error), folder) from None
            names = [name for name in sorted(file_names(source, "train")) if not name.endswith(".bytes")]
            for name in names:
                if name not in sums:
                    raise damaged(folder / integrity.SUMS, f"has no checksum of {name}")
            listed = "".join(f"{sums[name]}  {name}\n" for name in names)
            digests[source["name"]] = hashlib.sha256(listed.encode("utf-8")).hexdigest()
        return digests

    def train_rows(self, context_length: int, document_mask: bool, seed: int) -> TrainRows:
        """Training rows of `context_length` tokens. ValueError if a source fills no row.

        With `document_mask` the batches have document_ids and a target across a document's border is ignored;
        conversations are always masked so.
        """
        rows_of: dict[str, _TextRows | _PackedRows] = {}
        for source in self.index["sources"]:
            if self.index["format"] == "chat":
                rows = _PackedRows(_Documents(source, "train"), context_length, self._pad_id, seed)
            else:
                stream, n_tokens = _Shards(source, "train", "bin"), source["train"]["tokens"]
                rows = _TextRows(stream, n_tokens, context_length, self._bos_id, document_mask)
            if len(rows) == 0:
                remedy = "raise" if self.index["format"] == "chat" else "give it more text or lower"
                raise ValueError(
                    f"source {source['name']!r}: nothing of its {source['train']['tokens']:,} training tokens makes a "
                    f"row of {context_length} tokens; {remedy} data.context_length"
                )
            rows_of[source["name"]] = rows
        weights = [source["weight"] for source in self.index["sources"]]
        return TrainRows(rows_of, weights, context_length, seed)

    def held_out(self, name: str, context_length: int, document_mask: bool = False) -> HeldOutRows:
        """All held-out rows of source `name`; a source without held-out documents gives none, with n_tokens 0."""
        source = self.index["sources"][self.names.index(name)]
        return self._held_out(_Documents(source, "held_out"), context_length, document_mask)

    def _held_out(self, documents: _Documents, context_length: int, document_mask: bool) -> HeldOutRows:
        def shorter(max_tokens: int) -> HeldOutRows:
            return self._held_out(documents.first(max_tokens), context_length, document_mask)

        if len(documents) == 0:
            return HeldOutRows([], n_tokens=0, n_bytes=0, skipped={}, subset=shorter)
        if self.index["format"] == "chat":
            rows = _PackedRows(documents, context_length, self._pad_id, seed=0)
            n_tokens = sum(int(documents.mask_of(i).sum()) for i in rows.included)
            return HeldOutRows(rows, n_tokens, int(documents.n_bytes[rows.included].sum()), rows.skipped, shorter)
        end = int(documents.offsets[-1])
        rows = _TextRows(documents.ids, end, context_length, self._bos_id, document_mask, held_out_pad=self._pad_id)
        return HeldOutRows(rows, end - len(documents), int(documents.n_bytes.sum()), skipped={}, subset=shorter)


class TrainRows:
    """An endless sequence of rows; `batch` reads it anywhere.

    rows_per_epoch: over all sources, each repeated `weight` times. tokens_per_epoch: rows_per_epoch * T.
    skipped: {source: {reason: conversations}}, what fits no row.
    """

    def __init__(
        self, rows_of: dict[str, _TextRows | _PackedRows], weights: list[float], context_length: int, seed: int
    ):
        self._names, self._sources, self._weights, self._seed = list(rows_of), list(rows_of.values()), weights, seed
        self._first_row = np.cumsum([0, *map(len, self._sources)])  # of each source, numbering all rows of all sources
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)  # a batch may straddle two epochs
        self.rows_per_epoch = len(self._order(0))
        self.tokens_per_epoch = self.rows_per_epoch * context_length
        self.skipped = {name: rows.skipped for name, rows in rows_of.items() if rows.skipped}
        if self.rows_per_epoch == 0:
            raise ValueError(f"data.sources: the weights {weights} leave not one row an epoch; raise them")

    def batch(self, position: int, n_rows: int) -> dict[str, torch.Tensor]:
        """Rows `position` to `position + n_rows` of the sequence, as tensors (B, T).

        input_ids and labels int64 (labels aligned with input_ids, IGNORED where there is no target); where documents
        are masked document_ids int64, for conversations attention_mask bool (False: padding).
        """
        return _stack([self._row(i) for i in range(position, position + n_rows)])

    def origin(self, position: int) -> tuple[str, int]:
        """(source's name, row number in that source) of the row at `position` of the sequence."""
        source, row = self._place(position)
        return self._names[source], row

    def _row(self, position: int) -> Row:
        source, row = self._place(position)
        return self._sources[source][row]

    def _place(self, position: int) -> tuple[int, int]:
        """(source, its row) at `position`."""
        epoch, place = divmod(position, self.rows_per_epoch)
        row = int(self._order(epoch)[place])
        source = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return source, row - int(self._first_row[source])

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        """Numbers of the epoch's rows, in the order they are read."""
        rows = []
        for i, (source, weight) in enumerate(zip(self._sources, self._weights)):
            whole, fraction = divmod(weight, 1)
            repeated = [np.arange(len(source))] * int(whole)
            partial = self._part_of_source(i, epoch, round(fraction * len(source)))
            rows.append(self._first_row[i] + np.concatenate([*repeated, partial]))
        together = np.concatenate(rows)
        return together[_permutation(len(together), self._seed, epoch, 0)]

    def _part_of_source(self, i: int, epoch: int, n: int) -> np.ndarray:
        """`n` rows of source i: on from where the epoch before stopped, so that all rows are read equally often."""
        length = len(self._sources[i])
        cycle, start = divmod(epoch * n, length)
        two_cycles = [_permutation(length, self._seed, c, i + 1) for c in (cycle, cycle + 1)] if n else [np.arange(0)]
        return np.concatenate(two_cycles)[start : start + n]


@dataclass
class HeldOutRows:
    """The held-out rows of one source, in a fixed order.

    n_tokens: targets (every token but a document's BOS; of conversations what is learned). n_bytes: UTF-8 bytes of the
    text they spell. skipped: {reason: conversations}, left out of both. subset(max_tokens): the rows and counts of the
    first whole documents alone, up to the one that reaches max_tokens.
    """

    rows: Sequence[Row] | _TextRows | _PackedRows
    n_tokens: int
    n_bytes: int
    skipped: dict[str, int]
    subset: Callable[[int], HeldOutRows]

    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[dict[str, torch.Tensor]]:
        """All rows, `batch_size` at a time; keys as in TrainRows.batch, attention_mask wherever there is padding. With several
        ranks every `ranks`-th batch, from number `rank` on."""
        for start in range(rank * batch_size, len(self.rows), ranks * batch_size):
            yield _stack([self.rows[i] for i in range(start, min(start + batch_size, len(self.rows)))])


class _TextRows:
    """Row r: tokens r(T-1) to r(T-1) + T of a stream. The last, partial row is padded when held out, else left out."""

    skipped: dict[str, int] = {}

    def __init__(
        self,
        stream: _Shards,
        n_tokens: int,
        context_length: int,
        bos_id: int,
        document_mask: bool,
        held_out_pad: int | None = None,
    ):
        self.stream, self.n_tokens, self.context_length = stream, n_tokens, context_length
        self.bos_id, self.document_mask, self.held_out_pad = bos_id, document_mask, held_out_pad
        stride = context_length - 1
        whole, rest = divmod(max(n_tokens - 1, 0), stride)
        self.n_rows = whole + (held_out_pad is not None and rest > 0)

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, i: int) -> Row:
        start = i * (self.context_length - 1)
        ids = self.stream.read(start, min(start + self.context_length, self.n_tokens))  # (up to T,)
        labels = ids.copy()
        if self.document_mask or self.held_out_pad is not None:
            labels[ids == self.bos_id] = IGNORED  # the first token of a document says nothing about the text before it
        row = {"input_ids": ids, "labels": labels}
        if self.document_mask:
            row["document_ids"] = np.cumsum(ids == self.bos_id)
        return row if len(ids) == self.context_length else _padded(row, self.context_length, self.held_out_pad)


class _PackedRows:
    """Whole conversations in rows of T tokens, padded on the right."""

    def __init__(self, documents: _Documents, context_length: int, pad_id: int, seed: int):
        self.documents, self.context_length, self.pad_id = documents, context_length, pad_id
        lengths = np.diff(documents.offsets)
        self.included = np.flatnonzero(lengths <= context_length)
        items, self._starts = pack(lengths[self.included], context_length, seed)
        self._items = self.included[items]
        too_long = len(lengths) - len(self.included)
        self.skipped = {f"longer than {context_length} tokens": too_long} if too_long else {}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> Row:
        conversations = self._items[self._starts[i] : self._starts[i + 1]]
        ids = [self.documents.ids_of(c) for c in conversations]
        input_ids, mask = np.concatenate(ids), np.concatenate([self.documents.mask_of(c) for c in conversations])
        row = {
            "input_ids": input_ids,
            "labels": np.where(mask == 1, input_ids, IGNORED),
            "document_ids": np.repeat(np.arange(len(ids)), [len(part) for part in ids]),
        }
        return _padded(row, self.context_length, self.pad_id)


class _Documents:
    """The documents of one split: where each lies in the shards, and the UTF-8 bytes it counts for.

    ValueError if the files do not say so: offsets from 0 to the last token, each beyond the one before.
    """

    def __init__(self, source: dict, split: str):
        self.ids = _Shards(source, split, "bin")
        self.mask = _Shards(source, split, "mask")  # empty for text
        folder, part = Path(source["folder"]), source[split]
        self.offsets = _int64_file(folder / f"{split}.idx", part["documents"] + 1)  # (documents + 1,)
        self.n_bytes = _int64_file(folder / f"{split}.bytes", part["documents"])  # (documents,)
        ordered = self.offsets[0] == 0 and (self.offsets[1:] > self.offsets[:-1]).all()
        if not ordered or self.offsets[-1] != part["tokens"]:
            raise damaged(folder / f"{split}.idx", "damaged, it does not say where documents begin")
        if (self.n_bytes < 0).any() or (self.n_bytes > part["bytes"]).any() or self.n_bytes.sum() != part["bytes"]:
            raise damaged(folder / f"{split}.bytes", "damaged, its sum is not that of index.json")

    def __len__(self) -> int:
        return len(self.n_bytes)

    def first(self, max_tokens: int) -> _Documents:
        """The first documents, up to the one that reaches `max_tokens`."""
        n = int(np.searchsorted(self.offsets[1:], max_tokens)) + 1
        shorter = copy.copy(self)
        shorter.offsets, shorter.n_bytes = self.offsets[: n + 1], self.n_bytes[:n]
        return shorter

    def ids_of(self, i: int) -> np.ndarray:
        return self.ids.read(int(self.offsets[i]), int(self.offsets[i + 1]))

    def mask_of(self, i: int) -> np.ndarray:
        return self.mask.read(int(self.offsets[i]), int(self.offsets[i + 1]))


class _Shards:
    """The files SPLIT-*.ENDING of a source, read as one array. ValueError if one is missing or was cut short."""

    def __init__(self, source: dict, split: str, ending: str):
        dtype = np.dtype(source["dtype"] if ending == "bin" else np.uint8)
        self._limit = source["vocab_size"] if ending == "bin" else 2
        files = [file for file in source[split]["files"] if file["name"].endswith(f".{ending}")]
        self._starts = np.cumsum([0, *(file["tokens"] for file in files)])
        self._parts: list[np.ndarray] = []
        self._paths = [Path(source["folder"]) / file["name"] for file in files]
        for path, file in zip(self._paths, files):
            _check_size(path, file["tokens"] * dtype.itemsize)
            self._parts.append(np.memmap(path, dtype=dtype, mode="r"))

    def read(self, start: int, end: int) -> np.ndarray:
        """Items start to end, int64. ValueError if one is no id of the vocabulary (of a mask: neither 0 nor 1)."""
        part = first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < end:
            offset, stop = int(self._starts[part]), min(end, int(self._starts[part + 1]))
            pieces.append(self._parts[part][start - offset : stop - offset].astype(np.int64))
            start, part = stop, part + 1
        items = np.concatenate(pieces) if len(pieces) != 1 else pieces[0]
        if items.max(initial=0) >= self._limit:
            raise damaged(self._paths[first], f"damaged, it holds {items.max()}, beyond {self._limit - 1}")
        return items


def _check_size(path: Path, n_bytes: int) -> None:
    if not os.path.lexists(path) or os.lstat(path).st_size != n_bytes:
        raise damaged(path, "missing or not of the size in index.json")
    check_plain(path)


def _int64_file(path: Path, n: int) -> np.ndarray:
    _check_size(path, 8 * n)
    return np.fromfile(path, dtype=np.int64)


def _padded(row: Row, length: int, pad_id: int) -> Row:
    """`row` filled up on the right: no targets, not attended to, and a document of its own."""
    n = len(row["input_ids"])
    fill = {"input_ids": pad_id, "labels": IGNORED}
    if "document_ids" in row:
        fill["document_ids"] = int(row["document_ids"][-1]) + 1
    padded = {key: np.concatenate([values, np.full(length - n, fill[key])]) for key, values in row.items()}
    return {**padded, "attention_mask": np.arange(length) < n}


def _stack(rows: list[Row]) -> dict[str, torch.Tensor]:
    """(T,) rows -> (B, T) tensors; a row without attention_mask among others with one is full."""
    if any("attention_mask" in row for row in rows):
        rows = [{"attention_mask": np.ones(len(row["input_ids"]), dtype=bool), **row} for row in rows]
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


def _permutation(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of range(n) of (seed, epoch, stream), the same in every numpy: it sorts Philox's raw output."""
    raw = np.random.Philox(key=[seed, stream * 2**32 + epoch]).random_raw(n) if n else np.arange(0)
    return np.argsort(raw, kind="stable")
