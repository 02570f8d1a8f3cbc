"""What the loop does with micro-batches, bad steps, other settings and mistakes; runs here are real, in this process."""

import math
import signal

import pytest
import torch
from safetensors.torch import load_file

from train import checkpoint, loop, step
from train.config import load_config
from train.metrics import read_rows

QUICK = ("eval.every=0", "eval.prompts=[]", "eval.max_tokens=200", "train.checkpoint_every=0", "train.steps=6")


@pytest.fixture
def train(workplace):
    """train(name, *overrides) -> (exit code, rows of metrics.jsonl, log.txt) of a run of pretrain.yaml in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name: str, *overrides: str):
        code = loop.train(load_config(workplace / "pretrain.yaml", [f"name={name}", *QUICK, *overrides]))
        folder = workplace / "runs" / name
        return (
            code,
            [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"],
            (folder / "log.txt").read_text("utf-8"),
        )

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_randomness_follows_seed_step_and_micro_batch_alone():
    def draw(*key):
        step.seed_randomness(*key)
        return torch.rand(3).tolist()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 11), (0, 11, 1), (2**32 - 1, 10**6, 4096)]
    draws = [draw(*key) for key in keys]
    assert draws == [draw(*key) for key in keys]
    assert len({tuple(values) for values in draws}) == len(keys)


def test_how_a_step_is_cut_into_micro_batches_does_not_show(train):
    """With dropout and jitter off: those follow the micro-batch."""
    rows = {
        size: train(
            f"micro-{size}", f"train.micro_batch_size={size}", "model.dropout=0.0", "model.router_jitter_noise=0.0"
        )[1]
        for size in (1, 8)
    }
    for key in ("loss", "grad_norm", "balance_loss", "z_loss", "aux_loss"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[8]], rel=1e-4), key
    assert [row["routing"]["load"] for row in rows[1]][0] == rows[8][0]["routing"]["load"]


def test_activation_checkpointing_changes_memory_alone(train):
    plain, recomputed = (
        train(f"recompute-{on}", f"train.activation_checkpointing={on}", "train.steps=3")[1] for on in ("false", "true")
    )
    for key in ("loss", "grad_norm", "routing"):
        assert [row[key] for row in plain] == [row[key] for row in recomputed], key


# Bad steps


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): in these steps (from 0) one gradient of the run is not a number."""

    def prepare(bad_steps):
        real_build, real_seed, now = loop.build_optimizer, step.seed_randomness, [0]

        def build(model, config):
            weight = model.get_parameter("layers.0.self_attn.q_proj.weight")
            weight.register_hook(lambda gradient: gradient * math.nan if now[0] in bad_steps else gradient)
            return real_build(model, config)

        def seed(seed, step, micro_batch):
            now[0] = step
            real_seed(seed, step, micro_batch)

        monkeypatch.setattr(loop, "build_optimizer", build)
        monkeypatch.setattr(step, "seed_randomness", seed)

    return prepare


def test_a_step_whose_gradient_is_not_a_number_is_skipped_and_the_run_goes_on(train, poison, workplace):
    poison({2})
    code, rows, log = train("poisoned")
    assert code == 0 and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["grad_norm"] is None and all(math.isfinite(row["loss"]) for row in rows)
    assert (
        log.count("skipped") == 1
        and "step 3: skipped, loss" in log
        and "gradient norm nan is not finite, 1 in a row" in log
    )
    newest = checkpoint.find_checkpoint(workplace / "runs/poisoned")
    state = checkpoint.read_state(newest)
    assert (
        state["guard"]["bad_total"] == 1
        and state["guard"]["accepted_steps"] == 5
        and state["guard"]["bad_in_a_row"] == 0
    )
    steps = [
        value.item() for name, value in load_file(newest / "optimizer.safetensors").items() if name.endswith("/step")
    ]
    assert set(steps) == {5.0}, "the skipped step was counted by the optimizer"


def test_a_skipped_step_changes_no_weight(train, poison, workplace):
    """Six steps with the last one bad leave the same weights and router biases as five."""
    train("five", "train.steps=5", "train.schedule=constant")
    poison({5})
    train("six", "train.schedule=constant")
    five, six = (
        load_file(checkpoint.find_checkpoint(workplace / "runs" / name) / "model.safetensors")
        for name in ("five", "six")
    )
    different = [name for name in five if not torch.equal(five[name], six[name])]
    assert not different, different


def test_too_many_bad_steps_in_a_row_end_the_run_with_its_checkpoints_intact(train, poison, workplace):
    poison({3, 4, 5, 6, 7})
    with pytest.raises(
        ValueError,
        match=r"runs/hopeless: 3 steps in a row were skipped, the last of them step 6 \(train.max_bad_steps: 3\)",
    ) as error:
        train("hopeless", "train.max_bad_steps=3", "train.checkpoint_every=2", "train.steps=9")
    sentence = str(error.value)
    assert "\n" not in sentence and "its checkpoints are intact" in sentence and "start another run (name)" in sentence
    assert [path.name for path in checkpoint.complete_checkpoints(workplace / "runs/hopeless")] == [
        "step-00000002",
        "step-00000004",
    ]


def test_bad_steps_here_and_there_do_not_end_it(train, poison):
    poison({0, 2, 3, 5})
    code, rows, _ = train("stumbling", "train.max_bad_steps=3")
    assert code == 0 and rows[-1]["skipped_steps"] == 4


# Mistakes are seen before the data is prepared


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.micro_batch_size=3"], "train.micro_batch_size: 3 does not divide the 8 rows"),
        (["eval.best_source=topicz"], "eval.best_source: 'topicz' is no source of this config; use one of topics"),
        (["train.init_from=runs/nowhere"], "runs/nowhere: is not there; give a run folder"),
        (["model.vocab_size=300"], "model.vocab_size: 300 is less than the 384 tokens of"),
    ],
)
def test_mistakes_are_seen_before_hours_of_preparing(train, workplace, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train("mistaken", f"data.cache_dir={tmp_path / 'cache'}", *overrides)
    assert not (tmp_path / "cache").exists() and not (workplace / "runs/mistaken").exists()


def test_a_run_goes_on_with_other_free_settings_and_refuses_the_rest_by_name(train, workplace):
    train("settled", "train.steps=2")
    for override, message in (
        (
            "train.learning_rate=0.5",
            "train.learning_rate: 0.5, but the run in .*settled was started with 0.003; give the run another name",
        ),
        ("seed=8", "seed: 8, but the run in .* was started with 7"),
        ("model.dropout=0.0", "model.dropout: 0.0, but the run in .* was started with 0.1"),
        ("data.held_out_fraction=0.2", "data.held_out_fraction: 0.2, but .* was started with 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            train("settled", override, f"data.cache_dir={workplace / 'cache2'}")
    code, rows, log = train("settled", "train.steps=4", "train.log_every=2", "train.micro_batch_size=4")
    assert code == 0 and [row["step"] for row in rows] == [1, 2, 4] and "resumed at step 2" in log
