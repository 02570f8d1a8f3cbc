"""The training loop, for pretraining and fine-tuning alike: read `train` from top to bottom.

Order of a step: save? -> evaluate? -> step -> log. Which rows a step takes is a pure function of (seed, step), randomness of
(seed, step, global micro-batch), the learning rate of the step: so a checkpoint needs weights, moments and a step number,
and the same command again goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import math
import signal
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.dataset import TrainRows
from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.experts import resolve_backend
from train import checkpoint, describe, distributed
from train.config import RunConfig
from train.distributed import World
from train.guard import LateReading, StepGuard, StopSignals
from train.metrics import Reporter
from train.optim import build_optimizer, set_learning_rate, step_if
from train.plan import Plan, check_settings, make_plan
from train.precision import Autocast, autocast_for, compute_dtype, resolve_precision
from train.progress import Clock, Progress
from train.runs import RunFolder
from train.schedule import learning_rate_at
from train.validate import held_out_row, loss_that_decides, samples


def train(config: RunConfig) -> int:
    """Runs or resumes the run that `config` describes. Returns the exit code: 0 when finished, 128 + signal when stopped."""
    world = distributed.start(config.train)
    torch.use_deterministic_algorithms(config.train.deterministic)

    # Data, and what it means for the batch.
    tokenizer = Tokenizer.load(config.tokenizer.path)
    describe.check_vocabulary(config, tokenizer)
    check_settings(config, world.size, tokenizer)
    world.on_main(lambda: prepare(config.data, tokenizer))
    prepared = open_prepared(config.data, tokenizer)
    signals = StopSignals()
    masked = config.data.document_mask or config.data.format == "chat"
    rows = prepared.train_rows(config.context_length, masked, config.seed)
    plan = make_plan(config, rows.rows_per_epoch, world.size)

    # The run folder, and where we are in it.
    precision = resolve_precision(config.train.precision, world.device)
    resolved_backend = resolve_backend(config.model.expert_backend, world.device, compute_dtype(precision))
    folder = RunFolder(config)
    newest = folder.newest_checkpoint()
    config = folder.settle_config(config, newest, resolved_backend)
    world.on_main(lambda: folder.write(config, tokenizer))

    if newest is not None and folder.is_finished(newest, plan.steps, prepared):
        distributed.stop(world)
        if world.is_main:
            print(f"{folder.path}: already finished, {plan.steps} steps; nothing to do (a larger train.steps goes on)")
        return 0

    # Model and optimizer: fresh, from another run's weights, or as the newest checkpoint left them.
    torch.manual_seed(config.seed)
    model = MoEForCausalLM(config.model)
    if newest is not None:
        checkpoint.load_weights(model, newest)
    elif config.train.init_from is not None:
        checkpoint.load_weights(model, checkpoint.find_checkpoint(config.train.init_from))
    model.to(world.device)
    model.activation_checkpointing = config.train.activation_checkpointing
    model.set_count_reduction(world.sum)
    optimizer = build_optimizer(model, config.train)
    guard = StepGuard(world.device, config.train.spike_factor)
    progress = Progress()
    if newest is not None:
        checkpoint.load_optimizer(optimizer, model, newest)
        state = checkpoint.read_state(newest)
        guard.load_state(state["guard"])
        progress = Progress(**state["progress"])
    compiled = _compile(model, config, world, precision)
    parallel = _parallel(model, world)
    autocast = autocast_for(precision, world.device)

    reporter = Reporter(config, folder.path, plan.steps, progress.step, world.is_main)
    reporter.say(describe.start_text(config, plan, world, model, precision, compiled, prepared, rows, progress.step))
    if newest is not None and state["ranks"] != world.size:
        reporter.say(
            f"saved by {state['ranks']} process(es), resumed by {world.size}: equal to float tolerance, not bit for bit"
        )
    model.train()
    readings, clock = LateReading(), Clock(world.device, progress.train_seconds, progress.tokens)
    started_at, stopping, saved_step = progress.step, False, progress.step if newest is not None else None
    folder.begin_session(world, progress.step)

    def write_checkpoint() -> None:
        progress.train_seconds = clock.seconds()
        state = {"progress": dataclasses.asdict(progress), "guard": guard.state(), "ranks": world.size}
        checkpoint.save(folder.path, progress.step, model, optimizer, state, config)
        checkpoint.prune(folder.path, config.train.keep_checkpoints)

    def save() -> None:
        nonlocal saved_step
        if saved_step != progress.step:
            world.on_main(write_checkpoint)
        saved_step = progress.step

    def evaluate() -> None:
        progress.train_seconds = clock.seconds()
        row = held_out_row(model, prepared, config, world, autocast, progress)
        if world.is_main:
            for prompt, text in samples(model, tokenizer, config, autocast):
                reporter.sample(progress.step, prompt, text)
        if row is None:
            return
        reporter.log(row)
        reporter.say(describe.held_out_text(row))
        loss = loss_that_decides(row, config)
        if math.isfinite(loss) and (
            progress.best_loss is None or loss <= progress.best_loss
        ):  # equal: again after a resume
            progress.best_loss, progress.best_step = loss, progress.step
            save()  # a best step is worth a checkpoint of its own
            if world.is_main:
                checkpoint.point(folder.path, "best", checkpoint.checkpoint_name(progress.step))

    while True:
        finished = progress.step >= plan.steps
        if finished or stopping or _due(progress.step, config.train.checkpoint_every):
            with clock.paused():
                save()
        if stopping and not finished:
            break
        if finished or _due(progress.step, config.eval.every):
            with clock.paused():
                evaluate()
        if finished:
            break

        learning_rate = learning_rate_at(progress.step, plan.steps, config.train)
        set_learning_rate(optimizer, learning_rate)
        sums = train_step(
            parallel, model, optimizer, guard, rows, plan, config, world, autocast, progress.step, signals
        )
        progress.step += 1
        progress.tokens += plan.tokens_per_step

        previous = readings.push(torch.stack((sums.stop, guard.bad_in_a_row, guard.bad_total)))
        if previous is not None:
            stopping = previous[0] > 0
            _watch_bad_steps(previous[1], previous[2], progress.step - 1, progress, config, folder, reporter)
        if progress.step % config.train.log_every == 0 or progress.step == plan.steps:
            row = describe.step_row(sums, model, plan, config, world, precision, learning_rate, guard, progress, clock)
            reporter.log(row)
            reporter.say(describe.step_text(row, plan))
        reporter.progress()

    last = readings.pop()
    if last is not None and finished:
        _watch_bad_steps(last[1], last[2], progress.step, progress, config, folder, reporter)
    folder.end_session(world, started_at, progress.step, clock.seconds())
    reporter.say(
        f"finished: {plan.steps} steps, {progress.tokens:,} tokens, {clock.seconds():.0f} s of training, best at step "
        f"{progress.best_step}; run folder {folder.path}"
        if finished
        else f"stopped after step {progress.step} with a checkpoint; the same command goes on from there"
    )
    reporter.close()
    distributed.stop(world)
    return 0 if finished else 128 + (signals.received or signal.SIGTERM)


@dataclass
class StepSums:
    """A step's sums over micro-batches and ranks, on the device."""

    nats: Tensor  # () float64
    targets: Tensor  # () float64
    aux_loss: Tensor  # () float64, weighted, averaged
    norm: Tensor  # () float32, before clipping
    stop: Tensor  # () float32, above 0 if any rank was asked to stop
    routing_sums: Tensor | None  # (L, 4) float64, see MoEForCausalLM.routing_counts
    tokens_per_expert: Tensor | None  # (L, E) float64


def train_step(
    parallel: nn.Module,
    model: MoEForCausalLM,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    rows: TrainRows,
    plan: Plan,
    config: RunConfig,
    world: World,
    autocast: Autocast,
    step: int,
    signals: StopSignals,
) -> StepSums:
    """One optimizer step on rows [step * rows_per_step, (step + 1) * rows_per_step) of the endless row order.

    Minimises sum over micro-batches of loss * n_targets / (targets of the whole step) + aux_loss averaged over ranks and
    micro-batches: the same function whatever the split into ranks and micro-batches.
    """
    global_indices = [a * world.size + world.rank for a in range(plan.accumulation)]  # this rank's micro-batches
    first_row = step * plan.rows_per_step
    batches = [rows.batch(first_row + g * plan.micro_batch_size, plan.micro_batch_size) for g in global_indices]
    here = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    targets, stop = world.sum(
        _without_waiting(torch.tensor([here, signals.received], dtype=torch.float32), world.device)
    )

    optimizer.zero_grad(set_to_none=True)
    model.reset_counts()
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    aux_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for a, (g, batch) in enumerate(zip(global_indices, batches, strict=True)):
        seed_randomness(config.seed, step, g)
        last = a == plan.accumulation - 1
        with contextlib.nullcontext() if last or world.size == 1 else parallel.no_sync():
            with autocast():
                out = parallel(
                    **{key: _without_waiting(value, world.device) for key, value in batch.items()}, return_logits=False
                )
            # DDP averages gradients over ranks: `world.size` turns the mean of the first term back into a sum.
            objective = out.loss * (out.n_targets * world.size / targets) + out.aux_loss / plan.accumulation
            objective.backward()
        nats += out.loss.detach().double() * out.n_targets
        aux_loss += out.aux_loss.detach().double() / (plan.accumulation * world.size)

    sums = _sum_over_ranks(model, nats, aux_loss, world)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip or math.inf)
    accepted = guard.judge(norm, sums[0])
    step_if(optimizer, accepted)
    if sums[3] is not None:
        model.update_router_bias(sums[3], accepted)
    return StepSums(sums[0], targets.double(), sums[1], norm, stop, sums[2], sums[3])


def seed_randomness(seed: int, step: int, micro_batch: int) -> None:
    """Dropout and jitter of a micro-batch are a function of (seed, step, global micro-batch index) alone."""
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _sum_over_ranks(
    model: MoEForCausalLM, nats: Tensor, aux_loss: Tensor, world: World
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """nats, aux_loss, routing sums (L, 4) and tokens per expert (L, E), in one collective; the last two None when dense."""
    parts = [nats.view(1), aux_loss.view(1)]
    if model.gates():
        counts, sums = model.routing_counts()
        parts += [sums.double().flatten(), counts.double().flatten()]
    total = world.sum(torch.cat(parts))
    if len(parts) == 2:
        return total[0], total[1], None, None
    L = counts.shape[0]
    return total[0], total[1], total[2 : 2 + 4 * L].view(L, 4), total[2 + 4 * L :].view(L, -1)


def _without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; through pinned memory, so that the host does not wait for the device's queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _compile(model: MoEForCausalLM, config: RunConfig, world: World, precision: str) -> bool:
    """torch.compile of the layers. grouped_mm compiles in bfloat16 only, and a CPU gains little."""
    wanted = config.train.compile
    able = world.device.type == "cuda" and precision == "bfloat16" and importlib.util.find_spec("triton") is not None
    on = wanted == "on" or (wanted == "auto" and able)
    if on:
        model.compile_layers()
    return on


def _parallel(model: MoEForCausalLM, world: World) -> nn.Module:
    """DDP around the model where there are several ranks. Buffers stay local: counts are summed by hand, tables are equal."""
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    renamed = (
        "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    )  # after torch 2.11
    keep_local = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **keep_local)


def _due(step: int, every: int) -> bool:
    """Whether something done every so many steps is due after `step` of them."""
    return every > 0 and step > 0 and step % every == 0


def _watch_bad_steps(
    bad_in_a_row: float,
    bad_total: float,
    step: int,
    progress: Progress,
    config: RunConfig,
    folder: RunFolder,
    reporter: Reporter,
) -> None:
    """Says what was skipped up to `step`, and ends the run when there were too many in a row."""
    if bad_total > progress.bad_steps:
        progress.bad_steps = int(bad_total)
        reporter.say(f"step {step}: a bad step was skipped (gradient not finite, or a spike); {int(bad_total)} so far")
    if bad_in_a_row >= config.train.max_bad_steps:
        raise ValueError(
            f"{folder.path}: {int(bad_in_a_row)} steps in a row were skipped (train.max_bad_steps: {config.train.max_bad_steps}), their "
            "gradients not finite or spikes; its checkpoints are intact: look at the data, or start another run (name) with a lower "
            "train.learning_rate"
        )
