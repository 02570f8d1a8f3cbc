"""Bad steps that are really bad: an embedding that is no number, a text unlike all others. Nothing is stubbed; every run is a process.

A model starts from a checkpoint in which the embedding of one token is broken. That token stands in known rows, so it is known
beforehand which steps are bad, how many in a row, and which micro-batch of which process has them.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data.integrity import write_checksums
from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from train import checkpoint
from train.config import RunConfig, load_config
from train.guard import SETTLED
from train.metrics import read_rows
from train.optim import build_optimizer
from train.schedule import learning_rate_at

from ..train.conftest import run
from .conftest import assert_equal_runs, assert_sound, ends, finish_ranks, metrics, start_ranks

RARE = "\U00012000"  # its first byte, a token of its own, is in no other text
STEPS, ROWS = 20, 8  # rows of a step


def bad_rows(config: RunConfig) -> list[int]:
    """Positions of the rows with the rare token, as far as the run reads."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    prepare(config.data, tokenizer)
    rows = open_prepared(config.data, tokenizer).train_rows(config.context_length, False, config.seed)
    rare, end = tokenizer.encode(RARE)[0], config.train.steps * ROWS
    return [position for position in range(end) if (rows.batch(position, 1)["input_ids"] == rare).any()]


def steps_of(positions: list[int]) -> list[int]:
    """Steps, from 1, that read these rows."""
    return sorted({position // ROWS + 1 for position in positions})


def bad_rows_logged(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "bad_step"]


def train_rows(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]


@pytest.fixture(scope="module")
def poison(workplace):
    """poison(name, rare documents, value) -> (YAML file, its config): a run over some plain texts and some documents with the
    rare token, from a checkpoint in which every number of that token's embedding is `value`."""
    plain = [json.loads(line)["text"] for line in (workplace / "text.jsonl").read_text("utf-8").splitlines()]
    plain.sort(key=len)

    def write(name: str, rare: list[str], value: float, texts: int = 9, **changes) -> tuple[Path, RunConfig]:
        sources = []
        for source, documents, held_out in (("plain", plain[:texts], 0.1), ("odd", rare, 0.0)):
            path = workplace / f"{name}-{source}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            sources.append({"name": source, "kind": "jsonl", "path": str(path), "held_out_fraction": held_out})
        file = workplace / f"{name}.yaml"
        start = workplace / "runs" / f"{name}-start"
        tree = {
            "base": "pretrain.yaml",
            "name": name,
            "data": {"sources": sources},
            **changes,
            "model": {"tie_word_embeddings": False, **changes.get("model", {})},  # tied, every logit would be broken too
            "train": {
                "init_from": str(start), "steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": 99, **changes.get("train", {})
            },
        }  # fmt: skip
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        config = load_config(file)
        torch.manual_seed(1)
        model = MoEForCausalLM(config.model)
        folder = checkpoint.save(start, 0, model, build_optimizer(model, config.train), {}, config)
        weights = load_file(folder / "model.safetensors")
        weights["embed_tokens.weight"][Tokenizer.load(config.tokenizer.path).encode(RARE)[0]] = value
        save_file(weights, folder / "model.safetensors")
        write_checksums(folder, checkpoint.FILES)
        return file, config

    return write


def rare_documents(n: int, with_the_token: int, length: int = 300) -> list[str]:
    rng = random.Random(0)
    words = ["the", "class", "value", "is", "object", "method", "of", "a", "name", "statement"]
    texts = [" ".join(rng.choices(words, k=length // 5)) + f" {i}." for i in range(n)]
    return [text[:100] + RARE + text[100:] if i < with_the_token else text for i, text in enumerate(texts)]


def assert_skipped(run_dir: Path, config: RunConfig, expected: list[int], where: list[int]) -> None:
    """Exactly the steps `expected` were skipped for the rows at `where`, and nothing of them is left but counts."""
    assert_sound(run_dir)
    bad = bad_rows_logged(run_dir)
    assert [row["step"] for row in bad] == expected, "other steps were skipped"
    steps = config.train.steps
    assert [row["step"] for row in train_rows(run_dir)] == list(range(1, steps + 1))
    accepted, log = 0, (run_dir / "log.txt").read_text("utf-8")
    for row in train_rows(run_dir):
        step = row["step"]
        rate = learning_rate_at(accepted, steps, config.train)
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-6), f"step {step}: the schedule counts accepted steps"
        assert row["tokens"] == step * config.train.tokens_per_step
        accepted += step not in expected
        assert row["skipped_steps"] == step - accepted
        before, after = (run_dir / "checkpoints" / f"step-{i:08d}" for i in (step - 1, step))
        state = checkpoint.read_training_state(after)
        assert state.guard.accepted_steps == accepted and state.progress.step == step
        counts = {v.item() for k, v in load_file(after / "optimizer.safetensors").items() if k.endswith("/step")}
        assert counts == {float(accepted)}, f"step {step}: the optimizer counted a skipped step"
        if step > 1:
            same = [
                (before / name).read_bytes() == (after / name).read_bytes()
                for name in ("model.safetensors", "optimizer.safetensors")
            ]
            kept = "changed" if step in expected else "did not change"
            assert same == [step in expected] * 2, f"step {step}: weights, router bias or moments {kept}"
    for row in bad:
        first, last = row["rows"]
        assert [first, last] == [(row["step"] - 1) * ROWS, row["step"] * ROWS - 1]
        rows = [row for micro_batch in row["micro_batches"] for row in range(*_ends(micro_batch["rows"]))]
        assert rows == list(range(first, last + 1)), "micro-batches are of all processes and cover the step"
        assert sum(n for each in row["micro_batches"] for n in each["sources"].values()) == ROWS
        for each in row["micro_batches"]:
            guilty = [position for position in where if position in range(*_ends(each["rows"]))]
            assert not guilty or "odd" in each["sources"], "the source is not named"
        sentence = next(line for line in log.splitlines() if line.startswith(f"step {row['step']}: skipped"))
        assert f"scripts.show_rows {run_dir}" in sentence, sentence


def _ends(rows: list[int]) -> tuple[int, int]:
    return rows[0], rows[1] + 1


@pytest.fixture(scope="module")
def broken(poison) -> tuple[Path, RunConfig, list[int]]:
    """A run in which one row of each epoch has an embedding that is no number: its YAML file and config, and where those rows are."""
    file, config = poison("nan", rare_documents(4, 1), math.nan)
    run("train.pretrain", file)
    return file, config, bad_rows(config)


def test_exactly_the_steps_that_read_a_broken_token_are_skipped_and_leave_no_trace(broken, workplace):
    _, config, where = broken
    expected = steps_of(where)
    assert 2 <= len(expected) <= STEPS // 2, f"the test is of no use with the bad rows at {where}"
    assert_skipped(workplace / "runs/nan", config, expected, where)
    for row in bad_rows_logged(workplace / "runs/nan"):
        assert row["loss"] is None and row["grad_norm"] is None, "JSON has no NaN"
        for each in row["micro_batches"]:
            guilty = any(position in range(*_ends(each["rows"])) for position in where)
            assert (each["loss"] is None) == guilty, f"micro-batch {each} of bad rows {where}"


@pytest.mark.slow
def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_too(poison, workplace):
    """An embedding of 3e38 is normalised to a finite output, but its gradient overflows."""
    file, config = poison("huge", rare_documents(4, 1), 3e38)
    run("train.pretrain", file)
    where = bad_rows(config)
    assert_skipped(workplace / "runs/huge", config, steps_of(where), where)
    assert all(
        math.isfinite(row["loss"]) and row["grad_norm"] is None for row in bad_rows_logged(workplace / "runs/huge")
    ), "else nothing new is shown"


@pytest.mark.slow
def test_two_processes_skip_the_same_steps_alike(broken, workplace):
    """The bad row is now with one process, now with the other; both skip."""
    file, config, where = broken
    finish_ranks(start_ranks(2, "train.pretrain", file, "name=two-nan"))
    ranks = {position % ROWS // config.train.micro_batch_size % 2 for position in where}
    assert ranks == {0, 1}, f"the test is of no use: bad rows {where} are all with rank {ranks}"
    assert_skipped(workplace / "runs/two-nan", config, steps_of(where), where)
    one, two = metrics(workplace / "runs/nan"), metrics(workplace / "runs/two-nan")
    assert one.keys() == two.keys()
    for key, row in one.items():
        for name in ("learning_rate", "skipped_steps", "rows", "rows_digest"):
            assert row.get(name) == two[key].get(name), f"{key}: {name}"
        for name in ("loss", "grad_norm"):
            ours, theirs = row.get(name), two[key].get(name)
            assert ours == theirs or ours == pytest.approx(theirs, rel=1e-3), f"{key}: {name}"
    for step in steps_of(where):
        ours, theirs = one["bad_step", step]["micro_batches"], two["bad_step", step]["micro_batches"]
        assert [(each["rows"], each["sources"]) for each in ours] == [
            (each["rows"], each["sources"]) for each in theirs
        ]
        assert [each["loss"] is None for each in ours] == [each["loss"] is None for each in theirs]


def first_run_of_bad_steps(bad: list[int], n: int) -> int:
    """The step with which `n` bad ones in a row are complete."""
    return next(step for step in bad if all(step - i in bad for i in range(n)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_bad_steps_in_a_row_stop_the_run_and_say_which_rows(poison, workplace, processes):
    """The same command stops again; with more patience it goes on, and ends as a run that had it from the start."""
    name = f"hopeless-{processes}"
    file, config = poison(name, rare_documents(40, 14, 120), 3e38)
    bad = steps_of(bad_rows(config))
    stop = first_run_of_bad_steps(bad, 3)
    assert 4 < stop < STEPS - 2 and {1, 2, 3} - set(bad), f"the test is of no use with the bad steps {bad}"
    folder = workplace / "runs" / name
    for _ in range(2 if processes == 1 else 1):  # the count in a row is kept, too
        ended = ends(start_ranks(processes, "train.pretrain", file, "train.max_bad_steps=3"))
        assert [code for code, _, _ in ended] == [2] * processes
        (error,) = [line for _, _, error in ended for line in error.splitlines() if line.startswith("error: ")]
        assert not any("Traceback" in error for _, _, error in ended)
        assert f"{folder}: 3 steps in a row were skipped, the last of them step {stop} " in error, error
        assert f"show_rows {folder} {(stop - 3) * ROWS} {stop * ROWS - 1}" in error, error
        assert_sound(folder)
        newest = checkpoint.find_checkpoint(folder)
        last_good = max(step for step in range(1, stop) if step not in bad)
        good = folder / "checkpoints" / f"step-{last_good:08d}"
        for part in ("model.safetensors", "optimizer.safetensors"):
            assert (newest / part).read_bytes() == (good / part).read_bytes(), "not as after the last good step"
        assert {row["step"] for row in bad_rows_logged(folder)} == {step for step in bad if step <= stop}
    if processes == 1:
        run("train.pretrain", file, "train.max_bad_steps=99")
        run("train.pretrain", file, "train.max_bad_steps=99", f"name={name}-patient")
        assert_equal_runs(workplace / "runs" / f"{name}-patient", folder)


# Spikes


@pytest.mark.slow
def test_a_gradient_far_above_the_usual_is_skipped_once_the_usual_is_known(poison, workplace):
    """An embedding of almost nothing, which the first normalisation enlarges a millionfold, and its gradient with it."""
    name, steps = "spike", 72
    for seed in range(100):  # until the rare row comes late
        changes = {"train": {"steps": steps, "spike_factor": 4.0}, "eval": {"every": 0, "prompts": []}}
        file, config = poison(
            name, rare_documents(1, 1), 1e-9, texts=40, seed=seed, model={"rms_norm_eps": 1e-12}, **changes
        )
        where = bad_rows(config)
        if len(where) == 1 and SETTLED + 2 < where[0] // ROWS + 1 < steps - 4:
            break
    finish_ranks(start_ranks(2, "train.pretrain", file))
    folder = workplace / "runs" / name
    assert_skipped(folder, config, steps_of(where), where)
    (row,) = bad_rows_logged(folder)
    assert row["grad_norm"] > 4 * row["mean_norm"] > 0 and math.isfinite(row["loss"])
    assert "far above the usual" in (folder / "log.txt").read_text("utf-8")
    run("train.pretrain", file, "train.spike_factor=0", "name=spike-taken")
    assert not bad_rows_logged(workplace / "runs/spike-taken"), "spike_factor 0 judges no finite step"
