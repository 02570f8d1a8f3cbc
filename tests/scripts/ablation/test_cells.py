"""Real studies of tiny runs: done cells are left alone, interrupted ones go on, failing ones hold nobody up."""

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from data.integrity import SUMS, damage
from scripts.ablation import record
from scripts.ablation.cells import MOST_AT_ONCE, slots
from scripts.ablation.study import Study, read_study
from train import checkpoint
from train.config import load_config

from ...reliability.conftest import ends, is_alive, last_step, start, wait_until
from .conftest import DENSE, EXPERTS, record_of, states

LONG = "train.steps=400", "train.checkpoint_every=0", "eval.every=0"


def ablate(*arguments: object, code: int = 0) -> str:
    """What the command printed; the test fails at another exit code."""
    [(found, out, err)] = ends([start("scripts.ablate", *arguments)])
    assert found == code, f"exit code {found}\n{out[-2000:]}\n{err[-4000:]}"
    assert "Traceback" not in err
    return out + err


def checksums(place: Path) -> dict[str, bytes]:
    """Of every checkpoint of every cell."""
    found = (place / "runs/ablations/cells").glob(f"*/checkpoints/step-*/{SUMS}")
    return {str(path): path.read_bytes() for path in found}


def sessions(study: Study) -> list[int]:
    """How often each cell was started."""
    return [len(json.loads((c.config.run_dir / "run.json").read_text())["sessions"]) for c in study.cells]


def test_the_plan_starts_nothing(write, place):
    out = ablate(write(), "--plan", "train.steps=10", "--seeds", "1")
    assert "Do experts help?" in out and "0/2" in out and "dense-longer" in out
    assert not (place / "runs").exists()


def test_a_mistake_ends_in_one_sentence(write, place):
    for arguments, words in (
        ([write(), "--seeds", "3"], "--seeds: 3 is none of 1, 2"),
        ([write(), "--variants", "sparse"], "--variants: 'sparse' is none of dense, dense-longer, experts"),
    ):
        out = ablate(*arguments, code=2)
        assert words in out and not (place / "runs").exists()


@pytest.mark.slow
def test_a_study_from_nothing_to_its_results(write, place, workplace):
    """Trained in turns of two, timed, and repeated: then nothing is done again. Another study takes over what they share."""
    text = ablate(write(), "--at-once", "2", "--seeds", "1")
    study = read_study(write())
    first = [cell for cell in study.cells if cell.seed == 1]
    assert states(place) == {(c.variant, c.seed): "done" if c in first else "to do" for c in study.cells}
    assert text.count("bits/byte after") == 3 and "at once" in text
    for cell in first:
        folder = cell.config.run_dir
        steps = cell.config.train.steps
        assert [path.name for path in checkpoint.complete_checkpoints(folder)][-1] == checkpoint.checkpoint_name(steps)
        assert json.loads((folder / "evaluation.json").read_text())["step"] == steps
        judged = json.loads((folder / "evaluation.json").read_text())["heldout"]["topics"]["bits_per_byte"]
        assert record.bits_per_byte(cell) == pytest.approx(judged) and f"{judged:.4f}" in text

    said = record_of(place)
    assert said["clock"]["seconds"].keys() == {"dense", "experts"}
    for [rounds] in said["clock"]["seconds"].values():
        assert len(rounds) == said["clock"]["rounds"] and all(0 < seconds < 60 for seconds in rounds)
    assert said["clock"]["tokens_per_step"] == {"dense": 256, "experts": 256}
    for variant in said["variants"]:
        for cell in variant["cells"]:
            assert (study.folder / cell["folder"]).resolve().parent == study.cells_folder.resolve()
    for name in ("results.json", "results.md", "report.html"):
        assert (study.folder / name).stat().st_size > 0
    before = checksums(place)
    assert len(before) >= 3 and not any(damage(Path(path).parent, checkpoint.FILES) for path in before), (
        "the clock wrote"
    )

    again = ablate(write(), "--seeds", "1")
    assert "3 of 3 cells are done" in again and "begins" not in again and "timing" not in again
    assert checksums(place) == before and record_of(place)["clock"] == said["clock"]

    other = write("other", variants=[{**DENSE, "name": "twin"}, EXPERTS], compare_with=["twin"], seeds=[1])
    assert "2 of 2 cells are done" in ablate(other, "--no-clock")
    assert checksums(place) == before
    assert {Path(v["cells"][0]["folder"]).name for v in record_of(place, "other")["variants"]} == {
        c.config.name for c in first if c.variant != "dense-longer"
    }

    # Another text under the same name: what was trained on the old one cannot be compared with what would be trained now.
    text = workplace / "text.jsonl"
    kept = text.read_text(encoding="utf-8")
    try:
        text.write_text("".join(kept.splitlines(keepends=True)[:-20]), encoding="utf-8")
        assert "was trained on other text" in ablate(write(), code=2)
        assert checksums(place) == before
    finally:
        text.write_text(kept, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(write, number):
    path = write(variants=[DENSE, EXPERTS], seeds=[1])
    study = read_study(path, LONG)
    process = start("scripts.ablate", path, *LONG, "--at-once", "2", "--no-clock")
    folders = [cell.config.run_dir for cell in study.cells]
    wait_until(lambda: all(last_step(folder) >= 2 for folder in folders), process)
    process.send_signal(number)
    [(code, out, err)] = ends([process])
    assert code == 128 + number and "the same command goes on" in out and "Traceback" not in err, f"{code}: {out}{err}"
    stopped = [record.trained_steps(cell) for cell in study.cells]
    assert all(2 <= step < 400 for step in stopped), "the signal came too late to test anything"
    assert [last_step(folder) for folder in folders] == stopped, "a run ended without saving its last step"
    assert not any(record.is_locked(cell) for cell in study.cells), "a run goes on alone"
    for log in (study.folder / "cells").glob("*.log"):
        assert log.read_text().count("stopped after step") == 1

    if number != signal.SIGTERM:
        return  # how it goes on is the same
    out = ablate(path, *LONG, "--at-once", "2", "--no-clock")
    assert all(f"goes on at step {step}" in out for step in stopped)
    assert set(states(study.folder.parents[2], study.name).values()) == {"done"} and sessions(study) == [2, 2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux alone tells a child that its parent has died")
def test_no_run_outlives_a_command_that_is_killed(write):
    path = write(variants=[DENSE], seeds=[1])
    [cell] = read_study(path, LONG).cells
    process = start("scripts.ablate", path, *LONG, "--no-clock")
    wait_until(lambda: last_step(cell.config.run_dir) >= 2, process)
    child = int((cell.config.run_dir / ".lock").read_text())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child), "the run trains on, and nobody knows"
    assert record.trained_steps(cell) == last_step(cell.config.run_dir) < 400


@pytest.mark.slow
def test_a_cell_that_fails_holds_nobody_up(write, place):
    broken = {**EXPERTS, "name": "broken", "set": {**EXPERTS["set"], "train.init_from": str(place / "nowhere")}}
    path = write(variants=[broken, DENSE], seeds=[1])
    out = ablate(path, "--at-once", "1", "--no-clock", code=1)
    assert states(place) == {("broken", 1): "failed", ("dense", 1): "done"}
    assert "nowhere: is not there" in out and "exit code 2" in out and "broken-seed1.log" in out
    assert "failed: broken, seed 1" in out.splitlines()[-1]


@pytest.mark.slow
def test_a_run_of_another_process_is_waited_for(write):
    path = write(variants=[DENSE, EXPERTS], seeds=[1])
    study = read_study(path)
    theirs, ours = study.cells
    theirs.config.run_dir.mkdir(parents=True)
    with open(theirs.config.run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start("scripts.ablate", path, "--at-once", "2", "--no-clock")
        wait_until(lambda: record.is_done(ours), process, pause=0.1)
        assert process.poll() is None and record.trained_steps(theirs) == 0, "it did not wait"
        wait_until(lambda: states(study.folder.parents[2])["dense", 1] == "running", process, pause=0.1)
    [(code, out, err)] = ends([process])
    assert code == 0, out + err
    assert out.count("another process trains it") == 1 and record.is_done(theirs)


@pytest.mark.slow
def test_what_is_missing_of_a_cell_is_made_up(write, place):
    """Without its evaluation, or with that of another step, it is evaluated and not trained."""
    path = write(variants=[DENSE], seeds=[1])
    ablate(path, "--no-clock")
    [cell] = read_study(path).cells
    evaluation, before = cell.config.run_dir / "evaluation.json", checksums(place)
    kept = evaluation.read_text()
    for text in (None, kept.replace('"step": 12', '"step": 11'), "{", "[]"):
        evaluation.unlink(missing_ok=True)
        if text is not None:
            evaluation.write_text(text)
        assert not record.is_done(cell) and record.is_trained(cell)
    os.utime(evaluation, (0, 0))
    out = ablate(path, "--no-clock")
    assert (
        "begins" not in out
        and record.is_done(cell)
        and checksums(place) == before
        and sessions(read_study(path)) == [1]
    )


def test_how_many_go_at_once(place):
    config = load_config(place / "base.yaml", ["train.device=cpu"])
    cores = len(os.sched_getaffinity(0))
    assert len(slots(config, None)) == min(cores, MOST_AT_ONCE)
    assert slots(config, 3) == [{"OMP_NUM_THREADS": "1"}] * 3
    config.train.threads = cores
    assert len(slots(config, None)) == 1
    config.train.threads = None
    assert slots(config, None) == [{"OMP_NUM_THREADS": str(cores)}]
