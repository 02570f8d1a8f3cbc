"""The training loop, for pretraining and fine-tuning alike: read `train` from top to bottom.

Order of a step: save? -> evaluate? -> step -> log. Which rows a step takes is a pure function of (seed, step), randomness of
(seed, step, global micro-batch), the learning rate of the number of accepted steps: so a checkpoint needs weights, moments
and a few counters, and the same command again goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import math
import signal
import zlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.experts import resolve_backend
from train import checkpoint, describe, distributed
from train.config import RunConfig, to_yaml
from train.distributed import World
from train.guard import LateReading, StepGuard, StopSignals
from train.metrics import Reporter
from train.optim import build_optimizer, set_learning_rate
from train.plan import check_memory, check_settings, make_plan
from train.precision import autocast_for, compute_dtype, resolve_precision
from train.progress import Clock, Progress, TrainingState
from train.runs import RunFolder
from train.schedule import learning_rate_table
from train.step import StepVerdict, announce, settle_buckets, train_step
from train.validate import held_out_row, loss_that_decides, samples
from train.watchdog import Watchdog
from train.writer import CheckpointWriter


def train(config: RunConfig) -> int:
    """Runs or resumes the run that `config` describes. Returns the exit code: 0 when finished, 128 + signal when stopped."""
    with (
        distributed.joined(config.train) as world,
        contextlib.closing(RunFolder(config)) as folder,
        contextlib.ExitStack() as at_the_end,
    ):
        return _train(config, world, folder, at_the_end)


def _train(config: RunConfig, world: World, folder: RunFolder, at_the_end: contextlib.ExitStack) -> int:
    torch.use_deterministic_algorithms(config.train.deterministic)

    # Data, and what it means for the batch.
    tokenizer = Tokenizer.load(config.tokenizer.path)
    describe.check_vocabulary(config, tokenizer)
    check_settings(config, world.size, tokenizer)
    check_memory(config.model, *world.memory)
    folder.check_tokenizer(tokenizer)
    world.on_main(lambda: prepare(config.data, tokenizer))
    prepared = open_prepared(config.data, tokenizer)
    if config.data.verify:
        world.on_main(prepared.verify)
    data_digests = prepared.content_digests()
    signals = at_the_end.enter_context(contextlib.closing(StopSignals()))  # from here on; before, nothing is lost
    masked = config.data.document_mask or config.data.format == "chat"
    rows = prepared.train_rows(config.context_length, masked, config.seed)
    plan = make_plan(config, rows.rows_per_epoch, world.size)

    # The run folder, and where we are in it.
    world.on_main(lambda: folder.claim(tokenizer))
    newest = folder.newest_checkpoint()
    state = checkpoint.read_training_state(newest) if newest is not None else None
    world.agree(
        state.step if state else -1,
        f"runs_dir: {config.runs_dir!r} does not show every process the same checkpoints; put it on a disk that all machines share",
    )
    precision = resolve_precision(config.train.precision, world.device)
    resolved_backend = resolve_backend(config.model.expert_backend, world.device, compute_dtype(precision))
    config = folder.settle_config(config, newest, resolved_backend)
    if state is not None:
        folder.check_data(state, data_digests)
    world.agree(
        zlib.crc32(f"{to_yaml(config)}{data_digests}".encode()),
        f"{config.run_dir}: the processes were started with different configs or data; give every machine the same",
    )
    world.on_main(lambda: folder.write(config, tokenizer))

    finished = world.is_main and newest is not None and folder.is_finished(newest, plan.steps, prepared)
    if world.from_main([finished]) == [1.0]:
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
    learning_rates = learning_rate_table(plan.steps, config.train, world.device)
    guard = StepGuard(world.device, config.train.spike_factor)
    progress = Progress()
    if state is not None:
        checkpoint.load_optimizer(optimizer, model, newest)
        guard.load_state(state.guard)
        progress = state.progress
        step, loss = world.from_main(folder.best_so_far(progress, config))
        progress.best_step, progress.best_loss = (None, None) if math.isnan(loss) else (int(step), loss)
    compiled = compile_model(model, config, world, precision)
    parallel = _parallel(model, world)
    autocast = autocast_for(precision, world.device)

    with (
        Reporter(config, folder.path, plan.steps, progress.step, world.is_main) as reporter,
        Watchdog(world, config.train.stall_timeout, signals),
        contextlib.closing(CheckpointWriter(config)) as writer,
    ):
        reporter.say(
            describe.start_text(config, plan, world, model, precision, compiled, prepared, rows, progress.step)
        )
        if state is not None and state.ranks != world.size:
            reporter.say(
                f"saved by {state.ranks} process(es), resumed by {world.size}: equal to float tolerance, not bit for bit"
            )
        model.train()
        if world.size > 1:
            settle_buckets(parallel, rows, plan, world, autocast)
        readings, clock = LateReading(), Clock(world.device, progress.train_seconds, progress.tokens)
        started_at, saved_step = progress.step, progress.step if state is not None else None
        stopping = failed = False
        folder.begin_session(world, progress.step)

        def heed(values: list[float] | None, step: int) -> None:
            """Acts on what the device said of `step`, which the host reads a step late."""
            nonlocal stopping, failed
            if values is None:
                return
            verdict = StepVerdict.of(values)
            stopping, failed = stopping or verdict.stop, failed or verdict.failed
            if not verdict.accepted:
                reporter.log(describe.bad_step_row(verdict, step, plan, rows))
                reporter.say(describe.bad_step_text(verdict, step, plan, rows, folder.path))
            if verdict.bad_in_a_row >= config.train.max_bad_steps:
                world.fail(describe.too_many_bad_steps(verdict, step, plan, config))

        def save() -> None:
            nonlocal saved_step
            heed(readings.pop(), progress.step)
            if saved_step == progress.step:
                return
            world.beat(f"step {progress.step}: saving")
            progress.train_seconds = clock.seconds()
            now = TrainingState(progress.step, world.size, progress, guard.state(), data_digests, tokenizer.fingerprint)
            world.on_main(lambda: writer.save(progress.step, model, optimizer, dataclasses.asdict(now)))
            saved_step = progress.step

        def evaluate() -> None:
            nonlocal stopping
            progress.train_seconds = clock.seconds()
            row, broken_off = held_out_row(model, prepared, config, world, autocast, progress, signals)
            if broken_off:
                stopping = True
                return
            if world.is_main and not signals.received:
                try:
                    for prompt, text in samples(model, tokenizer, config, autocast):
                        reporter.sample(progress.step, prompt, text)
                except ValueError as error:  # a model that says nothing may still learn to
                    reporter.say(f"no samples at step {progress.step}: {error}")
            if row is None:
                return
            loss = loss_that_decides(row, config)
            if math.isfinite(loss) and (
                progress.best_loss is None or loss <= progress.best_loss
            ):  # equal: again after a resume
                progress.best_loss, progress.best_step = loss, progress.step
                save()  # a best step is worth a checkpoint of its own
                world.on_main(lambda: writer.point_best(progress.step))
            if finished:
                world.on_main(writer.wait)  # the last row says that all is done: `best` must be right before
            reporter.log(row)
            reporter.say(describe.held_out_text(row))

        while True:
            finished = progress.step >= plan.steps
            if failed:
                world.on_main(writer.wait)  # raises what the disk said
            if finished or stopping or _due(progress.step, config.train.checkpoint_every):
                with clock.paused():
                    save()
            if stopping:
                break
            if finished or _due(progress.step, config.eval.every):
                with clock.paused():
                    evaluate()
                if stopping:
                    continue
            if finished:
                break

            announced = announce(rows, plan, world, progress.step, signals.received > 0, writer.failed)
            if announced.must_not_be_taken:
                stopping, failed = bool(announced.stop), bool(announced.failed)
                continue
            learning_rate = learning_rates.index_select(0, guard.accepted_steps.long().view(1)).squeeze(0)
            set_learning_rate(optimizer, learning_rate)
            sums = train_step(parallel, model, optimizer, guard, plan, config, world, autocast, announced)
            progress.step += 1
            progress.tokens += plan.tokens_per_step

            heed(readings.push(sums.verdict(guard)), progress.step - 1)
            if progress.step % config.train.log_every == 0 or progress.step == plan.steps:
                row = describe.step_row(
                    sums, model, plan, config, world, precision, learning_rate, guard, progress, clock
                )
                reporter.log(row)
                reporter.say(describe.step_text(row, plan))
            reporter.progress()

        world.beat("writing the last checkpoint")
        world.on_main(writer.wait)
        folder.end_session(world, started_at, progress.step, clock.seconds())
        reporter.say(
            f"stopped after step {progress.step} with a checkpoint; the same command goes on from there"
            if stopping
            else f"finished: {plan.steps} steps, {progress.tokens:,} tokens, {clock.seconds():.0f} s of training, best at step "
            f"{progress.best_step}; run folder {folder.path}"
        )
        # wandb may take a while; who leaves earlier makes torchrun hurry the others
        world.on_main(lambda: reporter.close(hurried=stopping))
    return 128 + (signals.received or signal.SIGTERM) if stopping else 0


def compile_model(model: MoEForCausalLM, config: RunConfig, world: World, precision: str) -> bool:
    """torch.compile of the layers where the config asks for it; returns whether it did. `auto`: grouped_mm compiles in bfloat16
    only, and a CPU gains little."""
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
