"""What only shows in a long run: memory, files kept, files appended to; and a clock that jumps about."""

import json
import os
import pty
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train import checkpoint
from train.metrics import read_rows

from ..train.conftest import ROOT, environment, run, start
from .conftest import (
    UNEQUAL,
    WAIT,
    assert_equal_runs,
    checkpoint_step,
    ends,
    last_step,
    leftovers,
    wait_for_step,
    wait_until,
)

STEPS = 5000
WARM = 0.4  # of the steps: 10 evaluations and 40 checkpoints, after which the memory that the first ones freed is used again
GROWTH = 0.01  # largest growth of memory from then on; measured up to step 14,000: 0.1 %


def status_of(pid: int) -> dict[str, int] | None:
    """KiB of resident memory, open files and threads of a process; None when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Threads"))}
        return {
            "rss": int(found["VmRSS"]),
            "threads": int(found["Threads"]),
            "files": len(os.listdir(f"/proc/{pid}/fd")),
        }
    except (OSError, KeyError):
        return None


@pytest.fixture(scope="module")
def long_run(workplace) -> tuple[Path, list[tuple[int, dict]], list[str]]:
    """5,000 steps of the smallest model, watched while it runs: the run folder, [(step, memory, files, threads)], and what was
    wrong with metrics.jsonl on the way."""
    tree = {
        "base": "pretrain.yaml", "name": "long-run",
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "moe_intermediate_size": 16, "dropout": 0.0},
        "data": {"context_length": 16},
        "train": {
            "steps": STEPS, "tokens_per_step": 32, "micro_batch_size": 2, "warmup_steps": 100, "log_every": 10, "checkpoint_every": 50,
            "keep_checkpoints": 3, "keep_every": 1000,
        },
        "eval": {"every": 200, "max_tokens": 500, "prompts": ["The class"], "sample_tokens": 4},
    }  # fmt: skip
    (workplace / "long.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    folder = workplace / "runs/long-run"
    command = [sys.executable, "-m", "train.pretrain", str(workplace / "long.yaml")]
    with open(workplace / "long.out", "w") as out:  # a pipe that nobody reads would stop it after 64 KiB
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT)
    file = folder / "metrics.jsonl"
    wait_until(lambda: file.is_file() and file.stat().st_size > 0, process)
    inode, seen, samples, wrong = file.stat().st_ino, b"", [], []
    while process.poll() is None:
        now = file.read_bytes()
        if not now.startswith(seen):
            wrong.append(f"what was written changed, or became shorter, after {len(seen)} bytes")
        if file.stat().st_ino != inode:
            wrong.append("the file was replaced by another one")
        seen = now
        last = json.loads(now.splitlines()[-2]) if now.count(b"\n") > 1 else {"step": 0}
        if (status := status_of(process.pid)) is not None:
            samples.append((last["step"], status))
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0, (workplace / "long.out").read_text()[-3000:]
    return folder, samples, wrong


@pytest.mark.slow
def test_memory_open_files_and_threads_stay_flat_over_5000_steps(long_run):
    folder, samples, _ = long_run
    early = [status for step, status in samples if WARM * STEPS <= step <= (WARM + 0.15) * STEPS]
    late = [status for step, status in samples if step >= 0.85 * STEPS]
    assert len(early) >= 5 and len(late) >= 5, "too few samples to say anything"
    medians = [statistics.median(status["rss"] for status in group) for group in (early, late)]
    assert medians[1] <= medians[0] * (1 + GROWTH), f"resident memory grew from {medians[0]} to {medians[1]} KiB"
    for kind in ("threads", "files"):
        usual = [statistics.median(status[kind] for status in group) for group in (early, late)]
        assert usual[1] <= usual[0], f"ever more {kind}: {usual[0]}, then {usual[1]}"
    peak = {row["step"]: row["memory_gib"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"}
    settled = peak[int(WARM * STEPS)]
    assert peak[STEPS] <= settled * (1 + GROWTH), f"peak memory grew from {settled} to {peak[STEPS]} GiB"


@pytest.mark.slow
def test_metrics_are_appended_to_and_never_rewritten(long_run):
    folder, samples, wrong = long_run
    assert not wrong, wrong[:3]
    assert len({step for step, _ in samples}) > 10, "looked at too rarely to say anything"
    rows = [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert rows == list(range(10, STEPS + 1, 10))


@pytest.mark.slow
def test_the_newest_the_best_and_those_of_every_so_many_steps_are_kept_and_no_others(long_run):
    folder, _, _ = long_run
    held_out = {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "held_out"}
    best = min(held_out, key=lambda step: (held_out[step], -step))  # of equal ones the newest
    assert checkpoint.pointed(folder, "best").name == checkpoint.checkpoint_name(best)
    before = min((step for step in held_out if step < STEPS), key=lambda step: (held_out[step], -step))
    kept = {int(path.name[5:]) for path in checkpoint.complete_checkpoints(folder)}
    wanted = {best, 1000, 2000, 3000, 4000, STEPS - 100, STEPS - 50, STEPS}
    assert wanted <= kept <= wanted | {before}, "the best before this one goes with the next save"
    assert not leftovers(folder)


@pytest.mark.slow
def test_a_resume_appends_to_the_same_metrics(workplace, whole):
    folder = workplace / "runs/appended"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step-00000020")
    before, inode = (folder / "metrics.jsonl").read_bytes(), (folder / "metrics.jsonl").stat().st_ino
    run("train.pretrain", workplace / "pretrain.yaml", "name=appended")
    assert (folder / "metrics.jsonl").stat().st_ino == inode
    after = (folder / "metrics.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    assert_equal_runs(whole, folder)


# Whoever looked at the run goes away: a terminal, or the program that its output went to.


@pytest.mark.slow
def test_a_closed_terminal_makes_the_run_save_and_leave(workplace, whole):
    """Its first sign may be a line that cannot be printed any more, not the signal."""
    folder, config = workplace / "runs/hung-up", (str(workplace / "pretrain.yaml"), "name=hung-up")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(
            sys.executable, [sys.executable, "-m", "train.pretrain", *config, "train.checkpoint_every=0"], environment()
        )
    wait_until(lambda: last_step(folder) >= 5 or not os.read(terminal, 10_000))
    os.close(terminal)  # the kernel sends SIGHUP; what is printed from now on is an error
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert 5 <= checkpoint_step(folder) < 20, "nothing was saved, or the terminal was closed too late"
    run("train.pretrain", *config)
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_goes_on(workplace, whole):
    """`python -m train.pretrain ... | head`, or an ssh connection that breaks: log.txt has every line."""
    folder, config = workplace / "runs/unheard", (workplace / "pretrain.yaml", "name=unheard")
    process = start("train.pretrain", *config)
    wait_for_step(3, folder, process)
    process.stdout.close()
    process.stdout = None
    error = process.stderr.read()
    assert process.wait(WAIT) == 0, error
    assert "Traceback" not in error and "Exception ignored" not in error, error
    assert_equal_runs(whole, folder)
    assert "finished: 20 steps" in (folder / "log.txt").read_text("utf-8")


# A clock that jumps: what is done with times must not show in a run, and durations are of a clock that only goes forward.

JUMPING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long jump(void) {  /* other seconds at each call: from -10^6 to 10^6 */
    static unsigned state = 12345;
    return (long)(rand_r(&state) % 2000001) - 1000000;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec fine;
    int result = clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec, now->tv_usec = fine.tv_nsec / 1000;
    (void)zone;
    return result;
}

time_t time(time_t *result) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (result) *result = fine.tv_sec;
    return fine.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory) -> dict[str, str]:
    """An environment in which the wall clock jumps by up to 10^6 s, forth and back, each time it is looked at."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumping.c").write_text(JUMPING)
    built = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(folder / "jumping.so"), str(folder / "jumping.c"), "-ldl"]
    subprocess.run(built, check=True, capture_output=True)
    variables = {**environment(), "LD_PRELOAD": str(folder / "jumping.so")}
    look = "import time; times = [time.time() for _ in range(9)]; print(max(times) - min(times))"
    spread = float(subprocess.run([sys.executable, "-c", look], env=variables, capture_output=True, text=True).stdout)
    assert spread > 1e5, "the clock does not jump: the test would show nothing"
    return variables


@pytest.mark.slow
def test_a_wall_clock_that_jumps_changes_nothing_but_dates(workplace, whole, jumping_clock):
    """A kill and a resume on the way; the lengths of time in every row are those of a clock that only goes forward."""
    folder, config = workplace / "runs/jumping", (str(workplace / "pretrain.yaml"), "name=jumping")
    for steps in (8, 20):  # train.steps of the first is that of the second: it is stopped by a signal
        process = subprocess.Popen(
            [sys.executable, "-m", "train.pretrain", *config, "train.stall_timeout=60"],
            cwd=ROOT, env=jumping_clock, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if steps == 8:
            wait_until(lambda: len(read_rows(folder / "metrics.jsonl")) >= steps, process)  # noqa: B023
            process.terminate()
        ((code, out, error),) = ends([process])
        assert code == (143 if steps == 8 else 0), f"{out}{error}"
    assert_equal_runs(whole, folder)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    seconds = [row["train_seconds"] for row in rows]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < WAIT, seconds
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
    assert len(speeds) >= len(rows) - 2 and all(0 < speed < 1e7 for speed in speeds), speeds
    for session in json.loads((folder / "run.json").read_text())["sessions"]:
        assert 0 < session["train_seconds"] <= session["seconds"] < WAIT, session
    assert "train_seconds" in UNEQUAL, "what is compared above leaves times out"
