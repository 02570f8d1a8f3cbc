"""AdamW or Muon, with the groups that matter: matrices decay, norms and biases do not, the router has its own learning rate."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.muon import Muon
from train.precision import compute_dtype, resolve_precision

NAMES = {"adamw": "AdamW", "muon": "Muon and AdamW"}  # of train.optimizer, for people
ADAMW_STATE, MUON_STATE = ("exp_avg", "exp_avg_sq", "step"), ("momentum_buffer",)  # what is kept of a parameter


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101), or Muon and AdamW. Each group carries `lr_multiplier`; `set_learning_rate` applies it."""
    parameters = defaultdict(list)
    for name, parameter in model.named_parameters():
        parameters[tuple(_settings(name, parameter, config).items())].append(parameter)
    groups = [{"params": members, **dict(settings)} for settings, members in parameters.items()]
    adamw = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adamw)
    precision = resolve_precision(config.precision, next(model.parameters()).device)
    return Muon(groups, products=compute_dtype(precision), **adamw)


def _settings(name: str, parameter: Tensor, config: TrainConfig) -> dict:
    """What a parameter's group says of it. Muon's are the matrices inside the layers: not embedding and head, whose rows are tokens,
    nor the router and the shared expert's gate, whose rows are scores of their own."""
    if name.endswith("mlp.gate.weight"):
        return {"weight_decay": 0.0, "lr_multiplier": config.router_lr_multiplier}
    if parameter.dim() < 2:
        return {"weight_decay": 0.0, "lr_multiplier": 1.0}
    own_decay = ".experts." in name and config.expert_weight_decay is not None
    settings = {"weight_decay": config.expert_weight_decay if own_decay else config.weight_decay, "lr_multiplier": 1.0}
    if config.optimizer == "muon" and name.startswith("layers.") and not name.endswith("shared_expert_gate.weight"):
        settings |= {"momentum": config.muon_momentum, "parts": 2 if name.endswith("gate_up_proj") else 1}
    return settings


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: Tensor | float) -> None:
    """Times each group's multiplier. A tensor stays on its device: nothing waits for its value."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_multiplier"]


def step_if(optimizer: torch.optim.Optimizer, accepted: Tensor) -> None:
    """optimizer.step(), left undone where `accepted` (bool scalar on the parameters' device) is False, without a host sync.

    `found_inf` is how torch's fused optimizers take torch.amp.GradScaler's verdict: moments, weights and step counts stay.
    """
    optimizer.grad_scale = None
    optimizer.found_inf = (~accepted).to(torch.float32)
    optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as NAME/KEY tensors: exp_avg, exp_avg_sq, step of each parameter of AdamW's, momentum_buffer of each of
    Muon's. Empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def expected_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors with the names, shapes and types of `state_tensors` after the first step (and no memory of their own)."""
    kept = _state_keys(optimizer)
    return {
        f"{name}/{key}": torch.empty(parameter.shape if key != "step" else (), dtype=torch.float32, device="meta")
        for name, parameter in model.named_parameters()
        for key in kept[parameter]
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The reverse of `state_tensors`. ValueError, naming the tensor, if one is missing or has another shape."""
    if not tensors:
        return  # saved before the first step
    for key, expected in expected_state(model, optimizer).items():
        found = tensors.get(key)
        if found is None or found.shape != expected.shape:
            there = "absent" if found is None else f"of shape {tuple(found.shape)}"
            raise ValueError(
                f"optimizer state: {key} is {there}, wanted {tuple(expected.shape)}; use another checkpoint"
            )
    kept = _state_keys(optimizer)
    for name, parameter in model.named_parameters():
        for key in kept[parameter]:
            optimizer.state[parameter][key] = tensors[f"{name}/{key}"].to(parameter.device)


def _state_keys(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """What the optimizer keeps of each parameter."""
    groups = [(MUON_STATE if "momentum" in group else ADAMW_STATE, group) for group in optimizer.param_groups]
    return {parameter: keys for keys, group in groups for parameter in group["params"]}
