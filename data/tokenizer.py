"""Byte-level BPE: any text to ids and back, exactly.

The splitter before BPE is Qwen2's (digits one by one, good for CJK, known to llama.cpp by name); no normaliser, so
that every text round-trips. Ids 0 to 4 are the special tokens, 5 to 260 the bytes, then the merges. `encode` never
yields a special id: text that looks like a special token stays text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.chat import CHAT_TEMPLATE

if TYPE_CHECKING:
    import tokenizers  # at run time only where it is used: opening model and train must work without it

PAD, BOS, EOS, IM_START, IM_END = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # every byte has an id

# Qwen2's splitter, https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/tokenizer.json
SPLITTER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What other tokenizers call them. EOS is chosen first and BOS must differ: a document's start is told from its end.
_NAMES = {
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

    `fingerprint` is the SHA-256 (hex) of tokenizer.json; shards remember it.
    """

    def __init__(self, json_bytes: bytes, where: str):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_bytes.decode("utf-8"))
        except Exception as error:  # the Rust library raises bare Exceptions
            raise ValueError(f"{where}: not readable as a tokenizer.json ({error}); make it anew") from None
        self._json = json_bytes
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(json_bytes).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._names = _find_special_tokens(self._tokenizer, where)
        self.pad_id, self.bos_id, self.eos_id, self.im_start_id, self.im_end_id = (
            self._tokenizer.token_to_id(self._names[role]) for role in ("pad", "bos", "eos", "im_start", "im_end")
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json, or that file. ValueError if it is missing, broken or lacks a special token."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() or file.suffix != ".json" else file
        try:
            return cls(file.read_bytes(), str(file))
        except OSError as error:
            raise ValueError(
                f"tokenizer.path: cannot read {file} ({error.strerror}); "
                "train it with: python -m scripts.train_tokenizer CONFIG"
            ) from None

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
        """Writes tokenizer.json (last, so its presence means complete) and a tokenizer_config.json for transformers."""
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _replace_file(folder / "tokenizer_config.json", json.dumps(config, indent=2).encode("utf-8"))
        _replace_file(folder / "tokenizer.json", self._json)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast([replace_surrogates(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a sequence cut inside a character) come out as U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _find_special_tokens(tokenizer: tokenizers.Tokenizer, where: str) -> dict[str, str]:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names: dict[str, str] = {}
    for role, candidates in _NAMES.items():
        usable = [name for name in candidates if name in special and not (role == "bos" and name == names["eos"])]
        if not usable:
            raise ValueError(
                f"{where}: no special token for {role} (looked for {', '.join(candidates)}); "
                "add one to the tokenizer, or train a new one with scripts.train_tokenizer"
            )
        names[role] = usable[0]
    return names


def _replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
