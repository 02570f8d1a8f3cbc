"""A tokenizer as llama.cpp reads it, and as it splits text: the keys tokenizer.ggml.* of a GGUF file.

llama.cpp knows the ways to split text before BPE by name (src/llama-vocab.cpp). SPLITTERS holds the patterns behind the names
that tokenizers here can have: our own is Qwen2's. A tokenizer that splits otherwise is refused, because its ids would change.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data.chat import CHAT_TEMPLATE
from data.tokenizer import SPLITTER, Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = SPLITTER.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITTERS = {  # tokenizer.ggml.pre -> the patterns that llama.cpp splits text with before BPE, one after another
    "qwen2": (SPLITTER,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
}
IGNORES_MERGES = {"llama-bpe"}  # a word that is a token is taken whole
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def tokenizer_metadata(folder: Path, tokenizer: Tokenizer, vocab_size: int, chat: bool) -> dict[str, object]:
    """The tokenizer of `folder` under llama.cpp's keys, and the chat template where the run learned to chat. ValueError
    where llama.cpp would split text in another way."""
    json_bytes = (folder / "tokenizer.json").read_bytes()
    if hashlib.sha256(json_bytes).hexdigest() != tokenizer.fingerprint:
        raise ValueError(f"{folder / 'tokenizer.json'}: has just changed; repeat the command")
    tree = json.loads(json_bytes)
    model, added = tree["model"], {token["id"]: token for token in tree.get("added_tokens") or []}
    pre = _pre_tokenizer(tree, folder)
    names = {number: text for text, number in model["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    if max(names) >= vocab_size:
        raise ValueError(
            f"{folder}: has ids up to {max(names)}, and model.vocab_size is {vocab_size}; this is not its run"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise ValueError(
            f"{folder}: the tokenizer knows single bytes alone, no merges, and llama.cpp reads none without; "
            "train one with a larger model.vocab_size"
        )
    if any(merge.count(" ") != 1 for merge in merges):
        raise ValueError(
            f"{folder}: a token holds a space, which GGUF cannot merge; train one with scripts.train_tokenizer"
        )
    known, tokens, kinds = set(names.values()), [], []
    for number in range(vocab_size):  # ids that only the model has, to a rounder vocab_size, get a name of their own
        tokens.append(names.get(number) or _unused_name(number, known))
        special = (CONTROL if added[number]["special"] else USER_DEFINED) if number in added else NORMAL
        kinds.append(special if number in names else UNUSED)
    values: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,  # every row of training began with it
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if chat:  # a model that only continues text gets none, or llama-cli would talk to it
        values["tokenizer.ggml.eot_token_id"] = tokenizer.im_end_id
        values["tokenizer.chat_template"] = CHAT_TEMPLATE
    return values


def _unused_name(number: int, known: set[str]) -> str:
    name = f"<|unused-{number}|>"
    while name in known:
        name = f"_{name}"
    return name


def _pre_tokenizer(tree: dict, folder: Path) -> str:
    """tokenizer.ggml.pre. ValueError where llama.cpp has no name for this tokenizer's way to split text."""
    if tree.get("normalizer") is not None:
        raise ValueError(
            f"{folder}: the tokenizer changes text before it splits it (normalizer), which llama.cpp would leave out; "
            "train one with scripts.train_tokenizer"
        )
    patterns = _patterns(tree.get("pre_tokenizer"))
    for name, own in SPLITTERS.items():
        if own == patterns and bool(tree["model"].get("ignore_merges")) == (name in IGNORES_MERGES):
            return name
    raise ValueError(
        f"{folder}: the tokenizer splits text as none of llama.cpp's {', '.join(SPLITTERS)} does; "
        "train one with scripts.train_tokenizer"
    )


def _patterns(part: dict | None) -> tuple[str, ...]:
    """The patterns a byte-level pre-tokenizer splits with, one after another; () where it is none."""
    parts = (part or {}).get("pretokenizers", [part])
    patterns: list[str] = []
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} if not part.get("invert"):
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [_GPT2] if part.get("use_regex", True) else []
            case _:
                return ()
    is_byte_level = bool(parts) and isinstance(parts[-1], dict) and parts[-1].get("type") == "ByteLevel"
    return tuple(patterns) if is_byte_level else ()
