"""What training shows of itself on the way: held-out loss and samples.

Losses are summed in float64, so that neither batch size nor the number of ranks shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.chat import encode_prompt
from data.dataset import HeldOutRows, Prepared
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.generate import generate
from train.config import RunConfig
from train.distributed import WAITING, World
from train.guard import StopSignals
from train.precision import Autocast
from train.progress import Progress


class HeldOutLoss(NamedTuple):
    """A source's held-out cross-entropy, as a sum, so that batches and ranks add up."""

    nats: float  # cross-entropy summed over the targets
    targets: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / max(self.targets, 1)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits for each UTF-8 byte of the text the targets spell."""
        return self.nats / math.log(2) / max(n_bytes, 1)

    def figures(self, n_bytes: int) -> dict[str, float]:
        """What metrics.jsonl and evaluation.json say of a source whose targets spell `n_bytes` bytes of UTF-8."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),  # beyond, a float overflows
            "bits_per_byte": self.bits_per_byte(n_bytes),
            "tokens": self.targets,
            "bytes": n_bytes,
        }


@torch.inference_mode()
def held_out_loss(
    model: MoEForCausalLM, batches: Iterable[dict[str, Tensor]], device: torch.device, autocast: Autocast
) -> HeldOutLoss:
    """Runs the model in eval mode (and puts its mode back) over batches as `data.dataset` yields them."""
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    targets = torch.zeros((), dtype=torch.int64, device=device)
    try:
        for batch in batches:
            with autocast():
                out = model(**{key: value.to(device) for key, value in batch.items()}, return_logits=False)
            nats += out.loss.double() * out.n_targets
            targets += out.n_targets
    finally:
        model.train(was_training)
    return HeldOutLoss(nats.item(), int(targets.item()))


def held_out_row(
    model: MoEForCausalLM,
    prepared: Prepared,
    config: RunConfig,
    world: World,
    autocast: Autocast,
    progress: Progress,
    signals: StopSignals,
) -> tuple[dict | None, bool]:
    """The held-out loss of every source, shared out over ranks, as a row of metrics.jsonl, None where nothing is held out; and
    whether it was broken off because a rank was asked to stop."""
    masked = config.data.document_mask or config.data.format == "chat"
    sources, losses = {}, {}

    def own_batches(held: HeldOutRows, name: str) -> Iterator[dict[str, Tensor]]:
        for batch in held.batches(config.eval.batch_size, world.rank, world.size):
            if signals.received:
                world.tell("stop")
            if signals.received or world.told("stop"):
                return
            world.beat(f"step {progress.step}: held-out loss of {name}")
            yield batch

    for name in prepared.names:
        held = prepared.held_out(name, config.context_length, masked)
        if config.eval.max_tokens is not None:
            held = held.subset(config.eval.max_tokens)
        if held.n_tokens == 0:
            continue
        with torch.compiler.set_stance("force_eager"):  # evaluation's many shapes are not worth compiling
            local = held_out_loss(model, own_batches(held, name), world.device, autocast)
        world.beat(f"step {progress.step}: {WAITING}")
        sums = torch.tensor([local.nats, local.targets, signals.received > 0], dtype=torch.float64, device=world.device)
        nats, targets, stop = world.sum(sums).tolist()
        if stop:
            return None, True
        losses[name] = whole = HeldOutLoss(nats, int(targets))
        sources[name] = whole.figures(held.n_bytes)
    if not losses:
        return None, False
    mean = sum(each.nats for each in losses.values()) / max(sum(each.targets for each in losses.values()), 1)
    row = {
        "kind": "held_out",
        "step": progress.step,
        "tokens": progress.tokens,
        "train_seconds": progress.train_seconds,
        "sources": sources,
        "loss": mean,
    }
    return row, False


def loss_that_decides(row: dict, config: RunConfig) -> float:
    """The loss that chooses `best`: eval.best_source's, or the mean over all held-out targets."""
    source = config.eval.best_source
    if source is None:
        return row["loss"]
    if source not in row["sources"]:
        raise ValueError(f"eval.best_source: {source!r} has no held-out text; use one of {', '.join(row['sources'])}")
    return row["sources"][source]["loss"]


def samples(
    model: MoEForCausalLM, tokenizer: Tokenizer, config: RunConfig, autocast: Autocast
) -> list[tuple[str, str]]:
    """(prompt, what the model says) for the config's prompts: text continued, or in fine-tuning a user's turn answered."""
    chat = config.data.format == "chat"
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
        if chat
        else [tokenizer.bos_id, *tokenizer.encode(prompt)]
        for prompt in config.eval.prompts
    ]
    model.eval()
    try:
        with autocast(), torch.compiler.set_stance("force_eager"):
            answers = generate(
                model, prompts, max_new_tokens=config.eval.sample_tokens, temperature=0.0 if chat else 0.7, top_p=0.9,
                stop_ids=(tokenizer.eos_id, tokenizer.im_end_id), seed=config.seed,
            )  # fmt: skip
    finally:
        model.train()
    return [(prompt, tokenizer.decode(answer)) for prompt, answer in zip(config.eval.prompts, answers, strict=True)]
