"""What a config's sources hold, counted as training will use them, before anything is prepared or trained.

`examine` reads every source once, as a stream, and tokenises it as `data.prepare` does: the same documents are held out, skipped
and dropped. Memory stays bounded: lengths are kept in bins of 1/64, duplicates as `data.duplicates` says.
"""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from data.config import DataConfig, SourceConfig
from data.duplicates import Duplicates
from data.packing import pack
from data.prepare import batches, encoded
from data.sources import Conversation, Document, is_held_out, iterate
from data.tokenizer import Tokenizer, replace_surrogates

Example = tuple[list[int], list[int] | None]  # ids and mask, as training has them

MOST_PACKED = 200_000  # conversations that are packed to learn how full rows get; more are taken to be like them


class Lengths:
    """How long documents are, in tokens: exactly below 128, in bins of 1/64 of their length from there on."""

    def __init__(self) -> None:
        self.count = self.total = self.longest = 0
        self._bins: Counter[int] = Counter()  # the least length of a bin -> documents

    def add(self, n: int) -> None:
        """Counts one more length."""
        self.count, self.total, self.longest = self.count + 1, self.total + n, max(self.longest, n)
        shift = max(0, n.bit_length() - 7)
        self._bins[n >> shift << shift] += 1

    def quantile(self, q: float) -> int:
        """The length that a share `q` of the documents does not exceed (the lower edge of its bin); 0 without documents."""
        left = q * self.count
        for length, n in sorted(self._bins.items()):
            left -= n
            if left <= 0:
                return self.longest if q == 1 else length
        return 0

    def octaves(self) -> list[tuple[int, int, int]]:
        """(least, most, documents) for lengths of as many bits, from the first to the last that has any."""
        counts: Counter[int] = Counter()
        for length, n in self._bins.items():
            counts[length.bit_length()] += n
        bits = range(min(counts, default=1), max(counts, default=0) + 1)
        return [(1 << b >> 1, (1 << b) - 1, counts[b]) for b in bits]

    def summary(self) -> dict:
        """Mean, quantiles, longest and octaves, for JSON."""
        return {
            "mean": self.total / max(1, self.count),
            **{name: self.quantile(q) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))},
            "max": self.longest,
            "histogram": [list(octave) for octave in self.octaves()],
        }


@dataclass
class SourceStatistics:
    """One source. Counts are of documents (or conversations) and of tokens as shards hold them, special ones included."""

    name: str
    weight: float
    records: int = 0  # read, of use or not
    skipped: dict[str, int] = field(default_factory=Counter)  # reason -> records
    documents: int = 0  # of use, training and held out
    characters: int = 0
    bytes: int = 0  # UTF-8
    tokens: int = 0
    text_tokens: int = 0  # without special tokens and roles
    lengths: Lengths = field(default_factory=Lengths)
    train_documents: int = 0
    train_tokens: int = 0
    held_out_documents: int = 0
    held_out_tokens: int = 0
    long_documents: int = 0  # training: longer than a row
    long_tokens: int = 0
    learned_tokens: int = 0  # training: targets, of what is not dropped
    duplicates: int = 0  # exact copies of a text before, in this source or an earlier one
    near_duplicates: int = 0
    rows: int = 0  # of training, once through
    padding: float = 0.0  # share of the rows
    rows_per_epoch: int = 0  # by weight

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["bytes_per_token"] = self.bytes / max(1, self.text_tokens)
        return {**values, "skipped": dict(self.skipped), "lengths": self.lengths.summary()}


@dataclass
class Statistics:
    """All sources, and what can be said of them together alone."""

    sources: list[SourceStatistics]
    context_length: int  # tokens of a row
    format: str
    overlap: int  # held-out documents whose text is trained on as well
    near_overlap: int  # those that are nearly
    compared: int  # documents among which near duplicates were looked for
    examples: dict[str, list[Example]]  # source -> its first documents that are trained on

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources in one epoch, each source repeated by its weight."""
        return sum(source.rows_per_epoch for source in self.sources)


def examine(
    config: DataConfig,
    context_length: int,
    tokenizer: Tokenizer,
    documents: int | None = None,
    examples: int = 1,
    progress: bool = True,
) -> Statistics:
    """Reads every source, at most `documents` records of each, and counts. ValueError as `data.sources.iterate`.

    The first `examples` training documents of each source are kept as they are tokenised.
    """
    if not config.sources:
        raise ValueError("data.sources: there is no source; name at least one")
    duplicates = Duplicates()
    counted = [_OneSource(config, source, context_length, tokenizer, duplicates, examples) for source in config.sources]
    for one in counted:
        one.read(documents, progress)
    return Statistics(
        sources=[one.finished() for one in counted],
        context_length=context_length,
        format=config.format,
        overlap=duplicates.overlap,
        near_overlap=duplicates.near_overlap,
        compared=duplicates.compared,
        examples={one.source.name: one.examples for one in counted},
    )


class _OneSource:
    """Counts the records of one source."""

    def __init__(
        self,
        config: DataConfig,
        source: SourceConfig,
        context_length: int,
        tokenizer: Tokenizer,
        duplicates: Duplicates,
        examples: int,
    ):
        self.config, self.source, self.context_length, self.tokenizer = config, source, context_length, tokenizer
        self.chat = config.format == "chat"
        self.duplicates, self.examples_wanted = duplicates, examples
        self.examples: list[Example] = []
        self.counts = SourceStatistics(source.name, source.weight)
        self._packed = array("I")  # lengths of the training conversations that fit a row, MOST_PACKED at most
        self._fitting_tokens = 0  # of all of them

    def read(self, documents: int | None, progress: bool) -> None:
        """Counts all records, or the first `documents`."""
        records = self._each_counted(itertools.islice(iterate(self.source, self.config.format), documents))
        with tqdm(desc=f"reading {self.source.name}", unit=" documents", disable=None if progress else True) as bar:
            for batch in batches(records, self.counts.skipped):
                plain = (
                    self.tokenizer.encode_batch(["\n".join(record.texts()) for record in batch]) if self.chat else None
                )
                for i, (ids, mask, n_bytes) in enumerate(encoded(self.tokenizer, batch, self.config.format)):
                    self._add(batch[i], ids, mask, n_bytes, plain[i] if plain else ids[1:-1])
                bar.update(len(batch))

    def _each_counted(self, records: Iterator) -> Iterator:
        for record in records:
            self.counts.records += 1
            yield record

    def _add(
        self, record: Document | Conversation, ids: list[int], mask: list[int] | None, n_bytes: int, plain: list[int]
    ) -> None:
        """Counts one record. `plain`: the tokens of its text alone."""
        counts, n = self.counts, len(ids)
        if n_bytes == 0:
            counts.skipped["nothing to learn" if self.chat else "empty text"] += 1
            return
        held_out, limit = is_held_out(record, self.source, self.config), self.config.held_out_max_tokens
        if held_out and limit is not None and counts.held_out_tokens >= limit:
            counts.skipped["held out, beyond held_out_max_tokens"] += 1
            return
        text = "\n".join(record.texts())
        counts.documents += 1
        counts.characters += len(text)
        counts.bytes += len(replace_surrogates(text).encode("utf-8"))
        counts.tokens += n
        counts.text_tokens += len(plain)
        counts.lengths.add(n)
        # Of a conversation what makes it another one is who says what, not only the words.
        copies, near = self.duplicates.add(repr(record.messages) if self.chat else text, plain, held_out)
        counts.duplicates += copies
        counts.near_duplicates += near
        if held_out:
            counts.held_out_documents += 1
            counts.held_out_tokens += n
        else:
            if len(self.examples) < self.examples_wanted:
                self.examples.append((ids, mask))
            self._add_to_training(n, mask)

    def _add_to_training(self, n: int, mask: list[int] | None) -> None:
        counts = self.counts
        counts.train_documents += 1
        counts.train_tokens += n
        long = n > self.context_length
        counts.long_documents += long
        counts.long_tokens += n * long
        if mask is None:
            counts.learned_tokens += n - 1  # all but BOS
        elif not long:
            counts.learned_tokens += sum(mask)
            self._fitting_tokens += n
            if len(self._packed) < MOST_PACKED:
                self._packed.append(n)

    def finished(self) -> SourceStatistics:
        """The counts, with the rows they make."""
        counts = self.counts
        if self.chat:
            rows = len(pack(np.array(self._packed, dtype=np.int64), self.context_length, seed=0)[1]) - 1
            share = sum(self._packed) / max(1, self._fitting_tokens)  # of all that fit, those that were packed
            counts.rows = round(rows / share) if share else 0
            counts.padding = 1 - sum(self._packed) / (rows * self.context_length) if rows else 0.0
        else:
            counts.rows = max(counts.train_tokens - 1, 0) // (self.context_length - 1)
        whole, fraction = divmod(counts.weight, 1)
        counts.rows_per_epoch = int(whole) * counts.rows + round(fraction * counts.rows)
        return counts
