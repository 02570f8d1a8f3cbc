"""Promise 4: 20 steps in one go equal 10 steps, a kill and 10 more, bit for bit; in real processes with a real SIGKILL."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint
from train.metrics import read_rows

from .conftest import run, start

UNEQUAL = ("train_seconds", "tokens_per_second", "mfu", "memory_gib")  # times and memory are a machine's, not a run's


def metrics(run_dir: Path) -> dict:
    rows = {(row["kind"], row["step"]): {k: v for k, v in row.items() if k not in UNEQUAL} for row in read_rows(run_dir / "metrics.jsonl")}
    return dict(sorted(rows.items()))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other), "logged losses differ"
    last_one, last_other = checkpoint.find_checkpoint(one), checkpoint.find_checkpoint(other)
    assert last_one.name == last_other.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(last_one / file), load_file(last_other / file)
        assert ours.keys() == theirs.keys() and len(ours) > 5
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"{file}: {different[:5]} differ after the resume"
    states = [json.loads((path / "state.json").read_text()) for path in (last_one, last_other)]
    for state in states:
        del state["progress"]["train_seconds"]
    assert states[0] == states[1]


def kill_after_step(process, run_dir: Path, step: int, delay: float) -> None:
    """SIGKILL `delay` seconds after the first training row of `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["kind"] == "train" and row["step"] >= step for row in read_rows(run_dir / "metrics.jsonl")):
            time.sleep(delay)
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def whole(workplace) -> Path:
    run("train.pretrain", workplace / "pretrain.yaml")
    return workplace / "runs/pre"


@pytest.mark.parametrize("step, delay", [(11, 0.0), (15, 0.004)])
def test_a_killed_pretraining_run_resumes_bit_for_bit(workplace, whole, step, delay):
    name = f"pre-killed-{step}"
    config = workplace / "pretrain.yaml", f"name={name}"
    kill_after_step(start("train.pretrain", *config), workplace / "runs" / name, step, delay)
    newest = checkpoint.find_checkpoint(workplace / "runs" / name)
    assert checkpoint.read_state(newest)["step"] < 20, "the kill came too late to test anything"
    assert "resumed at step" in run("train.pretrain", *config)
    assert_equal_runs(whole, workplace / "runs" / name)


def test_a_killed_fine_tuning_run_resumes_bit_for_bit(workplace, whole):
    run("train.sft", workplace / "sft.yaml")
    config = workplace / "sft.yaml", "name=sft-killed"
    kill_after_step(start("train.sft", *config), workplace / "runs/sft-killed", 12, 0.002)
    run("train.sft", *config)
    assert_equal_runs(workplace / "runs/sft", workplace / "runs/sft-killed")


def test_sigterm_saves_and_the_same_command_goes_on(workplace, whole):
    config = workplace / "pretrain.yaml", "name=pre-asked", "train.checkpoint_every=0"
    process = start("train.pretrain", *config)
    folder = workplace / "runs/pre-asked"
    deadline = time.monotonic() + 120
    while not read_rows(folder / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, f"{process.returncode}: {out}{err}"
    assert "the same command goes on" in out
    run("train.pretrain", *config)
    assert metrics(folder) == metrics(whole)


def test_a_finished_run_stays_as_it_is(workplace, whole):
    before = metrics(whole)
    assert "already finished" in run("train.pretrain", workplace / "pretrain.yaml")
    assert metrics(whole) == before


def test_best_and_latest_name_whole_checkpoints(whole):
    assert checkpoint.pointed(whole, "latest") == checkpoint.find_checkpoint(whole)
    held_out = {row["step"]: row["loss"] for row in read_rows(whole / "metrics.jsonl") if row["kind"] == "held_out"}
    best = checkpoint.pointed(whole, "best")
    assert checkpoint.read_state(best)["step"] == min(held_out, key=held_out.get)
