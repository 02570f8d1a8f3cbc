"""A tokenizer from elsewhere, with the special tokens that this project needs: start and end of a document, padding, ChatML's two.

Those it lacks are added behind its own ids, by editing tokenizer.json (JSON, nothing is run); whether the result keeps every text is
checked by data/tokenizer.py, which refuses what does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from data.tokenizer import BOS, EOS, IM_END, IM_START, LARGEST_FILE, LARGEST_ID, PAD, SPECIAL_NAMES, Tokenizer
from data.tokenizer_file import problem_of
from data.words import short_name

OURS = {"eos": EOS, "bos": BOS, "im_start": IM_START, "im_end": IM_END, "pad": PAD}


class Adopted(NamedTuple):
    """A tokenizer with every special token, and what was done for that: {token: id} each."""

    tokenizer: Tokenizer
    added: dict[str, int]  # ids that nothing had before
    promoted: dict[str, int]  # were plain tokens, which the model may have learned


def adopt_tokenizer(folder: Path) -> Adopted:
    """The tokenizer of a folder. ValueError where it cannot be used."""
    path = folder / "tokenizer.json"
    where = short_name(path)
    if not path.is_file():
        raise ValueError(
            f"{where}: missing; a tokenizer.model or vocab.json alone is not read: save the tokenizer with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER))"
        )
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{where}: larger than the {LARGEST_FILE >> 20} MiB that a tokenizer.json may have")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not UTF-8 text; copy it anew") from None
    problem = problem_of(text)
    if problem:
        raise ValueError(f"{where}: {problem}; only byte-pair tokenizers that keep every text can be used here")
    text, added, promoted = _with_special_tokens(text, where)
    tokenizer = Tokenizer(text.encode("utf-8") if added or promoted else content, where)
    for name, token_id in (
        added | promoted
    ).items():  # the library gives ids of its own where those of the file have gaps
        if tokenizer.decode([token_id], skip_special_tokens=False) != name:
            raise ValueError(
                f"{where}: {name} cannot be added, because the ids there are not 0, 1, 2, ... without gaps"
            )
    return Adopted(tokenizer, added, promoted)


def _with_special_tokens(text: str, where: str) -> tuple[str, dict[str, int], dict[str, int]]:
    """tokenizer.json with those it lacks, and the two tables of `Adopted`."""
    tree = json.loads(text)
    vocabulary, known = tree["model"].get("vocab"), tree.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(known, list) or not all(isinstance(t, dict) for t in known):
        raise ValueError(f"{where}: its vocabulary is no table of tokens; copy it anew")
    ids = [*vocabulary.values(), *(token.get("id") for token in known)]
    if not all(isinstance(i, int) and 0 <= i < LARGEST_ID for i in ids):
        raise ValueError(f"{where}: an id of a token is no number below {LARGEST_ID:,}; copy it anew")
    special = {str(token.get("content")) for token in known if token.get("special")}
    missing, taken = [], None
    for role, names in SPECIAL_NAMES.items():  # as data/tokenizer.py looks for them: eos first, and bos must differ
        usable = [name for name in names if name in special and not (role == "bos" and name == taken)]
        if not usable:
            missing.append(OURS[role])
        if role == "eos":
            taken = usable[0] if usable else OURS[role]
    if not missing:
        return text, {}, {}
    added, promoted, free = {}, {}, max(ids, default=-1) + 1
    tree["added_tokens"] = [token for token in known if token.get("content") not in missing]
    for name in missing:
        kept = next((token["id"] for token in known if token.get("content") == name), vocabulary.get(name))
        if kept is None:
            added[name], free = free, free + 1
        else:
            promoted[name] = kept
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tree["added_tokens"].append({"id": added.get(name, kept), "content": name, **flags})
    tree["added_tokens"].sort(key=lambda token: token["id"])
    return json.dumps(tree, indent=2), added, promoted
