"""SIGKILL at any moment, the writing of a checkpoint included, loses at most the steps since the newest checkpoint, and harms nothing.

A checkpoint every step, so that there is always one being written, pointed at or pruned.
"""

import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..train.conftest import run
from .conftest import (
    assert_equal_runs,
    assert_sound,
    checkpoint_step,
    finish_ranks,
    leftovers,
    start,
    start_ranks,
    wait_until,
)

EVERY_STEP = "train.checkpoint_every=1", "train.keep_checkpoints=2"


class Victim:
    """One run that is killed and started again, many times; `kill` checks what must hold after each."""

    def __init__(self, module: str, config: tuple, run_dir: Path, seed: int, slow_disk: Path) -> None:
        self.module, self.config, self.run_dir = module, config, run_dir
        self.slow = {"LD_PRELOAD": slow_disk, "FSYNC_MILLISECONDS": 25}  # a checkpoint takes a quarter of a second
        self.random = random.Random(seed)
        self.kills = self.while_writing = self.while_pruning_or_pointing = 0
        self.seconds_to_resume: list[float] = []

    def kill(self, moment: str) -> None:
        """Starts the run and kills it at a random moment of the `start`, of the `training`, or while it is `writing`."""
        before, said_before = checkpoint_step(self.run_dir), len(self._said(0))
        began = time.monotonic()
        process = start(self.module, *self.config, **(self.slow if moment == "writing" else {}))
        if moment == "start":
            time.sleep(self.random.uniform(0, 4))
        elif moment == "training":
            wait_until(lambda: re.search(rb"^step +\d+/", self._said(said_before), re.MULTILINE), process)
            self.seconds_to_resume.append(time.monotonic() - began)
            time.sleep(self.random.uniform(0, 0.1))
        else:
            wait_until(lambda: checkpoint_step(self.run_dir) > before, process)  # leftovers from now on are its own
            time.sleep(self.random.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it ended before the kill"

        self.kills += 1
        left = leftovers(self.run_dir)
        self.while_writing += any(name.startswith(".partial-step-") for name in left)
        self.while_pruning_or_pointing += any(not name.startswith(".partial-step-") for name in left)
        assert_sound(self.run_dir)
        assert checkpoint_step(self.run_dir) >= before, "a kill took the newest checkpoint away"
        said = self._said(said_before).decode()
        if "resumed at step" in said:
            resumed = int(said.partition("resumed at step")[2].split()[0])
            assert resumed == before, f"resumed at step {resumed}, but the newest checkpoint was of step {before}"

    def _said(self, after: int) -> bytes:
        """What log.txt has after its first `after` bytes."""
        log = self.run_dir / "log.txt"
        return log.read_bytes()[after:] if log.is_file() else b""


def test_killed_while_it_writes_a_checkpoint_it_goes_on_from_the_one_before(workplace, whole, slow_disk):
    config, folder = (workplace / "pretrain.yaml", "name=kill-writing", *EVERY_STEP), workplace / "runs/kill-writing"
    victim = Victim("train.pretrain", config, folder, 0, slow_disk)
    for _ in range(4):
        victim.kill("writing")
        if victim.while_writing:
            break
    assert victim.while_writing, "no kill fell into the writing of a checkpoint"
    run("train.pretrain", *config, "train.checkpoint_every=0")  # which writes none of the same name
    assert leftovers(folder) == [], "leftovers of the interrupted save"
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(workplace, whole, slow_disk, capsys):
    """20 of a pretraining run and 10 of a fine-tuning run, two at a time as the machine has two cores."""
    runs = workplace / "runs"
    rounds = {
        "train.pretrain": ["training", "writing", "start", "writing"] * 5,
        "train.sft": ["writing", "training", "writing", "training", "start"] * 2,
    }
    yaml = {"train.pretrain": workplace / "pretrain.yaml", "train.sft": workplace / "sft.yaml"}

    def torment(module: str) -> Victim:
        config = yaml[module], "train.steps=80", "eval.every=20", *EVERY_STEP
        run(module, *config, f"name=kept-{module}")
        victim = Victim(module, (*config, f"name=killed-{module}"), runs / f"killed-{module}", len(module), slow_disk)
        for moment in rounds[module]:
            victim.kill(moment)
        assert checkpoint_step(victim.run_dir) < 80, "the kills came too late to test anything"
        run(module, *victim.config)
        return victim

    with ThreadPoolExecutor(2) as pool:
        victims = list(pool.map(torment, rounds))
    for victim in victims:
        assert leftovers(victim.run_dir) == [], "leftovers of interrupted saves"
        assert_equal_runs(runs / f"kept-{victim.module}", victim.run_dir)
    kills = sum(victim.kills for victim in victims)
    writing = sum(victim.while_writing for victim in victims)
    pointing = sum(victim.while_pruning_or_pointing for victim in victims)
    seconds = [second for victim in victims for second in victim.seconds_to_resume]
    assert kills == 30 and writing >= 8, f"{kills} kills, {writing} in the writing of a checkpoint"
    with capsys.disabled():
        print(
            f"\n{kills} kills survived, {writing} of them while a checkpoint was written, {pointing} while a pointer was; from start "
            f"to first new step {statistics.median(seconds):.1f} s (median of {len(seconds)}, two runs at a time)"
        )


@pytest.mark.slow
def test_all_of_two_processes_killed_while_rank_0_writes(workplace, whole_two):
    """Rank 1 may be a step ahead of the checkpoint: it must go back with rank 0."""
    config, folder = (workplace / "pretrain.yaml", "name=two-writing", *EVERY_STEP), workplace / "runs/two-writing"
    while_writing = False
    for _ in range(6):
        before = checkpoint_step(folder)
        ranks = start_ranks(2, "train.pretrain", *config)
        wait_until(lambda: checkpoint_step(folder) > before, *ranks)  # noqa: B023
        wait_until(lambda: any(".partial-step-" in name for name in leftovers(folder)), *ranks, pause=0)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()
        assert_sound(folder)
        assert 0 < checkpoint_step(folder) < 20, "the kill came too late to test anything"
        while_writing = any(".partial-step-" in name for name in leftovers(folder))
        if while_writing:
            break
    assert while_writing, "no kill fell into the writing of a checkpoint"
    finish_ranks(start_ranks(2, "train.pretrain", *config))
    assert_equal_runs(whole_two, folder)
