"""Byte-level BPE: any text to ids and back, exactly.

The splitter before BPE is Qwen2's (digits one by one, good for CJK, known to llama.cpp by name); no normaliser, so
that every text round-trips. Ids 0 to 4 are the special tokens, 5 to 260 the bytes, then the merges. `encode` never
yields a special id: text that looks like a special token stays text.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data import integrity
from data.chat import CHAT_TEMPLATE
from data.tokenizer_file import problem_of

if TYPE_CHECKING:
    import tokenizers  # at run time only where it is used: opening model and train must work without it

PAD, BOS, EOS, IM_START, IM_END = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
# Comes back from every tokenizer that knows all bytes, whatever it normalises.
PROBE = f"The <|eos|> 0123 {''.join(map(chr, range(33, 127)))} \n\n\tna\u00efve \u65e5\u672c\u8a9e \U0001f469"
FILES = ("tokenizer_config.json", "tokenizer.json")
LARGEST_FILE = 2**28  # bytes; the largest tokenizers of others have 2**25
LARGEST_ID = 2**24  # the largest vocabularies of others have 2**20; a table of all ids must fit into memory
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # every byte has an id

# Qwen2's splitter, https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json
SPLITTER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What other tokenizers call them. EOS is chosen first and BOS must differ: a document's start is told from its end.
SPECIAL_NAMES = {
    "eos": (EOS, "</s>", "<|end_of_text|>", "<eos>", IM_END, "<|endoftext|>"),
    "bos": (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "im_start": (IM_START,),
    "im_end": (IM_END,),
    "pad": (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}

_SURROGATES = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate (half a character, as broken JSON escapes leave): encodable as UTF-8."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


class Tokenizer:
    """Text <-> ids. Make one with `Tokenizer.load` or `Tokenizer.train`.

    `json_bytes` is tokenizer.json as it was read; `fingerprint` its SHA-256 (hex), which shards remember.
    """

    def __init__(self, json_bytes: bytes, where: str):
        import tokenizers

        try:
            text = json_bytes.decode("utf-8")
            problem = problem_of(text)
            if problem:
                raise ValueError(problem)
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust library raises bare Exceptions
            short = " ".join(str(error).split())[:200]
            raise ValueError(f"{where}: not readable as a tokenizer.json ({short}); make it anew") from None
        self.json_bytes, self._where = json_bytes, where
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(json_bytes).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if self.vocab_size > LARGEST_ID or len(set(ids)) < len(ids):
            what = "an id has two tokens" if self.vocab_size <= LARGEST_ID else f"an id is beyond {LARGEST_ID:,}"
            raise ValueError(f"{where}: {what}; make it anew")
        self._names = _find_special_tokens(self._tokenizer, where)
        self.pad_id, self.bos_id, self.eos_id, self.im_start_id, self.im_end_id = (
            self._tokenizer.token_to_id(self._names[role]) for role in ("pad", "bos", "eos", "im_start", "im_end")
        )
        self._check_nothing_is_lost()

    def _check_nothing_is_lost(self) -> None:
        ids = self.encode(PROBE)
        back = self.decode(ids)
        if back.strip() != PROBE or not {*ids}.isdisjoint((self.pad_id, self.bos_id, self.eos_id)):
            i = next((i for i, (a, b) in enumerate(zip(PROBE, back.strip())) if a != b), min(len(PROBE), len(back)))
            raise ValueError(
                f"{self._where}: it loses text ({PROBE[i : i + 12]!r} comes back as {back.strip()[i : i + 12]!r}); "
                "use a tokenizer that knows every byte"
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json, or that file. ValueError if it is missing, broken or lacks a special token.

        Where SHA256SUMS lies beside it, as `save` leaves it, the bytes must be those.
        """
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() or file.suffix != ".json" else file
        try:
            n_bytes = file.stat().st_size if file.is_file() else 0
            if n_bytes > LARGEST_FILE:
                raise ValueError(f"{file}: {n_bytes:,} bytes are too many for a tokenizer.json; make it anew")
            if file.exists() and not file.is_file():  # a pipe, say, which nobody may ever write to
                raise ValueError(f"{file}: no plain file; put a tokenizer.json there")
            json_bytes = file.read_bytes()
        except OSError as error:
            raise ValueError(
                f"tokenizer.path: cannot read {file} ({error.strerror}); "
                "train it with: python -m scripts.train_tokenizer CONFIG"
            ) from None
        if file.name == "tokenizer.json" and os.path.lexists(file.parent / integrity.SUMS):
            problem = integrity.damage(file.parent, FILES)
            if problem:
                raise ValueError(
                    f"{problem}; put back a whole copy of the tokenizer (each run has one in RUN/tokenizer), or remove "
                    f"{file.parent} and train it anew with: python -m scripts.train_tokenizer CONFIG"
                )
        return cls(json_bytes, str(file))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
        """Byte-pair merges learned from `texts`, which is read once. ValueError if `vocab_size` tokens cannot be found."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"model.vocab_size: {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                f"need {SMALLEST_VOCABULARY}"
            )
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLITTER), behavior="isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=show_progress,
        )
        tokenizer.train_from_iterator((replace_surrogates(text) for text in texts), trainer)
        found = tokenizer.get_vocab_size()
        if found < vocab_size:
            raise ValueError(
                f"model.vocab_size: {vocab_size} is more than the {found} tokens this text holds; "
                f"lower model.vocab_size to {found} or give the tokenizer more text"
            )
        return cls(tokenizer.to_str(pretty=True).encode("utf-8"), "the trained tokenizer")

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json (last, so its presence means complete), tokenizer_config.json for transformers, SHA256SUMS.

        A folder that holds just these is left alone.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._names["bos"],
            "eos_token": self._names["eos"],
            "pad_token": self._names["pad"],
            "additional_special_tokens": [self._names["im_start"], self._names["im_end"]],
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        config = json.dumps(config, indent=2).encode("utf-8")
        sums = "".join(
            f"{hashlib.sha256(c).hexdigest()}  {name}\n" for name, c in zip(FILES, (config, self.json_bytes))
        )
        contents = {
            "tokenizer_config.json": config,
            integrity.SUMS: sums.encode("utf-8"),
            "tokenizer.json": self.json_bytes,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            _replace_files(folder, contents)

    def encode(self, text: str) -> list[int]:
        with self._panics_as_errors():
            return self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = [replace_surrogates(text) for text in texts]
        with self._panics_as_errors():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a sequence cut inside a character) come out as U+FFFD."""
        with self._panics_as_errors():
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @contextlib.contextmanager
    def _panics_as_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # a panic of the Rust library is no Exception
            if type(error).__name__ != "PanicException":
                raise
            short = " ".join(str(error).split())[:200]
            raise ValueError(f"{self._where}: this tokenizer fails ({short}); make it anew") from None


def _find_special_tokens(tokenizer: tokenizers.Tokenizer, where: str) -> dict[str, str]:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names: dict[str, str] = {}
    for role, candidates in SPECIAL_NAMES.items():
        usable = [name for name in candidates if name in special and not (role == "bos" and name == names["eos"])]
        if not usable:
            raise ValueError(
                f"{where}: no special token for {role} (looked for {', '.join(candidates)}); "
                "add one to the tokenizer, or train a new one with scripts.train_tokenizer"
            )
        names[role] = usable[0]
    return names


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes all that is not there yet, then puts each in its place, in this order.

    A kill in between leaves the tokenizer of before, that of after, or none: never one that its checksums deny.
    """
    temporary = {name: folder / f".{name}.partial" for name in contents}
    try:
        if all(_holds(folder / name, content) for name, content in contents.items()):
            return
        for name, content in contents.items():
            temporary[name].unlink(missing_ok=True)  # of a process that was killed; or a link, not to be followed
            with temporary[name].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if not _holds(folder / "tokenizer.json", contents["tokenizer.json"]):
            (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / integrity.SUMS).unlink(missing_ok=True)
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            if os.path.lexists(path):
                path.unlink()
