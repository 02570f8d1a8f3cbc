"""The README keeps its word: its commands parse, its paths exist, its own-data walk runs as it stands, only smaller."""

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
WALK = README.partition("## From your own data to a chat")[2].partition("\n## ")[0]  # the section alone

LINES = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
COMMANDS = LINES + [text for text in INLINE if text.startswith(("python -m ", "torchrun ", "bash scripts/"))]
MADE_BY_RUNNING = ("runs/", "cache/", "my/", ".venv/")  # not in a checkout

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
    (tmp_path / "my").mkdir()
    named = dict(re.findall(r"`(my/\w+\.yaml)`:\n\n```yaml\n(.*?)```", WALK, re.DOTALL))
    assert named.keys() == {"my/pretrain.yaml", "my/sft.yaml"}
    for name, text in named.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    document, conversation = (text.strip() for text in re.findall(r"```json\n(.*?)```", WALK, re.DOTALL))
    for name, line in (("text", document), ("chat", conversation)):
        lines = [line.replace("snow", f"snow {i % 9} of {i}") for i in range(300)]
        assert all(json.loads(each) for each in lines)
        (tmp_path / f"my/{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def python_part(command: str) -> tuple[str, list[str]] | None:
    """Module and arguments of `python -m MODULE ...` or `torchrun ... -m MODULE ...`; None for other commands."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module, f"{command}: torchrun needs -m before the module"
        return parsed.training_script, parsed.training_script_args
    return (words[2], words[3:]) if words[:2] == ["python", "-m"] else None


def call(module: str, arguments: list[str], monkeypatch) -> int:
    """`python -m module arguments` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        return importlib.import_module(module).main() or 0
    except SystemExit as leaving:
        return leaving.code or 0


def test_readme_has_commands_of_both_kinds():
    assert len(LINES) >= 10 and any(line.startswith("torchrun") for line in LINES)


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\{\{.*?\}\}", README), "numbers that nobody has measured yet"


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command, monkeypatch, own_data):
    """The real parser takes the arguments, a named config loads with its overrides; nothing is run."""
    if command.startswith("bash "):
        script, *arguments = shlex.split(command)[1:]
        assert script.startswith("scripts/") and (ROOT / script).is_file()
        text = (ROOT / script).read_text()
        known = [
            argument in text or (ROOT / argument).is_dir() for argument in arguments
        ]  # test.sh takes folders of tests
        assert all(known), f"{script} says nothing of {arguments}"
        return
    assert python_part(command), f"{command}: neither bash, python -m nor torchrun: teach this test what it is"
    module, arguments = python_part(command)
    seen = {}
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        seen["arguments"] = real(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        call(module, arguments, monkeypatch)
    parsed = seen["arguments"]
    if hasattr(parsed, "config"):
        where = own_data if parsed.config.startswith("my/") else ROOT
        config = load_config(where / parsed.config, getattr(parsed, "overrides", []))
        assert config.data.format == ("chat" if module == "train.sft" else "text")
    if hasattr(parsed, "run"):
        assert parsed.run.startswith("runs/")
    if getattr(parsed, "tasks", None):
        from eval.evaluate import choose_tasks

        choose_tasks(parsed.tasks, True)


@pytest.mark.parametrize("module", sorted({python_part(c)[0] for c in COMMANDS if not c.startswith("bash ")}))
def test_help_shows_an_example(module, monkeypatch, capsys):
    assert call(module, ["--help"], monkeypatch) == 0
    assert f"python -m {module} " in capsys.readouterr().out


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", PROSE)
    assert len(targets) > 5
    assert not [t for t in targets if not t.startswith("https://") and not (ROOT / t).exists()]


def test_named_paths_exist():
    paths = [text for text in INLINE if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(md|txt|toml|sh|py)", text)]
    missing = [path for path in paths if not path.startswith(MADE_BY_RUNNING) and not (ROOT / path).exists()]
    assert len(paths) > 3 and not missing


def test_tasks_named_are_the_tasks():
    from data.exercises import TASKS

    assert re.findall(r"^\| `(\w+)`", README, re.MULTILINE) == list(TASKS)


def test_sources_and_formats_named_are_real():
    from data.config import SOURCE_KINDS

    kinds = re.search(r"kind: (\w+) +# or ([\w, ]+)", WALK)
    assert sorted([kinds[1], *kinds[2].split(", ")]) == sorted(SOURCE_KINDS)


def tree(name_in_it: str) -> str:
    return next(text for language, text in BLOCKS if language == "text" and name_in_it in text)


def test_folder_tree_is_the_checkout():
    words = tree("pyproject.toml").split()
    named = {word.rstrip("/") for word in words if re.fullmatch(r"\w+/|LICENSE|[\w-]+\.(md|txt|toml)", word)}
    assert not [name for name in named - {"runs", "cache"} if not (ROOT / name).exists()]
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("no git checkout here: whether something is missing in the tree cannot be said")
    top = {line.partition("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} | {"README.md"} == named - {"runs", "cache"}


@pytest.mark.parametrize("command, output", re.findall(r"^\$ (.*)\n(error: .*)", README, re.MULTILINE))
def test_shown_error_is_the_error(command, output, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as caught:
        call(*python_part(command), monkeypatch)
    assert f"error: {caught.value}" == output


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


@pytest.mark.slow
def test_torchrun_line_runs_on_two_cpu_processes(own_data, monkeypatch):
    """The README's CPU line, as torchrun really starts it, on the walk's data."""
    line = next(line for line in LINES if line.startswith("torchrun") and "train.device=cpu" in line)
    words = shlex.split(line)
    words[words.index("configs/quickstart/pretrain.yaml")] = "my/pretrain.yaml"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    tokenizer = [sys.executable, "-m", "scripts.train_tokenizer", "my/pretrain.yaml", *SMALL]
    subprocess.run(tokenizer, cwd=own_data, env=environment, check=True, timeout=300)
    training = [sys.executable, "-m", "torch.distributed.run", *words[1:], *SMALL]
    done = subprocess.run(training, cwd=own_data, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es)" in (own_data / "runs/two-processes/log.txt").read_text()
