"""Muon moves each matrix as torch's own does, and keeps every promise that AdamW keeps: resuming, ranks, memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from scripts.inspect_model import optimizer_bytes
from train import checkpoint
from train.config import RunConfig, TrainConfig
from train.muon import COEFFICIENTS, ITERATIONS, Muon, adamw_scale, orthogonalise
from train.optim import build_optimizer, expected_state, set_learning_rate, state_tensors, step_if

from ..reliability.conftest import assert_equal_runs, finish_ranks, start, start_ranks, wait_for_step
from .conftest import ROOT, environment, run
from .test_optim import fill_gradients, tiny_model

SETTINGS = {"steps": 1, "optimizer": "muon", "learning_rate": 0.01, "weight_decay": 0.3, "muon_momentum": 0.9}
KINDS = {  # one model with every kind of matrix: wide, tall and square, stacked and single, gated and plain
    "gated": {"hidden_size": 32, "moe_intermediate_size": 48, "num_key_value_heads": 1, "shared_expert_gate": True},
    "plain": {"hidden_size": 32, "moe_intermediate_size": 16, "gated_ffn": False, "first_k_dense_replace": 1},
}


def settings(**values) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **values})


def is_inner(name: str, parameter: torch.Tensor) -> bool:
    """What Muon is to move, said again in the tests' own words."""
    outside = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate")
    return parameter.dim() > 1 and not any(part in name for part in outside)


def matrices(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Each matrix of a parameter by itself: every expert's, and of `gate_up_proj` the gate's and the up half."""
    singles = list(tensor) if tensor.dim() == 3 else [tensor]
    return [part for m in singles for part in (m.chunk(2) if name.endswith("gate_up_proj") else (m,))]


# The update


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_moves_as_torchs_muon_moves_it_alone(kind):
    model, untouched = tiny_model(**KINDS[kind]), tiny_model(**KINDS[kind])
    optimizer = build_optimizer(model, settings(precision="bfloat16"))
    alone = {
        name: [nn.Parameter(m.detach().clone()) for m in matrices(name, p)]
        for name, p in model.named_parameters()
        if is_inner(name, p)
    }
    reference = torch.optim.Muon(
        [m for each in alone.values() for m in each],
        lr=0.01, weight_decay=0.3, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        fill_gradients(model, step)
        for name, p in model.named_parameters():
            for m, grad in zip(alone.get(name, ()), matrices(name, p.grad)):
                m.grad = grad.clone()
        step_if(optimizer, torch.tensor(True))
        reference.step()
    before = dict(untouched.named_parameters())
    for name, each in alone.items():
        parameter = dict(model.named_parameters())[name]
        moved = [now - then for now, then in zip(matrices(name, parameter), matrices(name, before[name]), strict=True)]
        expected = [m - then for m, then in zip(each, matrices(name, before[name]), strict=True)]
        for ours, theirs in zip(moved, expected, strict=True):
            off = (ours - theirs).norm() / theirs.norm()
            assert off < 0.01, f"{name}: the move is off by {off:.1%}, which bfloat16 does not explain"


def test_what_is_not_inside_the_layers_moves_as_with_adamw():
    ours, theirs = tiny_model(**KINDS["gated"]), tiny_model(**KINDS["gated"])
    optimizers = build_optimizer(ours, settings()), build_optimizer(theirs, settings(optimizer="adamw"))
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            fill_gradients(model, step)
            step_if(optimizer, torch.tensor(True))
    same = {name for (name, a), b in zip(ours.named_parameters(), theirs.parameters()) if torch.equal(a, b)}
    assert same == {name for name, p in ours.named_parameters() if not is_inner(name, p)}
    assert {name.split(".")[-2] for name in same} >= {"embed_tokens", "lm_head", "gate", "shared_expert_gate", "q_norm"}


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 20, 12), (4, 16, 16), (1, 1, 7)])
def test_newton_schulz_keeps_singular_vectors_and_maps_singular_values_by_its_polynomial(shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64) * 1e-3
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalise(x), u @ torch.diag_embed(s) @ vt, rtol=1e-9, atol=1e-11)


def test_a_matrix_is_orthogonalised_by_itself_whatever_lies_beside_it():
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(2))
    beside = torch.stack((x[0] * 1e4, x[1], torch.zeros(8, 6)))
    torch.testing.assert_close(orthogonalise(beside)[1], orthogonalise(x)[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(orthogonalise(beside)[0], orthogonalise(x)[0], rtol=1e-5, atol=1e-6)
    assert not orthogonalise(beside)[2].any()


@pytest.mark.parametrize("rows, columns", [(64, 64), (16, 96), (96, 16)])
def test_a_move_is_as_long_as_one_of_adamws_whatever_the_shape(rows, columns):
    """AdamW's, with gradients that are noise, has an RMS of 0.2 to 0.4 times the learning rate (Moonlight, section 2.2)."""
    x = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(3))
    move = orthogonalise(x)[0] * adamw_scale(rows, columns)
    assert 0.14 < move.square().mean().sqrt() < 0.25


def test_the_runs_precision_is_that_of_the_products():
    models = {precision: tiny_model(**KINDS["gated"]) for precision in ("float32", "bfloat16", "float32 again")}
    for precision, model in models.items():
        optimizer = build_optimizer(model, settings(precision=precision.removesuffix(" again")))
        assert isinstance(optimizer, Muon) and optimizer.products == getattr(torch, precision.removesuffix(" again"))
        fill_gradients(model, 0)
        step_if(optimizer, torch.tensor(True))
        assert all(tensor.dtype == torch.float32 for tensor in state_tensors(optimizer, model).values())
    name = "layers.0.mlp.experts.down_proj"
    one, other, again = (dict(model.named_parameters())[name] for model in models.values())
    assert torch.equal(one, again)
    assert 0 < (one - other).abs().max() < 0.01 * 0.1, "bfloat16 rounds, and does no more"


def test_an_expert_without_tokens_goes_on_along_its_momentum_and_one_that_never_had_any_only_decays():
    model = tiny_model(**KINDS["gated"])
    optimizer = build_optimizer(model, settings(precision="float32"))
    down = model.layers[0].mlp.experts.down_proj
    moves = []
    for step in range(3):
        fill_gradients(model, step)
        for parameter in model.layers[0].mlp.experts.parameters():
            parameter.grad[0] = 0.0  # expert 0 is never chosen, expert 1 in the first step alone
            if step > 0:
                parameter.grad[1] = 0.0
        before = down.detach().clone()
        step_if(optimizer, torch.tensor(True))
        moves.append(down.detach() - before * (1 - 0.01 * 0.3))
    assert all(torch.isfinite(move).all() for move in moves)
    assert all(move[0].abs().max() < 1e-7 for move in moves), "without a gradient there is nothing but decay"
    torch.testing.assert_close(moves[2][1], moves[0][1], rtol=1e-3, atol=1e-6)  # as far, and in the same direction
    assert moves[0][1].square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)


@pytest.mark.parametrize("norm, steps", [(1e-3, 230), (1.0, 370)])
def test_how_long_an_idle_expert_moves_at_full_speed(norm, steps):
    matrix, other = nn.Parameter(torch.zeros(1, 32, 64)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [matrix], "momentum": 0.95, "parts": 1, "weight_decay": 0.0}, {"params": [other]}]
    optimizer = Muon(groups, products=torch.float32, lr=1e-3)
    generator, moves = torch.Generator().manual_seed(4), []
    for step in range(60 + steps + 60):
        gradient = torch.randn(matrix.shape, generator=generator)
        matrix.grad = gradient * (norm / gradient.norm()) if step < 60 else torch.zeros_like(matrix)
        before = matrix.detach().clone()
        optimizer.step()
        moves.append((matrix.detach() - before).norm().item())
    full, *idle = moves[59:]
    assert idle[steps - 30] > 0.7 * full and idle[steps + 30] < 0.3 * full, (full, idle[steps - 30 : steps + 30 : 10])


def test_a_model_learns_with_it():
    torch.manual_seed(0)
    model = tiny_model(hidden_size=32, moe_intermediate_size=32)
    optimizer = build_optimizer(model, settings(weight_decay=0.0))
    ids = torch.randint(0, 40, (4, 32))
    losses = []
    for _ in range(40):
        out = model(ids, labels=ids, return_logits=False)
        (out.loss + out.aux_loss).backward()
        step_if(optimizer, torch.tensor(True))
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(math.log(40), rel=0.05) and losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_asks_the_device_for_no_value(optimizer):
    """On a GPU the host would wait for it. Fake tensors have no values to give."""
    with FakeTensorMode():
        model = tiny_model(**KINDS["gated"])
        stepper = build_optimizer(model, settings(optimizer=optimizer))
        with pytest.raises(DataDependentOutputException):
            torch.rand(()).item()
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            set_learning_rate(stepper, torch.rand(()))
            step_if(stepper, torch.rand(()) > 0.5)
        assert len(state_tensors(stepper, model)) >= len(list(model.parameters()))


# What is kept of it


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_what_inspect_model_says(kind):
    model = tiny_model(**KINDS[kind])
    for optimizer in ("muon", "adamw"):
        config = RunConfig(model=model.config, train=settings(optimizer=optimizer))
        kept = expected_state(model, build_optimizer(model, config.train))
        assert optimizer_bytes(config) == sum(
            4 * tensor.numel() for name, tensor in kept.items() if "/step" not in name
        )


@pytest.mark.parametrize("saved, wanted", [("adamw", "muon"), ("muon", "adamw")])
def test_the_other_optimizers_checkpoint_is_refused_in_a_sentence(saved, wanted, tmp_path):
    model = tiny_model()
    config = RunConfig(model=model.config, train=settings(optimizer=saved))
    optimizer = build_optimizer(model, config.train)
    fill_gradients(model, 0)
    step_if(optimizer, torch.tensor(True))
    folder = checkpoint.save(tmp_path / "run", 1, model, optimizer, {}, config)
    checkpoint.load_optimizer(build_optimizer(model, config.train), model, folder)
    other = build_optimizer(model, settings(optimizer=wanted))
    with pytest.raises(ValueError, match=r"optimizer.safetensors: layers.0.* train.optimizer that it was made with$"):
        checkpoint.load_optimizer(other, model, folder)
    assert state_tensors(other, model) == {}


# Whole runs


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(workplace):
    config = workplace / "pretrain.yaml", "train.optimizer=muon", "model.zero_init_output=true"
    run("train.pretrain", *config, "name=muon-whole")
    process = start("train.pretrain", *config, "name=muon-killed")
    wait_for_step(11, workplace / "runs/muon-killed", process)
    process.kill()
    process.communicate()
    assert "resumed at step" in run("train.pretrain", *config, "name=muon-killed")
    assert_equal_runs(workplace / "runs/muon-whole", workplace / "runs/muon-killed")
    refused = subprocess.run(
        [sys.executable, "-m", "train.pretrain", *map(str, config), "name=muon-whole", "train.optimizer=adamw"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "train.optimizer: 'adamw', but the run" in refused.stderr


RANK = """
import hashlib, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.train.test_optim import tiny_model
from train.config import TrainConfig
from train.optim import build_optimizer, state_tensors, step_if
dist.init_process_group("gloo")
model = tiny_model(n_routed_experts=16)
optimizer = build_optimizer(model, TrainConfig(steps=1, learning_rate=0.01, optimizer="muon"))
parallel = DistributedDataParallel(model)
for step in range(4):
    torch.manual_seed(10 * step + dist.get_rank())
    ids = torch.randint(0, 40, (1, 4))
    out = parallel(ids, labels=ids, return_logits=False)
    (out.loss + out.aux_loss).backward()
    idle = sum(int((layer.mlp.experts.down_proj.grad.flatten(1).abs().sum(1) == 0).sum()) for layer in model.layers)
    assert idle > 0, "every expert had a token: nothing is tested"
    step_if(optimizer, torch.tensor(step != 2))
    optimizer.zero_grad()
tensors = {**model.state_dict(), **state_tensors(optimizer, model)}
print("digest", hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest())
"""


@pytest.mark.slow
def test_ranks_with_other_rows_and_idle_experts_keep_equal_weights_and_moments(tmp_path):
    (tmp_path / "muon_rank.py").write_text(RANK, encoding="utf-8")
    ended = finish_ranks(start_ranks(2, "muon_rank", PYTHONPATH=f"{ROOT}:{tmp_path}"))
    digests = {line for _, out, _ in ended for line in out.splitlines() if line.startswith("digest")}
    assert len(digests) == 1, f"the ranks drifted apart: {digests}"


@pytest.mark.slow
def test_two_processes_train_as_one_does(workplace):
    """Rounding is all that differs, and Muon makes more of it than AdamW: it lifts singular values that are small."""
    losses = []
    for ranks in (1, 2):
        name = f"muon-ranks-{ranks}"
        run(
            "train.pretrain", workplace / "pretrain.yaml", f"name={name}", "train.optimizer=muon", "eval.every=0",
            "eval.prompts=[]", "train.checkpoint_every=0", processes=ranks,
        )  # fmt: skip
        rows = [json.loads(line) for line in Path(workplace, "runs", name, "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-3)
