"""A tiny but real run: topics of Python's documentation, a trained tokenizer, YAML files, commands in processes of their own."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.config import SourceConfig  # noqa: F401  (fails early and clearly if the checkout is not the working directory)
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with text.jsonl, chat.jsonl, tokenizer/, pretrain.yaml and sft.yaml."""
    folder = tmp_path_factory.mktemp("workplace")
    topics = [text for text in pydoc_data.topics.topics.values() if 200 < len(text) < 6000]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics), encoding="utf-8")
    sums = [(a, b) for a in range(12) for b in range(12)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{a} + {b} = ?"},
                {"role": "assistant", "content": f"The sum is {a + b}."},
            ]
        }
        for a, b in sums
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    Tokenizer.train(topics, 384).save(folder / "tokenizer")

    source = {"name": "topics", "kind": "jsonl", "path": str(folder / "text.jsonl")}
    pretrain = {
        "name": "pre",
        "runs_dir": str(folder / "runs"),
        "seed": 7,
        "model": {
            "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "dropout": 0.1,
            "router_jitter_noise": 0.01, "router_bias_update_rate": 0.001, "aux_loss_level": "sequence", "router_z_loss_coef": 0.001,
        },
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"cache_dir": str(folder / "cache"), "context_length": 32, "held_out_fraction": 0.1, "sources": [source]},
        "train": {
            "steps": 20, "tokens_per_step": 256, "micro_batch_size": 2, "learning_rate": 3e-3, "warmup_steps": 3, "log_every": 1,
            "checkpoint_every": 5, "threads": 1, "precision": "float32",
        },
        "eval": {"every": 10, "max_tokens": 2000, "prompts": ["The class"], "sample_tokens": 8},
    }  # fmt: skip
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain), encoding="utf-8")
    sft = {
        "base": "pretrain.yaml",
        "name": "sft",
        "data": {
            "format": "chat",
            "context_length": 64,
            "sources": [{"name": "sums", "kind": "jsonl", "path": str(folder / "chat.jsonl")}],
        },
        "train": {"init_from": str(folder / "runs/pre"), "tokens_per_step": 512, "steps": 20},
        "eval": {"prompts": ["1 + 2 = ?"]},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft), encoding="utf-8")
    return folder


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def start(module: str, *arguments: str, processes: int = 1) -> subprocess.Popen:
    """`python -m module arguments` from the checkout's root, or the same under torchrun."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.Popen(
        [*launcher, module, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can reach the launcher and its processes together
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """Waits for success and returns what was printed."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out


def run(module: str, *arguments: str, processes: int = 1) -> str:
    return finish(start(module, *arguments, processes=processes))
