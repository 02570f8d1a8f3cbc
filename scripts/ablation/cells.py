"""Runs the cells of a study: each one `train.pretrain` and then `eval.evaluate` in processes of their own, several at once.

A cell that is done is left alone, one that was interrupted goes on, one that another process trains is waited for, and one that
fails does not hold the others up. A signal is passed on once: every run finishes its step, saves and ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.prepare import open_prepared, prepare
from data.words import harmless
from scripts.ablation import record
from scripts.ablation.study import Cell, Study, cell_folder
from scripts.train_tokenizer import train_tokenizer
from train import checkpoint
from train.config import RunConfig, to_yaml
from train.describe import check_vocabulary
from train.distributed import PR_SET_PDEATHSIG, choose_device
from train.files import replace_file
from train.guard import StopSignals

MOST_AT_ONCE = 4  # on a CPU without --at-once: runs share the memory's bandwidth
PAUSE = 0.2  # seconds between two looks at the processes
PATIENCE = 5.0  # seconds between two looks at a run that another process trains
LAST_WORDS = 4096  # bytes of a log that are read for its last line


def slots(config: RunConfig, at_once: int | None) -> list[dict[str, str]]:
    """One environment for each run that goes at once: a GPU of its own, or its share of the cores. `at_once` None: one a GPU;
    on a CPU as many as train.threads leaves room for, at most MOST_AT_ONCE."""
    train = config.train
    if choose_device(train.device).type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(at_once or len(gpus))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = train.threads or cores
    count = at_once or max(1, min(cores // threads, MOST_AT_ONCE))
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]  # which eval.evaluate heeds


def prepare_text(config: RunConfig) -> dict[str, str]:
    """Tokenizer and shards, made where they are missing; {source: SHA-256} of what is trained on.

    ValueError as scripts.train_tokenizer and data.prepare, and where nothing is held out to measure on.
    """
    tokenizer = train_tokenizer(config, progress=sys.stderr.isatty())
    check_vocabulary(config, tokenizer)
    prepare(config.data, tokenizer)
    prepared = open_prepared(config.data, tokenizer)
    judge = config.eval.best_source
    held_out = {source["name"]: source["held_out"]["documents"] for source in prepared.index["sources"]}
    if not (held_out[judge] if judge is not None else any(held_out.values())):
        raise ValueError(
            f"data: no document of {judge or 'any source'} is held out, so there is nothing to compare; set data.held_out_fraction"
        )
    return prepared.content_digests()


@dataclass
class Outcome:
    """How it ended."""

    failed: list[Cell] = field(default_factory=list)
    began: bool = False  # whether anything was started
    signal: int = 0  # that stopped it


@dataclass
class _Job:
    """A process at work on a cell."""

    cell: Cell
    stage: str  # train, evaluate
    process: subprocess.Popen
    log: Path


class Runner:
    """Runs cells in slots, and says in one line each what begins and ends."""

    def __init__(self, study: Study, environments: list[dict[str, str]], say: Callable[[str], None]) -> None:
        self.study, self.say = study, say
        self.slots: list[tuple[dict[str, str], _Job | None]] = [(each, None) for each in environments]
        self.outcome = Outcome()
        self._not_before: dict[str, float] = {}  # digest: when to look again whether another process has left it

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Until all are done or have failed, or a signal was heard."""
        self.wanted, self.waiting, told = list(cells), list(cells), False
        stop = StopSignals()
        try:
            while self.waiting or self._jobs():
                if stop.received and not told:
                    self.waiting, told = [], True
                    self.outcome.signal = stop.received
                    self.say(f"asked to stop: {len(self._jobs())} runs finish their step and save")
                    for job in self._jobs():
                        job.process.send_signal(stop.received)
                for i, (environment, job) in enumerate(self.slots):
                    if job is not None and job.process.poll() is not None:
                        job = self._next_stage(job, environment)
                    if job is None:
                        job = self._begin(environment)
                    self.slots[i] = environment, job
                time.sleep(PAUSE)
        finally:
            stop.close()
            for job in self._jobs():  # after an error of ours
                job.process.terminate()
        self.outcome.signal = stop.received  # one that came when nothing ran any more, too
        self._write()
        return self.outcome

    def _jobs(self) -> list[_Job]:
        return [job for _, job in self.slots if job is not None]

    def _begin(self, environment: dict[str, str]) -> _Job | None:
        """A job for the next cell that nobody else is at, None if there is none now."""
        for cell in list(self.waiting):
            if time.monotonic() < self._not_before.get(cell.digest, 0.0):
                continue
            if made := cell_folder(self.study.cells_folder, cell.digest):  # by another study, since this one was read
                cell.config.name = made
            if record.is_locked(cell):
                if cell.digest not in self._not_before:
                    self.say(f"{_label(cell)}: another process trains it; left to the end")
                self._not_before[cell.digest] = time.monotonic() + PATIENCE
                continue
            self.waiting.remove(cell)
            if record.is_done(cell):  # by that process
                self._finished(cell)
                continue
            return self._start(cell, "evaluate" if record.is_trained(cell) else "train", environment)
        return None

    def _start(self, cell: Cell, stage: str, environment: dict[str, str]) -> _Job:
        run_dir, train = cell.config.run_dir, cell.config.train
        place = self.study.folder / "cells"
        place.mkdir(parents=True, exist_ok=True)
        name = f"{cell.variant}-seed{cell.seed}"
        command = {
            "train": ["train.pretrain", str(place / f"{name}.yaml")],
            "evaluate": ["eval.evaluate", str(run_dir), "--tasks", "none", "--device", train.device, "--precision", train.precision],
        }[stage]  # fmt: skip
        if stage == "train":
            replace_file(place / f"{name}.yaml", to_yaml(cell.config))
            steps = record.trained_steps(cell)
            self.say(f"{_label(cell)}: " + (f"goes on at step {steps}" if steps else "begins"))
        log = place / f"{name}.log"
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C comes from here alone, and so once
                preexec_fn=_end_with_parent,
            )
        self.outcome.began = True
        job = _Job(cell, stage, process, log)
        self._write(job)
        return job

    def _next_stage(self, job: _Job, environment: dict[str, str]) -> _Job | None:
        """What follows a process that has ended: the evaluation of what was trained, or nothing."""
        cell, code = job.cell, job.process.returncode
        if code == 0 and job.stage == "train" and not self.outcome.signal:
            return self._start(cell, "evaluate", environment)
        if code == 0 and job.stage == "evaluate" and record.is_done(cell):
            record.note_finished(cell)
            checkpoint.prune(cell.config.run_dir, keep=1, keep_every=cell.config.train.keep_every)
            self._finished(cell)
        elif self.outcome.signal:
            self.say(f"{_label(cell)}: stopped at step {record.trained_steps(cell)} of {cell.config.train.steps}")
        elif record.is_locked(cell):
            self.waiting.append(cell)
        else:
            self.outcome.failed.append(cell)
            why = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            self.say(f"{_label(cell)}: failed ({why}): {_last_line(job.log)} ({job.log})")
            self._write()
        return None

    def _finished(self, cell: Cell) -> None:
        left = [each for each in self.wanted if not record.is_done(each) and each not in self.outcome.failed]
        seconds = record.seconds_left(self.study, left, len(self.slots))
        estimate = f", about {_duration(seconds)}" if seconds and left else ""
        self.say(
            f"{_label(cell)}: {record.bits_per_byte(cell):.4f} bits/byte after {record.train_seconds(cell):.0f} s of training; "
            f"{len(left)} left{estimate}"
        )
        self._write()

    def _write(self, *new: _Job) -> None:
        running = [job.cell for job in [*self._jobs(), *new] if job.process.poll() is None]
        record.write_record(self.study, running, self.outcome.failed, began=self.outcome.began)


def _label(cell: Cell) -> str:
    return f"{time.strftime('%m-%d %H:%M')} {cell.variant}, seed {cell.seed}"


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return harmless(next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing"))


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def _end_with_parent() -> None:
    """Asks Linux for a SIGTERM when this command dies without a word: its runs save and end too. Runs in the child."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
