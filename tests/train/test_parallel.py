"""Promise 5: ranks x accumulation is a way to run, not another run: real gloo processes under torchrun."""

import pytest

from train.metrics import read_rows

from .conftest import run

TOLERANCE = 1e-4  # relative, over 20 steps


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]


def assert_close(one: list[float], other: list[float]) -> None:
    assert len(one) == len(other) == 20
    worst = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
    assert worst < TOLERANCE, f"losses differ by {worst:.2e}"


@pytest.mark.parametrize("level", ["sequence", "batch"])
def test_one_process_accumulating_four_equals_two_times_two(workplace, level):
    """micro_batch_size 2 of 8 rows: 1 x 4, then 2 x 2. Dropout and jitter are on: they follow the global micro-batch."""
    runs = workplace / "runs"
    for ranks in (1, 2):
        run(
            "train.pretrain", workplace / "pretrain.yaml", f"name={level}-{ranks}", f"model.aux_loss_level={level}",
            "eval.every=0", "train.checkpoint_every=0", processes=ranks,
        )  # fmt: skip
    assert_close(losses(runs / f"{level}-1"), losses(runs / f"{level}-2"))


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
    assert_close(losses(runs / "ranks-1"), losses(runs / "ranks-4"))
    held_out = [
        [row["loss"] for row in read_rows(runs / f"ranks-{ranks}/metrics.jsonl") if row["kind"] == "held_out"]
        for ranks in (1, 4)
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=TOLERANCE)


def test_global_balance_does_not_depend_on_which_rank_holds_which_rows(workplace):
    """Without accumulation: 1 process with 8 rows and 2 with 4 see the same counts, so the same balance loss."""
    runs = workplace / "runs"
    for ranks, rows in ((1, 8), (2, 4)):
        run(
            "train.pretrain", workplace / "pretrain.yaml", f"name=global-{ranks}", "model.aux_loss_level=global",
            f"train.micro_batch_size={rows}", "model.dropout=0.0", "model.router_jitter_noise=0.0",
            "eval.every=0", "train.checkpoint_every=0", processes=ranks,
        )  # fmt: skip
    assert_close(losses(runs / "global-1"), losses(runs / "global-2"))
    balance = [
        [row["balance_loss"] for row in read_rows(runs / f"global-{ranks}/metrics.jsonl") if row["kind"] == "train"]
        for ranks in (1, 2)
    ]
    assert balance[0] == pytest.approx(balance[1], rel=TOLERANCE)


def test_the_same_run_twice_gives_the_same_bits(workplace):
    runs = workplace / "runs"
    for name in ("once", "twice"):
        run(
            "train.pretrain",
            workplace / "pretrain.yaml",
            f"name={name}",
            "eval.every=0",
            "train.checkpoint_every=0",
            processes=2,
        )
    assert losses(runs / "once") == losses(runs / "twice")
