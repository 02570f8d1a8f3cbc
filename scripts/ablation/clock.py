"""What a training step of each variant takes, all of them interleaved in one process, from their last checkpoints.

Two runs that were hours apart, or side by side, cannot be compared by their own clocks: the machine drifts. So every variant is
taken up where its run ended (weights, moments, routing as trained, the text's own rows) and takes real steps by turns, at the
schedule's last learning rate; nothing of it is saved.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from data.prepare import open_prepared
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.experts import resolve_backend
from scripts.ablation import record
from scripts.ablation.study import Cell, Study
from scripts.benchmark import race
from scripts.contestants import Contestant
from train import checkpoint, distributed, loop
from train.distributed import World
from train.guard import LateReading, StepGuard
from train.optim import build_optimizer, set_learning_rate
from train.plan import make_plan
from train.precision import autocast_for, compute_dtype, resolve_precision
from train.runs import describe_machine
from train.schedule import learning_rate_table
from train.step import announce, train_step

ROUNDS = 15
STEPS = {
    "cpu": 2,
    "cuda": 10,
}  # timed of a variant in a round, after as many that are not; on a GPU the host runs ahead
BUSY = 0.5  # processors' worth of other work that is worth a word


def missing(study: Study, again: bool = False) -> list[str]:
    """The variants to be timed now: all that can be, if one of them has no time yet (or `again`), else none. A longer variant has
    its `of`'s steps."""
    clock = record.known_clock(study, record.read_json(study.folder / "study.json")) or {"seconds": {}}
    names = [cell.variant for cell in record.timed_cells(study) if record.is_done(cell)]
    return names if again or not set(names) <= clock["seconds"].keys() else []


def measure(study: Study, names: list[str], say: Callable[[str], None], rounds: int = ROUNDS) -> dict:
    """study.json's `clock`: the seconds per step of the variants `names` in each round, and what they were measured on."""
    # oneDNN keeps the newest 1,024 compiled kernels: too few for all variants' shapes, so they would evict each other's.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32768")
    cells = {cell.variant: cell for cell in record.timed_cells(study)}
    first = cells[names[0]].config.train
    with distributed.joined(first) as world:
        torch.use_deterministic_algorithms(first.deterministic)
        steps = STEPS[world.device.type]
        say(f"\ntiming {len(names)} variants, {rounds} rounds of {steps} steps, {world.threads} thread(s)")
        _say_if_busy(world, say)
        competing = [_contestant(cells[name], world, steps) for name in names]
        seconds = race(competing, world.device, rounds, warm_up=2)
        _say_if_busy(world, say)
        head, _ = record.commit()
        return {
            "rounds": rounds,
            "steps_a_round": steps,
            "threads": world.threads,
            "machine": describe_machine(world),
            "commit": head,
            "seconds": {c.name: [[round(each / steps, 7) for each in seconds[c.key]]] for c in competing},
            "tokens_per_step": {c.name: c.tokens // steps for c in competing},
            "digests": {name: cells[name].digest for name in names},  # a variant whose settings change is timed again
        }


def _contestant(cell: Cell, world: World, steps: int) -> Contestant:
    """A variant whose `work` is so many steps of training, as train.loop takes them, from its last checkpoint on."""
    newest = checkpoint.find_checkpoint(cell.config.run_dir)
    checkpoint.check_intact(newest)
    config, state = checkpoint.read_config(newest), checkpoint.read_training_state(newest)
    tokenizer = Tokenizer.load(cell.config.run_dir / "tokenizer")
    prepared = open_prepared(cell.config.data, tokenizer)
    rows = prepared.train_rows(config.context_length, config.data.document_mask, config.seed)
    plan = make_plan(config, rows.rows_per_epoch, world.size)
    precision = resolve_precision(config.train.precision, world.device)
    config.model.expert_backend = resolve_backend(
        cell.config.model.expert_backend, world.device, compute_dtype(precision)
    )
    model = MoEForCausalLM(config.model)
    checkpoint.load_weights(model, newest)
    model.to(world.device).train()
    model.activation_checkpointing = config.train.activation_checkpointing
    model.set_count_reduction(world.sum)
    optimizer = build_optimizer(model, config.train)
    checkpoint.load_optimizer(optimizer, model, newest)
    guard = StepGuard(world.device, config.train.spike_factor)
    guard.load_state(state.guard)
    loop.compile_model(model, config, world, precision)
    learning_rate = learning_rate_table(plan.steps, config.train, world.device)[-1]
    step = functools.partial(
        train_step, model, model, optimizer, guard, plan, config, world, autocast_for(precision, world.device)
    )
    done, readings = state.step, LateReading()

    def work() -> None:
        nonlocal done
        for _ in range(steps):
            announced = announce(rows, plan, world, done, False, False)
            set_learning_rate(optimizer, learning_rate)
            readings.push(step(announced).verdict(guard))
            done += 1

    return Contestant(cell.variant, precision, work, steps * plan.tokens_per_step, 0.0)


def _say_if_busy(world: World, say: Callable[[str], None]) -> None:
    """A word where other processes are at work: interleaved times stay comparable, but are larger and noisier."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    if load - world.threads > BUSY:
        say(
            f"the machine is busy: {load:.1f} processes on {cores} cores in the last minute, of which this needs {world.threads}"
        )
