"""The training loop, for pretraining and fine-tuning alike: read `train` from top to bottom.

Order of a step: save? -> evaluate? -> step -> log. Which rows a step takes is a pure function of (seed, step), randomness of
(seed, step, global micro-batch), the learning rate of the step: so a checkpoint needs weights, moments and a step number,
and the same command again goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import signal
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.chat import encode_prompt
from data.dataset import Prepared, TrainRows
from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.experts import resolve_backend
from model.generate import generate
from train import checkpoint, describe, distributed
from train.config import RunConfig
from train.distributed import World
from train.guard import LateReading, StepGuard, StopSignals
from train.metrics import Reporter
from train.optim import build_optimizer, set_learning_rate, step_if
from train.precision import autocast_for, compute_dtype, resolve_precision
from train.runs import RunFolder
from train.schedule import learning_rate_at
from train.validate import HeldOutLoss, held_out_loss


@dataclass(frozen=True)
class Plan:
    """How a step's tokens are shared out. rows_per_step = micro_batch_size x accumulation x ranks, exactly."""

    context_length: int
    rows_per_step: int
    micro_batch_size: int
    accumulation: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.context_length


def rows_of_step(config: RunConfig, ranks: int) -> int:
    """Rows of an optimizer step. ValueError, with numbers that would work, if they cannot be divided exactly."""
    train, T = config.train, config.context_length
    rows, left = divmod(train.tokens_per_step, T)
    if left or rows == 0:
        raise ValueError(
            f"train.tokens_per_step: {train.tokens_per_step} is no multiple of the context length {T}; use {max(rows, 1) * T}"
        )
    if rows < ranks:
        raise ValueError(
            f"torchrun: {ranks} processes, but train.tokens_per_step: {train.tokens_per_step} is only {rows} rows of {T} tokens; "
            "start fewer processes or raise it"
        )
    if rows % ranks:
        raise ValueError(
            f"torchrun: {ranks} processes cannot share the {rows} rows of train.tokens_per_step: {train.tokens_per_step} evenly; "
            f"start a number of processes that divides {rows}"
        )
    if rows // ranks % train.micro_batch_size:
        raise ValueError(
            f"train.micro_batch_size: {train.micro_batch_size} does not divide the {rows // ranks} rows that each of {ranks} "
            f"process(es) has in a step of {train.tokens_per_step} tokens; use a divisor of {rows // ranks}"
        )
    return rows


def make_plan(config: RunConfig, rows_per_epoch: int, ranks: int) -> Plan:
    """The run's arithmetic. ValueError as `rows_of_step`."""
    train, rows = config.train, rows_of_step(config, ranks)
    steps = train.steps if train.steps is not None else math.ceil(train.epochs * rows_per_epoch / rows)
    return Plan(config.context_length, rows, train.micro_batch_size, rows // (train.micro_batch_size * ranks), steps)


def check_settings(config: RunConfig, ranks: int) -> None:
    """ValueError for what would stop the run later and can be seen now, before hours of preparing data."""
    rows_of_step(config, ranks)
    names = [source.name for source in config.data.sources]
    if config.eval.best_source not in (None, *names):
        raise ValueError(f"eval.best_source: {config.eval.best_source!r} is no source of this config; use one of {', '.join(names)}")
    if config.train.init_from is not None and not checkpoint.complete_checkpoints(config.run_dir):
        checkpoint.check_same_shape(config.model, checkpoint.find_checkpoint(config.train.init_from))


def train(config: RunConfig) -> int:
    """Runs or resumes the run that `config` describes. Returns the exit code: 0 when finished, 128 + signal when stopped."""
    world = distributed.start(config.train)
    torch.use_deterministic_algorithms(config.train.deterministic)
    torch.set_float32_matmul_precision("high")

    # Data, and what it means for the batch.
    tokenizer = Tokenizer.load(config.tokenizer.path)
    describe.check_vocabulary(config, tokenizer)
    check_settings(config, world.size)
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

    if newest is not None and folder.is_finished(newest, plan.steps):
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
        loss = _held_out(model, prepared, config, world, autocast, progress, clock, reporter)
        if world.is_main:
            _samples(model, tokenizer, config, autocast, progress.step, reporter)
        if progress.best_loss is None or loss <= progress.best_loss:  # equal: evaluated again after a resume
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
        sums = train_step(parallel, model, optimizer, guard, rows, plan, config, world, autocast, progress.step, signals)
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
        f"finished: {plan.steps} steps, {progress.tokens:,} tokens, {clock.seconds():.0f} s of training; run folder {folder.path}"
        if finished
        else f"stopped after step {progress.step} with a checkpoint; the same command goes on from there"
    )
    reporter.close()
    distributed.stop(world)
    return 0 if finished else 128 + (signals.received or signal.SIGTERM)


@dataclass
class Progress:
    """What a checkpoint says of the run beside weights and moments."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen, over all ranks
    train_seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    bad_steps: int = 0  # skipped steps already reported


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
    autocast,
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
    targets, stop = world.sum(torch.tensor([here, signals.received], dtype=torch.float32, device=world.device))

    optimizer.zero_grad(set_to_none=True)
    model.reset_counts()
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    aux_loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for a, (g, batch) in enumerate(zip(global_indices, batches, strict=True)):
        seed_randomness(config.seed, step, g)
        last = a == plan.accumulation - 1
        with contextlib.nullcontext() if last or world.size == 1 else parallel.no_sync():
            with autocast():
                out = parallel(**_to_device(batch, world.device), return_logits=False)
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


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":
        return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
    return batch


def _compile(model: MoEForCausalLM, config: RunConfig, world: World, precision: str) -> bool:
    """torch.compile of each decoder layer in place. grouped_mm compiles in bfloat16 only, and a CPU gains little."""
    wanted = config.train.compile
    on = wanted == "on" or (wanted == "auto" and world.device.type == "cuda" and precision == "bfloat16")
    if on:
        for layer in model.layers:
            layer.compile()
    return on


def _parallel(model: MoEForCausalLM, world: World) -> nn.Module:
    """DDP around the model where there are several ranks. Buffers stay local: counts are summed by hand, tables are equal."""
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def _due(step: int, every: int) -> bool:
    """Whether something done every so many steps is due after `step` of them."""
    return every > 0 and step > 0 and step % every == 0


def _held_out(
    model: MoEForCausalLM, prepared: Prepared, config: RunConfig, world: World, autocast, progress: Progress, clock: Clock,
    reporter: Reporter,
) -> float:  # fmt: skip
    """Held-out loss of every source, shared out over ranks; logs it and returns the loss that chooses `best`."""
    masked = config.data.document_mask or config.data.format == "chat"
    sources, losses = {}, {}
    for name in prepared.names:
        held = prepared.held_out(name, config.context_length, masked)
        if config.eval.max_tokens is not None:
            held = held.subset(config.eval.max_tokens)
        if held.n_tokens == 0:
            continue
        batches = (batch for i, batch in enumerate(held.batches(config.eval.batch_size)) if i % world.size == world.rank)
        with torch.compiler.set_stance("force_eager"):  # evaluation's many shapes are not worth compiling
            local = held_out_loss(model, batches, world.device, autocast)
        sums = world.sum(torch.tensor([local.nats, local.targets], dtype=torch.float64, device=world.device)).tolist()
        losses[name] = whole = HeldOutLoss(sums[0], int(sums[1]))
        sources[name] = {
            "loss": whole.loss,
            "perplexity": math.exp(min(whole.loss, 700)),
            "bits_per_byte": whole.bits_per_byte(held.n_bytes),
            "tokens": whole.targets,
            "bytes": held.n_bytes,
        }
    if not losses:
        return math.inf
    mean = sum(each.nats for each in losses.values()) / max(sum(each.targets for each in losses.values()), 1)
    best_source = config.eval.best_source
    if best_source is not None and best_source not in losses:
        raise ValueError(f"eval.best_source: {best_source!r} is no source with held-out text; use one of {', '.join(losses)}")
    row = {"kind": "held_out", "step": progress.step, "tokens": progress.tokens, "train_seconds": clock.seconds(), "sources": sources, "loss": mean}
    reporter.log(row)
    reporter.say(describe.held_out_text(row))
    return losses[best_source].loss if best_source else mean


def _samples(model: MoEForCausalLM, tokenizer: Tokenizer, config: RunConfig, autocast, step: int, reporter: Reporter) -> None:
    """What the model says to the config's prompts: text continued, or in fine-tuning a user's turn answered."""
    if not config.eval.prompts:
        return
    chat = config.data.format == "chat"
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) if chat else [tokenizer.bos_id, *tokenizer.encode(prompt)]
        for prompt in config.eval.prompts
    ]
    model.eval()
    with autocast(), torch.compiler.set_stance("force_eager"):
        answers = generate(
            model, prompts, max_new_tokens=config.eval.sample_tokens, temperature=0.0 if chat else 0.7, top_p=0.9,
            stop_ids=(tokenizer.eos_id, tokenizer.im_end_id), seed=config.seed,
        )  # fmt: skip
    model.train()
    for prompt, answer in zip(config.eval.prompts, answers, strict=True):
        text = tokenizer.decode(answer)
        reporter.sample(step, prompt, text)
        reporter.say(f"  {prompt!r} -> {text!r}")


def _watch_bad_steps(
    bad_in_a_row: float, bad_total: float, step: int, progress: Progress, config: RunConfig, folder: RunFolder, reporter: Reporter
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


class Clock:
    """Seconds of training, without those spent saving and evaluating."""

    def __init__(self, device: torch.device, seconds_before: float, tokens_before: int) -> None:
        self.device, self._before, self._since = device, seconds_before, time.perf_counter()
        self.logged_seconds, self.logged_tokens = seconds_before, tokens_before  # at the last logged step

    def seconds(self) -> float:
        """Seconds so far; waits for the device, so that its queue counts."""
        if self._since is None:
            return self._before
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self._before + time.perf_counter() - self._since

    @contextlib.contextmanager
    def paused(self):
        self._before, self._since = self.seconds(), None
        yield
        self._since = time.perf_counter()
