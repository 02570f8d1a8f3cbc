"""The learning rate: continuous, at the peak after the warm-up, at its end value at the end, whatever the settings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config import TrainConfig
from train.schedule import learning_rate_at, learning_rate_table

SCHEDULES = ("cosine", "linear", "wsd", "constant")
STEPS = 400


def curve(steps: int = STEPS, **settings) -> list[float]:
    config = TrainConfig(steps=steps, learning_rate=2.0, **settings)
    return [learning_rate_at(step, steps, config) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule):
    rates = curve(schedule=schedule, warmup_steps=40)
    assert rates[:40] == pytest.approx([2.0 * (i + 1) / 40 for i in range(40)])
    assert rates[40] == max(rates) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_end_is_the_given_fraction_of_the_peak(schedule):
    assert curve(schedule=schedule, min_learning_rate=0.1)[-1] == pytest.approx(0.2)
    assert curve(schedule=schedule, min_learning_rate=0.0)[-1] == pytest.approx(0.0)


def test_half_way_cosine_and_linear_are_half_way_down():
    for schedule in ("cosine", "linear"):
        assert curve(schedule=schedule, min_learning_rate=0.5)[STEPS // 2] == pytest.approx(1.5)


def test_wsd_holds_the_peak_and_falls_over_the_last_fraction():
    rates = curve(schedule="wsd", decay_fraction=0.25, min_learning_rate=0.0)
    assert set(rates[:301]) == {2.0}
    assert rates[301:] == pytest.approx([2.0 * (100 - i) / 100 for i in range(1, 101)])


def test_constant_stays():
    assert set(curve(schedule="constant")) == {2.0}


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 350),
    decay_fraction=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_after_the_warm_up_it_never_rises_never_jumps_and_stays_within_bounds(
    schedule, steps, warmup_steps, decay_fraction, low
):
    rates = curve(
        steps, schedule=schedule, warmup_steps=warmup_steps, decay_fraction=decay_fraction, min_learning_rate=low
    )
    lowest = min(2.0 * low, 2.0 / max(warmup_steps, 1))
    assert all(lowest - 1e-12 <= rate <= 2.0 + 1e-12 for rate in rates)
    after = rates[warmup_steps:-1]  # steps that are taken; at the end a fall over no steps at all may remain
    falls = [a - b for a, b in zip(after, after[1:])]
    span = (
        max(min(round(steps * decay_fraction), steps - warmup_steps), 1)
        if schedule == "wsd"
        else max(steps - warmup_steps, 1)
    )
    steepest = 2.0 * (1 - low) * 1.6 / span  # a cosine's slope is pi / 2 of a line's
    assert all(-1e-12 <= fall <= steepest + 1e-12 for fall in falls), (
        f"jumps of up to {max(falls)}, at most {steepest} expected"
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_devices_table_holds_the_rate_of_every_step(schedule):
    config = TrainConfig(steps=STEPS, learning_rate=3e-4, schedule=schedule, warmup_steps=7, min_learning_rate=0.1)
    table = learning_rate_table(STEPS, config, torch.device("cpu"))
    assert table.shape == (STEPS,) and table.dtype == torch.float64
    expected = torch.tensor([learning_rate_at(step, STEPS, config) for step in range(STEPS)], dtype=torch.float64)
    assert torch.equal(table, expected)
