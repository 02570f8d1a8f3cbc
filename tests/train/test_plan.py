"""A step is shared out exactly over micro-batches and processes, or the mistake says what would divide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import ModelConfig
from model.flops import total_count
from train.config import RunConfig, TrainConfig
from train.plan import check_memory, make_plan


def config_of(T: int, tokens: int, micro_batch: int, **train) -> RunConfig:
    config = RunConfig(
        train=TrainConfig(**{"steps": 1, "tokens_per_step": tokens, "micro_batch_size": micro_batch, **train})
    )
    config.data.context_length = T
    return config


@given(
    T=st.integers(2, 40),
    rows=st.integers(0, 64),
    extra=st.integers(0, 3),
    micro_batch=st.integers(1, 9),
    ranks=st.integers(1, 9),
)
def test_a_step_is_shared_out_exactly_or_refused(T, rows, extra, micro_batch, ranks):
    tokens = rows * T + extra % T
    if tokens == 0:
        return
    divides = extra % T == 0 and rows >= ranks and rows % (micro_batch * ranks) == 0
    try:
        plan = make_plan(config_of(T, tokens, micro_batch), rows_per_epoch=100, ranks=ranks)
    except ValueError as error:
        assert not divides, f"{rows} rows of {T} divide over {ranks} ranks of {micro_batch}: {error}"
        assert any(key in str(error) for key in ("train.tokens_per_step: ", "train.micro_batch_size: ")), error
    else:
        assert divides
        assert plan.micro_batch_size * plan.accumulation * ranks == plan.rows_per_step == rows
        assert plan.tokens_per_step == tokens


@pytest.mark.parametrize(
    "T, tokens, micro_batch, ranks, message",
    [
        (32, 100, 1, 1, "train.tokens_per_step: 100 is no multiple of the context length 32; use 96"),
        (32, 31, 1, 1, "train.tokens_per_step: 31 is no multiple of the context length 32; use 32"),
        (
            32,
            64,
            1,
            4,
            "torchrun: 4 processes, but train.tokens_per_step: 64 is only 2 rows of 32 tokens; start fewer processes or raise it",
        ),
        (
            32,
            256,
            1,
            3,
            "torchrun: 3 processes cannot share the 8 rows of .* evenly; start a number of processes that divides 8",
        ),
        (
            32,
            256,
            3,
            2,
            r"train.micro_batch_size: 3 does not divide the 4 rows that each of 2 process\(es\) has .*; use a divisor of 4",
        ),
    ],
)
def test_a_batch_that_does_not_divide_says_what_would(T, tokens, micro_batch, ranks, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config_of(T, tokens, micro_batch), 100, ranks)


@pytest.mark.parametrize("epochs, steps", [(1.0, 13), (0.01, 1), (2.5, 32), (4.0, 50)])
def test_epochs_are_rounded_up_to_steps(epochs, steps):
    assert make_plan(config_of(8, 64, 2, steps=None, epochs=epochs), rows_per_epoch=100, ranks=2).steps == steps


def test_more_steps_than_a_table_should_hold_are_refused():
    config = config_of(512, 512, 1, steps=None, epochs=1e5)
    with pytest.raises(ValueError, match=r"train.epochs: 100000 makes 100,000,000 steps; at most 10,000,000"):
        make_plan(config, rows_per_epoch=1000, ranks=1)


def test_a_model_that_the_machine_cannot_hold_is_refused_before_it_is_built():
    config = ModelConfig(vocab_size=2**20, hidden_size=2**14, num_attention_heads=64)
    needed = 16 * total_count(config).total
    check_memory(config, needed, 1)
    with pytest.raises(
        ValueError, match=r"model: .* parameters in 2 process\(es\) need .* GiB .*make the model smaller"
    ):
        check_memory(config, needed, 2)
