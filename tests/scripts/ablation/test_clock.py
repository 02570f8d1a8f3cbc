"""The clock times what training does: its steps are the run's next ones, of the run's own rows, weights and moments."""

import pytest
import torch

from data.integrity import damage
from scripts.ablation import clock
from scripts.ablation.study import read_study
from train import checkpoint
from train.config import to_yaml
from train.distributed import World
from train.metrics import read_rows

from ...reliability.conftest import ends, start
from .conftest import EXPERTS


@pytest.mark.slow
def test_a_timed_step_is_the_step_that_training_would_take(write, place, monkeypatch):
    """Losses and gradient norms of the clock's first steps, bit for bit, are those which the run logs when it goes on."""
    variants = [
        {**EXPERTS, "set": {"train.schedule": "constant"}}
    ]  # so that the rate at the end is that of what comes after it
    [cell] = read_study(write(variants=variants, compare_with=["experts"], seeds=[1])).cells
    config = place / "cell.yaml"
    config.write_text(to_yaml(cell.config), encoding="utf-8")

    def train(*overrides: str) -> None:
        [(code, out, err)] = ends([start("train.pretrain", config, *overrides)])
        assert code == 0, out + err

    train()
    taken = []
    step = clock.train_step

    def noting(*arguments):
        sums = step(*arguments)
        taken.append(
            (sums.announced.step + 1, sums.loss.item(), sums.norm.item(), int(sums.announced.rows_digest.item()))
        )
        return sums

    monkeypatch.setattr(clock, "train_step", noting)
    torch.set_num_threads(1)
    contestant = clock._contestant(cell, World(threads=1), steps=2)
    contestant.work()
    contestant.work()
    newest = checkpoint.find_checkpoint(cell.config.run_dir)
    assert newest.name == "step-00000012" and damage(newest, checkpoint.FILES) is None, "the clock wrote into the run"
    assert contestant.tokens == 2 * 256

    train("train.steps=16")
    rows = [row for row in read_rows(cell.config.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    expected = [(row["step"], row["loss"], row["grad_norm"], row["rows_digest"]) for row in rows if row["step"] > 12]
    assert taken == expected and len(taken) == 4
