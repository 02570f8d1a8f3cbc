"""What only shows at the edges: four ranks, a cache that is moved away, a signal in a collective, a best that is not yet known."""

import os
import shutil
import signal
import time

import pytest
import torch

from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from train import checkpoint, loop
from train.config import load_config
from train.files import replace_file
from train.metrics import Reporter, append_row, read_rows
from train.precision import autocast_for
from train.progress import Progress
from train.runs import RunFolder
from train.validate import samples

from .conftest import (
    assert_equal_runs,
    assert_sound,
    checkpoint_step,
    ends,
    finish_ranks,
    start,
    start_ranks,
    wait_for_step,
)


@pytest.mark.slow
def test_four_killed_processes_resume_bit_for_bit(workplace):
    """With three ranks and more the order of a sum depends on where a gradient lies in DDP's buckets."""
    config = workplace / "pretrain.yaml", "train.micro_batch_size=1"
    finish_ranks(start_ranks(4, "train.pretrain", *config, "name=four"))
    processes = start_ranks(4, "train.pretrain", *config, "name=four-killed")
    wait_for_step(11, workplace / "runs/four-killed", *processes)
    for process in processes:
        process.kill()
        process.communicate()
    assert 0 < checkpoint_step(workplace / "runs/four-killed") < 20, "the kill came too late to test anything"
    finish_ranks(start_ranks(4, "train.pretrain", *config, "name=four-killed"))
    assert_equal_runs(workplace / "runs/four", workplace / "runs/four-killed")


@pytest.mark.slow
def test_a_cache_that_is_moved_away_costs_no_work(workplace, tmp_path):
    cache, folder = tmp_path / "cache", workplace / "runs/moved-cache"
    process = start(
        "train.pretrain", workplace / "pretrain.yaml", "name=moved-cache", f"data.cache_dir={cache}", "train.steps=5000",
        "train.checkpoint_every=0", "eval.every=0",
    )  # fmt: skip
    wait_for_step(3, folder, process)
    cache.rename(tmp_path / "elsewhere")
    process.send_signal(signal.SIGTERM)
    [(code, out, err)] = ends([process])
    assert code == 143, f"{out[-1000:]}{err[-2000:]}"
    assert_sound(folder)


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_waits_for_a_stopped_one(workplace):
    """Its main thread sits in a collective and hears nothing."""
    processes = start_ranks(
        2,
        "train.pretrain",
        workplace / "pretrain.yaml",
        "name=asked-while-waiting",
        "train.steps=5000",
        "train.stall_timeout=0",
    )
    wait_for_step(3, workplace / "runs/asked-while-waiting", *processes)
    processes[0].send_signal(signal.SIGSTOP)
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)
    time.sleep(2)
    assert processes[1].poll() is None, "the first signal ended it"
    processes[1].send_signal(signal.SIGTERM)
    [(code, _, _)] = ends(processes[1:])
    assert code == 143
    processes[0].kill()


@pytest.mark.slow
def test_a_checkpoint_slower_than_the_patience_after_a_signal_is_still_written(workplace, slow_disk):
    """Two ranks, both asked to stop, and a disk that takes 26 s for the eight flushes of a save: nobody is lost, so nobody is hurried."""
    folder = workplace / "runs/slow-save"
    processes = start_ranks(
        2, "train.pretrain", workplace / "pretrain.yaml", "name=slow-save", "train.steps=5000", "train.checkpoint_every=0",
        "eval.every=0", LD_PRELOAD=slow_disk, FSYNC_MILLISECONDS=3300,
    )  # fmt: skip
    wait_for_step(3, folder, *processes)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    assert [code for code, _, _ in ends(processes)] == [138, 138]
    assert_sound(folder)
    assert checkpoint_step(folder) >= 3


def test_a_reader_that_has_seen_enough_is_no_error(workplace):
    """python -m scripts.inspect_model CONFIG | head -1, with a head that is already gone."""
    process = start("scripts.inspect_model", workplace / "pretrain.yaml")
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""


def test_a_sample_that_fails_leaves_the_model_in_training(workplace):
    config = load_config(workplace / "pretrain.yaml")
    config.eval.prompts = ["class " * 100]
    model = MoEForCausalLM(config.model).train()
    with pytest.raises(ValueError, match="prompt: .* tokens"):
        samples(model, Tokenizer.load(config.tokenizer.path), config, autocast_for("float32", torch.device("cpu")))
    assert model.training


def test_pruning_leaves_alone_what_another_command_is_writing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    unfinished = tmp_path / f".report.html.{os.getpid()}.partial"
    unfinished.write_text("half a report")
    checkpoint.prune(tmp_path, keep=1)
    assert unfinished.exists()
    unfinished.unlink()
    replace_file(tmp_path / "report.html", "whole")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_best_is_right_before_the_last_row_says_that_all_is_done(workplace, whole, monkeypatch):
    """A kill between the two would leave `best` as it was: the next start finds the row and does nothing."""
    pointed = []

    def log(self, row):
        if row["kind"] == "held_out" and row["step"] == 20:
            pointed.append(checkpoint.pointed(self.run_dir, "best").name)
        real(self, row)

    real = Reporter.log
    monkeypatch.setattr(Reporter, "log", log)
    assert loop.train(load_config(workplace / "pretrain.yaml", ["name=best-first"])) == 0
    assert pointed == [checkpoint.pointed(whole, "best").name]


def test_the_best_is_known_even_if_its_checkpoint_was_saved_before_it_was_judged(workplace, whole, tmp_path):
    """Resuming with another eval.every must not let a worse step become the best."""
    shutil.copytree(whole, tmp_path / "run")
    config = load_config(workplace / "pretrain.yaml", ["name=run", f"runs_dir={tmp_path}"])
    folder = RunFolder(config)
    best = int(checkpoint.pointed(folder.path, "best").name[5:])
    rows = {row["step"]: row["loss"] for row in _held_out(folder)}
    assert folder.best_so_far(Progress(best_step=10**6, best_loss=9.0), config) == (best, rows[best])
    assert folder.best_so_far(Progress(best_step=best, best_loss=9.0), config) == (best, 9.0)
    append_row(folder.path / "metrics.jsonl", {"kind": "held_out", "step": best, "loss": "none"})  # a stranger's
    assert folder.best_so_far(Progress(), config) == (best, rows[best]), "a row that is none was believed"
    (folder.path / "checkpoints/best").unlink()
    assert folder.best_so_far(Progress(best_step=best, best_loss=9.0), config)[0] == -1


def _held_out(folder: RunFolder) -> list[dict]:
    return [row for row in read_rows(folder.path / "metrics.jsonl") if row["kind"] == "held_out"]
