"""What the disk says of a study is believed where it is true: now, of these settings, and on one text."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data.integrity import write_checksums
from scripts import ablate
from scripts.ablation import cells, clock, record
from scripts.ablation.study import Cell, read_study
from train import checkpoint
from train.config import to_yaml
from train.guard import GuardState
from train.progress import Progress, TrainingState

from .conftest import DENSE, EXPERTS

VARIANTS = [DENSE, EXPERTS]


def saved(cell: Cell, step: int, text: str = "a") -> Path:
    """A checkpoint as far as a study looks at it: `step` steps of a second each, trained on `text`."""
    folder = cell.config.run_dir / "checkpoints" / checkpoint.checkpoint_name(step)
    folder.mkdir(parents=True)
    for name in checkpoint.FILES:
        (folder / name).write_text("")
    progress = Progress(step=step, tokens=256 * step, train_seconds=float(step))
    state = TrainingState(step, 1, progress, GuardState(), {"topics": text}, "tokenizer")
    (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    write_checksums(folder, checkpoint.FILES)
    return folder


def test_a_checkpoint_that_training_removes_meanwhile_is_no_damage(write, monkeypatch):
    """Of a run at work the newest checkpoint of a moment ago may be gone: the estimate must not end the whole command."""
    cell = read_study(write()).cells[0]
    assert record.train_seconds(cell) == 0.0
    older, listing = saved(cell, 6), checkpoint.complete_checkpoints

    def while_it_trains(run_dir: Path) -> list[Path]:
        found = listing(run_dir)
        if older.exists():
            saved(cell, 12)
            shutil.rmtree(older)
        return found

    monkeypatch.setattr(checkpoint, "complete_checkpoints", while_it_trains)
    assert record.train_seconds(cell) == 12.0
    (older.with_name(checkpoint.checkpoint_name(12)) / "state.json").write_text("{")
    with pytest.raises(ValueError, match="state.json: cannot be read"):
        record.train_seconds(cell)


def test_a_run_of_other_settings_is_not_taken_for_the_cell(write):
    """Its digest leaves out what is at its default: a default that changes leaves the name, and the run is another one."""
    cell = (study := read_study(write())).cells[0]
    cell.config.run_dir.mkdir(parents=True)
    path = cell.config.run_dir / "config.yaml"
    trained = dataclasses.replace(cell.config, name="other")
    trained.model = dataclasses.replace(cell.config.model, expert_backend="loop")
    trained.train = dataclasses.replace(cell.config.train, log_every=3)
    path.write_text(to_yaml(trained), encoding="utf-8")
    record.check_same_settings(study)
    trained.train.beta1 = 0.8
    path.write_text(to_yaml(trained), encoding="utf-8")
    with pytest.raises(ValueError, match="config.yaml: is not what 'dense', seed 1, would be trained with now"):
        record.check_same_settings(study)


def test_the_time_of_a_step_is_forgotten_with_the_settings_it_was_measured_with(write, monkeypatch):
    monkeypatch.setattr(record, "is_done", lambda cell: True)
    study = read_study(write(variants=VARIANTS))
    times = {
        "seconds": {"dense": [[1.0]], "experts": [[2.0]]},
        "digests": {c.variant: c.digest for c in study.cells[:2]},
    }
    record.write_record(study, clock=times)
    assert clock.missing(study) == [] and clock.missing(study, again=True) == ["dense", "experts"]

    scores = {**EXPERTS, "set": {**EXPERTS["set"], "model.scoring_func": "sigmoid"}}
    changed = read_study(write(variants=[DENSE, scores]))
    assert clock.missing(changed) == ["dense", "experts"]
    record.write_record(changed)
    kept = record.read_json(study.folder / "study.json")["clock"]
    assert kept["seconds"] == {"dense": [[1.0]]}, "the old variant's time stands beside the new one's quality"

    record.write_record(study, clock={"seconds": times["seconds"]})  # as it was written before digests were noted
    assert clock.missing(study) == []


def test_text_that_changes_under_the_runs_is_said_before_results_are_written(write, monkeypatch):
    study = read_study(write(variants=VARIANTS, seeds=[1]))

    def run(self: cells.Runner, pending: list[Cell]) -> cells.Outcome:
        for cell, text in zip(pending, "ab", strict=True):
            saved(cell, 12, text)
        return self.outcome

    monkeypatch.setattr(cells, "prepare_text", lambda config: {"topics": "a"})
    monkeypatch.setattr(cells.Runner, "run", run)
    with pytest.raises(ValueError, match="was trained on other text than .*dense"):
        ablate.run(study, study.cells, argparse.Namespace(at_once=1, clock=False))
    assert not (study.folder / "results.md").exists()


def test_a_cell_that_another_study_makes_meanwhile_is_found(write, monkeypatch):
    """Studies run for days: what one has trained since the other was read is not trained again."""
    study = read_study(write(variants=VARIANTS, seeds=[1]))
    theirs, ours = study.cells
    name = f"by-another-name-{theirs.digest}"
    saved(Cell(theirs.variant, 1, dataclasses.replace(theirs.config, name=name), theirs.digest), 6)
    runner, started = cells.Runner(study, [{}], print), []
    monkeypatch.setattr(runner, "_start", lambda cell, stage, environment: started.append((cell.config.name, stage)))
    runner.waiting = list(study.cells)
    runner._begin({})
    runner._begin({})
    assert started == [(name, "train"), (ours.config.name, "train")]


def test_a_signal_that_comes_when_nothing_runs_is_heard(write, monkeypatch):
    study = read_study(write(variants=VARIANTS, seeds=[1]))
    runner = cells.Runner(study, [{}], print)

    def begin(environment: dict) -> None:
        runner.waiting.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    monkeypatch.setattr(runner, "_begin", begin)
    assert runner.run(study.cells).signal == signal.SIGTERM, "the command would go on with the clock"


def test_asking_git_for_the_commit_holds_up_nobody(tmp_path, monkeypatch):
    """`git status` writes the index anew, under a lock that would make a person's commit fail just then."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == (None, False)
    file, git = tmp_path / "file", ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    file.write_text("one")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    os.utime(file, (1, 1))  # which `status` would note in the index
    before = (tmp_path / ".git/index").stat()
    head, dirty = record.commit()
    after = (tmp_path / ".git/index").stat()
    assert head and not dirty and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    file.write_text("two")
    assert record.commit() == (head, True)
