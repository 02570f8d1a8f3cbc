"""AdamW with the groups that matter: matrices decay, norms and biases do not, the router has its own learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101). Each group carries `lr_multiplier`; `set_learning_rate` applies it."""
    router, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        group = router if name.endswith("mlp.gate.weight") else matrices if parameter.dim() >= 2 else vectors
        group.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_multiplier": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_multiplier": 1.0},
        {"params": router, "weight_decay": 0.0, "lr_multiplier": config.router_lr_multiplier},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


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
    """The optimizer's state as NAME/KEY tensors: exp_avg, exp_avg_sq, step of each parameter. Empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def expected_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors with the names, shapes and types of `state_tensors` after the first step (and no memory of their own)."""
    return {
        f"{name}/{key}": torch.empty(parameter.shape if key != "step" else (), dtype=torch.float32, device="meta")
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The reverse of `state_tensors`. ValueError, naming the tensor, if one is missing or has another shape."""
    if not tensors:
        return  # saved before the first step
    for key, expected in expected_state(model).items():
        found = tensors.get(key)
        if found is None or found.shape != expected.shape:
            there = "absent" if found is None else f"of shape {tuple(found.shape)}"
            raise ValueError(
                f"optimizer state: {key} is {there}, wanted {tuple(expected.shape)}; use another checkpoint"
            )
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            optimizer.state[parameter][key] = tensors[f"{name}/{key}"].to(parameter.device)
