"""What a tokenizer.json may hold: byte-pair encoding and the parts that well-known tokenizers put around it.

The Rust library that runs it trusts the file: with some values (seen with tokenizers 0.23) it aborts the process, panics
or doubles the text at every step. A stranger's file must not, so everything that is not known to be harmless is refused.
"""

from __future__ import annotations

import json

MOST_PARTS = 16  # of a sequence; LLaMA's and DeepSeek's have up to 6
LONGEST_PATTERN = 4096  # characters; o200k's has 400

_SPLITTERS = {"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence"}
_PARTS = {  # what may stand where, besides null
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Sequence"},
    "pre_tokenizer": _SPLITTERS,
    "decoder": {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "Sequence"},
}
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def problem_of(text: str) -> str | None:
    """What is wrong with a tokenizer.json, in a few words; None if it may be handed to the library."""
    try:
        tree = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        return str(error)
    if not isinstance(tree, dict):
        return "it is no JSON object"
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return "model must be of type BPE"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"model.{key} must be null"
    for key, allowed in _PARTS.items():
        problem = _part_problem(tree.get(key), key, allowed)
        if problem:
            return problem
    return None


def _part_problem(part: object, key: str, allowed: set[str]) -> str | None:
    if part is None:
        return None
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in allowed:
        return f"{key} of type {str(kind)[:40]!r} is none of {', '.join(sorted(allowed))}"
    if kind == "Sequence":
        parts = part.get(_LISTS[key])
        if not isinstance(parts, list) or len(parts) > MOST_PARTS:
            return f"{key} must be a sequence of at most {MOST_PARTS}"
        problems = (_part_problem(inner, key, allowed - {"Sequence"}) for inner in parts if inner is not None)
        return next((problem for problem in problems if problem), None)
    if "pattern" in part:
        pattern = part["pattern"]
        wanted = {"String", "Regex"} if kind == "Split" else {"String"}
        if not isinstance(pattern, dict) or len(pattern) != 1 or not pattern.keys() <= wanted:
            return f"{key}: the pattern of {kind} must be one {' or '.join(sorted(wanted))}"
        (value,) = pattern.values()
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_PATTERN:
            return f"{key}: a pattern must have 1 to {LONGEST_PATTERN} characters"
        content = part.get("content", "")
        if kind == "Replace" and (not isinstance(content, str) or len(content) > len(value)):
            return f"{key}: Replace must not lengthen the text"
    if kind == "Strip" and not all(type(part.get(side)) is int and 0 <= part[side] <= 1 for side in ("start", "stop")):
        return f"{key}: Strip must take at most one character from a side"
    if kind == "Prepend" and (not isinstance(part.get("prepend"), str) or len(part["prepend"]) != 1):
        return f"{key}: Prepend must add one character"
    return None


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key stands in it twice")
    return tree
