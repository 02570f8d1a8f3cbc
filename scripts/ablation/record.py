"""What is on the disk of a study: which cells are done, how good and how long they were, and study.json, which says so.

study.json is what the analysis reads (eval/study.py); it is rewritten whenever a cell begins or ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Collection
from pathlib import Path

from scripts.ablation.study import Cell, Study, digest
from scripts.watching.files import lock_holder
from train import checkpoint
from train.config import load_config
from train.distributed import World, choose_device
from train.files import open_plain, replace_file
from train.metrics import read_rows
from train.progress import TrainingState
from train.runs import describe_machine

ROOT = Path(__file__).resolve().parents[2]
LARGEST_JSON = 2**26  # bytes
FINISHED = "ablation.json"  # in a run folder: the commit at which its cell was finished


def read_json(path: Path) -> dict:
    """The mapping in a file; an empty one where there is none, or something else."""
    try:
        with open(path, encoding="utf-8", opener=open_plain) as file:
            tree = json.loads(file.read(LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def trained_steps(cell: Cell) -> int:
    """Steps of the newest whole checkpoint, 0 without one."""
    found = checkpoint.complete_checkpoints(cell.config.run_dir)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def newest_state(cell: Cell) -> TrainingState | None:
    """State of the newest whole checkpoint, None without one. Of a run that is being trained that checkpoint may be removed
    while it is read: then the newest one of now is taken. ValueError where it is damaged."""
    while found := checkpoint.complete_checkpoints(cell.config.run_dir):
        try:
            return checkpoint.read_training_state(found[-1])
        except ValueError:
            if found[-1].exists():
                raise
    return None


def is_trained(cell: Cell) -> bool:
    """Whether the last checkpoint and the last held-out row are there."""
    steps = cell.config.train.steps
    rows = read_rows(cell.config.run_dir / "metrics.jsonl") if trained_steps(cell) == steps else []
    return any(row.get("kind") == "held_out" and row.get("step") == steps for row in rows)


def is_done(cell: Cell) -> bool:
    """Whether it is trained, and evaluation.json is that of its last checkpoint."""
    folder, steps = cell.config.run_dir, cell.config.train.steps
    if read_json(folder / "evaluation.json").get("step") != steps or not is_trained(cell):
        return False
    last = folder / "checkpoints" / checkpoint.checkpoint_name(steps) / "state.json"
    return (folder / "evaluation.json").stat().st_mtime_ns >= last.stat().st_mtime_ns


def is_locked(cell: Cell) -> bool:
    """Whether a process trains this run now."""
    held, _ = lock_holder(cell.config.run_dir / ".lock")
    return held is True


def bits_per_byte(cell: Cell) -> float:
    """Held-out bits per byte of the source that judges, or of all together; NaN where evaluation.json does not say."""
    sources = read_json(cell.config.run_dir / "evaluation.json").get("heldout", {})
    judge = cell.config.eval.best_source
    try:
        figures = [sources[judge]] if judge is not None else list(sources.values())
        bits = sum(source["loss"] * source["tokens"] for source in figures) / math.log(2)
        return bits / sum(source["bytes"] for source in figures)
    except (KeyError, TypeError, ZeroDivisionError, AttributeError):
        return math.nan


def train_seconds(cell: Cell) -> float:
    """Seconds spent in training steps up to the newest checkpoint; 0 without one."""
    state = newest_state(cell)
    return state.progress.train_seconds if state is not None else 0.0


def seconds_left(study: Study, cells: Collection[Cell], at_once: int) -> float | None:
    """What the unfinished of `cells` will take, by the seconds per operation of what is done; None before there is anything."""
    seconds, work, left = 0.0, 0.0, 0.0
    for cell in study.cells:
        size, steps = study.sizes[cell.variant], trained_steps(cell)
        share = steps / cell.config.train.steps
        operations = size.flops_per_token * size.tokens
        seconds, work = seconds + train_seconds(cell), work + share * operations
        if cell in cells:
            left += (1 - share) * operations
    return left * seconds / work / at_once if work else None


def check_same_data(study: Study, prepared: dict[str, str] | None) -> None:
    """ValueError, naming two cells, if they were trained on other tokens or with another tokenizer; `prepared`: what the next
    ones will be trained on, {source: SHA-256}, None if there is no next one."""
    first, expected = "this machine's text", prepared
    for cell in study.cells:
        if (state := newest_state(cell)) is None:
            continue
        data = state.data
        if expected is not None and data != expected:
            raise ValueError(
                f"{cell.config.run_dir}: was trained on other text than {first}; remove the older one, to train it anew, or bring "
                "the text back as it was"
            )
        first, expected = (first, expected) if expected is not None else (str(cell.config.run_dir), data)


def check_same_settings(study: Study) -> None:
    """ValueError if a cell's folder is named after other settings than it was trained with. The digest leaves out what is at its
    default, so a default that was changed since would bring up old runs as if they were new ones."""
    for cell in study.cells:
        path = cell.config.run_dir / "config.yaml"
        if not path.is_file():
            continue
        trained = load_config(path)
        trained.model.expert_backend = cell.config.model.expert_backend  # the run has put in what `auto` is here
        if digest(trained) != cell.digest:
            raise ValueError(
                f"{path}: is not what {cell.variant!r}, seed {cell.seed}, would be trained with now (a default that has changed?); "
                "move the run away, to train it anew"
            )


def commit() -> tuple[str | None, bool]:
    """(short id of git's HEAD, whether files of it are changed); (None, False) outside of a checkout."""

    def git(*words: str) -> str | None:
        try:
            # Without that option `status` writes the index anew, and a person's commit at that moment fails.
            command = ["git", "--no-optional-locks", *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return head, bool(head and git("status", "--porcelain", "--untracked-files=no"))


def note_finished(cell: Cell) -> None:
    """Leaves in the cell's folder the commit that it was finished at."""
    head, dirty = commit()
    name = head and head + ("-dirty" if dirty else "")
    replace_file(cell.config.run_dir / FINISHED, json.dumps({"commit": name}) + "\n")


def write_record(
    study: Study,
    running: Collection[Cell] = (),
    failed: Collection[Cell] = (),
    clock: dict | None = None,
    began: bool = False,
) -> None:
    """Writes study.json. `clock`: new step times, None: those there were; `began`: something was trained or timed just now, so
    machine and commit are this one's."""
    path = study.folder / "study.json"
    before = read_json(path)
    head, dirty = commit() if began or "commit" not in before else (before["commit"], before.get("dirty", False))
    machine = _machine(study) if began or "machine" not in before else before["machine"]
    variants = []
    for variant in study.file.variants:
        cells = [cell for cell in study.cells if cell.variant == variant.name]
        variants.append(
            {
                **dataclasses.asdict(variant),
                "longer": variant.longer is not None,
                **dataclasses.asdict(study.sizes[variant.name]),
                "cells": [_cell_record(study, cell, cell in running, cell in failed) for cell in cells],
            }
        )
    record = {
        "study": study.name,
        "question": study.file.question,
        "config": study.path,
        "overrides": study.overrides,
        "base": study.base,
        "scale": study.scale,
        "seeds": study.file.seeds,
        "compare_with": study.file.compare_with,
        "tolerance": study.file.tolerance,
        "commit": head,
        "dirty": dirty,
        "machine": machine,
        "variants": variants,
        "clock": clock if clock is not None else known_clock(study, before),
    }
    study.folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def known_clock(study: Study, before: dict) -> dict | None:
    """The step times of an earlier study.json, without those of variants whose settings have changed since."""
    clock = before.get("clock")
    if not isinstance(clock, dict):
        return None
    digests, timed = {c.variant: c.digest for c in timed_cells(study)}, clock.get("digests", {})
    seconds = {
        name: rounds
        for name, rounds in clock.get("seconds", {}).items()
        if timed.get(name) in (None, digests.get(name))  # None: timed before digests were noted
    }
    return {**clock, "seconds": seconds}


def timed_cells(study: Study) -> list[Cell]:
    """The first seed's cells, but for the longer ones, whose steps are those of their `of`."""
    first = study.file.seeds[0]
    return [cell for cell in study.cells if cell.seed == first and study.variant(cell.variant).longer is None]


def _cell_record(study: Study, cell: Cell, running: bool, failed: bool) -> dict:
    done = is_done(cell)
    state = "done" if done else "failed" if failed else "running" if running or is_locked(cell) else "to do"
    folder = os.path.relpath(cell.config.run_dir, study.folder)
    at = read_json(cell.config.run_dir / FINISHED).get("commit") if done else None
    return {"seed": cell.seed, "folder": folder, "state": state, "commit": at}


def _machine(study: Study) -> dict:
    train = study.configs[study.file.compare_with[0]].train
    threads = train.threads or os.cpu_count() or 1
    return describe_machine(World(device=choose_device(train.device), threads=threads))
