"""The training loop on a GPU: it never waits for the device, and a killed run goes on bit for bit. Skips itself without CUDA.

Not yet run on a GPU: no session so far was lent one.
"""

import contextlib
import signal
from pathlib import Path

import pytest
import torch

from model import ModelConfig, MoEForCausalLM
from train import checkpoint
from train.config import RunConfig, TrainConfig
from train.distributed import World
from train.guard import LateReading, StepGuard
from train.metrics import read_rows
from train.optim import build_optimizer, set_learning_rate
from train.plan import Plan
from train.schedule import learning_rate_table
from train.step import StepVerdict, announce, train_step

from ..reliability.conftest import assert_equal_runs
from ..train.conftest import run, start, workplace  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class RandomRows:
    """Rows of random tokens, the same at the same position."""

    def batch(self, position: int, n_rows: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 512, (n_rows, 64), generator=torch.Generator().manual_seed(position))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_a_step_is_judged_taken_and_reported_without_waiting_for_the_device(optimizer_name):
    shape = {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "moe_intermediate_size": 128,
        "n_routed_experts": 8, "max_position_embeddings": 64, "router_bias_update_rate": 0.001,
    }  # fmt: skip
    train = TrainConfig(steps=10, micro_batch_size=4, tokens_per_step=512, optimizer=optimizer_name)
    config = RunConfig(model=ModelConfig(**shape), train=train)
    device = torch.device("cuda", 0)
    world, plan = World(0, 1, device), Plan(64, 8, 4, 2, 10)
    model = MoEForCausalLM(config.model).to(device)
    model.set_count_reduction(world.sum)
    optimizer, guard = build_optimizer(model, config.train), StepGuard(device, 10.0)
    rates, readings = learning_rate_table(plan.steps, config.train, device), LateReading()

    def step(number: int) -> None:
        set_learning_rate(optimizer, rates.index_select(0, guard.accepted_steps.long().view(1)).squeeze(0))
        autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)  # noqa: E731
        announced = announce(RandomRows(), plan, world, number, False, False)
        sums = train_step(model, model, optimizer, guard, plan, config, world, autocast, announced)
        pushed.append(sums.verdict(guard))

    pushed: list[torch.Tensor] = []
    step(0)  # first uses of kernels and of the optimizer's state may wait
    step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert readings.push(pushed[-1]) is None
    verdict = StepVerdict.of(readings.pop())
    assert verdict.accepted and verdict.bad_in_a_row == 0 and len(verdict.micro_losses) == 2
    assert guard.accepted_steps.item() == 3


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_with_deterministic_kernels(workplace, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = workplace / "pretrain.yaml", "train.device=cuda", "train.deterministic=true", "train.precision=bfloat16"
    monkeypatch.setattr("tests.train.conftest.environment", _with_gpu)
    run("train.pretrain", *options, "name=gpu-whole")
    killed = workplace / "runs/gpu-killed"
    process = start("train.pretrain", *options, "name=gpu-killed")
    with contextlib.suppress(FileNotFoundError):
        while process.poll() is None and not any(row["step"] >= 11 for row in read_rows(killed / "metrics.jsonl")):
            pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < checkpoint.read_state(checkpoint.find_checkpoint(killed))["step"] < 20, "the kill came too late"
    run("train.pretrain", *options, "name=gpu-killed")
    assert_equal_runs(workplace / "runs/gpu-whole", killed)


def _with_gpu() -> dict:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
