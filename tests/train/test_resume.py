"""Promise 4: 20 steps in one go equal 10 steps, a kill and 10 more, bit for bit; in real processes with a real SIGKILL."""

import json
import os
import random
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
    rows = {
        (row["kind"], row["step"]): {k: v for k, v in row.items() if k not in UNEQUAL}
        for row in read_rows(run_dir / "metrics.jsonl")
    }
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


@pytest.mark.slow
def test_sigkill_at_random_moments_always_leaves_a_run_that_goes_on(workplace, whole):
    """A checkpoint every step, so that many kills fall into the writing of one."""
    config = workplace / "pretrain.yaml", "name=pre-random", "train.checkpoint_every=1"
    folder, rng = workplace / "runs/pre-random", random.Random(0)
    for _ in range(10):
        process = start("train.pretrain", *config)
        before = len(read_rows(folder / "metrics.jsonl"))
        deadline = time.monotonic() + 60
        while (
            len(read_rows(folder / "metrics.jsonl")) == before
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        if checkpoint.complete_checkpoints(folder):
            checkpoint.read_state(checkpoint.find_checkpoint(folder))
        for pointer in ("latest", "best"):
            if (folder / "checkpoints" / pointer).exists():
                assert checkpoint.pointed(folder, pointer) is not None, f"{pointer} points at nothing"
    run("train.pretrain", *config)
    assert_equal_runs(whole, folder)
    assert not list((folder / "checkpoints").glob(".*partial*")), "leftovers of interrupted saves"


def stop_after_rows(workplace: Path, name: str, rows: int, how: signal.Signals, processes: int) -> None:
    """Starts the pretraining run `name` and stops it once it has logged so many rows: SIGTERM goes to torchrun, which passes it
    on; SIGKILL to torchrun and to its processes, which would outlive it."""
    folder = workplace / "runs" / name
    process = start("train.pretrain", workplace / "pretrain.yaml", f"name={name}", processes=processes)
    deadline = time.monotonic() + 120
    while len(read_rows(folder / "metrics.jsonl")) < rows and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    workers = (
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if how == signal.SIGKILL else []
    )
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, how)
    process.communicate(timeout=90)
    assert 0 < checkpoint.read_state(checkpoint.find_checkpoint(folder))["step"] < 20, (
        "stopped too late to test anything"
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_resume_bit_for_bit(workplace, how):
    runs, name = workplace / "runs", f"two-{how.name}"
    if not (runs / "two").exists():
        run("train.pretrain", workplace / "pretrain.yaml", "name=two", processes=2)
    stop_after_rows(workplace, name, 8, how, processes=2)
    run("train.pretrain", workplace / "pretrain.yaml", f"name={name}", processes=2)
    assert_equal_runs(runs / "two", runs / name)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_to_float_tolerance(workplace, whole, first, then):
    name = f"from-{first}-to-{then}"
    stop_after_rows(workplace, name, 8, signal.SIGTERM, processes=first)
    run("train.pretrain", workplace / "pretrain.yaml", f"name={name}", processes=then)
    expected = metrics(whole)
    for key, row in metrics(workplace / "runs" / name).items():
        assert row["loss"] == pytest.approx(expected[key]["loss"], rel=1e-4), key
