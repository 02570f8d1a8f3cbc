"""The optimizers' groups and state, and the step that is left undone without the host knowing."""

import math

import pytest
import torch
from torch import nn

from model import ModelConfig, MoEForCausalLM
from train.config import TrainConfig
from train.optim import (
    build_optimizer,
    expected_state,
    load_state_tensors,
    set_learning_rate,
    state_tensors,
    step_if,
)


def tiny_model(**settings) -> MoEForCausalLM:
    """Every kind of parameter: router, stacked and shared experts, norms, QK-norms, biases, a head of its own."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 8,
    }
    extras = {
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "router_bias_update_rate": 0.001,
    }
    return MoEForCausalLM(ModelConfig(**{**shape, **extras, **settings}))


both_optimizers = pytest.mark.parametrize("kind", ["adamw", "muon"])


def settings(**values) -> TrainConfig:
    return TrainConfig(
        **{"steps": 1, "learning_rate": 0.01, "weight_decay": 0.5, "router_lr_multiplier": 3.0, **values}
    )


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def everything(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of weights, moments and step counts."""
    tensors = {**dict(model.named_parameters()), **state_tensors(optimizer, model)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{different[:4]} differ"


def test_only_matrices_decay_and_only_the_router_has_its_own_rate():
    model = tiny_model()
    optimizer = build_optimizer(model, settings())
    set_learning_rate(optimizer, 0.02)
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(group_of) == len(list(model.parameters())), "a parameter is in no group, or in two"
    kinds = {"router": 0, "vector": 0, "matrix": 0}
    for name, parameter in model.named_parameters():
        kind = (
            "router"
            if name.endswith("gate.weight")
            else "vector"
            if "norm" in name or name.endswith("bias")
            else "matrix"
        )
        kinds[kind] += 1
        group = group_of[parameter]
        assert group["weight_decay"] == (0.5 if kind == "matrix" else 0.0), f"{name} is a {kind}"
        assert group["lr"] == pytest.approx(0.06 if kind == "router" else 0.02), f"{name} is a {kind}"
    assert kinds["router"] == 2 and min(kinds.values()) > 1, kinds


@both_optimizers
def test_a_decay_of_their_own_is_for_routed_experts_alone(kind):
    model = tiny_model(first_k_dense_replace=1, shared_expert_gate=True)
    plain = build_optimizer(model, settings(optimizer=kind))
    optimizer = build_optimizer(model, settings(optimizer=kind, expert_weight_decay=0.0))
    decay, before = (
        {p: group["weight_decay"] for group in each.param_groups for p in group["params"]}
        for each in (optimizer, plain)
    )
    changed = {name for name, p in model.named_parameters() if decay[p] != before[p]}
    assert changed == {"layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"}
    assert all(decay[p] == 0.0 for name, p in model.named_parameters() if name in changed)


def test_a_dense_model_has_no_router_group():
    groups = build_optimizer(tiny_model(n_routed_experts=0), settings()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_an_accepted_step_is_a_plain_adamw_step():
    ours, plain = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours, settings())
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in plain.named_parameters() if p.dim() >= 2 and "gate.weight" not in n], "weight_decay": 0.5},
            {"params": [p for n, p in plain.named_parameters() if p.dim() < 2], "weight_decay": 0.0},
            {"params": [p for n, p in plain.named_parameters() if "gate.weight" in n], "weight_decay": 0.0, "lr": 0.03},
        ],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    set_learning_rate(optimizer, 0.01)
    for step in range(4):
        fill_gradients(ours, step)
        fill_gradients(plain, step)
        step_if(optimizer, torch.tensor(True))
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@both_optimizers
@pytest.mark.parametrize("gradient", [1.0, math.nan, math.inf])
def test_a_refused_step_leaves_weights_moments_and_counts_bit_for_bit(kind, gradient):
    model = tiny_model()
    optimizer = build_optimizer(model, settings(optimizer=kind))
    fill_gradients(model, 0)
    step_if(optimizer, torch.tensor(True))
    before = everything(optimizer, model)
    assert any(name.endswith("/step") for name in before)
    for parameter in model.parameters():
        parameter.grad.fill_(gradient)
    step_if(optimizer, torch.tensor(False))
    assert_same_bits(everything(optimizer, model), before)


@both_optimizers
def test_steps_after_a_refused_one_are_as_if_it_had_never_been(kind):
    one, other = tiny_model(), tiny_model()
    optimizers = build_optimizer(one, settings(optimizer=kind)), build_optimizer(other, settings(optimizer=kind))
    for verdicts, model, optimizer in (((True, False, True), one, optimizers[0]), ((True, True), other, optimizers[1])):
        for seed, accepted in zip(range(3) if len(verdicts) == 3 else (0, 2), verdicts):
            fill_gradients(model, seed)
            step_if(optimizer, torch.tensor(accepted))
    assert_same_bits(everything(optimizers[0], one), everything(optimizers[1], other))


@both_optimizers
def test_a_refused_first_step_leaves_empty_moments(kind):
    model = tiny_model()
    optimizer = build_optimizer(model, settings(optimizer=kind))
    fill_gradients(model, 0)
    step_if(optimizer, torch.tensor(False))
    assert all(not tensor.any() for tensor in state_tensors(optimizer, model).values())


@both_optimizers
def test_state_goes_through_tensors_and_back_bit_for_bit(kind):
    model, copy = tiny_model(), tiny_model()
    optimizer, restored = (
        build_optimizer(model, settings(optimizer=kind)),
        build_optimizer(copy, settings(optimizer=kind)),
    )
    assert state_tensors(optimizer, model) == {}
    for step in range(2):
        fill_gradients(model, step)
        step_if(optimizer, torch.tensor(True))
    copy.load_state_dict(model.state_dict())
    load_state_tensors(
        restored, copy, {name: tensor.clone() for name, tensor in state_tensors(optimizer, model).items()}
    )
    for each, its_optimizer in ((model, optimizer), (copy, restored)):
        fill_gradients(each, 9)
        step_if(its_optimizer, torch.tensor(True))
    assert_same_bits(everything(restored, copy), everything(optimizer, model))


@both_optimizers
def test_a_learning_rate_on_the_device_steps_as_the_same_number_on_the_host(kind):
    """The loop looks it up on the device, where alone it is known how many steps were taken."""
    one, other = tiny_model(), tiny_model()
    optimizers = build_optimizer(one, settings(optimizer=kind)), build_optimizer(other, settings(optimizer=kind))
    rates = torch.tensor([0.01, 0.004, 0.0])
    for step in range(3):
        for model, optimizer, rate in ((one, optimizers[0], rates[step]), (other, optimizers[1], rates[step].item())):
            set_learning_rate(optimizer, rate)
            fill_gradients(model, step)
            step_if(optimizer, torch.tensor(True))
    for (name, ours), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@both_optimizers
def test_what_is_expected_of_a_saved_state_is_what_a_step_leaves(kind):
    model = tiny_model()
    optimizer = build_optimizer(model, settings(optimizer=kind))
    fill_gradients(model, 0)
    step_if(optimizer, torch.tensor(True))
    found, expected = state_tensors(optimizer, model), expected_state(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(found[key].shape == expected[key].shape and found[key].dtype == expected[key].dtype for key in found)


@both_optimizers
@pytest.mark.parametrize("broken", ["absent", "other shape"])
def test_a_moment_that_does_not_fit_is_named_and_nothing_is_taken_over(kind, broken):
    model, copy = tiny_model(), tiny_model()
    optimizer, restored = (
        build_optimizer(model, settings(optimizer=kind)),
        build_optimizer(copy, settings(optimizer=kind)),
    )
    fill_gradients(model, 0)
    step_if(optimizer, torch.tensor(True))
    tensors = state_tensors(optimizer, model)
    name = f"layers.1.self_attn.q_proj.weight/{'exp_avg_sq' if kind == 'adamw' else 'momentum_buffer'}"
    if broken == "absent":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1]
    with pytest.raises(ValueError, match=f"{name} is .*use another checkpoint"):
        load_state_tensors(restored, copy, tensors)
    assert state_tensors(restored, copy) == {}, "half a state was taken over"
