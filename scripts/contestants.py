"""What the benchmark times: sizes of models, and for each kind of work the contestants that do it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model import ModelConfig, MoEForCausalLM
from model.flops import flops_per_token, total_count
from model.generate import generate
from model.products import Linear
from scripts import peers
from train.config import TrainConfig
from train.optim import build_optimizer
from train.precision import autocast_for

TWIN, OURS, LOOP, COMPILED, TWIN_COMPILED = (
    "our dense twin", "ours", "ours, loop", "ours, compiled", "our dense twin, compiled",
)  # fmt: skip
PRODUCT = "one large product"
PROMPT, NEW_TOKENS, STREAMS = 32, 128, 8


@dataclass(frozen=True)
class Size:
    """A model and a micro-batch of rows x context tokens, which is the whole step."""

    model: ModelConfig
    rows: int
    context: int

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    def twin(self) -> ModelConfig:
        """The dense model of equal active width: every token meets as many feed-forward units."""
        model = self.model
        width = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
        return dataclasses.replace(model, n_routed_experts=0, intermediate_size=width)


def _size(rows: int, context: int, **model) -> Size:
    return Size(ModelConfig(**model, max_position_embeddings=context, use_qk_norm=True), rows, context)


_CPU = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
_GPU = {"vocab_size": 6400, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
SIZES = {
    "cpu-16": _size(
        8, 256, **_CPU, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=256, n_shared_experts=1
    ),
    "cpu-64": _size(
        8, 256, **_CPU, n_routed_experts=64, num_experts_per_tok=4, moe_intermediate_size=128, n_shared_experts=1
    ),
    "gpu-16": _size(
        64, 1024, **_GPU, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=512, n_shared_experts=1
    ),
    "gpu-64": _size(
        64, 1024, **_GPU, n_routed_experts=64, num_experts_per_tok=4, moe_intermediate_size=256, n_shared_experts=1
    ),
}


@dataclass
class Contestant:
    """`work()` processes `tokens` tokens and `flops` operations (0: not counted)."""

    name: str
    precision: str
    work: Callable[[], object]
    tokens: int
    flops: float
    trained: tuple[nn.Module, torch.optim.Optimizer] | None = None  # what `work` of a training step changes

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.precision


@dataclass(frozen=True)
class Field:
    """Who takes part: on which device, in which precision, with which peers."""

    device: torch.device
    precision: str  # float32 or bfloat16
    peers: bool
    compiled: bool
    minimind: Path | None

    def model_of(self, name: str, size: Size) -> nn.Module:
        """The contestant's model, with its own random weights, on the device."""
        torch.manual_seed(0)
        backend = "loop" if name == LOOP else "auto"
        config = size.twin() if name.startswith(TWIN) or name == peers.DENSE else size.model
        if name == peers.DENSE:
            model = peers.dense_peer(config)
        elif name == peers.MINIMIND:
            model = peers.minimind_peer(config, self.minimind)
        elif name in peers.EXPERTS.values():
            model = peers.moe_peer(config, next(key for key, label in peers.EXPERTS.items() if label == name))
        else:
            model = MoEForCausalLM(dataclasses.replace(config, expert_backend=backend))
            if name in (COMPILED, TWIN_COMPILED):
                model.to(self.device).compile_layers()
        return model.to(self.device)

    def names(self) -> list[str]:
        """The contestants, in the order of their rounds and of the table."""
        names = [TWIN, OURS, LOOP]
        names += [TWIN_COMPILED, COMPILED] if self.compiled else []
        names += [peers.DENSE, *peers.EXPERTS.values()] if self.peers else []
        return [*names, peers.MINIMIND] if self.minimind else names


def training(name: str, size: Size, field: Field) -> Contestant:
    """Forward, backward, clipping, AdamW: what a training step does, without its data."""
    model = field.model_of(name, size).train()
    optimizer = build_optimizer(model, TrainConfig(steps=1, learning_rate=1e-4))
    autocast = autocast_for(field.precision, field.device)
    ids = _ids(size, field.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = _loss(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    flops = size.tokens * flops_per_token(_shape(name, size), size.context)
    return Contestant(name, field.precision, step, size.tokens, flops, (model, optimizer))


def evaluation(name: str, size: Size, field: Field) -> Contestant:
    """The loss of the same rows, forward alone, in evaluation mode."""
    model = field.model_of(name, size).eval()
    autocast = autocast_for(field.precision, field.device)
    ids = _ids(size, field.device)

    def forward() -> None:
        with torch.inference_mode(), autocast():
            _loss(model, ids)

    return Contestant(
        name, field.precision, forward, size.tokens, size.tokens * flops_per_token(_shape(name, size), size.context) / 3
    )


BUILD = {"train": training, "evaluate": evaluation}


def generation(size: Size, field: Field) -> list[Contestant]:
    """Greedy continuation with a KV cache by ours and by transformers' `generate` on the same weights: one stream, and a
    batch of prompts of different lengths. ValueError if the two do not say the same in float32."""
    torch.manual_seed(0)
    config = dataclasses.replace(size.model, use_qk_norm=False, max_position_embeddings=PROMPT + NEW_TOKENS)
    ours = MoEForCausalLM(config).to(field.device).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.1)  # far from ties, which rounding would decide
    theirs = {label: peers.moe_peer(config, key) for key, label in peers.EXPERTS.items()} if field.peers else {}
    for model in theirs.values():
        model.to(field.device).eval()
        peers.copy_weights(ours, model)
    generator = torch.Generator().manual_seed(1)
    lengths = [PROMPT - 3 * i for i in range(STREAMS)]
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    autocast = autocast_for(field.precision, field.device)

    def by_us(prompts: list[list[int]]) -> list[list[int]]:
        with autocast():
            return generate(ours, prompts, max_new_tokens=NEW_TOKENS, temperature=0)

    def by_them(model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=field.device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=field.device)
        with torch.inference_mode(), autocast():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        return out[:, longest:].tolist()

    speakers = {OURS: by_us} | {label: functools.partial(by_them, model) for label, model in theirs.items()}
    if field.precision == "float32" and any(speak(prompts) != by_us(prompts) for speak in speakers.values()):
        raise ValueError("generation: ours and transformers' tokens differ on the same weights; that is a bug")
    return [
        Contestant(
            f"{name}, {'one stream' if count == 1 else f'{count} ragged streams'}",
            field.precision, functools.partial(speak, prompts[:count]), count * NEW_TOKENS, 0.0,
        )
        for count in (1, STREAMS)
        for name, speak in speakers.items()
    ]  # fmt: skip


def large_product(field: Field) -> Contestant:
    """A product as large as the processor likes, in the same precision: what a model's products could reach at best."""
    n = 1024 if field.device.type == "cpu" else 8192
    dtype = torch.bfloat16 if field.precision == "bfloat16" else torch.float32
    linear = Linear(n, n, bias=False).to(field.device, dtype)
    x = torch.randn(n, n, device=field.device, dtype=dtype)

    def multiply() -> None:
        with torch.inference_mode():
            linear(x)

    return Contestant(PRODUCT, field.precision, multiply, 0, 2.0 * n**3)


def _ids(size: Size, device: torch.device) -> Tensor:
    ids = torch.randint(size.model.vocab_size, (size.rows, size.context), generator=torch.Generator().manual_seed(0))
    return ids.to(device)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    if isinstance(model, MoEForCausalLM):
        out = model(ids, ids, return_logits=False)
        return out.loss + out.aux_loss
    return peers.loss_of(model, ids)


def _shape(name: str, size: Size) -> ModelConfig:
    """Whose operations count: the products of a dense contestant are the twin's."""
    return size.twin() if name.startswith(TWIN) or name == peers.DENSE else size.model


def describe(size: Size) -> str:
    """One line: sizes, parameters, operations of a trained token."""
    model, count = size.model, total_count(size.model)
    return (
        f"hidden {model.hidden_size}, {model.num_hidden_layers} layers, {model.n_routed_experts} experts of width "
        f"{model.moe_intermediate_size}, top-{model.num_experts_per_tok} + {model.n_shared_experts} shared, vocabulary "
        f"{model.vocab_size}, {size.rows} rows of {size.context} tokens; {count.total / 1e6:.1f}M parameters, "
        f"{count.active / 1e6:.1f}M active, {flops_per_token(model, size.context) / 1e9:.4f} GFLOP a trained token"
    )
