"""llama.cpp itself against the run, where llama-cpp-python can be imported: by this interpreter, or by the one that
MINIMOE_LLAMA_PYTHON names.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python        compiles for some minutes
    MINIMOE_LLAMA_PYTHON=/tmp/llama/bin/python python -m pytest tests/scripts/formats/test_gguf_llama.py --all
"""

import dataclasses
import importlib.util
import json
import math
import os
import pydoc_data.topics
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from data.chat import CHAT_TEMPLATE, encode_prompt
from data.tokenizer import Tokenizer
from model import ModelConfig
from model.generate import generate
from scripts.export_gguf import export
from scripts.formats.gguf_check import HARD_STRINGS, TEXTS
from scripts.formats.gguf_file import TYPES
from train.checkpoint import open_run
from train.config import load_config

from .gguf_cases import (
    CONFIGS,
    LOGITS_TOLERANCE,
    SHAPES,
    UNGATED,
    export_of,
    logits,
    others_tokenizer,
    texts_as_ids,
    with_tokenizer,
)


def llama_python() -> str | None:
    """The interpreter that has llama-cpp-python."""
    here = sys.executable if importlib.util.find_spec("llama_cpp") else None
    return os.environ.get("MINIMOE_LLAMA_PYTHON", here)


needs_llama = pytest.mark.skipif(
    llama_python() is None, reason="no llama-cpp-python: pip install it, or name an interpreter in MINIMOE_LLAMA_PYTHON"
)


def ask_llama(questions: list[dict]) -> list[dict]:
    command = [llama_python(), str(Path(__file__).with_name("llama_answers.py"))]
    done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["answers"]


def shrunk(config: ModelConfig) -> dict:
    """Its keys with a small size: everything that decides how it computes is the shipped one."""
    factor = config.intermediate_size // config.moe_intermediate_size if config.moe_layers else 1
    sizes = {
        "vocab_size": 512, "hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32 * max(factor, 1),
        "num_hidden_layers": min(config.num_hidden_layers, 4), "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 256, "expert_backend": "loop",
    }  # fmt: skip
    return dataclasses.asdict(config) | sizes


@needs_llama
@pytest.mark.slow
def test_llama_cpp_computes_what_the_run_does(random_run, tmp_path):
    """Every shipped model, small, and every shape above: logits, 50 tokens, ids, a chat turn. One process for all."""
    shapes = {name: keys for name, (_, keys) in SHAPES.items()}
    for path in CONFIGS:
        if (name := f"{path.parent.name}/{path.stem}") not in UNGATED:
            shapes[name] = shrunk(load_config(path).model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2 + 3 = ? \n"}]
    runs, questions = {}, []
    for number, (name, keys) in enumerate(shapes.items()):
        run = runs[name] = export_of(random_run(f"run{number}", **keys), tmp_path / f"{number}.gguf")
        ids = texts_as_ids(run)
        questions.append(
            {
                "path": str(tmp_path / f"{number}.gguf"), "ids": ids, "texts": HARD_STRINGS, "special": HARD_STRINGS,
                "greedy": ids[0][:24], "tokens": 50, "prompt": TEXTS[0], "prompt_tokens": len(ids[0]),
                "messages": messages,
            }
        )  # fmt: skip
    worst = {}
    for (name, run), question, answer in zip(runs.items(), questions, ask_llama(questions), strict=True):
        found, tokenizer = np.load(answer["logits"]), run.tokenizer
        worst[name] = max(
            float((torch.from_numpy(found[f"arr_{i}"]) - logits(run.model, ids)).abs().max())
            for i, ids in enumerate(question["ids"])
        )
        assert worst[name] < LOGITS_TOLERANCE, f"{name}: logits differ by {worst[name]:.2g}"
        ends = {tokenizer.eos_id, tokenizer.im_end_id}
        assert set(answer["ends"]) == ends, f"{name}: tokens that end an answer"
        own = generate(run.model, [question["greedy"]], max_new_tokens=50, temperature=0.0, stop_ids=ends)[0]
        made = [token for token in answer["greedy"] if token not in ends]
        assert made == own, f"{name}: greedy"
        assert answer["texts"] == [tokenizer.encode(text) for text in HARD_STRINGS], f"{name}: ids of text"
        assert answer["texts_back"] == [tokenizer.decode(ids, False) for ids in answer["texts"]], f"{name}: text of ids"
        parsing = tokenizers.Tokenizer.from_file(str(run.run_dir / "tokenizer/tokenizer.json"))
        parsed = [parsing.encode(text, add_special_tokens=False).ids for text in HARD_STRINGS]
        assert answer["special"] == parsed, f"{name}: special tokens in text"
        assert answer["prompt"] == question["ids"][0], f"{name}: a prompt without <|bos|> or with two"
        assert answer["chat_ids"] == encode_prompt(tokenizer, messages), f"{name}: the chat prompt"
    assert len(worst) > 20
    print(f"llama.cpp: logits differ by {max(worst.values()):.1e} at most over {len(worst)} models")


@needs_llama
@pytest.mark.slow
def test_splitters_of_others_are_llama_cpps(random_run, tmp_path):
    texts = [*HARD_STRINGS, *TEXTS, "1234567 12345 WE'LL we'll WORD aWORDb  x"]
    cases = []
    for splitter in ("gpt-2", "smollm", "llama-bpe"):
        tokenizer = others_tokenizer(splitter, ignore_merges=splitter == "llama-bpe")
        export_of(with_tokenizer(random_run(splitter, vocab_size=640), tokenizer), tmp_path / f"{splitter}.gguf")
        cases.append(({"path": str(tmp_path / f"{splitter}.gguf"), "texts": texts}, tokenizer))
    for (question, tokenizer), answer in zip(cases, ask_llama([question for question, _ in cases]), strict=True):
        assert answer["texts"] == [tokenizer.encode(text) for text in texts], question["path"]


@needs_llama
@pytest.mark.slow
def test_a_run_that_learned_sums_answers_them_in_llama_cpp(trained, tmp_path):
    run = export_of(trained.chat, tmp_path / "m.gguf", "q8_0")
    asked = {"role": "user", "content": "2 + 3 = ?"}
    (answer,) = ask_llama([{"path": str(tmp_path / "m.gguf"), "messages": [asked], "tokens": 40}])
    assert answer["chat_ids"] == encode_prompt(run.tokenizer, [asked])
    assert answer["template"] == CHAT_TEMPLATE
    assert re.fullmatch(r"2 \+ 3 = \d+\.", answer["chat"]) and answer["finish"] == "stop", answer["chat"]


@needs_llama
@pytest.mark.slow
def test_smaller_types_lose_little_on_held_out_text(trained, tmp_path):
    """Bits per byte, by llama.cpp, of text that the model has not seen."""
    run = open_run(trained.text, device="cpu", precision="float32")
    texts = [text for text in pydoc_data.topics.topics.values() if len(text) > 6000][:6]  # too long for its training
    ids = [[run.tokenizer.bos_id, *run.tokenizer.encode(text)][:64] for text in texts]
    questions = []
    for wanted in TYPES:
        export(run, tmp_path / f"{wanted}.gguf", wanted)
        questions.append({"path": str(tmp_path / f"{wanted}.gguf"), "ids": ids})
    bits = {}
    for wanted, answer in zip(TYPES, ask_llama(questions), strict=True):
        found = np.load(answer["logits"])
        bits[wanted] = bits_per_byte([torch.from_numpy(found[f"arr_{i}"]) for i in range(len(ids))], ids, run.tokenizer)
    own = bits_per_byte([logits(run.model, row) for row in ids], ids, run.tokenizer)
    assert abs(bits["f32"] - own) < 1e-5
    assert abs(bits["f16"] - own) < 2e-3 and abs(bits["bf16"] - own) < 2e-2 and abs(bits["q8_0"] - own) < 2e-2, bits
    print(f"bits per byte: {bits}")


def bits_per_byte(all_logits: list[torch.Tensor], all_ids: list[list[int]], tokenizer: Tokenizer) -> float:
    nats = sum(
        float(torch.nn.functional.cross_entropy(found[:-1].double(), torch.tensor(ids[1:]), reduction="sum"))
        for found, ids in zip(all_logits, all_ids, strict=True)
    )
    return nats / math.log(2) / sum(len(tokenizer.decode(ids[1:]).encode()) for ids in all_ids)
