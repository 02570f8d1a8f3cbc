"""The evaluate command: what it writes is what DESIGN.md section 2 names, and a mistake is one sentence."""

from __future__ import annotations

import json
import sys

import pytest

from data.exercises import TASKS
from eval import evaluate
from train import checkpoint
from train.config import to_yaml
from train.optim import build_optimizer


@pytest.fixture
def saved(make_run):
    """A run folder on disk, with two checkpoints of random weights."""

    def save(**options):
        run = make_run(**options)
        optimizer = build_optimizer(run.model, run.config.train)
        for step in (2, 3):
            checkpoint.save(run.run_dir, step, run.model, optimizer, {}, run.config)
        run.tokenizer.save(run.run_dir / "tokenizer")
        (run.run_dir / "config.yaml").write_text(to_yaml(run.config))
        return run

    return save


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


def without_time(path) -> dict:
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}


def test_the_keys_are_the_designs_and_the_numbers_are_repeatable(saved, monkeypatch, tmp_path, capsys):
    run = saved()
    assert command(monkeypatch, run.run_dir, "--json", tmp_path / "sub" / "a.json", "--precision", "float32") == 0
    printed = capsys.readouterr().out
    assert command(monkeypatch, run.run_dir, "--json", tmp_path / "b.json", "--precision", "float32") == 0

    result = without_time(tmp_path / "sub" / "a.json")
    assert result == without_time(tmp_path / "b.json") == without_time(run.run_dir / "evaluation.json")
    assert set(result["heldout"]["tales"]) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
    assert result["tasks"] == {}, "a text run was asked questions by default"
    assert result["step"] == 3
    assert f"{result['heldout']['tales']['bits_per_byte']:.4f}" in printed
    assert "layer 1" in printed and "layer 0" not in printed, "layer 0 is dense"


def test_a_chat_run_is_asked_the_tasks(saved, monkeypatch):
    run = saved(chat=True)
    assert command(monkeypatch, run.run_dir, "--limit", 2, "--precision", "float32") == 0
    result = without_time(run.run_dir / "evaluation.json")
    assert set(result["tasks"]) == set(TASKS)
    for task in result["tasks"].values():
        assert {"score", "chance", "trivial", "n"} <= set(task)
        assert task["n"] == 2
    assert result["task_limit"] == 2
    tokens, counts = result["routing"]["tokens"], result["routing"]["tokens_per_expert"]
    assert [sum(layer) for layer in counts] == [2 * tokens] * 2, (
        "the tasks' tokens were counted among the held-out ones"
    )


def test_an_older_checkpoint_does_not_replace_the_runs_evaluation(saved, monkeypatch, tmp_path):
    run = saved()
    older = run.run_dir / "checkpoints" / "step-00000002"
    assert command(monkeypatch, older, "--json", tmp_path / "older.json") == 0
    assert without_time(tmp_path / "older.json")["step"] == 2
    assert not (run.run_dir / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "sums,sumz"], "'sumz'"),
        (["--limit", "0"], "--limit: 0"),
        (["--batch-size", "-1"], "--batch-size: -1"),
        (["--tasks", "sums", "--fewshot", "0"], "--fewshot: is for tasks of lm-evaluation-harness"),
        (["--tasks", "sums", "--chat-template", "no"], "--chat-template: is for tasks of lm-evaluation-harness"),
        (["--add-bos"], "--add-bos: is for tasks of lm-evaluation-harness"),
    ],
)
def test_a_mistyped_option_names_itself_and_writes_nothing(saved, monkeypatch, options, message):
    run = saved()
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, run.run_dir, *options)
    assert not (run.run_dir / "evaluation.json").exists()


def test_a_run_that_is_not_there_names_its_path(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="runs/nothing"):
        command(monkeypatch, tmp_path / "runs" / "nothing")


def test_choose_tasks():
    assert evaluate.choose_tasks(None, is_chat=True) == evaluate.choose_tasks("all", is_chat=False) == (list(TASKS), [])
    assert evaluate.choose_tasks(None, is_chat=False) == evaluate.choose_tasks("none", is_chat=True) == ([], [])
    assert evaluate.choose_tasks("sums, book", is_chat=False) == (["sums", "book"], [])
