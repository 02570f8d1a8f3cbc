"""The README keeps its word about itself: tree, tasks, run folder; its own-data walk runs as it stands, only smaller.

What it shares with the other pages (commands, links, paths) is in test_docs.py.
"""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.pages import ROOT, Page, call, commands_of, python_part

PAGE = Page(ROOT / "README.md")
README = PAGE.text
WALK = README.partition("## From your own data to a chat")[2].partition("\n## ")[0]  # the section alone

LINES = [line for language, text in PAGE.blocks if language == "bash" for line in commands_of(text)]

# What makes the walk fit a test; every other key is the README's.
SMALL = """model.vocab_size=280 model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=4
    model.moe_intermediate_size=16 model.max_position_embeddings=128 train.tokens_per_step=1024 train.micro_batch_size=4
    train.epochs=null train.steps=3 train.threads=1 train.device=cpu eval.sample_tokens=8""".split()


@pytest.fixture
def signal_handlers():
    """Training takes SIGINT and SIGTERM for itself; pytest gets them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def own_data(tmp_path) -> Path:
    """The walk's folder `my/`: the README's two YAML files, and data shaped like the README's two JSON lines."""
    PAGE.write_files(tmp_path)
    files = {f"my/{path.name}" for path in (tmp_path / "my").iterdir()}
    assert files == {"my/pretrain.yaml", "my/sft.yaml", "my/text.jsonl", "my/chat.jsonl"}
    return tmp_path


def test_readme_has_commands_of_both_kinds():
    assert len(LINES) >= 10 and any(line.startswith("torchrun") for line in LINES)


def test_tasks_named_are_the_tasks():
    from data.exercises import TASKS

    assert re.findall(r"^\| `(\w+)`", README, re.MULTILINE) == list(TASKS)


def test_sources_and_formats_named_are_real():
    from data.config import SOURCE_KINDS

    kinds = re.search(r"kind: (\w+) +# or ([\w, ]+)", WALK)
    assert sorted([kinds[1], *kinds[2].split(", ")]) == sorted(SOURCE_KINDS)


def tree(name_in_it: str) -> str:
    return next(text for language, text in PAGE.blocks if language == "text" and name_in_it in text)


def test_folder_tree_is_the_checkout():
    words = tree("pyproject.toml").split()
    named = {word.rstrip("/") for word in words if re.fullmatch(r"\w+/|LICENSE|[\w.-]+\.(md|txt|toml)", word)}
    assert not [name for name in named - {"runs", "cache"} if not (ROOT / name).exists()]
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("no git checkout here: whether something is missing in the tree cannot be said")
    top = {line.partition("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} | {"README.md"} == named - {"runs", "cache"}


@pytest.mark.usefixtures("signal_handlers")
def test_own_data_walk_runs_from_json_lines_to_chat(own_data, monkeypatch, capsys):
    """Every command of the walk, in its order, with the README's YAML; smaller by SMALL."""
    monkeypatch.chdir(own_data)
    commands = re.search(r"```bash\n(.*?)```", WALK, re.DOTALL)[1].splitlines()
    assert {python_part(c)[0] for c in commands} >= {"train.pretrain", "train.sft", "scripts.chat", "eval.evaluate"}
    for command in commands:
        module, arguments = python_part(command)
        if arguments[0].endswith(".yaml"):
            arguments = [*arguments, *SMALL]
        if module == "scripts.chat":
            arguments = [*arguments, "--prompt", "What is the colour of snow?", "--max-tokens", "8"]
        if module in ("scripts.chat", "eval.evaluate"):
            arguments = [*arguments, "--device", "cpu"]
        assert call(module, arguments, monkeypatch) == 0, f"{command}: {capsys.readouterr().err}"
    run = own_data / "runs/my-sft"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "held_out" and rows[-1]["step"] == 3
    compare_with_tree(run)


def compare_with_tree(run: Path) -> None:
    """The run folder against the README's drawing of one: the same names, neither more nor less."""
    lines = [line for line in tree("runs/my-sft/").splitlines()[1:] if "──" in line]
    drawn = {re.sub(r"step-\d+", "step", re.split(r"── ", line)[1].split()[0].rstrip("/")) for line in lines}
    found = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    found |= {re.sub(r"step-\d+", "step", path.name) for path in (run / "checkpoints").iterdir()}
    assert found == drawn
    for folder in ("tokenizer", "step-"):
        line = next(line for line in lines if f"── {folder}" in line)
        inside = set(re.findall(r"\w+\.(?:json|safetensors|yaml)|SHA256SUMS", line))
        real = next(path for path in (*run.iterdir(), *(run / "checkpoints").iterdir()) if path.name.startswith(folder))
        assert {path.name for path in real.iterdir()} == inside
