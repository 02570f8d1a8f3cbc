"""scripts/show_rows.py shows the very rows that training reads."""

import json
import re
import sys

import pytest

from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer
from scripts import show_rows
from train import cli
from train.config import load_config, to_yaml

TOPICS = [f"Topic {i}: {word} {'and more of it ' * (i % 4)}\x1b[2J." for i, word in enumerate(["apples", "pears"] * 30)]
SUMS = [(a, b) for a in range(6) for b in range(6)]
CHATS = [
    [{"role": "user", "content": f"{a} + {b} <|eos|>?"}, {"role": "assistant", "content": f"It is {a + b}."}]
    for a, b in SUMS
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, tokenizer) with text.jsonl and chat.jsonl."""
    folder = tmp_path_factory.mktemp("show_rows")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOPICS))
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return folder, Tokenizer.train(TOPICS, 280)


@pytest.fixture(scope="module")
def run_folder(made):
    """run_folder(format) -> the folder of a run that has begun and prepared its data; nothing is trained."""
    folder, tokenizer = made

    def make(format):
        path = folder / ("text.jsonl" if format == "text" else "chat.jsonl")
        (folder / f"{format}.yaml").write_text(
            f"name: {format}\nruns_dir: {folder}/runs\nseed: 3\nmodel: {{vocab_size: 280, max_position_embeddings: 64}}\n"
            f"tokenizer: {{path: {folder}/runs/{format}/tokenizer}}\n"
            f"data:\n  format: {format}\n  cache_dir: {folder}/cache\n"
            f"  sources: [{{name: first, kind: jsonl, path: {path}}}, {{name: second, kind: jsonl, path: {path}, weight: 2}}]\n"
        )
        config = load_config(folder / f"{format}.yaml")
        tokenizer.save(config.run_dir / "tokenizer")
        (config.run_dir / "config.yaml").write_text(to_yaml(config))
        (config.run_dir / "checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
        prepare(config.data, tokenizer, progress=False)
        rows = open_prepared(config.data, tokenizer).train_rows(64, format == "chat", 3)
        return config.run_dir, rows

    return make


@pytest.fixture
def show(monkeypatch, capsys):
    """Runs the command; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["show_rows", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.run(show_rows.main)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return call


def test_text_rows_are_those_that_training_reads(run_folder, show, made):
    run_dir, rows = run_folder("text")
    n = rows.rows_per_epoch
    code, out, err = show(run_dir, n - 1, n + 1)
    assert code == 0, err
    heads = [line for line in out.splitlines() if line.startswith("--- row ")]
    for position, head in zip((n - 1, n, n + 1), heads, strict=True):
        name, number = rows.origin(position)
        epoch, place = divmod(position, n)
        assert head.startswith(
            f"--- row {position}: epoch {epoch + 1}, {place + 1} of {n}; row {number} of source '{name}'; 64"
        )
    ids = rows.batch(n, 1)["input_ids"][0].tolist()
    spelled = made[1].decode(ids, skip_special_tokens=False)
    assert spelled.replace("\x1b", "\\x1b") in out and "\x1b" not in out, "a terminal must not obey the text"
    assert "<|eos|><|bos|>Topic" in out
    assert show(run_dir / "checkpoints/step-00000001", n, n)[1] == show(run_dir, n)[1] != ""


def test_conversations_show_what_is_learned(run_folder, show):
    run_dir, rows = run_folder("chat")
    code, out, err = show(run_dir, 0, rows.rows_per_epoch - 1)
    assert code == 0, err
    for a, b in SUMS:
        said = (
            f"<|im_start|>user\n{a} + {b} <|eos|>?<|im_end|>\n<|im_start|>assistant\n>>>It is {a + b}.<|im_end|><<<\n"
        )
        assert out.count(f"<|bos|>{said}") == 3, "once in the first source, twice in the second"
    assert "<|pad|>" not in out
    code, out, err = show(run_dir, 5, "--tokens")
    lines = out.splitlines()[1:]
    batch = rows.batch(5, 1)
    real = batch["attention_mask"][0]
    assert [int(line.split()[0]) for line in lines] == batch["input_ids"][0][real].tolist()
    assert [line.split()[1] == "learned" for line in lines] == batch["labels"][0][real].ne(-100).tolist()


def test_mistakes_are_one_sentence(run_folder, show, made, tmp_path):
    run_dir, _ = run_folder("text")
    for arguments, problem in [
        ((run_dir, -1), "unrecognized arguments: -1|no number of a row|required: FIRST"),
        ((run_dir, "2" * 30), "no number of a row"),
        ((run_dir, "٣"), "no number of a row"),
        ((run_dir, 5, 4), "LAST: 4 is before FIRST, 5"),
        ((tmp_path, 0), f"{tmp_path}: no run"),
        ((tmp_path / "nowhere", 0), "no run"),
    ]:
        code, out, err = show(*arguments)
        assert code == 2 and not out and "Traceback" not in err
        assert re.search(problem, err.splitlines()[-1]), f"{arguments}: {err}"
    assert "example:\n  python -m scripts.show_rows runs/" in show("--help")[1]
    assert show(run_dir, 2**40)[0] == 0, "the last position that is allowed"
