"""scripts.train_tokenizer and scripts.prepare_data do their work once, and fail with one sentence."""

import sys

import pytest

from scripts import prepare_data, train_tokenizer
from train import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command's main as a person does; returns (exit code, stdout, stderr)."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.run(module.main)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def yaml(tmp_path, jsonl, manual):
    path = jsonl([{"text": text} for text in manual])
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{vocab_size: 500}}\n"
        f"tokenizer: {{path: {tmp_path}/tokenizer}}\n"
        f"data:\n  cache_dir: {tmp_path}/cache\n  sources: [{{name: manual, kind: jsonl, path: {path}}}]\n"
    )
    return file


def test_tokenizer_then_shards_then_nothing_more_to_do(run, yaml, tmp_path):
    code, out, err = run(train_tokenizer, yaml)
    assert code == 0 and "500 tokens, trained in" in out, err
    code, out, err = run(train_tokenizer, yaml)
    assert code == 0 and "500 tokens, found" in out, err
    for _ in range(2):
        code, out, err = run(prepare_data, yaml)
        assert code == 0 and "manual" in out, err
    assert len(list(tmp_path.glob("cache/prepared/*/index.json"))) == 1


def test_preparing_without_a_tokenizer_says_how_to_get_one(run, yaml):
    code, _, err = run(prepare_data, yaml)
    assert code == cli.USER_ERROR and err.count("\n") == 1
    assert err.startswith("error: tokenizer.path: cannot read") and "python -m scripts.train_tokenizer CONFIG" in err


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(run, yaml):
    run(train_tokenizer, yaml)
    code, _, err = run(train_tokenizer, yaml, "model.vocab_size=400")
    assert code == cli.USER_ERROR and "model.vocab_size: 400 is less than the 500 tokens" in err


def test_a_broken_line_reaches_the_person_as_one_sentence(run, yaml, tmp_path):
    run(train_tokenizer, yaml)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"text": "cut')
    code, _, err = run(prepare_data, yaml)
    last = err.strip().splitlines()[-1]
    assert code == cli.USER_ERROR and last.startswith("error: ") and "data.jsonl:80: not readable as JSON" in last
