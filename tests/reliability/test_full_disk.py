"""A disk that fills during training, for real: the run folder lies on a tmpfs of a few MiB, and ballast takes the rest of it."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.integrity import damage
from train import checkpoint
from train.config import load_config
from train.metrics import read_rows

from ..train.conftest import run
from .conftest import assert_equal_runs, assert_sound, checkpoint_step, ends, leftovers, start_ranks

PAGE = 4096
CHECKPOINT = 160 * PAGE  # bytes that one of the tiny run takes, a little more than in truth


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB; skipped where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free: int) -> None:
    """Leaves so many bytes on the disk, in whole pages."""
    (folder / "ballast").unlink(missing_ok=True)
    status = os.statvfs(folder)
    (folder / "ballast").write_bytes(b"x" * max(status.f_bavail * status.f_frsize - free, 0))
    status = os.statvfs(folder)
    assert status.f_bavail * status.f_frsize <= free


def stops(processes: int, *arguments: object) -> str:
    """Runs train.pretrain, which must end with exit code 2 and one sentence; returns it."""
    ended = ends(start_ranks(processes, "train.pretrain", *arguments))
    errors = [line for _, _, error in ended for line in error.splitlines() if line.startswith("error: ")]
    assert not any("Traceback" in error for _, _, error in ended), ended
    assert [code for code, _, _ in ended] == [2] * processes, ended
    assert len(errors) == 1, f"one sentence, not {errors}"
    return errors[0]


def intact(folder: Path) -> list[int]:
    """Steps of the whole checkpoints, after a look at what else is there."""
    assert_sound(folder)
    assert not leftovers(folder), "something half-written takes the room that is needed"
    found = checkpoint.complete_checkpoints(folder)
    assert all(damage(path, checkpoint.FILES) is None for path in found)
    return [int(path.name[5:]) for path in found]


@pytest.mark.slow
@pytest.mark.parametrize("processes, background", [(1, True), (1, False), (2, True)])
def test_a_disk_that_fills_stops_the_run_and_with_room_it_goes_on_to_an_equal_end(
    workplace, small_disk, request, processes, background
):
    """There is room for the first checkpoint, but not for the second: it is the writer that finds out, while steps go on."""
    name = f"full-{processes}-{background}"
    settings = (f"name={name}", f"runs_dir={small_disk}", f"train.async_checkpoint={background}")
    command = (workplace / "pretrain.yaml", *settings)
    fill(small_disk, CHECKPOINT + CHECKPOINT // 2 + 20 * PAGE)
    error = stops(processes, *command)
    folder = small_disk / name
    assert "step-00000010: cannot write this checkpoint" in error and "free some disk space" in error, error
    assert intact(folder) == [5]
    (small_disk / "ballast").unlink()
    for code, out, error in ends(start_ranks(processes, "train.pretrain", *command)):
        assert code == 0, error
        assert "resumed at step 5" in out or out == ""
    assert_equal_runs(request.getfixturevalue("whole" if processes == 1 else "whole_two"), folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_whatever_meets_the_full_disk_first_nothing_of_before_is_lost(workplace, whole, small_disk):
    """The same run, again and again with a little more room: the start, a row of metrics, a line of the log, a sample or a
    checkpoint is what finds the disk full."""
    folder, config = small_disk / "creeping", workplace / "pretrain.yaml"
    command = (
        config,
        "name=creeping",
        f"runs_dir={small_disk}",
        "train.keep_checkpoints=1",
        "train.checkpoint_every=7",
    )
    fill(small_disk, 2 * CHECKPOINT + 40 * PAGE)
    run("train.pretrain", *command, "train.steps=7", "eval.prompts=[]")  # only to have a run folder with a checkpoint
    sentences, pages = set(), (0, 1, 4, 12, 100)
    for free in pages:
        before = content(folder)
        kept = intact(folder)
        fill(small_disk, free * PAGE)
        sentences.add(stops(1, *command))
        after = content(folder)
        assert set(kept[-1:]) <= set(intact(folder)), f"with {free} pages the newest checkpoint was lost"
        for name, text in before.items():
            if name.endswith((".jsonl", "log.txt")):
                assert after[name].startswith(text), f"with {free} pages {name} was shortened or changed"
            elif name.startswith("tokenizer"):
                assert after[name] == text, f"with {free} pages {name} was damaged"
        load_config(folder / "config.yaml")
        json.loads((folder / "run.json").read_text())
        assert not [name for name in after if "partial" in name], f"with {free} pages: leftovers"
    assert all("space" in sentence for sentence in sentences), sentences
    assert len(sentences) >= 2, f"the disk was found full in one place only: {sentences}"
    (small_disk / "ballast").unlink()
    run("train.pretrain", *command)
    assert checkpoint_step(folder) == 20
    rows = [(row["kind"], row["step"]) for row in read_rows(folder / "metrics.jsonl")]
    assert {("train", step) for step in range(8, 21)} <= set(rows)


@pytest.mark.slow
def test_no_room_for_a_row_of_metrics_stops_both_processes(workplace, small_disk):
    """Rows and lines grow while no checkpoint is due: rank 0 alone finds the disk full, and says so; the other one leaves too."""
    config = workplace / "pretrain.yaml"
    command = (
        config,
        "name=rows",
        f"runs_dir={small_disk}",
        "train.checkpoint_every=0",
        "train.steps=400",
        "eval.every=0",
    )
    fill(small_disk, 30 * PAGE)
    ended = ends(start_ranks(2, "train.pretrain", *command))
    assert ended[0][0] == 2 and "disk is full; free some space and repeat the command" in ended[0][2], ended[0]
    assert all(code in (2, 75) for code, _, _ in ended), [code for code, _, _ in ended]
    assert not any("Traceback" in error for _, _, error in ended)
    rows = read_rows(small_disk / "rows/metrics.jsonl")
    assert rows and [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "rows before the last are whole"


@pytest.mark.slow
def test_a_disk_without_any_room_is_said_at_the_start(workplace, small_disk):
    fill(small_disk, 0)
    error = stops(1, workplace / "pretrain.yaml", "name=none", f"runs_dir={small_disk}")
    assert "space" in error, error
