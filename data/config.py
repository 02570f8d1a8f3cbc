"""The data part of a run's YAML: which tokenizer, which sources, how they become rows.

The dataclass tree is the YAML tree (`train/config.py` fills it and checks every value against the
bounds in `field(metadata=...)`); this file holds no logic beyond checks that need two fields at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SOURCE_KINDS = ("embedded", "hub", "jsonl", "parquet", "text")
BAD_RECORDS = ("stop", "skip")


@dataclass
class TokenizerConfig:
    """Which tokenizer, and how much text it learns from where there is none yet."""

    path: str = "cache/tokenizer"  # folder with tokenizer.json; `scripts.train_tokenizer` writes it if it is missing
    train_bytes: int = field(
        default=50_000_000, metadata={"min": 1}
    )  # UTF-8 bytes of text the BPE learns from, at most


@dataclass
class SourceConfig:
    """One source of documents or conversations: where it is, which column holds the text, how often it is repeated."""

    name: str = ""  # label in shards, metrics and reports; unique within a config
    kind: str = field(default="", metadata={"choices": SOURCE_KINDS})
    corpus: str | None = None  # embedded: which text (see data/corpora.py) or which exercise (see data/exercises.py)
    path: str | None = None  # hub: repository id; jsonl, parquet, text: a file name or glob (** allowed)
    subset: str | None = None  # hub: the data set's configuration name, such as sample-10BT
    split: str = "train"  # hub: the split to read
    data_files: str | None = (
        None  # hub: read only these files of the repository; one named *.jsonl is read line by line
    )
    streaming: bool = False  # hub: read over the network without storing the whole set
    text_key: str = "text"  # jsonl, parquet, hub: the column with the text (format: text)
    split_key: str | None = None  # column whose value decides train or held-out; null: the text itself
    held_out_key: str | None = (
        None  # column that says true where a record is held out; null: the hash of split_key decides
    )
    bad_records: str | None = field(
        default=None, metadata={"choices": BAD_RECORDS}
    )  # a record of no use: stop says where it stands, skip leaves it out and counts it; null: skip for hub, else stop
    weight: float = field(default=1.0, metadata={"min": 0.0, "exclusive": True, "max": 1e6})  # repetitions per epoch
    max_documents: int | None = field(default=None, metadata={"min": 1})  # stop reading after so many
    held_out_fraction: float | None = field(
        default=None, metadata={"min": 0.0, "max": 0.5}
    )  # null: data.held_out_fraction

    def __post_init__(self) -> None:
        if self.kind not in SOURCE_KINDS:
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} is none of {', '.join(SOURCE_KINDS)}")
        if self.kind == "embedded" and not self.corpus:
            raise ValueError(f"source {self.name!r}: kind embedded needs corpus: the name of an embedded text")
        if self.kind in ("hub", "jsonl", "parquet", "text") and not self.path:
            raise ValueError(f"source {self.name!r}: kind {self.kind} needs path")
        for key in ("split_key", "held_out_fraction"):
            if self.held_out_key is not None and getattr(self, key) is not None:
                raise ValueError(
                    f"source {self.name!r}: held_out_key decides what is held out, and {key} nothing; remove one"
                )


@dataclass
class DataConfig:
    """Which sources, how they become rows, and what of them is held out."""

    format: str = field(default="text", metadata={"choices": ("text", "chat")})  # documents, or conversations
    cache_dir: str = "cache/data"  # prepared shards live here
    verify: bool = True  # false: skip the check of the shards' bytes at the start, for very large sets
    context_length: int | None = field(
        default=None, metadata={"min": 2}
    )  # tokens of a row; null: model.max_position_embeddings
    document_mask: bool = False  # true: attention stays inside a document, positions restart (format chat: always)
    held_out_fraction: float = field(
        default=0.005, metadata={"min": 0.0, "max": 0.5}
    )  # of documents, by hash of split_key
    held_out_max_tokens: int | None = field(
        default=None, metadata={"min": 1}
    )  # per source; the rest of the held-out documents is left out
    sources: list[SourceConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        seen = set()
        for source in self.sources:
            if not source.name:
                raise ValueError("data.sources: every source needs a name")
            if source.name in seen:
                raise ValueError(f"data.sources: the name {source.name!r} is used twice; give every source its own")
            seen.add(source.name)
