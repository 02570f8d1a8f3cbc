"""Held-out loss: summed in float64, so that neither batch size nor the number of ranks shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from model import MoEForCausalLM
from train.precision import Autocast


class HeldOutLoss(NamedTuple):
    nats: float  # cross-entropy summed over the targets
    targets: int

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / max(self.targets, 1)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits for each UTF-8 byte of the text the targets spell."""
        return self.nats / math.log(2) / max(n_bytes, 1)


@torch.inference_mode()
def held_out_loss(
    model: MoEForCausalLM, batches: Iterable[dict[str, Tensor]], device: torch.device, autocast: Autocast
) -> HeldOutLoss:
    """Runs the model in eval mode (and puts its mode back) over batches as `data.dataset` yields them."""
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    targets = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        with autocast():
            out = model(**{key: value.to(device) for key, value in batch.items()}, return_logits=False)
        nats += out.loss.double() * out.n_targets
        targets += out.n_targets
    model.train(was_training)
    return HeldOutLoss(nats.item(), int(targets.item()))
