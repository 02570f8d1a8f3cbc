"""20 steps in one go equal 10 steps, a SIGKILL and the same command again: bit for bit with as many processes as before, to float
tolerance and with the same rows in the same order with another number."""

import json
import signal
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.prepare import open_prepared
from data.tokenizer import Tokenizer
from train import checkpoint
from train.config import load_config
from train.metrics import read_rows
from train.plan import make_plan

from ..train.conftest import run
from .conftest import (
    assert_equal_runs,
    assert_same_training,
    assert_sound,
    checkpoint_step,
    ends,
    finish_ranks,
    last_step,
    metrics,
    start,
    start_ranks,
    wait_for_step,
    wait_until,
)


def kill_after_step(module: str, config: tuple, run_dir: Path, step: int, delay: float) -> None:
    """One process, killed `delay` seconds after the row of `step`."""
    process = start(module, *config)
    wait_for_step(step, run_dir, process)
    wait_until(lambda: True, pause=delay)
    process.kill()
    process.communicate()
    assert 0 < checkpoint_step(run_dir) < 20, "the kill came too late to test anything"
    assert_sound(run_dir)


def test_the_run_under_test_has_everything_on(workplace):
    """Else the comparisons below would show less than they say."""
    config = load_config(workplace / "pretrain.yaml")
    model, train = config.model, config.train
    assert model.dropout > 0 and model.router_jitter_noise > 0 and model.router_bias_update_rate > 0
    assert model.aux_loss_level == "sequence" and model.router_z_loss_coef > 0
    assert train.warmup_steps > 0 and train.schedule != "constant" and train.spike_factor > 0 and train.async_checkpoint
    assert make_plan(config, 1000, 1).accumulation == 4 and make_plan(config, 1000, 2).accumulation == 2


@pytest.mark.parametrize(
    "step, delay",
    [(11, 0.0), pytest.param(10, 0.03, marks=pytest.mark.slow)],
)
def test_a_killed_pretraining_run_resumes_bit_for_bit(workplace, whole, step, delay):
    name = f"pre-killed-{step}"
    config = workplace / "pretrain.yaml", f"name={name}"
    kill_after_step("train.pretrain", config, workplace / "runs" / name, step, delay)
    assert "resumed at step" in run("train.pretrain", *config)
    assert_equal_runs(whole, workplace / "runs" / name)


@pytest.mark.slow
def test_a_killed_fine_tuning_run_resumes_bit_for_bit(workplace, whole_sft):
    config = workplace / "sft.yaml", "name=sft-killed"
    kill_after_step("train.sft", config, workplace / "runs/sft-killed", 11, 0.002)
    run("train.sft", *config)
    assert_equal_runs(whole_sft, workplace / "runs/sft-killed")


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(workplace, whole):
    before = {path: path.read_bytes() for path in sorted(whole.rglob("*")) if path.is_file() and path.name != ".lock"}
    assert "already finished" in run("train.pretrain", workplace / "pretrain.yaml")
    assert before == {path: path.read_bytes() for path in before}


def test_best_and_latest_name_whole_checkpoints(whole):
    assert_sound(whole)
    assert checkpoint.pointed(whole, "latest") == checkpoint.find_checkpoint(whole)
    held_out = {row["step"]: row["loss"] for row in read_rows(whole / "metrics.jsonl") if row["kind"] == "held_out"}
    best = checkpoint.pointed(whole, "best")
    assert checkpoint.read_state(best)["step"] == min(held_out, key=held_out.get)


# Which rows a step reads.


def expected_digests(config_file: Path, *overrides: str) -> dict[int, int]:
    """{step: rows_digest} of a run, computed from the row order without running it."""
    config = load_config(config_file, overrides)
    prepared = open_prepared(config.data, Tokenizer.load(config.tokenizer.path))
    masked = config.data.document_mask or config.data.format == "chat"
    rows = prepared.train_rows(config.context_length, masked, config.seed)
    n = config.train.tokens_per_step // config.context_length
    return {
        step + 1: sum(
            zlib.crc32(rows.batch(position, 1)["input_ids"].numpy().astype("<i8").tobytes(), position % 2**32)
            for position in range(step * n, (step + 1) * n)
        )
        for step in range(config.train.steps)
    }


def logged_digests(run_dir: Path) -> dict[int, int]:
    return {step: row["rows_digest"] for (kind, step), row in metrics(run_dir).items() if kind == "train"}


def test_a_run_reads_the_rows_of_its_order(workplace, whole):
    assert logged_digests(whole) == expected_digests(workplace / "pretrain.yaml")


@pytest.mark.slow
def test_fine_tuning_reads_the_rows_of_its_order(workplace, whole_sft):
    assert logged_digests(whole_sft) == expected_digests(workplace / "sft.yaml")


def test_rows_in_another_order_have_another_digest(workplace, whole):
    """The digest would notice: two rows exchanged between steps, and one step twice."""
    digests = expected_digests(workplace / "pretrain.yaml")
    assert len(set(digests.values())) == len(digests)
    assert expected_digests(workplace / "pretrain.yaml", "seed=8") != digests


@pytest.mark.slow
def test_fine_tuning_by_another_number_of_processes_is_the_same_training(workplace, whole_sft):
    config = workplace / "sft.yaml", "name=sft-by-2"
    kill_after_step("train.sft", config, workplace / "runs/sft-by-2", 6, 0.0)
    finish_ranks(start_ranks(2, "train.sft", *config))
    assert_same_training(whole_sft, workplace / "runs/sft-by-2")


@pytest.mark.slow
def test_one_run_by_1_then_2_then_4_processes_is_the_same_training(workplace):
    """Killed, stopped and resumed with other micro-batches too, over more than two epochs: in each, every row is read once. Without
    dropout and jitter, whose draws belong to a micro-batch (with them, another number of processes: tests/train/test_parallel)."""
    few = workplace / "few.jsonl"
    text = (workplace / "text.jsonl").read_text(encoding="utf-8")
    few.write_text("".join(text.splitlines(keepends=True)[:6]), encoding="utf-8")
    config = (
        workplace / "pretrain.yaml", "name=1-2-4", f"data.sources=[{{name: few, kind: jsonl, path: {json.dumps(str(few))}}}]",
        "model.dropout=0.0", "model.router_jitter_noise=0.0", "train.tokens_per_step=1024",
    )  # fmt: skip
    folder = workplace / "runs/1-2-4"
    kill_after_step("train.pretrain", (*config, "train.micro_batch_size=1"), folder, 6, 0.0)
    ranks = start_ranks(2, "train.pretrain", *config, "train.micro_batch_size=4")
    wait_for_step(last_step(folder) + 3, folder, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ends(ranks)] == [143, 143]
    assert checkpoint_step(folder) < 20, "stopped too late to test anything"
    said = finish_ranks(start_ranks(4, "train.pretrain", *config))[0][1]
    assert "saved by 2 process(es), resumed by 4" in said
    run("train.pretrain", *config, "name=1-2-4-whole")
    assert_same_training(workplace / "runs/1-2-4-whole", folder)
    assert logged_digests(folder) == expected_digests(*config), "the run read other rows"

    loaded = load_config(config[0], config[1:])
    prepared = open_prepared(loaded.data, Tokenizer.load(loaded.tokenizer.path))
    T, n = 32, 1024 // 32
    rows = prepared.train_rows(T, False, loaded.seed)
    epochs = 20 * n // rows.rows_per_epoch
    assert epochs >= 2, f"{rows.rows_per_epoch} rows an epoch are too many for this test"
    shards = sorted(Path(prepared.index["sources"][0]["folder"]).glob("train-*.bin"))
    tokens = np.concatenate([np.fromfile(path, dtype=prepared.index["dtype"]) for path in shards]).astype(np.int64)
    by_hand = Counter(tokens[start : start + T].tobytes() for start in range(0, len(tokens) - T + 1, T - 1))
    for epoch in range(epochs):
        first = epoch * rows.rows_per_epoch
        read = Counter(rows.batch(first + i, 1)["input_ids"].numpy().tobytes() for i in range(rows.rows_per_epoch))
        assert read == by_hand, (
            f"epoch {epoch}: {(read - by_hand).total()} rows too often, {(by_hand - read).total()} too seldom"
        )
