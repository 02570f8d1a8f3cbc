"""The same config and seed on the same machine give the same bits twice; what only watches a run changes none of them.

Not promised, and not tested: the same bits on another processor, with another number of threads or processes.
"""

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint

from ..train.conftest import finish, run
from .conftest import assert_equal_runs, finish_ranks, metrics, start_ranks


def test_one_process_gives_the_same_bits_twice(workplace, whole):
    """The second time with its data prepared anew, and another order of Python's sets."""
    config = workplace / "pretrain.yaml", "name=again", f"data.cache_dir={workplace / 'cache-again'}"
    [process] = start_ranks(1, "train.pretrain", *config, PYTHONHASHSEED="12345")
    finish(process)
    assert_equal_runs(whole, workplace / "runs/again")


@pytest.mark.slow
def test_two_processes_give_the_same_bits_twice(workplace, whole_two):
    finish_ranks(start_ranks(2, "train.pretrain", workplace / "pretrain.yaml", "name=two-again", PYTHONHASHSEED="7"))
    assert_equal_runs(whole_two, workplace / "runs/two-again")


@pytest.mark.slow
def test_bfloat16_gives_the_same_bits_twice(workplace):
    for name in ("bf16", "bf16-again"):
        run("train.pretrain", workplace / "pretrain.yaml", f"name={name}", "train.precision=bfloat16", "train.steps=8")
    assert_equal_runs(workplace / "runs/bf16", workplace / "runs/bf16-again")


@pytest.mark.slow
def test_saving_evaluating_and_logging_change_no_bit_of_the_training(workplace, whole):
    """How often, how and how much: checkpoints every step or none, written beside or by the training, no evaluation, no samples."""
    often = "train.checkpoint_every=1", "train.keep_checkpoints=1", "eval.every=3", "train.async_checkpoint=false"
    seldom = "train.checkpoint_every=0", "eval.every=0", "eval.prompts=[]", "train.log_every=7", "train.stall_timeout=0"
    expected = checkpoint.find_checkpoint(whole)
    for name, overrides in (("often", often), ("seldom", seldom)):
        run("train.pretrain", workplace / "pretrain.yaml", f"name={name}", *overrides)
        last = checkpoint.find_checkpoint(workplace / "runs" / name)
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = load_file(expected / file), load_file(last / file)
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], f"{name}: {file}"
        theirs = metrics(workplace / "runs" / name)
        assert all(theirs[key] == row for key, row in metrics(whole).items() if key in theirs and key[0] == "train")
