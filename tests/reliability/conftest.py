"""What the reliability tests share: the tiny but real run of tests/train, undisturbed, and how another one is compared with it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.integrity import damage
from train import checkpoint
from train.metrics import read_rows

from ..train import conftest as tiny
from ..train.conftest import ROOT, environment, run
from . import strangers

workplace = tiny.workplace  # the fixture, one for all of these tests
innocent, place = strangers.innocent, strangers.place
STARTED: list[subprocess.Popen] = []  # by the test that runs now

UNEQUAL = ("train_seconds", "tokens_per_second", "mfu", "memory_gib")  # times and memory are a machine's, not a run's
WAIT = 180  # seconds after which a test gives up waiting; long, because it measures nothing


@pytest.fixture(scope="session")
def whole(workplace) -> Path:
    """The pretraining run in one go, one process."""
    run("train.pretrain", workplace / "pretrain.yaml")
    return workplace / "runs/pre"


@pytest.fixture(scope="session")
def whole_two(workplace) -> Path:
    """The same with two processes."""
    finish_ranks(start_ranks(2, "train.pretrain", workplace / "pretrain.yaml", "name=two"))
    return workplace / "runs/two"


@pytest.fixture(scope="session")
def whole_sft(workplace, whole) -> Path:
    """The fine-tuning run in one go, one process."""
    run("train.sft", workplace / "sft.yaml")
    return workplace / "runs/sft"


@pytest.fixture(scope="session", autouse=True)
def signals_can_be_heard():
    """Processes inherit what their parent ignores, and a shell's background job ignores SIGINT: the tests send it."""

    def do_nothing(number: int, frame: object) -> None: ...

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    ignored = [number for number, handler in before.items() if handler == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, do_nothing)  # which a process started from here does not inherit
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


SLOW_DISK = r"""
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int fsync(int fd) { usleep(1000 * atoi(getenv("FSYNC_MILLISECONDS"))); return syscall(SYS_fsync, fd); }
"""


@pytest.fixture(scope="session")
def slow_disk(tmp_path_factory) -> Path:
    """A library that makes each fsync take FSYNC_MILLISECONDS, for a process that has it in LD_PRELOAD."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, which builds the slow disk of this test")
    folder = tmp_path_factory.mktemp("slow-disk")
    (folder / "slow.c").write_text(SLOW_DISK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "slow.so", folder / "slow.c"], check=True)
    return folder / "slow.so"


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A test that fails leaves no process behind."""
    STARTED.clear()
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(module: str, *arguments: object, **variables: object) -> subprocess.Popen:
    """`python -m module arguments` from the checkout's root, with `variables` in its environment."""
    return _start([module, *arguments], variables)


def start_ranks(size: int, module: str, *arguments: object, **variables: object) -> list[subprocess.Popen]:
    """`python -m module arguments` as `size` ranks without a launcher, so that each one's exit code and words are seen.

    For a launcher of ours each would be: RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m train.pretrain ...
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **variables,
    }
    return [_start([module, *arguments], {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(size)]


def start_torchrun(size: int, *options: str, module: str, arguments: tuple, **variables: object) -> subprocess.Popen:
    """torchrun with `options` of its own."""
    launcher = "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *options, "-m"
    return _start([*launcher, module, *arguments], variables)


def _start(arguments: list, variables: dict) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), **{key: str(value) for key, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def finish_ranks(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Waits for all; (0, what it printed, what it printed as an error) of each, or the test fails."""
    ended = ends(processes)
    for code, out, err in ended:
        assert code == 0, f"exit code {code}\n{out[-2000:]}\n{err[-4000:]}"
    return ended


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process; -n: killed by signal n. One that does not end is killed and fails the test."""
    ended = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"a process still ran after {WAIT} s\n{out[-2000:]}\n{err[-4000:]}")
        ended.append((process.returncode, out, err))
    return ended


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen, pause: float = 0.003) -> None:
    """Until `condition` holds; fails if a process ends before, or nothing comes."""
    deadline = time.monotonic() + WAIT
    while not condition():
        for process in processes:
            if process.poll() is not None and not condition():
                out, err = process.communicate()
                pytest.fail(f"ended early with exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}")
        assert time.monotonic() < deadline, "what the test waits for never came"
        time.sleep(pause)


def last_step(run_dir: Path) -> int:
    """The newest training step in metrics.jsonl, 0 without one."""
    return max((row["step"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"), default=0)


def wait_for_step(step: int, run_dir: Path, *processes: subprocess.Popen) -> None:
    """Until the row of `step` is written."""
    wait_until(lambda: last_step(run_dir) >= step, *processes)


def workers(torchrun: subprocess.Popen, size: int) -> list[int]:
    """Process ids of torchrun's processes, by rank."""
    found: dict[int, int] = {}

    def all_there() -> bool:
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        for pid in map(int, children):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found.update({int(each[5:]): pid for each in variables if each.startswith(b"RANK=")})
        return len(found) == size

    wait_until(all_there, torchrun, pause=0.05)
    return [found[rank] for rank in range(size)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_all(torchrun: subprocess.Popen, pids: list[int]) -> None:
    """SIGKILL for torchrun and its processes, as when a machine loses power."""
    for pid in (torchrun.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    torchrun.communicate()
    wait_until(lambda: not any(map(is_alive, pids)))


def metrics(run_dir: Path) -> dict[tuple, dict]:
    """{(kind, step): row}, without times; a step that was done again after a resume counts once, with its last row."""
    rows = {
        (row["kind"], row["step"]): {k: v for k, v in row.items() if k not in UNEQUAL}
        for row in read_rows(run_dir / "metrics.jsonl")
    }
    return dict(sorted(rows.items()))


def samples(run_dir: Path) -> dict[tuple, str]:
    return {(row["step"], row["prompt"]): row["text"] for row in read_rows(run_dir / "samples.jsonl")}


def checkpoint_step(run_dir: Path) -> int:
    """The step of the newest checkpoint by its name, 0 without one."""
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")), default=0)


def assert_equal_runs(one: Path, other: Path) -> None:
    """Logged losses, samples, weights, moments and every counter are the same bits in both."""
    ours, theirs = metrics(one), metrics(other)
    assert ours.keys() == theirs.keys(), f"other rows were logged: {ours.keys() ^ theirs.keys()}"
    unequal = [(key, name) for key in ours for name in ours[key] if ours[key][name] != theirs[key].get(name)]
    assert not unequal, f"metrics.jsonl: {unequal[:5]} differ"
    assert samples(one) == samples(other), "samples differ"
    last_one, last_other = checkpoint.find_checkpoint(one), checkpoint.find_checkpoint(other)
    assert last_one.name == last_other.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(last_one / file), load_file(last_other / file)
        assert ours.keys() == theirs.keys() and len(ours) > 5
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"{file}: {different[:5]} differ"
    states = [json.loads((path / "state.json").read_text()) for path in (last_one, last_other)]
    for state in states:
        assert state["guard"]["accepted_steps"] > 0
        del state["progress"]["train_seconds"]
    assert states[0] == states[1], "state.json differs"


def assert_same_training(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    """The same rows in the same steps, and losses equal to `tolerance` (relative): what another number of processes keeps."""
    ours, theirs = metrics(one), metrics(other)
    assert ours.keys() == theirs.keys(), f"other rows were logged: {ours.keys() ^ theirs.keys()}"
    for key, row in ours.items():
        assert row.get("rows_digest") == theirs[key].get("rows_digest"), f"{key}: other rows were read"
        assert row["loss"] == pytest.approx(theirs[key]["loss"], rel=tolerance), f"{key}: the loss differs"


def assert_sound(run_dir: Path) -> None:
    """What holds at any moment, whatever was killed: each folder step-* is whole, and `latest` and `best` name such folders."""
    folder = run_dir / "checkpoints"
    for path in folder.glob("step-*"):
        assert damage(path, checkpoint.FILES) is None, damage(path, checkpoint.FILES)
    for pointer in ("latest", "best"):
        if (folder / pointer).exists():
            name = (folder / pointer).read_text().strip()
            assert name.startswith("step-") and (folder / name).is_dir(), (
                f"{pointer} names {name!r}, which is not there"
            )


def leftovers(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob(".*"))
