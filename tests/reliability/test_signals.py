"""Signals: all ranks finish the step, save once and leave with a documented exit code; a second signal leaves at once."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.prepare import open_prepared
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from train import checkpoint
from train.config import load_config
from train.distributed import World
from train.precision import autocast_for
from train.progress import Progress
from train.validate import held_out_row

from ..train.conftest import ROOT, environment, run
from .conftest import (
    assert_equal_runs,
    assert_sound,
    checkpoint_step,
    ends,
    finish_ranks,
    is_alive,
    last_step,
    metrics,
    start,
    start_ranks,
    start_torchrun,
    wait_for_step,
    wait_until,
    workers,
)

LONG = "train.steps=3000", "train.checkpoint_every=0", "train.log_every=1"  # never finished by the time of the signal
SLOW_STEP = (
    "train.tokens_per_step=262144",
    "train.steps=3",
    "train.checkpoint_every=0",
)  # a step of half a minute or more


def assert_saved_once(run_dir: Path) -> int:
    """One checkpoint, of the last step that was logged. Returns the step."""
    assert_sound(run_dir)
    found = checkpoint.complete_checkpoints(run_dir)
    assert [checkpoint.read_state(path)["step"] for path in found] == [last_step(run_dir)]
    assert checkpoint.pointed(run_dir, "latest") == found[0]
    return last_step(run_dir)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(workplace, whole):
    config, folder = (workplace / "pretrain.yaml", "name=asked"), workplace / "runs/asked"
    process = start("train.pretrain", *config, "train.checkpoint_every=0")
    wait_for_step(2, folder, process)
    process.send_signal(signal.SIGTERM)
    [(code, out, err)] = ends([process])
    assert code == 143, f"{code}: {out}{err}"
    assert "the same command goes on" in out and "Traceback" not in err
    assert assert_saved_once(folder) < 20, "the signal came too late to test anything"
    run("train.pretrain", *config)
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_a_signal_before_the_first_step_changes_nothing(workplace, whole):
    config, folder = (workplace / "pretrain.yaml", "name=asked-early"), workplace / "runs/asked-early"
    process = start("train.pretrain", *config)
    wait_until(lambda: (folder / ".lock").exists(), process)
    process.send_signal(signal.SIGTERM)
    [(code, out, err)] = ends([process])
    assert code == 143 and last_step(folder) == 0, f"{code}: {out}{err}"
    run("train.pretrain", *config)
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_each_signal_saves_once_and_has_its_exit_code(workplace):
    numbers = (
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
    )  # the last: what SLURM's --signal sends before the time is up
    config = workplace / "pretrain.yaml", *LONG, "eval.every=0"
    processes = [start("train.pretrain", *config, f"name=asked-{number.name}") for number in numbers]
    for number, process in zip(numbers, processes, strict=True):
        wait_for_step(2, workplace / f"runs/asked-{number.name}", process)
        process.send_signal(number)
    for number, (code, out, err) in zip(numbers, ends(processes), strict=True):
        assert code == 128 + number and "Traceback" not in err, f"{number.name}: {code}: {out}{err}"
        assert assert_saved_once(workplace / f"runs/asked-{number.name}") < 3000


@pytest.mark.parametrize(
    "rank, name",
    [
        (1, "SIGTERM"),
        pytest.param(0, "SIGINT", marks=pytest.mark.slow),
        pytest.param(1, "SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all(workplace, rank, name):
    run_name = f"asked-{name}-{rank}"
    folder, number = workplace / "runs" / run_name, signal.Signals[name]
    ranks = start_ranks(2, "train.pretrain", workplace / "pretrain.yaml", f"name={run_name}", *LONG, "eval.every=0")
    wait_for_step(2, folder, *ranks)
    ranks[rank].send_signal(number)
    ended = ends(ranks)
    codes = [code for code, _, _ in ended]
    assert codes[rank] == 128 + number and codes[1 - rank] == 143, f"exit codes {codes}\n{ended}"
    for _, _, err in ended:
        assert "Traceback" not in err, err
    assert assert_saved_once(folder) < 3000


@pytest.mark.slow
def test_the_step_that_runs_is_the_last_one(workplace):
    """Steps may take long, and torchrun waits 30 s at most. A signal in step n + 1 is heard before step n + 2."""
    folder = workplace / "runs/last"
    config = (
        "name=last",
        "train.tokens_per_step=8192",
        "train.steps=50",
        "train.checkpoint_every=0",
        "eval.every=0",
    )
    ranks = start_ranks(2, "train.pretrain", workplace / "pretrain.yaml", *config)
    wait_for_step(2, folder, *ranks)
    step = last_step(folder)
    ranks[-1].send_signal(signal.SIGTERM)
    ends(ranks)
    assert assert_saved_once(folder) - step <= 1, "it went on for more than the step that ran"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_signal_to_torchrun_ends_in_one_save_and_the_same_command_goes_on(workplace, whole_two, name):
    """SIGTERM (and SIGINT) torchrun passes on. Of a SIGKILL, or a signal that it does not handle, its processes learn from the
    kernel: they save and leave, and the lock goes with them."""
    config, folder = (workplace / "pretrain.yaml", f"name=torchrun-{name}"), workplace / f"runs/torchrun-{name}"
    torchrun = start_torchrun(2, module="train.pretrain", arguments=(*config, "train.checkpoint_every=0"))
    wait_for_step(4, folder, torchrun)
    pids = workers(torchrun, 2)
    torchrun.send_signal(signal.Signals[name])
    [(code, _, _)] = ends([torchrun])
    wait_until(lambda: not any(map(is_alive, pids)))
    assert code != 0, "a scheduler would take the run for finished"
    assert assert_saved_once(folder) < 20, "stopped too late to test anything"
    finish_ranks(start_ranks(2, "train.pretrain", *config))
    assert_equal_runs(whole_two, folder)


def training_has_begun(run_dir: Path) -> bool:
    return (run_dir / "run.json").is_file() and bool(json.loads((run_dir / "run.json").read_text())["sessions"])


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(workplace):
    """In the middle of a step that would take long: nothing is saved, and the process is ended by the signal itself."""
    folder = workplace / "runs/twice-asked"
    process = start("train.pretrain", workplace / "pretrain.yaml", "name=twice-asked", *SLOW_STEP)
    wait_until(lambda: training_has_begun(folder), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)  # two signals within a second count as one
    assert process.poll() is None, "one signal alone ended it in the middle of a step"
    process.send_signal(signal.SIGTERM)
    [(code, _, _)] = ends([process])
    assert code == -signal.SIGTERM and last_step(folder) == checkpoint_step(folder) == 0


@pytest.mark.slow
def test_two_signals_within_a_second_are_one(workplace):
    """A Ctrl-C often comes twice: from the terminal, and passed on by the launcher."""
    folder = workplace / "runs/asked-in-a-row"
    process = start("train.pretrain", workplace / "pretrain.yaml", "name=asked-in-a-row", *LONG, "eval.every=0")
    wait_for_step(1, folder, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    [(code, _, err)] = ends([process])
    assert code == 130, err
    assert_saved_once(folder)


@pytest.mark.slow
def test_a_signal_to_one_rank_breaks_off_the_evaluation_of_all(workplace):
    """A thousand forward passes of held-out rows after step 2; the signal comes in their midst, and no loss of a part is logged.
    The same command evaluates anew, and ends as an undisturbed run."""
    run_name = "evaluating"
    folder = workplace / "runs" / run_name
    config = (
        workplace / "pretrain.yaml", "data.held_out_fraction=0.5", "eval.max_tokens=null", "eval.every=2", "eval.prompts=[]",
        "train.steps=3", "train.checkpoint_every=0",
    )  # fmt: skip
    one_at_a_time = *config, f"name={run_name}", "eval.batch_size=1"
    ranks = start_ranks(2, "train.pretrain", *one_at_a_time)
    wait_for_step(2, folder, *ranks)
    time.sleep(0.3)
    ranks[-1].send_signal(signal.SIGTERM)
    for code, _, err in ends(ranks):
        assert code == 143, err
        assert "Traceback" not in err, err
    assert list(metrics(folder)) == [("train", 1), ("train", 2)], (
        "the evaluation was logged: it had ended before the signal"
    )
    assert assert_saved_once(folder) == 2
    finish_ranks(start_ranks(2, "train.pretrain", *config, f"name={run_name}"))
    finish_ranks(start_ranks(2, "train.pretrain", *config, f"name={run_name}-whole"))
    assert_equal_runs(workplace / f"runs/{run_name}-whole", folder)


@pytest.mark.parametrize("asked", ["this rank", "another rank"])
def test_an_evaluation_ends_with_the_batch_at_which_the_signal_comes(workplace, whole, asked):
    config = load_config(workplace / "pretrain.yaml", ["eval.batch_size=1"])
    prepared = open_prepared(config.data, Tokenizer.load(config.tokenizer.path))
    model = MoEForCausalLM(config.model)
    signals, world, calls = SimpleNamespace(received=0), World(device=torch.device("cpu")), []

    def forward(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3 and asked == "this rank":
            signals.received = signal.SIGTERM

    model.register_forward_pre_hook(forward)
    world.told = lambda word: asked == "another rank" and len(calls) >= 3
    world.sum = lambda tensor: torch.cat((tensor[:2], torch.ones(1))) if asked == "another rank" else tensor
    row, broken_off = held_out_row(
        model, prepared, config, world, autocast_for("float32", world.device), Progress(), signals
    )
    assert row is None and broken_off and len(calls) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nohup") is None, reason="no nohup command here")
def test_under_nohup_a_closed_terminal_changes_nothing(workplace, whole):
    config, folder = (workplace / "pretrain.yaml", "name=nohup"), workplace / "runs/nohup"
    plain = start("train.pretrain", "--help")
    plain.communicate()
    process = subprocess.Popen(
        ["nohup", *plain.args[:-2], "train.pretrain", *map(str, config)],
        cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(3, folder, process)
    process.send_signal(signal.SIGHUP)
    [(code, _, err)] = ends([process])
    assert code == 0, err
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_on_a_slow_disk_no_rank_leaves_before_the_last_checkpoint_is_written(workplace, slow_disk):
    """torchrun ends all processes as soon as one has left: that must not hit rank 0 while it writes, here for seconds."""
    folder = workplace / "runs/slow-disk"
    config = workplace / "pretrain.yaml", "name=slow-disk", *LONG, "eval.every=0"
    ranks = start_ranks(2, "train.pretrain", *config, LD_PRELOAD=slow_disk, FSYNC_MILLISECONDS=400)
    wait_for_step(2, folder, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    ends([ranks[1]])
    assert time.monotonic() - began > 2.0, "the disk was not slow: this test shows nothing"
    assert checkpoint_step(folder) > 0, "rank 1 left while rank 0 was writing"
    ends([ranks[0]])
    assert assert_saved_once(folder) < 3000
