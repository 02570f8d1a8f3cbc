"""Two machines train together; one is cut off, loses power, or is told to stop: the run ends as if nothing had been.

The machines are network namespaces (machines.py). docs/several_machines.md has the commands for real ones, and its script for
SLURM runs here, with stand-ins for SLURM's commands.
"""

import contextlib
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from train import distributed

from ..train.conftest import ROOT
from .conftest import assert_equal_runs, assert_sound, checkpoint_step, last_step, wait_until
from .machines import Machine, TwoMachines, training_starts, two_machines

CONFIG = "train.steps=60", "train.checkpoint_every=10", "eval.every=30"
STALL = "train.stall_timeout=5"


@pytest.fixture(scope="module")
def network():
    with contextlib.ExitStack() as stack:
        try:
            both = stack.enter_context(two_machines())
        except OSError as error:
            pytest.skip(f"network namespaces are not to be had here: {error}")
        yield both


@pytest.fixture
def machines(network):
    """Two idle machines with a whole cable."""
    yield network
    for machine in network.both:
        machine.lose_power()
    network.mend()


@pytest.fixture(scope="module")
def undisturbed(workplace, network) -> Path:
    network.start(workplace, "machines", *CONFIG)
    finish(network)
    return workplace / "runs/machines"


def finish(machines: TwoMachines) -> None:
    """Waits until both torchruns have ended, with 0."""
    wait_until(lambda: None not in machines.codes() or any(machines.codes()), pause=0.05)
    assert machines.codes() == [0, 0], f"exit codes {machines.codes()}\n{machines.a.said()}\n{machines.b.said()}"


def wait_for_step(step: int, run_dir: Path, machines: TwoMachines) -> None:
    wait_until(lambda: last_step(run_dir) >= step or any(code is not None for code in machines.codes()))
    assert machines.codes() == [None, None], f"ended early\n{machines.a.said()}\n{machines.b.said()}"


def assert_watchdog_blames(machine: Machine, other: int) -> None:
    rank = machine.number
    line = rf"^error: rank {rank} of 2.*nothing has moved.* s \(train\.stall_timeout: 5\).*rank {other} stands still"
    assert re.search(line, machine.said(), re.MULTILINE), machine.said()


@pytest.mark.slow
def test_a_machine_cut_off_and_started_again_changes_nothing(workplace, machines, undisturbed):
    """b's scheduler ends its job and starts it anew; a's torchrun stays, starts training again and takes b in."""
    folder = workplace / "runs/cut"
    machines.start(workplace, "cut", *CONFIG, STALL, max_restarts=3)
    wait_for_step(25, folder, machines)
    machines.cut()
    wait_until(lambda: not machines.a.trains() and not machines.b.trains(), pause=0.1)
    assert_watchdog_blames(machines.a, 1)
    assert_watchdog_blames(machines.b, 0)
    assert_sound(folder)

    machines.b.lose_power()
    machines.mend()
    machines.b.start(workplace, "cut", *CONFIG, STALL, max_restarts=3)
    finish(machines)
    assert_equal_runs(undisturbed, folder)
    assert training_starts(machines.a.said()) == [0, 20], machines.a.said()


@pytest.mark.slow
def test_torchrun_in_a_loop_on_each_machine_needs_no_restarts_of_its_own(workplace, machines, undisturbed):
    """Neither torchrun restarts anything: both end, and a loop around each starts it again, whichever comes first."""
    folder = workplace / "runs/loop"
    machines.start(workplace, "loop", *CONFIG, STALL)
    wait_for_step(25, folder, machines)
    machines.cut()
    wait_until(lambda: not machines.a.processes(), pause=0.1)
    machines.a.start(workplace, "loop", *CONFIG, STALL)
    machines.mend()
    ended = []
    while machines.codes() != [0, 0]:
        wait_until(lambda: any(machines.codes()) or machines.codes() == [0, 0], pause=0.1)
        for machine in machines.both:
            if machine.torchrun.poll():
                ended.append(machine.number)
                assert len(ended) < 5, f"{machines.a.said()}\n{machines.b.said()}"
                machine.start(workplace, "loop", *CONFIG, STALL)
    assert_equal_runs(undisturbed, folder)
    assert training_starts(machines.a.said()) == [0, 20], machines.a.said()


@pytest.mark.slow
def test_a_cable_that_comes_back_in_time_is_waited_for(workplace, machines, undisturbed):
    """Shorter than train.stall_timeout: nothing ends, no step is done again."""
    folder = workplace / "runs/wait"
    machines.start(workplace, "wait", *CONFIG, "train.stall_timeout=60")
    wait_for_step(25, folder, machines)
    machines.cut()
    time.sleep(1.5)
    stood_at = last_step(folder)
    machines.mend()
    finish(machines)
    assert_equal_runs(undisturbed, folder)
    assert training_starts(machines.a.said()) == [0] and stood_at < 60


@pytest.mark.slow
def test_a_warning_to_every_torchrun_saves_once_and_the_same_commands_go_on(workplace, machines, undisturbed):
    """SIGUSR1, as SLURM sends it before the time is up; restarts are allowed, and torchrun makes none."""
    folder = workplace / "runs/warned"
    machines.start(workplace, "warned", *CONFIG, max_restarts=3)
    wait_for_step(22, folder, machines)
    for machine in machines.both:
        machine.torchrun.send_signal(signal.SIGUSR1)
    wait_until(lambda: None not in machines.codes(), pause=0.05)
    assert machines.codes() == [1, 1], "torchrun's code for a signal; docs/several_machines.md says so"
    assert not machines.a.processes() and not machines.b.processes()
    stopped = checkpoint_step(folder)
    assert 22 <= stopped < 30 and f"stopped after step {stopped} with a checkpoint" in machines.a.said(), (
        machines.a.said()
    )

    machines.start(workplace, "warned", *CONFIG)
    finish(machines)
    assert_equal_runs(undisturbed, folder)
    assert training_starts(machines.a.said()) == [0, stopped]


@pytest.mark.slow
def test_a_machine_whose_name_is_127_0_0_1_is_told_how_to_say_its_address(workplace, machines):
    """On the machine that cannot reach the other; that one waits."""
    machines.start(workplace, "loopback", *CONFIG, interface="lo")
    wait_until(lambda: any(machines.codes()), pause=0.05)
    said = machines.a.said() + machines.b.said()
    assert re.search(r"^error: rank \d of 2: .*set GLOO_SOCKET_IFNAME", said, re.MULTILINE), said
    assert re.search(r"exitcode +: 2 ", said), said
    assert not (workplace / "runs/loopback").exists()


def in_threads(*jobs) -> list:
    """What the jobs return, done at the same time."""
    results = [None] * len(jobs)

    def work(index: int) -> None:
        results[index] = jobs[index]()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_processes_started_again_find_no_key_of_those_before_them():
    """torchrun keeps one store for all its restarts: of three ranks one is new twice, before the others have come."""
    store = dist.HashStore()
    first = in_threads(*(lambda rank=rank: distributed._roll_call(store, rank, 3) for rank in range(3)))
    store.set("word of 1", "of a process that was started and died before the others came")
    second = in_threads(*(lambda rank=rank: distributed._roll_call(store, rank, 3) for rank in (2, 0, 1)))
    assert len(set(first)) == 1 and len(set(second)) == 1, "the ranks of one start do not agree"
    assert first[0] != second[0], "the second start reads the keys of the first"


def slurm_script() -> str:
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL) if "#SBATCH" in block]
    return script


DOCS = ROOT / "docs/several_machines.md"
SRUN = """#!/bin/bash
# Stands for training: the Nth call does what the Nth word of PLAN says.
call=$(($(cat calls 2> /dev/null || echo 0) + 1)); echo $call > calls; echo "$@" > command
word=$(echo $PLAN | cut -d " " -f $call)
mkdir -p runs/night/checkpoints
case $word in
    finishes) exit 0 ;;
    fails) exit 1 ;;
    saves-and-fails) echo step-0000000$call > runs/night/checkpoints/latest; exit 1 ;;
    is-warned) trap 'echo warned > warned; sleep 0.3; exit 1' USR1; kill -USR1 $PPID; for i in {1..400}; do sleep 0.05; done ;;
esac
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo "first-machine" && exit
echo "$@" >> requeued
"""


@pytest.mark.parametrize(
    "plan, calls, code, requeued",
    [
        ("finishes", 1, 0, False),
        ("saves-and-fails saves-and-fails saves-and-fails finishes", 4, 0, False),
        ("fails fails fails fails", 3, 1, False),
        ("saves-and-fails is-warned", 2, 0, True),
    ],
)
def test_the_slurm_script_goes_on_gives_up_and_queues_again(tmp_path, plan, calls, code, requeued):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", slurm_script())):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin", "PLAN": plan, "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", commands / "job"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "calls").read_text().strip() == str(calls), done.stderr
    assert done.returncode == code, done.stderr
    assert (tmp_path / "warned").exists() == ("is-warned" in plan), "srun did not get the warning"
    assert (tmp_path / "requeued").exists() == requeued
    assert "--nnodes=2" in (command := (tmp_path / "command").read_text()) and "first-machine:29400" in command
