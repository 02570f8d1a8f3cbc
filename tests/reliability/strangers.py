"""A run folder that a stranger could have made hostile: the fixtures `innocent` and `place`, and the commands that open it.

Every command runs in a child whose audit hook reports a write outside the test's folder, a started process or an unpickled
object (attempts.py). Files are made hostile and their checksums made right again: a stranger can do both.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from data.integrity import SUMS, write_checksums

from .attempts import attempt

RUN = Path("runs/pre")
CHECKPOINT = RUN / "checkpoints/step-00000004"
CHAT = ("scripts.chat", RUN, "--prompt", "The class", "--max-tokens", 4, "--seed", 1)
EVALUATE = ("eval.evaluate", RUN)
REPORT = ("eval.report", RUN)
RESUME = ("train.pretrain", "pretrain.yaml", "train.steps=5", "eval.prompts=[]")
FINE_TUNE = ("train.sft", "sft.yaml")
OPENERS = {"chat": CHAT, "evaluate": EVALUATE, "fine-tune": FINE_TUNE, "resume": RESUME}


@pytest.fixture(scope="session")
def innocent(workplace, tmp_path_factory) -> Path:
    """A folder with configs, data, tokenizer and a trained run, every path relative to it."""
    folder = tmp_path_factory.mktemp("innocent")
    for name in ("text.jsonl", "chat.jsonl", "tokenizer"):
        (shutil.copytree if (workplace / name).is_dir() else shutil.copy)(workplace / name, folder / name)
    pretrain = yaml.safe_load((workplace / "pretrain.yaml").read_text())
    pretrain["runs_dir"] = "runs"
    pretrain["tokenizer"]["path"] = "tokenizer"
    pretrain["data"] |= {"cache_dir": "cache", "sources": [{"name": "topics", "kind": "jsonl", "path": "text.jsonl"}]}
    pretrain["train"] |= {"steps": 4, "checkpoint_every": 2}
    pretrain["eval"] |= {"every": 0, "max_tokens": 200}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
    sft = yaml.safe_load((workplace / "sft.yaml").read_text())
    sft["data"]["sources"] = [{"name": "sums", "kind": "jsonl", "path": "chat.jsonl"}]
    sft["train"] |= {"init_from": str(RUN), "steps": 1}
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    for command in (("train.pretrain", "pretrain.yaml"), EVALUATE, ("scripts.prepare_data", "sft.yaml")):
        outcome = attempt(*command, allowed=folder, cwd=folder)
        assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def place(innocent, tmp_path) -> Path:
    """A copy of it to spoil; beside it, victim.txt, which nothing may touch."""
    (tmp_path / "victim.txt").write_text("precious")
    yield Path(shutil.copytree(innocent, tmp_path / "place"))
    assert (tmp_path / "victim.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "victim.txt"]


def tried(place: Path, command: tuple):
    return attempt(*command, allowed=place, cwd=place)


def reseal(folder: Path) -> None:
    """Makes the checksums of a folder right again."""
    if (folder / SUMS).is_file():
        names = [line.split("  ", 1)[1] for line in (folder / SUMS).read_text().splitlines()]
        write_checksums(folder, names)
