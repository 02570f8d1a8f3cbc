"""The watchdog: a process that stands still is named, with the step it stands at, and the job ends instead of hanging."""

import contextlib
import re
import signal
import subprocess
import sys
import time

import pytest

from ..train.conftest import ROOT, environment, start
from .conftest import (
    assert_equal_runs,
    assert_sound,
    checkpoint_step,
    ends,
    finish_ranks,
    last_step,
    start_ranks,
    wait_for_step,
)

PATIENCE = 4  # seconds of train.stall_timeout here: far more than a step of the tiny run takes on a busy machine


def test_a_step_that_never_ends_is_named_with_what_it_was_doing_and_where(workplace):
    """A step of 262,144 tokens stands for one that hangs. Exit code 75: the same command may be repeated."""
    settings = (
        "train.tokens_per_step=262144",
        "train.micro_batch_size=8192",
        "train.steps=2",
        "train.stall_timeout=1",
    )
    ((code, _, error),) = ends([start("train.pretrain", workplace / "pretrain.yaml", "name=stuck", *settings)])
    assert code == 75, error
    first = error.splitlines()[0]
    assert re.match(
        r"error: rank 0 of 1, step 1: \w+.*: nothing has moved for \d+ s \(train.stall_timeout: 1\); ", first
    ), first
    assert re.search(
        r"rank 0 stands still, step 1: \w+.* for \d+ s; ending this process: the same command goes on", first
    ), first
    assert "train/step.py" in error, "Python's stacks say where it stands"
    assert_sound(workplace / "runs/stuck")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_by_the_other_and_the_run_goes_on_to_an_equal_end(
    workplace, whole_two, stopped
):
    """SIGSTOP: the process is there, its connections are open, and nothing comes."""
    folder, config = workplace / f"runs/stopped-{stopped}", (workplace / "pretrain.yaml", f"name=stopped-{stopped}")
    ranks = start_ranks(2, "train.pretrain", *config, f"train.stall_timeout={PATIENCE}")
    wait_for_step(7, folder, *ranks)
    ranks[stopped].send_signal(signal.SIGSTOP)
    try:
        ((code, _, error),) = ends([ranks[1 - stopped]])
        step = last_step(folder)
    finally:
        ranks[stopped].send_signal(signal.SIGCONT)
    ((late, _, last_words),) = ends([ranks[stopped]])
    assert step < 20, "stopped too late to test anything"
    assert code == 75, error
    first, *lines = error[error.index("error: ") :].splitlines()
    # It waits for the other one in a sum of its own, or in that of the gradients, which is part of the backward pass.
    place = r"step (\d+): (?:waiting for the other ranks|forward and backward)"
    own = re.match(rf"error: rank {1 - stopped} of 2, {place}: nothing has moved for ", first)
    assert own and int(own[1]) in (step, step + 1, step + 2), f"after step {step}: {first}"
    # What is silent was last heard a pulse ago (0.4 s here): some of these short steps back, at its start, or never.
    found = re.search(rf"rank {stopped} stands still, [a-z].* for \d+ s, silent for \d+ s; ", first)
    assert found, first
    assert [line.split(":")[0] for line in lines[:2]] == ["  rank 0", "  rank 1"], "where each rank stands"
    assert late == 75, f"the rank that was stopped ends when it wakes: {late}, {last_words}"
    (farewell,) = [line for line in last_words.splitlines() if line.startswith("error: ")]
    assert f"rank {stopped} of 2" in farewell and "the same command goes on" in farewell, farewell
    assert "Traceback (most recent call last)" not in last_words
    assert_sound(folder)
    assert checkpoint_step(folder) >= 5
    finish_ranks(start_ranks(2, "train.pretrain", *config))
    assert_equal_runs(whole_two, folder)


LONG_STEP = """
import sys, time, torch
from train.distributed import World
from train.guard import StopSignals
from train.watchdog import Watchdog
world = World(0, 1, torch.device("cpu"), 1)
with Watchdog(world, 2.0, StopSignals()):
    world.beat("step 1: forward and backward")
    time.sleep(0.5)
    print("in the middle of a step", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("suspended", [True, False])
def test_the_time_in_which_a_process_was_suspended_does_not_count(suspended):
    """A laptop's lid is closed for longer than the timeout, in the middle of a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_STEP], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "in the middle of a step\n"
    if suspended:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    if suspended:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.7)  # the watchdog looks again, and the step is not over yet
        with contextlib.suppress(BrokenPipeError):  # it ended: the exit code says why
            process.stdin.write("\n")
            process.stdin.flush()
    ((code, _, error),) = ends([process])
    assert code == (0 if suspended else 75), error


@pytest.mark.slow
def test_without_a_timeout_a_pause_of_one_rank_harms_nothing(workplace, whole_two):
    folder, config = workplace / "runs/paused", (workplace / "pretrain.yaml", "name=paused")
    ranks = start_ranks(2, "train.pretrain", *config, "train.stall_timeout=0")
    wait_for_step(5, folder, *ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(PATIENCE)
    ranks[1].send_signal(signal.SIGCONT)
    finish_ranks(ranks)
    assert_equal_runs(whole_two, folder)
