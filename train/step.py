"""One optimizer step over all ranks and micro-batches: what is summed, what is judged, what the host learns of it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.dataset import TrainRows
from model import MoEForCausalLM
from train.config import RunConfig
from train.distributed import WAITING, World
from train.guard import StepGuard
from train.optim import step_if
from train.plan import Plan
from train.precision import Autocast


@dataclass
class StepVerdict:
    """What the host needs to know of a step, read from the device a step late."""

    stop: bool  # some rank was asked to stop
    failed: bool  # rank 0 could not write a checkpoint
    accepted: bool
    bad_in_a_row: int
    loss: float  # mean over the step's targets
    grad_norm: float
    mean_norm: float  # what is usual, after this step
    micro_losses: list[float]  # by global micro-batch

    @staticmethod
    def of(values: list[float]) -> StepVerdict:
        """The verdict from the numbers of `StepSums.verdict`, in their order."""
        stop, failed, accepted, bad_in_a_row, loss, grad_norm, mean_norm, *micro_losses = values
        return StepVerdict(
            stop > 0, failed > 0, accepted > 0, int(bad_in_a_row), loss, grad_norm, mean_norm, micro_losses
        )


@dataclass
class Announcement:
    """What this rank will work on in a step, and what all ranks say before it."""

    step: int  # steps done before
    batches: list[dict[str, Tensor]]  # of this rank, by its accumulation
    targets: Tensor  # () float64, of the whole step
    stop: Tensor  # () float64, above 0 if any rank was asked to stop
    failed: Tensor  # () float64, above 0 if rank 0 could not write a checkpoint
    rows_digest: Tensor  # () float64, a whole number: which rows stand at which positions

    @property
    def must_not_be_taken(self) -> bool:
        """Whether the step is to be left undone. On a GPU never: the host reads `stop` a step later, and does not wait."""
        return self.stop.device.type == "cpu" and bool(self.stop + self.failed > 0)


@dataclass
class StepSums:
    """A step's sums over micro-batches and ranks, on the device."""

    nats: Tensor  # () float64
    announced: Announcement
    aux_loss: Tensor  # () float64, weighted, averaged
    norm: Tensor  # () float32, before clipping
    accepted: Tensor  # () bool, whether the guard let the step be taken
    micro_losses: Tensor  # (accumulation * ranks,) float64, mean cross-entropy of each micro-batch
    routing_sums: Tensor | None  # (L, 4) float64, see MoEForCausalLM.routing_counts
    tokens_per_expert: Tensor | None  # (L, E) float64

    @property
    def loss(self) -> Tensor:
        """Nats per target."""
        return self.nats / self.announced.targets.clamp(min=1)

    def verdict(self, guard: StepGuard) -> Tensor:
        """The numbers of StepVerdict.of, in one tensor."""
        said = self.announced
        scalars = (said.stop, said.failed, self.accepted, guard.bad_in_a_row, self.loss, self.norm, guard.mean_norm)
        return torch.cat((torch.stack([scalar.double() for scalar in scalars]), self.micro_losses))


def announce(rows: TrainRows, plan: Plan, world: World, step: int, stop: bool, failed: bool) -> Announcement:
    """Reads this rank's rows of a step: [step * rows_per_step, (step + 1) * rows_per_step) of the endless order, micro-batch g of
    all at `g % ranks == rank`; and sums over ranks what must be known before. `stop`, `failed`: what this rank has to say."""
    world.beat(f"step {step + 1}: reading rows", beats=(step + 1) * 1_000_000)
    positions = [step * plan.rows_per_step + g * plan.micro_batch_size for g in global_micro_batches(plan, world)]
    batches = [rows.batch(position, plan.micro_batch_size) for position in positions]
    here = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    digest = sum(rows_digest(batch["input_ids"], position) for batch, position in zip(batches, positions, strict=True))
    world.beat(f"step {step + 1}: {WAITING}")
    sums = world.sum(_without_waiting(torch.tensor([here, stop, failed, digest], dtype=torch.float64), world.device))
    return Announcement(step, batches, *sums)


def global_micro_batches(plan: Plan, world: World) -> list[int]:
    """Which of the step's micro-batches are this rank's."""
    return [a * world.size + world.rank for a in range(plan.accumulation)]


def train_step(
    parallel: nn.Module,
    model: MoEForCausalLM,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    plan: Plan,
    config: RunConfig,
    world: World,
    autocast: Autocast,
    announced: Announcement,
) -> StepSums:
    """One optimizer step.

    Minimises sum over micro-batches of loss * n_targets / (targets of the whole step) + aux_loss averaged over ranks and
    micro-batches: the same function whatever the split into ranks and micro-batches.
    """
    step, targets = announced.step, announced.targets
    optimizer.zero_grad(set_to_none=True)
    model.reset_counts()
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    aux_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    micro_losses = torch.zeros(plan.accumulation * world.size, dtype=torch.float64, device=world.device)
    for a, (g, batch) in enumerate(zip(global_micro_batches(plan, world), announced.batches, strict=True)):
        world.beat(f"step {step + 1}: forward and backward")
        seed_randomness(config.seed, step, g)
        last = a == plan.accumulation - 1
        with contextlib.nullcontext() if last or world.size == 1 else parallel.no_sync():
            with autocast():
                out = parallel(
                    **{key: _without_waiting(value, world.device) for key, value in batch.items()}, return_logits=False
                )
            # DDP averages gradients over ranks: `world.size` turns the mean of the first term back into a sum.
            objective = out.loss * (out.n_targets * world.size / targets.float()) + out.aux_loss / plan.accumulation
            objective.backward()
        nats += out.loss.detach().double() * out.n_targets
        aux_loss += out.aux_loss.detach().double() / (plan.accumulation * world.size)
        micro_losses[g] = out.loss.detach()

    world.beat(f"step {step + 1}: {WAITING}")
    nats, aux_loss, micro_losses, routing_sums, tokens_per_expert = _sum_over_ranks(
        model, nats, aux_loss, micro_losses, world
    )
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip or math.inf)
    accepted = guard.judge(norm, nats)
    step_if(optimizer, accepted)
    if tokens_per_expert is not None:
        model.update_router_bias(tokens_per_expert, accepted)
    return StepSums(nats, announced, aux_loss, norm, accepted, micro_losses, routing_sums, tokens_per_expert)


def settle_buckets(parallel: nn.Module, rows: TrainRows, plan: Plan, world: World, autocast: Autocast) -> None:
    """One forward and backward pass whose gradients are thrown away.

    DDP lays its buckets out anew after the first one, and gradients are then added in another order: with three ranks or more
    the first step after a resume would differ in its last bits from the same step of a run that was not interrupted.
    """
    world.beat("trying a step")
    batch = {key: _without_waiting(value, world.device) for key, value in rows.batch(0, plan.micro_batch_size).items()}
    with autocast():
        out = parallel(**batch, return_logits=False)
    (out.loss + out.aux_loss).backward()
    parallel.zero_grad(set_to_none=True)


def rows_digest(input_ids: Tensor, position: int) -> int:
    """Which rows (B, T) stood at `position` and after it: a sum over rows, so that it adds up over micro-batches and ranks."""
    rows = input_ids.numpy()
    return sum(zlib.crc32(row.tobytes(), (position + i) & 0xFFFFFFFF) for i, row in enumerate(rows))


def seed_randomness(seed: int, step: int, micro_batch: int) -> None:
    """Dropout and jitter of a micro-batch are a function of (seed, step, global micro-batch index) alone."""
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _sum_over_ranks(
    model: MoEForCausalLM, nats: Tensor, aux_loss: Tensor, micro_losses: Tensor, world: World
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """nats, aux_loss, micro-batches' losses, routing sums (L, 4) and tokens per expert (L, E), in one collective; the last
    two None when dense."""
    parts = [nats.view(1), aux_loss.view(1), micro_losses]
    if model.gates():
        counts, sums = model.routing_counts()
        parts += [sums.double().flatten(), counts.double().flatten()]
    nats, aux_loss, micro_losses, *routing = world.sum(torch.cat(parts)).split([part.numel() for part in parts])
    if not routing:
        return nats[0], aux_loss[0], micro_losses, None, None
    return nats[0], aux_loss[0], micro_losses, routing[0].view(sums.shape), routing[1].view(counts.shape)


def _without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; through pinned memory, so that the host does not wait for the device's queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
