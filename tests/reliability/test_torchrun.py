"""torchrun as the engine: when a rank is lost the others say so and end, and --max-restarts goes on from the newest checkpoint."""

import contextlib
import os
import re
import signal

import pytest

from data.tokenizer import Tokenizer
from train import runs
from train.config import load_config
from train.runs import RunFolder

from ..train.conftest import run
from .conftest import (
    assert_equal_runs,
    assert_sound,
    checkpoint_step,
    ends,
    is_alive,
    start,
    start_ranks,
    start_torchrun,
    wait_for_step,
    wait_until,
    workers,
)

UNFINISHED = 75
LONG = (
    "train.steps=3000",
    "train.checkpoint_every=5",
    "eval.every=0",
    "train.stall_timeout=0",
)  # no watchdog comes to help


def assert_says_why(rank: int, size: int, end: tuple[int, str, str]) -> None:
    """Exit code 75 and one line that names the rank, the step and the remedy."""
    code, out, err = end
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == UNFINISHED, f"exit code {code}\n{out[-1000:]}\n{err[-3000:]}"
    assert len(errors) == 1 and "Traceback" not in err, err
    assert re.match(rf"error: rank {rank} of {size}, step \d+: ", errors[0]), errors[0]
    assert "lost" in errors[0] and "the same command goes on" in errors[0], errors[0]


@pytest.mark.parametrize("size, killed", [(2, 1), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_when_a_rank_is_killed_the_others_say_so_and_end(workplace, size, killed):
    """Rank 0 is also the one that holds the store of the rendezvous here."""
    name = f"lost-{killed}-of-{size}"
    folder = workplace / "runs" / name
    ranks = start_ranks(size, "train.pretrain", workplace / "pretrain.yaml", f"name={name}", *LONG)
    wait_for_step(6, folder, *ranks)
    ranks[killed].kill()
    for rank, end in enumerate(ends(ranks)):
        if rank != killed:
            assert_says_why(rank, size, end)
    assert_sound(folder)
    assert checkpoint_step(folder) >= 5


@pytest.mark.slow
def test_rank_0_killed_while_it_prepares_the_data_ends_the_other(workplace):
    """A long text is prepared for the first time; rank 1 waits for it."""
    killed = 0
    text, name = workplace / f"long-{killed}.jsonl", f"preparing-{killed}"
    text.write_text((workplace / "text.jsonl").read_text(encoding="utf-8") * 60, encoding="utf-8")
    cache = workplace / f"cache-{killed}"
    source = f"data.sources=[{{name: long, kind: jsonl, path: {text}}}]"
    config = (
        workplace / "pretrain.yaml",
        f"name={name}",
        source,
        f"data.cache_dir={cache}",
        "train.steps=1",
        "eval.prompts=[]",
    )
    ranks = start_ranks(2, "train.pretrain", *config)
    wait_until(lambda: cache.is_dir() and any(cache.rglob("*.bin")), *ranks)
    ranks[killed].kill()
    code, out, err = ends(ranks)[1 - killed]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == UNFINISHED and len(errors) == 1 and "Traceback" not in err, f"{code}\n{out[-1000:]}\n{err[-3000:]}"


@pytest.mark.slow
def test_torchrun_without_restarts_ends_when_a_rank_is_killed(workplace):
    """Not with exit code 0, no process left, and with a line from the rank that lost its peer."""
    folder = workplace / "runs/torchrun-lost"
    config = workplace / "pretrain.yaml", "name=torchrun-lost", *LONG
    torchrun = start_torchrun(2, module="train.pretrain", arguments=config)
    wait_for_step(6, folder, torchrun)
    pids = workers(torchrun, 2)
    os.kill(pids[1], signal.SIGKILL)
    [(code, _, err)] = ends([torchrun])
    assert code not in (0, None) and not any(map(is_alive, pids))
    ours = [line for line in err.splitlines() if re.search(r"error: rank 0 of 2, .*the same command goes on", line)]
    assert len(ours) == 1, err[-4000:]
    assert_sound(folder)
    assert checkpoint_step(folder) >= 5


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_ends_equal_to_an_undisturbed_one(workplace, whole_two):
    """Each rank is killed once; nobody types the command again."""
    config, folder = (workplace / "pretrain.yaml", "name=restarted"), workplace / "runs/restarted"
    torchrun = start_torchrun(2, "--max-restarts=2", module="train.pretrain", arguments=config)
    wait_for_step(6, folder, torchrun)
    first = workers(torchrun, 2)
    os.kill(first[1], signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, first)))
    wait_for_step(12, folder, torchrun)
    second = workers(torchrun, 2)
    assert not set(first) & set(second)
    os.kill(second[0], signal.SIGKILL)
    [(code, out, err)] = ends([torchrun])
    assert code == 0, f"exit code {code}\n{out[-2000:]}\n{err[-4000:]}"
    assert out.count("resumed at step") == 2, "not both kills led to a restart from a checkpoint"
    assert_equal_runs(whole_two, folder)


def test_a_run_that_another_process_holds_is_refused(workplace, whole, monkeypatch):
    """The lock alone; the test below with two commands waits for the lock's patience."""
    config = load_config(workplace / "pretrain.yaml")
    tokenizer = Tokenizer.load(config.tokenizer.path)
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0)
    with contextlib.closing(RunFolder(config)) as first, contextlib.closing(RunFolder(config)) as second:
        first.claim(tokenizer)
        with pytest.raises(ValueError, match=rf"another training \(process {os.getpid()}\) is writing this run"):
            second.claim(tokenizer)
    with contextlib.closing(RunFolder(config)) as third:
        third.claim(tokenizer)


@pytest.mark.slow
def test_a_second_training_of_a_running_run_is_refused(workplace):
    """By two processes, on a second machine say: both leave, one says why, and the running one goes on undisturbed."""
    config, folder = (workplace / "pretrain.yaml", "name=running", *LONG), workplace / "runs/running"
    running = start("train.pretrain", *config)
    wait_for_step(1, folder, running)
    first, second = ends(start_ranks(2, "train.pretrain", *config))
    assert first[0] == second[0] == 2, (first, second)
    assert first[2].count("error: ") == 1 and str(folder) in first[2] and "is writing this run" in first[2], first[2]
    assert "error: " not in second[2] and "Traceback" not in first[2] + second[2], second[2]
    log = folder / "log.txt"
    assert log.read_text().count("run        ") == 1, "the second one wrote into it"
    assert running.poll() is None, "the first one was ended by the second"
    running.kill()
    running.communicate()
    process = start("train.pretrain", *config)  # a lock of a killed process holds nobody up
    wait_until(lambda: log.read_text().count("run        ") == 2, process)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_running_run_can_be_looked_at(workplace):
    """Its newest checkpoint is opened while newer ones are written and older ones removed."""
    config, folder = (
        (workplace / "pretrain.yaml", "name=watched", *LONG, "train.checkpoint_every=2"),
        workplace / "runs/watched",
    )
    running = start("train.pretrain", *config)
    wait_until(lambda: checkpoint_step(folder) > 0, running)
    run("eval.evaluate", folder, "--json", workplace / "watched.json")
    assert running.poll() is None
    running.kill()
    running.communicate()
