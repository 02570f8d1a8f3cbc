"""One thread for every test, `--all` for the slow ones, and runs to open: trained ones, and random ones of any shape."""

from __future__ import annotations

import contextlib
import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

torch.set_num_threads(1)  # two threads on a busy two-core machine can be ten times slower than one

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --all"))


@pytest.fixture(autouse=True)
def wandb_is_not_left_running():
    """wandb keeps a process, which stands in the folder where it was started, and names it in the environment: for the next
    test it would be in the wrong place, and so would the processes that the test starts."""
    before = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
    yield
    if os.environ.get("WANDB_SERVICE") != before.get("WANDB_SERVICE"):
        import wandb

        with contextlib.suppress(Exception, SystemExit):  # a process that a test killed
            wandb.teardown()
    for key in [key for key in os.environ if key.startswith("WANDB_") and key not in before]:
        del os.environ[key]


@dataclass
class Trained:
    """Two runs that really learned a little: `text` continues Python's documentation, `chat` adds numbers up to 11."""

    folder: Path  # with pretrain.yaml, sft.yaml, text.jsonl, chat.jsonl, tokenizer/, runs/
    text: Path
    chat: Path


TINY = {
    "name": "text",
    "seed": 7,
    "model": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "moe_intermediate_size": 48, "n_routed_experts": 8, "use_qk_norm": True,
        "aux_loss_level": "batch",
    },
    "data": {"context_length": 64, "held_out_fraction": 0.1},
    "train": {
        "steps": 120, "tokens_per_step": 2048, "micro_batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 5, "log_every": 5,
        "checkpoint_every": 60, "threads": 1, "precision": "float32", "device": "cpu",
    },
    "eval": {"every": 40, "max_tokens": 2000, "prompts": ["The class"], "sample_tokens": 16},
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """About half a minute of training, once a session: for tests marked slow."""
    from data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("trained")
    topics = [text for text in pydoc_data.topics.topics.values() if 200 < len(text) < 6000]
    sums = [(f"{a} + {b} = ?", f"{a} + {b} = {a + b}.") for a in range(12) for b in range(12)]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in sums
    ]
    for name, records in (("text", [{"text": text} for text in topics]), ("chat", chats)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    Tokenizer.train([*topics, *(f"{q} {a}" for q, a in sums)], 512).save(folder / "tokenizer")

    def source(name: str) -> list[dict]:
        return [{"name": name, "kind": "jsonl", "path": str(folder / f"{name}.jsonl")}]

    places = {"runs_dir": str(folder / "runs"), "tokenizer": {"path": str(folder / "tokenizer")}}
    data = {**TINY["data"], "cache_dir": str(folder / "cache"), "sources": source("text")}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump({**TINY, **places, "data": data}), encoding="utf-8")
    sft = {
        "base": "pretrain.yaml",
        "name": "chat",
        "data": {"format": "chat", "sources": source("chat")},
        "train": {"init_from": str(folder / "runs/text"), "steps": 150},
        "eval": {"prompts": ["2 + 3 = ?"], "every": 50},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for module, config in (("train.pretrain", "pretrain.yaml"), ("train.sft", "sft.yaml")):
        command = [sys.executable, "-m", module, str(folder / config)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=600)
    return Trained(folder, folder / "runs/text", folder / "runs/chat")


@pytest.fixture(scope="session")
def small_tokenizer():
    """512 tokens, learned from Python's documentation."""
    from data.tokenizer import Tokenizer

    return Tokenizer.train([text for text in pydoc_data.topics.topics.values() if len(text) < 6000], 512)


@pytest.fixture
def random_run(tmp_path, small_tokenizer) -> Callable[..., Path]:
    """random_run(name="random", format="chat", seed=0, **model_keys) -> the folder of a run with random weights of any shape."""
    from tests.random_runs import make_random_run

    def make(name: str = "random", **keys) -> Path:
        return make_random_run(tmp_path / "runs", name, small_tokenizer, **keys)

    return make
