"""Small configurations, and models whose weights are large enough that a wrong term shows in the logits."""

import pytest
import torch
from torch import nn

from model import ModelConfig, MoEForCausalLM, products

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}


def _tiny_config(**changes) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


@torch.no_grad()
def _enlarge(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every matrix ~ N(0, 1/columns), router and embedding ~ N(0, 1), norms around 1, biases ~ N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            noise = 0.1 * noise
        elif "embed" not in name and not name.endswith("gate.weight") and name != "weight":
            noise = noise / parameter.shape[-1] ** 0.5
        parameter.copy_(noise)
    return module


def _tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> MoEForCausalLM:
    return _enlarge(MoEForCausalLM(_tiny_config(**changes)), seed).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """tiny_config(**changes) -> ModelConfig."""
    return _tiny_config


@pytest.fixture
def enlarge():
    """enlarge(module, seed=0) -> the module, with weights that make every part matter."""
    return _enlarge


@pytest.fixture
def tiny_model():
    """tiny_model(seed=0, dtype=torch.float32, **config changes) -> MoEForCausalLM in training mode, weights enlarged."""
    return _tiny_model


@pytest.fixture
def random_ids():
    """random_ids(B, T, seed=0, vocab_size=61) -> (B, T) int64."""

    def make(B: int, T: int, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
        return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request, monkeypatch) -> str:
    """Runs the test with each library that may multiply float32 matrices, and names it."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "float32_library", lambda: request.param)
    return request.param
