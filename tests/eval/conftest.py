"""A small untrained run with real shards, for the tests of everything that measures a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.prepare import prepare
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from train.checkpoint import Run
from train.config import RunConfig, from_dict
from train.precision import autocast_for

CPU = torch.device("cpu")
WORDS = "the king said to his men that they were to go up to the house and give an account of all that was done".split()


def sentence(i: int) -> str:
    """Text with some repetition, of varying length, some of it not ASCII."""
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(3 + i % 23)) + (
        " – ça suffit.\n" if i % 3 else "."
    )


def conversation(i: int) -> list[dict]:
    turns = []
    for turn in range(1 + i % 2):
        turns.append({"role": "user", "content": f"What is {i} + {turn}?"})
        turns.append({"role": "assistant", "content": f"{sentence(i)} {i + turn} €"})
    return turns


@pytest.fixture(scope="module")
def browser():
    """Chromium, for a module's tests that look at a page as a person does."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), None)
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(chat=False, **model_keys) -> a Run with random weights on its own text."""

    def make(chat: bool = False, **model_keys) -> Run:
        documents = [{"messages": conversation(i)} if chat else {"text": sentence(i)} for i in range(120)]
        source = tmp_path / ("chat.jsonl" if chat else "text.jsonl")
        source.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        config = run_config(tmp_path, source, chat, model_keys)
        tokenizer = Tokenizer.train((sentence(i) for i in range(120)), 300, show_progress=False)
        tokenizer.save(tmp_path / "tokenizer")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer")
        prepare(config.data, tokenizer, progress=False)
        torch.manual_seed(1)
        model = MoEForCausalLM(config.model).eval()
        return Run(
            config=config,
            model=model,
            tokenizer=tokenizer,
            device=CPU,
            precision="float32",
            step=3,
            run_dir=tmp_path / "runs" / "tiny",
            checkpoint=tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000003",
            autocast=autocast_for("float32", CPU),
        )

    return make


def run_config(folder: Path, source: Path, chat: bool, model_keys: dict) -> RunConfig:
    model = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 96 if chat else 24,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "initializer_range": 0.3,  # far from uniform predictions, so that a wrong target shows
        **model_keys,
    }
    tree = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "model": model,
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {
            "format": "chat" if chat else "text",
            "cache_dir": str(folder / "cache"),
            "held_out_fraction": 0.3,
            "sources": [{"name": "tales", "kind": "jsonl", "path": str(source)}],
        },
        "train": {"steps": 10, "tokens_per_step": 96, "micro_batch_size": 1},
        "eval": {"batch_size": 4},
    }
    return from_dict(tree, "test")
