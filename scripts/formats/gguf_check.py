"""Whether a GGUF file holds the run it was made of: every key, tensor and token, and the logits that llama.cpp will compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from scripts.formats.gguf_file import BLOCK, GGUFFile, packed, stored_type, unpacked
from scripts.formats.gguf_layout import Weights, entries
from scripts.formats.gguf_reference import logits_of
from scripts.formats.gguf_tokenizer import IGNORES_MERGES, SPLITTERS, USER_DEFINED

LOGITS_TOLERANCE = 2e-5  # of float32, at a spread of 1
HARD_STRINGS = (
    "The quick brown fox, don't you'll WE'RE 'S x's; jumps over 13 lazy dogs.",
    "0123456789 3.14159 1,000,000 x2 7th \u0664\u0662 \u00bd \u00b2",
    " leading, trailing ", "a  b   c\t\td\n\n\ne\r\n f \u00a0g\u3000h\n ",
    "na\u00efve \u65e5\u672c\u8a9e\u306e\u6587\u7ae0\uff0c\u4f60\u597d\u3002"
    " \ud55c\uad6d\uc5b4 \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \u05e9\u05dc\u05d5\u05dd e\u0301",
    "\U0001f469\u200d\U0001f52c\U0001f680\U0001f1eb\U0001f1f7 \U00020000\x00\x7f\ufffd",
    "<|im_start|>user\n<|im_end|><|eos|><|bos|><|pad|> <|im_start",
    "if x[i]!=y: return {\"a\": [1, 2]}  # \\n $%^&*()",
)  # fmt: skip
TEXTS = (  # for the logits; one of them must agree: a tie between two experts may fall otherwise in one
    "In the beginning there was light, and the light was good. What is 47 + 38? It is 85.",
    "def add(a, b):\n    return a + b\n\nThe men went up to the town, and the king said to them, Why?",
    "Once upon a time, Lily and her dog saw a little red boat. They were happy, because it was new.",
)
MOST_TOKENS = 48  # of each, in the reference


def difference(
    path: Path, model: MoEForCausalLM, tokenizer: Tokenizer, weights: Weights, values: dict[str, object], wanted: str
) -> str | None:
    """What in the file is not the run's, in a few words; None if it is all there."""
    try:
        file = GGUFFile(path)
    except (ValueError, KeyError, IndexError) as error:  # what the reader says of broken files
        return f"it cannot be read: {error}"
    return (
        _metadata_difference(file, values)
        or _tensor_difference(file, model, weights, wanted)
        or _token_difference(file, tokenizer)
        or _logits_difference(file, model, tokenizer, wanted)
    )


def _metadata_difference(file: GGUFFile, values: dict[str, object]) -> str | None:
    for key, value in values.items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if file.metadata.get(key) != expected:
            return f"key {key}"
    return None


def _tensor_difference(file: GGUFFile, model: MoEForCausalLM, weights: Weights, wanted: str) -> str | None:
    plan = entries(model.config)
    if file.names() != {entry.name for entry in plan}:
        return f"it has {len(file.names())} tensors, and {len(plan)} were written"
    for entry in plan:
        expected = entry.make(weights).float()
        kind = stored_type(entry.plain, expected.shape[-1], wanted)
        found = file.tensor(entry.name)
        if file.kind(entry.name) != kind or found.shape != expected.shape:
            return f"tensor {entry.name} is {file.kind(entry.name)} {tuple(found.shape)}"
        if not ((found - expected).abs() <= rounding(expected, kind)).all():
            return f"tensor {entry.name}"
    return None


def rounding(tensor: torch.Tensor, kind: str) -> torch.Tensor | float:
    """The most by which storing it as `kind` may change each number."""
    if kind == "f32":
        return 0.0
    if kind == "q8_0":  # 127 steps up to the largest of 32 numbers; the step itself is a float16
        blocks = tensor.unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1, keepdim=True)
        return (largest * (0.501 / 127 + 2**-11) + 127 * 2**-25).expand_as(blocks).flatten(-2)
    return tensor.abs() * {"f16": 2**-11, "bf16": 2**-8}[kind] + (2**-25 if kind == "f16" else 1e-38)


def _token_difference(file: GGUFFile, tokenizer: Tokenizer) -> str | None:
    """Compares ids with those of a tokenizer put together from the file, as llama.cpp does."""
    encode = encoder_of(file)
    for text in (*HARD_STRINGS, *TEXTS):
        if encode(text) != tokenizer.encode(text):
            return f"its tokens of {text[:20]!r}"
    return None


def encoder_of(file: GGUFFile) -> Callable[[str], list[int]]:
    """text -> ids, from the tokens, merges and splitter in the file; special tokens in it stay text."""
    import tokenizers

    tokens, kinds = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    pre = file.metadata["tokenizer.ggml.pre"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=pre in IGNORES_MERGES)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_tokens([token for token, kind in zip(tokens, kinds) if kind == USER_DEFINED])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            *(tokenizers.pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in SPLITTERS[pre]),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def _logits_difference(file: GGUFFile, model: MoEForCausalLM, tokenizer: Tokenizer, wanted: str) -> str | None:
    """The file's logits beside those of the model with its weights rounded as they are stored."""
    model, smallest = rounded(model, wanted), float("inf")
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)][: min(MOST_TOKENS, model.config.max_position_embeddings)]
        expected = model(torch.tensor([ids])).logits[0].float()
        largest = float((logits_of(file, ids) - expected).abs().max() / max(1.0, float(expected.std())))
        if largest <= LOGITS_TOLERANCE:  # and so not if it is no number
            return None
        smallest = min(smallest, largest)
    return f"its logits, by {smallest:.2g}"


def rounded(model: MoEForCausalLM, wanted: str) -> MoEForCausalLM:
    """A float32 copy on the CPU whose weights are those that the file holds."""
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    state = model.state_dict()
    done: set[str] = set()
    for entry in entries(model.config):
        for name in entry.sources:
            kind = stored_type(entry.plain, entry.make(state).shape[-1], wanted)
            if kind != "f32" and name not in done:
                state[name].copy_(_stored(state[name], kind, name))
                done.add(name)
    return model


def _stored(tensor: torch.Tensor, kind: str, name: str) -> torch.Tensor:
    """The numbers after they were stored; rows that end inside a block are filled up with zeros, as in the file."""
    row = tensor.shape[-1]
    filled = torch.nn.functional.pad(tensor, (0, -row % BLOCK))
    numbers = unpacked(packed(filled, kind, name), kind)
    return torch.from_numpy(np.array(numbers)).view_as(filled)[..., :row]
