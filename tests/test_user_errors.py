"""What a user's mistake gets: exit code 2, one line that names key or file, value and remedy, and nothing half-written.

One test for each kind of mistake. Commands run through their own `main` in this process, which is what
`python -m` runs, and as real processes where that is the point: a shell, torchrun, no network.
"""

import io
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.integrity import write_checksums
from data.tokenizer import Tokenizer
from eval import evaluate
from scripts import chat, inspect_data, inspect_model, prepare_data, train_tokenizer
from tests.train.conftest import ROOT, environment, start, workplace  # noqa: F401  (a fixture)
from train import checkpoint, cli, pretrain, sft

SHORT = ("train.steps=2", "train.checkpoint_every=1", "eval.every=0", "eval.prompts=[]", "eval.max_tokens=200")


def tree(*folders: Path) -> dict[str, bytes]:
    """Every file with its content; an empty lock is no product of the work."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in sorted(files)}


@pytest.fixture(autouse=True)
def signals():
    """Training listens to signals; pytest wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(monkeypatch, capfd):
    """command(module, arguments...) -> (exit code, stdout, stderr) of `python -m module arguments`."""

    def call(module, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run(module.main)
        return (exit.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def mistake(command, tmp_path, workplace):  # noqa: F811
    """mistake(module, arguments...) -> the one sentence; asserts everything that every mistake must get."""

    def call(module, *arguments) -> str:
        before = tree(tmp_path, workplace)
        code, _, err = command(module, *arguments)
        assert code == cli.USER_ERROR, err
        sentence = the_sentence(err)
        left = {name for name, content in tree(tmp_path, workplace).items() if before.get(name) != content}
        assert not left, f"left behind: {sorted(left)}"
        return sentence

    return call


def the_sentence(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    return lines[0].removeprefix("error: ")


@pytest.fixture
def text_config(tmp_path, workplace):  # noqa: F811
    """text_config(**sources' settings) -> a pretraining config with its cache and runs in tmp_path."""

    def write(base: str = "pretrain.yaml", **source) -> Path:
        tree = {
            "base": str(workplace / base),
            "runs_dir": str(tmp_path / "runs"),
            "data": {"cache_dir": str(tmp_path / "cache"), "sources": [{"name": "mine", "kind": "jsonl", **source}]},
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data_mistake(mistake, text_config, tmp_path):
    """data_mistake(content of data.jsonl, chat=False) -> the sentence of prepare_data, and of the training command alike."""

    def call(content: bytes, chat: bool = False) -> str:
        file = tmp_path / "data.jsonl"
        file.write_bytes(content)
        config = text_config("sft.yaml" if chat else "pretrain.yaml", path=str(file))
        sentence = mistake(prepare_data, config)
        if not chat:  # fine-tuning would first look for its pretrained run
            assert mistake(pretrain, config) == sentence
        return sentence

    return call


def line(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": "words"} for role in roles]}).encode() + b"\n"


GOOD_LINES = b"".join(
    json.dumps({"text": text}).encode() + b"\n" for text in list(pydoc_data.topics.topics.values())[:5]
)


# Keys


@pytest.mark.parametrize(
    "module",
    [pretrain, sft, train_tokenizer, prepare_data, inspect_model, inspect_data],
    ids=lambda module: module.__name__,
)
def test_an_unknown_key_comes_with_the_nearest_valid_one(mistake, workplace, tmp_path, module):  # noqa: F811
    (tmp_path / "run.yaml").write_text(f"base: {workplace}/pretrain.yaml\ntrain: {{learning_rat: 1}}")
    assert mistake(module, tmp_path / "run.yaml") == (
        f"{tmp_path}/run.yaml: unknown key 'train.learning_rat'; did you mean 'learning_rate'?"
    )


def test_in_a_shell_too(workplace, tmp_path):  # noqa: F811
    process = start("train.pretrain", workplace / "pretrain.yaml", f"runs_dir={tmp_path}", "train.stesp=3")
    out, err = process.communicate(timeout=120)
    assert process.returncode == cli.USER_ERROR and out == "" and list(tmp_path.iterdir()) == []
    assert the_sentence(err) == f"{workplace}/pretrain.yaml: unknown key 'train.stesp'; did you mean 'steps'?"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("seed: 1\nseed: 2", "run.yaml, line 2: not readable as YAML: key 'seed' is given twice"),
        ("train: {steps: many}", "run.yaml: train.steps: 'many' must be a whole number"),
        ("train: {steps: 1, learning_rate: -1.0}", "run.yaml: train.learning_rate: -1.0 must be more than 0"),
        (
            "train: {steps: 1, schedule: cosin}",
            "run.yaml: train.schedule: 'cosin' is none of cosine, linear, wsd, constant",
        ),
        (
            "model: {hidden_size: 48, num_attention_heads: 5}",
            "num_attention_heads: 5 does not divide hidden_size: 48; change one",
        ),
        (
            "model: {num_key_value_heads: 3}",
            "num_key_value_heads: 3 does not divide num_attention_heads: 8; use a divisor",
        ),
        ("model: {num_experts_per_tok: 5}", "num_experts_per_tok: 5 is more than n_routed_experts: 4"),
    ],
    ids=["duplicate", "mistyped", "out-of-range", "no-such-choice", "heads", "key-value-heads", "top-k"],
)
def test_a_key_that_cannot_be(mistake, tmp_path, text, sentence):
    (tmp_path / "run.yaml").write_text(text)
    assert sentence in mistake(pretrain, tmp_path / "run.yaml")


def test_a_batch_that_does_not_divide(mistake, workplace, text_config):  # noqa: F811
    config = text_config(path=str(workplace / "text.jsonl"))
    sentence = mistake(pretrain, config, "train.tokens_per_step=100")
    assert sentence == "train.tokens_per_step: 100 is no multiple of the context length 32; use 96"
    sentence = mistake(pretrain, config, "train.micro_batch_size=3")
    assert sentence.startswith("train.micro_batch_size: 3 does not divide the 8 rows") and sentence.endswith(
        "use a divisor of 8"
    )


def test_the_wrong_command_for_a_config(mistake, workplace):  # noqa: F811
    assert "data.format: 'chat' is for python -m train.sft" in mistake(pretrain, workplace / "sft.yaml")
    assert "data.format: 'text' is for python -m train.pretrain" in mistake(sft, workplace / "pretrain.yaml")
    assert "train.init_from is missing; name the pretrained run" in mistake(
        sft, workplace / "sft.yaml", "train.init_from=null"
    )


# Files


def test_a_missing_file(mistake, text_config, workplace, tmp_path):  # noqa: F811
    absent = tmp_path / "absent"
    assert f"{absent}: cannot read this config file (No such file or directory)" in mistake(pretrain, absent)
    config = text_config(path=f"{absent}.jsonl")
    for module in (prepare_data, pretrain, train_tokenizer):
        settings = [f"tokenizer.path={tmp_path}/tokenizer"] if module is train_tokenizer else []
        assert (
            mistake(module, config, *settings)
            == f"source 'mine': path: '{absent}.jsonl' does not exist; give the path of a file or a glob"
        )
    config = text_config(path=f"{absent}/*.jsonl")
    assert f"source 'mine': path: '{absent}/*.jsonl' matches no file" in mistake(prepare_data, config)
    config = text_config(path=str(workplace / "text.jsonl"))
    sentence = mistake(pretrain, config, f"tokenizer.path={absent}")
    assert (
        f"tokenizer.path: cannot read {absent}/tokenizer.json" in sentence
        and "python -m scripts.train_tokenizer" in sentence
    )
    for module in (evaluate, chat):
        assert (
            mistake(module, absent)
            == f"{absent}: is not there; give a run folder such as runs/NAME, or a checkpoint in it"
        )


@pytest.fixture
def unreadable(monkeypatch):
    """Takes away the right to read a file; root, who may read everything, is refused by a stand-in."""
    real_open = io.open

    def take(path: Path) -> None:
        def refuse(file, *arguments, **options):
            if str(file) == str(path):
                raise PermissionError(13, "Permission denied", str(file))
            return real_open(file, *arguments, **options)

        path.chmod(0)
        if os.geteuid() == 0:
            monkeypatch.setattr(io, "open", refuse)

    return take


def test_an_unreadable_config(command, tmp_path, unreadable):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1")
    unreadable(path)
    code, _, err = command(pretrain, path)
    assert code == cli.USER_ERROR
    assert (
        the_sentence(err) == f"{path}: cannot read this config file (Permission denied); give the path of a YAML file"
    )


def test_an_unreadable_source(command, text_config, tmp_path, unreadable):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD_LINES)
    config = text_config(path=str(path))
    unreadable(path)
    code, _, err = command(prepare_data, config)
    assert code == cli.USER_ERROR
    assert the_sentence(err) == f"source 'mine': cannot read {path} (Permission denied); check path and permissions"


def test_a_broken_jsonl_line(data_mistake, tmp_path):
    sentence = data_mistake(GOOD_LINES + b'{"text": "cut of\n' + GOOD_LINES)
    assert sentence.startswith(f"{tmp_path}/data.jsonl:6: not readable as JSON") and sentence.endswith(
        "mend or remove this line"
    )


def test_a_text_that_is_not_utf8(data_mistake, mistake, text_config, tmp_path):
    assert data_mistake(GOOD_LINES + b'{"text": "caf\xe9"}\n').startswith(
        f"{tmp_path}/data.jsonl:6: not UTF-8 text (byte "
    )
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    sentence = mistake(prepare_data, text_config(kind="text", path=str(tmp_path / "latin.txt")))
    assert sentence == f"{tmp_path}/latin.txt: not UTF-8 text (byte 4 is 0xe9); save it as UTF-8"


def test_an_empty_source(data_mistake, mistake, text_config, tmp_path):
    assert (
        data_mistake(b"") == f"source 'mine': '{tmp_path}/data.jsonl' is empty; give it some text or remove the source"
    )
    assert data_mistake(b"\n \n").endswith("is empty; give it some text or remove the source")
    assert "nothing to train on: 0 documents are held out and 1 skipped (1 empty text)" in data_mistake(
        b'{"text": ""}\n'
    )
    config = text_config(path=str(tmp_path / "data.jsonl"))
    assert mistake(prepare_data, config, "data.sources=[]") == "data.sources: there is no source; name at least one"


def test_a_conversation_without_an_assistant_turn(data_mistake, tmp_path):
    sentence = data_mistake(line("user", "assistant") + line("system", "user"), chat=True)
    assert (
        sentence
        == f"{tmp_path}/data.jsonl:2: the conversation has no assistant turn (system, user): nothing to learn from it"
    )


def test_roles_out_of_order(data_mistake, tmp_path):
    for roles, turn in (
        (("assistant", "user"), "turn 1 is 'assistant' where 'user' belongs"),
        (("user", "user", "assistant"), "turn 2 is 'user'"),
    ):
        sentence = data_mistake(line("user", "assistant") + line(*roles), chat=True)
        assert (
            sentence.startswith(f"{tmp_path}/data.jsonl:2: roles out of order: {turn}")
            and "user and assistant take turns" in sentence
        )


# Things made with other things


@pytest.fixture
def trained(command, text_config, workplace, tmp_path) -> tuple[Path, Path]:  # noqa: F811
    """(config, run folder) of a short finished run in tmp_path."""
    config = text_config(path=str(workplace / "text.jsonl"))
    code, _, err = command(pretrain, config, *SHORT)
    assert code == 0, err
    return config, tmp_path / "runs/pre"


def test_shards_made_with_another_tokenizer(command, mistake, trained, tmp_path):
    config, run_dir = trained
    texts = list(pydoc_data.topics.topics.values())[:20]
    Tokenizer.train(texts, 300).save(tmp_path / "other")
    for index in (tmp_path / "cache/prepared").glob("*/index.json"):
        index.unlink()
    assert command(prepare_data, config, f"tokenizer.path={tmp_path}/other")[0] == 0
    sentence = mistake(evaluate, run_dir)
    assert "source 'mine': its shards in" in sentence and "were made with another tokenizer" in sentence
    assert sentence.endswith("run: python -m scripts.prepare_data CONFIG")
    sentence = mistake(pretrain, config, *SHORT, "train.steps=3", f"tokenizer.path={tmp_path}/other")
    assert (
        "tokenizer.path: this is another tokenizer" in sentence
        and f"the run began with ({run_dir}/tokenizer)" in sentence
    )


def test_a_checkpoint_of_another_shape(mistake, trained, workplace, tmp_path):  # noqa: F811
    _, run_dir = trained
    settings = (f"train.init_from={run_dir}", f"data.cache_dir={tmp_path}/cache", f"runs_dir={tmp_path}/runs")
    sentence = mistake(sft, workplace / "sft.yaml", *settings, "model.hidden_size=48")
    assert (
        sentence
        == f"model.hidden_size: 48 here, but {run_dir}/checkpoints/step-00000002 was trained with 32; use its value"
    )
    config = checkpoint.find_checkpoint(run_dir) / "config.yaml"
    config.write_text(config.read_text().replace("moe_intermediate_size: 32", "moe_intermediate_size: 40"))
    write_checksums(config.parent, checkpoint.FILES)
    for module in (evaluate, chat):
        sentence = mistake(module, run_dir)
        assert "model.safetensors: layers.0.mlp." in sentence and "give the model section the values" in sentence


def test_a_damaged_checkpoint(mistake, trained):
    _, run_dir = trained
    weights = checkpoint.find_checkpoint(run_dir) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for module in (evaluate, chat):
        sentence = mistake(module, run_dir)
        assert f"{weights}: damaged" in sentence and "use another checkpoint" in sentence


def test_settings_that_do_not_fit_the_run_that_goes_on(mistake, trained):
    config, run_dir = trained
    sentence = mistake(pretrain, config, *SHORT, "train.weight_decay=0.5")
    assert sentence == (
        f"train.weight_decay: 0.5, but the run in {run_dir} was started with 0.1; "
        "give the run another name, or remove its folder to start afresh"
    )


# The world outside


def test_more_processes_than_rows(workplace, tmp_path):  # noqa: F811
    """torchrun says a lot itself; our line is there, once a process at most, and no traceback of ours."""
    process = start(
        "train.pretrain", workplace / "pretrain.yaml", f"runs_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache",
        "train.tokens_per_step=32", "train.micro_batch_size=1", processes=2,
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    ours = [text for text in err.splitlines() if text.startswith("error: ")]
    assert process.returncode != 0 and 1 <= len(ours) <= 2 and len(set(ours)) == 1, err
    assert ours[0] == (
        "error: torchrun: 2 processes, but train.tokens_per_step: 32 is only 1 rows of 32 tokens; start fewer processes or raise it"
    )
    assert "train/loop.py" not in err and tree(tmp_path) == {}


@pytest.mark.slow
def test_a_step_that_does_not_fit_into_memory(workplace, tmp_path):  # noqa: F811
    """A real one: this process may have 3 GiB, and one micro-batch of two million tokens needs more."""
    command = [sys.executable, "-m", "train.pretrain", str(workplace / "pretrain.yaml"), f"runs_dir={tmp_path}",
               "train.tokens_per_step=2097152", "train.micro_batch_size=65536", "eval.every=0"]  # fmt: skip
    result = subprocess.run(
        ["prlimit", f"--as={3 * 2**30}", *command], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: train.micro_batch_size: 65536 rows at once need more memory than there is")
    assert "lower it" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_mistake_in_the_data_under_torchrun(text_config, tmp_path):
    """Rank 0 reads the data and says what is wrong; the others leave without a word."""
    (tmp_path / "data.jsonl").write_bytes(GOOD_LINES + b"{")
    process = start("train.pretrain", text_config(path=str(tmp_path / "data.jsonl")), processes=2)
    before = tree(tmp_path)
    _, err = process.communicate(timeout=120)
    ours = [text for text in err.splitlines() if text.startswith("error: ")]
    assert process.returncode != 0 and len(ours) == 1 and "data.jsonl:6: not readable as JSON" in ours[0], err
    assert "[rank1]" not in err and tree(tmp_path) == before, err


def hub_error(tmp_path: Path, config: Path, code: str) -> str:
    unreachable = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HOME": str(tmp_path / "hub"),
    }
    before = tree(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", code, str(config)],
        cwd=ROOT,
        env={**environment(), **unreachable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == cli.USER_ERROR and "Traceback" not in result.stderr, result.stderr
    assert {path for path in tree(tmp_path) if "/hub/" not in path} == set(before)
    return result.stderr.splitlines()[-1]  # above it the hub's library tells of its retries


RUN_IT = (
    "import runpy, sys; sys.argv[0] = 'prepare_data'; runpy.run_module('scripts.prepare_data', run_name='__main__')"
)
HUB_SENTENCE = (
    "error: source 'mine': the hub set 'roneneldan/TinyStories' (subset None, split train) could not be read: "
)


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_network_for_a_hub_set(text_config, tmp_path, streaming):
    """A server that refuses connections; the pauses between the library's retries are left out."""
    config = text_config(kind="hub", path="roneneldan/TinyStories", streaming=streaming)
    last = hub_error(tmp_path, config, f"import time; time.sleep = lambda seconds: None; {RUN_IT}")
    assert last.startswith(HUB_SENTENCE) and last.endswith("check the name and the network, or use local files")


@pytest.mark.slow
def test_no_network_for_a_hub_set_with_all_its_patience(text_config, tmp_path):
    config = text_config(kind="hub", path="roneneldan/TinyStories")
    assert hub_error(tmp_path, config, RUN_IT).startswith(HUB_SENTENCE)


@pytest.fixture
def disk(tmp_path):
    """disk(KiB) -> a file system of that size; skipped where this user may not mount one."""
    mounted = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)


def test_a_disk_that_fills_while_preparing(mistake, command, text_config, workplace, disk):  # noqa: F811
    folder = disk(48)
    config = text_config(path=str(workplace / "text.jsonl"))
    sentence = mistake(prepare_data, config, f"data.cache_dir={folder}")
    assert (
        sentence
        == f"data.cache_dir: the disk of {folder}/prepared is full; free some space or set data.cache_dir elsewhere"
    )
    assert [path.name for path in (folder / "prepared").iterdir()] == [".lock"]
    grow(folder)
    assert command(prepare_data, config, f"data.cache_dir={folder}")[0] == 0


def test_a_disk_that_fills_while_the_tokenizer_is_written(command, text_config, workplace, disk):  # noqa: F811
    folder = disk(8)
    arguments = (text_config(path=str(workplace / "text.jsonl")), f"tokenizer.path={folder}/tokenizer")
    code, _, err = command(train_tokenizer, *arguments)
    assert code == cli.USER_ERROR and the_sentence(err).endswith(
        "the disk is full; free some space and repeat the command"
    )
    assert [path.name for path in (folder / "tokenizer").iterdir()] == [], "tokenizer.json makes it complete"
    grow(folder)
    assert command(train_tokenizer, *arguments)[0] == 0 and Tokenizer.load(folder / "tokenizer").vocab_size == 384


def test_a_disk_that_fills_at_a_checkpoint(command, text_config, workplace, disk):  # noqa: F811
    """The checkpoints before stay, nothing half-written does, and with more space the same command goes on."""
    folder = disk(2000)
    config = text_config(path=str(workplace / "text.jsonl"))
    arguments = (config, *SHORT, f"runs_dir={folder}", "train.steps=6", "train.keep_checkpoints=9")
    code, _, err = command(pretrain, *arguments)
    assert code == cli.USER_ERROR
    sentence = the_sentence(err)
    kept = checkpoint.complete_checkpoints(folder / "pre")
    failed = checkpoint.checkpoint_name(len(kept) + 1)
    assert 1 <= len(kept) < 6 and sentence.startswith(
        f"{folder}/pre/checkpoints/{failed}: cannot write this checkpoint"
    )
    assert "free some disk space and repeat the command" in sentence
    names = {path.name for path in (folder / "pre/checkpoints").iterdir()}
    assert names == {"latest", *(path.name for path in kept)}
    grow(folder)
    code, out, err = command(pretrain, *arguments)
    assert code == 0 and f"resumed at step {len(kept)}" in out, err
