"""Choices of experts that the tests of experts and permutation share, and a tensor that seems to be on a GPU."""

import torch

E = 5  # experts


def random_choice(N: int, k: int, n_experts: int = E) -> torch.Tensor:
    return torch.stack([torch.randperm(n_experts)[:k] for _ in range(N)])


ROUTINGS = {
    "spread": lambda: random_choice(23, 2),
    "one token": lambda: random_choice(1, 2),
    "two tokens, most experts idle": lambda: random_choice(2, 1),
    "all to one expert, k=1": lambda: torch.full((11, 1), 3),
    "all to two experts": lambda: torch.tensor([[4, 1]]).expand(11, 2).contiguous(),
    "first and last idle": lambda: 1 + random_choice(13, 2, E - 2),
    "k=1": lambda: random_choice(23, 1),
    "k=E": lambda: random_choice(9, E),
}


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU; what is computed from it is a plain one again."""

    device = property(lambda self: torch.device("cuda"))
    __torch_function__ = torch._C._disabled_torch_function_impl
