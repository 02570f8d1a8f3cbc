"""Promise 5: ranks x accumulation is a way to run, not another run: real gloo processes under torchrun.

Runs that change their number of processes on the way, and the same bits twice: tests/reliability.
"""

from pathlib import Path

import pytest

from train.metrics import read_rows

from .conftest import run

TOLERANCE = 1e-4  # relative, over 20 steps


def rows(folder: Path, kind: str = "train") -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def assert_same_training(one: Path, other: Path) -> None:
    """The same rows in each of 20 steps, and losses that differ by rounding alone."""
    ours, theirs = rows(one), rows(other)
    assert len(ours) == len(theirs) == 20
    assert [row["rows_digest"] for row in ours] == [row["rows_digest"] for row in theirs], "other rows were read"
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(ours, theirs, strict=True))
    assert worst < TOLERANCE, f"losses differ by {worst:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["sequence", pytest.param("batch", marks=pytest.mark.slow)])
def test_one_process_accumulating_four_equals_two_times_two(workplace, level):
    """micro_batch_size 2 of 8 rows: 1 x 4, then 2 x 2. Dropout and jitter are on: they follow the global micro-batch."""
    runs = workplace / "runs"
    for ranks in (1, 2):
        run(
            "train.pretrain", workplace / "pretrain.yaml", f"name={level}-{ranks}", f"model.aux_loss_level={level}",
            "eval.every=0", "eval.prompts=[]", "train.checkpoint_every=0", processes=ranks,
        )  # fmt: skip
    assert_same_training(runs / f"{level}-1", runs / f"{level}-2")


@pytest.mark.slow
def test_four_processes_equal_one(workplace):
    runs = workplace / "runs"
    for ranks in (1, 4):
        run(
            "train.pretrain",
            workplace / "pretrain.yaml",
            f"name=ranks-{ranks}",
            "train.checkpoint_every=0",
            processes=ranks,
        )
    assert_same_training(runs / "ranks-1", runs / "ranks-4")
    held_out = [[row["loss"] for row in rows(runs / f"ranks-{ranks}", "held_out")] for ranks in (1, 4)]
    assert len(held_out[0]) == 2 and held_out[0] == pytest.approx(held_out[1], rel=TOLERANCE)


@pytest.mark.slow
def test_global_balance_does_not_depend_on_which_rank_holds_which_rows(workplace):
    """Without accumulation: 1 process with 8 rows and 2 with 4 see the same counts, so the same balance loss."""
    runs = workplace / "runs"
    for ranks, micro_batch in ((1, 8), (2, 4)):
        run(
            "train.pretrain", workplace / "pretrain.yaml", f"name=global-{ranks}", "model.aux_loss_level=global",
            f"train.micro_batch_size={micro_batch}", "model.dropout=0.0", "model.router_jitter_noise=0.0",
            "eval.every=0", "eval.prompts=[]", "train.checkpoint_every=0", processes=ranks,
        )  # fmt: skip
    assert_same_training(runs / "global-1", runs / "global-2")
    balance = [[row["balance_loss"] for row in rows(runs / f"global-{ranks}")] for ranks in (1, 2)]
    assert balance[0] == pytest.approx(balance[1], rel=TOLERANCE)
