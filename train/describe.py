"""What a run says of itself: the numbers it starts with, each step's row, and the text a person reads."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from data.dataset import Prepared, TrainRows
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.balance import load_statistics
from model.flops import flops_per_token, total_count
from model.products import float32_library
from train import optim
from train.config import RunConfig
from train.distributed import World
from train.guard import StepGuard
from train.plan import Plan
from train.precision import resolve_precision
from train.progress import Clock, Progress
from train.step import StepSums, StepVerdict

# Dense bf16 peaks, FLOP/s, from the makers' data sheets (without sparsity), by the name torch gives the device. Others, laptop
# and NVL variants among them, have no MFU.
PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12,
}  # fmt: skip


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """ValueError if the tokenizer can give ids the model has no embedding for."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"{config.tokenizer.path}; set it to {tokenizer.vocab_size}, or train another tokenizer"
        )


def start_text(
    config: RunConfig, plan: Plan, world: World, model: MoEForCausalLM, precision: str, compiled: bool, prepared: Prepared,
    rows: TrainRows, step: int,
) -> str:  # fmt: skip
    """Enough for a reader to redo the arithmetic of the run."""
    c = config.model
    count = total_count(c)
    flops = flops_per_token(c, plan.context_length)
    seen = plan.steps * plan.tokens_per_step
    experts = (
        f"{c.n_routed_experts} experts of width {c.moe_intermediate_size} in {len(c.moe_layers)} of {c.num_hidden_layers} layers, "
        f"{c.num_experts_per_tok} a token + {c.n_shared_experts} shared, backend {c.expert_backend}, "
        f"balance {c.aux_loss_level} x {c.aux_loss_alpha:g}"
        if c.moe_layers
        else f"none (dense, {c.num_hidden_layers} layers of width {c.intermediate_size})"
    )
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    lines = [
        f"run        {config.run_dir}, seed {config.seed}" + (f", resumed at step {step}" if step else ""),
        f"devices    {world.size} process(es) on {device}, {world.threads} thread(s) each, "
        f"{_arithmetic(precision, world.device)}, compile {'on' if compiled else 'off'}",
        f"model      {count.total:,} parameters, {count.active:,} active for a token; {flops / 1e6:,.1f} MFLOP per trained token",
        f"attention  {c.num_attention_heads} query and {c.num_key_value_heads} key-value heads of {c.head_dim}, "
        f"{_attention_kernel(config.data.document_mask or config.data.format == 'chat', precision, world.device)}",
        f"experts    {experts}",
        f"data       {', '.join(prepared.names)}: {rows.rows_per_epoch:,} rows of {plan.context_length} tokens an epoch"
        + _skipped(prepared, rows),
        f"step       {plan.micro_batch_size} rows x {plan.accumulation} accumulated x {world.size} process(es) x "
        f"{plan.context_length} tokens = {plan.tokens_per_step:,} tokens",
        f"plan       {plan.steps:,} steps = {seen:,} tokens = {plan.steps * plan.rows_per_step / rows.rows_per_epoch:.2f} epochs = "
        f"{seen / count.active:.1f} tokens per active parameter; {flops * seen:.3g} FLOP",
        f"optimizer  {optim.NAMES[config.train.optimizer]}, learning rate {config.train.learning_rate:g} at its peak, {config.train.schedule}",
    ]
    return "\n".join(lines)


def _arithmetic(precision: str, device: torch.device) -> str:
    """The precision, and what of the processor decided how it is computed."""
    if device.type != "cpu":
        return precision
    if precision == "bfloat16":
        able = "has" if resolve_precision("auto", device) == "bfloat16" else "lacks"
        return f"bfloat16 (the processor {able} the instructions for it)"
    return f"float32 (products by {float32_library()})"


def _attention_kernel(masked: bool, precision: str, device: torch.device) -> str:
    written_out = device.type == "cpu" and precision == "bfloat16"
    kernel = "attention written out" if written_out else "scaled_dot_product_attention"
    return f"{kernel}, {'document mask' if masked else 'causal'}"


def _skipped(prepared: Prepared, rows: TrainRows) -> str:
    """What of the sources is in no row, and why: nothing is dropped silently."""
    left_out = [(source["name"], source["skipped"]) for source in prepared.index["sources"]] + list(
        rows.skipped.items()
    )
    return "".join(
        f"; left out of {name}: {number} {reason}" for name, reasons in left_out for reason, number in reasons.items()
    )


def step_row(
    sums: StepSums, model: MoEForCausalLM, plan: Plan, config: RunConfig, world: World, precision: str, learning_rate: Tensor,
    guard: StepGuard, progress: Progress, clock: Clock,
) -> dict:  # fmt: skip
    """The row of metrics.jsonl for the step just done. Its losses are this step's own, so a resumed run logs the same."""
    seconds = clock.seconds()
    span_tokens, span_seconds = progress.tokens - clock.logged_tokens, seconds - clock.logged_seconds
    clock.logged_tokens, clock.logged_seconds = progress.tokens, seconds
    speed = span_tokens / span_seconds if span_seconds > 0 else None
    row = {
        "kind": "train",
        "step": progress.step,
        "tokens": progress.tokens,
        "train_seconds": round(seconds, 3),
        "loss": sums.loss.item(),
        "aux_loss": sums.aux_loss.item(),
        "learning_rate": learning_rate.item(),
        "grad_norm": sums.norm.item(),
        "tokens_per_second": speed,
        "mfu": _mfu(speed, config, plan, world, precision),
        "memory_gib": memory_gib(world.device),
        "skipped_steps": int(guard.bad_total.item()),
        "rows_digest": int(sums.announced.rows_digest.item()),
    }
    if sums.tokens_per_expert is not None:
        micro_batches = plan.accumulation * world.size
        counts, routing_sums = sums.tokens_per_expert.cpu(), sums.routing_sums.cpu()
        statistics = load_statistics(counts)
        row["balance_loss"] = routing_sums[:, 0].mean().item() / micro_batches
        row["z_loss"] = routing_sums[:, 1].mean().item() / micro_batches
        row["routing"] = {
            "layers": [i for i, _ in model.moe_layers()],
            "load": [
                [round(share, 5) for share in layer]
                for layer in (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
            ],
            "max_vio": statistics["max_vio"].tolist(),
            "load_entropy": statistics["load_entropy"].tolist(),
            "router_entropy": (routing_sums[:, 2] / routing_sums[:, 3].clamp(min=1)).tolist(),
            "dead": statistics["dead"].tolist(),
        }
    return row


def step_text(row: dict, plan: Plan) -> str:
    """A row of `step_row` as the line a person reads; the time left is at the speed since the last one."""
    speed, mfu = row["tokens_per_second"], row["mfu"]
    left = (plan.steps - row["step"]) * plan.tokens_per_step / speed if speed else None
    parts = [
        f"step {row['step']:>{len(str(plan.steps))}}/{plan.steps}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"norm {row['grad_norm']:.3f}",
        f"{speed:,.0f} tok/s" if speed else "n/a tok/s",
        f"mfu {mfu:.1%}" if mfu is not None else "mfu n/a",
        f"{row['memory_gib']:.2f} GiB",
    ]
    if "routing" in row:
        routing = row["routing"]
        parts.insert(2, f"balance {row['balance_loss']:.3f} (+{row['aux_loss']:.4f})")
        parts.append(
            f"busiest expert +{max(routing['max_vio']):.0%}"
            + (f", {sum(routing['dead'])} dead" if sum(routing["dead"]) else "")
        )
    if left is not None:
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return "  ".join(parts)


def bad_step_row(verdict: StepVerdict, step: int, plan: Plan, rows: TrainRows) -> dict:
    """The row of metrics.jsonl for a step that was skipped: where its rows came from, and what each micro-batch's loss was."""
    first, size = (step - 1) * plan.rows_per_step, plan.micro_batch_size
    micro_batches = []
    for g, loss in enumerate(verdict.micro_losses):
        positions = range(first + g * size, first + (g + 1) * size)
        sources = Counter(rows.origin(position)[0] for position in positions)
        micro_batches.append({"rows": [positions[0], positions[-1]], "loss": loss, "sources": dict(sources)})
    return {
        "kind": "bad_step",
        "step": step,
        "rows": [first, first + plan.rows_per_step - 1],
        "loss": verdict.loss,
        "grad_norm": verdict.grad_norm,
        "mean_norm": verdict.mean_norm,
        "micro_batches": micro_batches,
    }


def bad_step_text(verdict: StepVerdict, step: int, plan: Plan, rows: TrainRows, run_dir: Path) -> str:
    """Why a step was skipped, and the command that shows the text whose micro-batch had the highest loss."""
    worst = [i for i, loss in enumerate(verdict.micro_losses) if not math.isfinite(loss)]
    finite = not worst and math.isfinite(verdict.grad_norm)
    if not worst:
        worst = [max(range(len(verdict.micro_losses)), key=verdict.micro_losses.__getitem__)]
    first = (step - 1) * plan.rows_per_step + worst[0] * plan.micro_batch_size
    last = (step - 1) * plan.rows_per_step + (worst[-1] + 1) * plan.micro_batch_size - 1
    sources = ", ".join(sorted({rows.origin(position)[0] for position in (first, last)}))
    why = (
        f"its gradient norm {verdict.grad_norm:.3g} is far above the usual {verdict.mean_norm:.3g}"
        if finite
        else f"loss {verdict.loss:.3g} or gradient norm {verdict.grad_norm:.3g} is not finite"
    )
    return (
        f"step {step}: skipped, {why}, {verdict.bad_in_a_row} in a row; the highest loss came from rows {first} to {last} ({sources}): "
        f"python -m scripts.show_rows {run_dir} {first} {last}"
    )


def too_many_bad_steps(verdict: StepVerdict, step: int, plan: Plan, config: RunConfig) -> str:
    """The last words of a run that skipped `train.max_bad_steps` steps in a row."""
    n = verdict.bad_in_a_row
    first, last = (step - n) * plan.rows_per_step, step * plan.rows_per_step - 1
    return (
        f"{config.run_dir}: {n} steps in a row were skipped, the last of them step {step} (train.max_bad_steps: "
        f"{config.train.max_bad_steps}); its checkpoints are intact: look at the text (python -m scripts.show_rows {config.run_dir} "
        f"{first} {last}), or start another run (name) with a lower train.learning_rate"
    )


def held_out_text(row: dict) -> str:
    """A held-out row as the line a person reads."""
    sources = "  ".join(
        f"{name} {source['loss']:.4f} ({source['bits_per_byte']:.4f} bits/byte)"
        for name, source in row["sources"].items()
    )
    return f"held-out at step {row['step']}: {sources}"


def memory_gib(device: torch.device) -> float:
    """Peak memory so far, GiB: the device's on CUDA, this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _mfu(speed: float | None, config: RunConfig, plan: Plan, world: World, precision: str) -> float | None:
    """Model FLOPs utilisation; None on a device without a known peak, or not in bfloat16."""
    if speed is None or world.device.type != "cuda" or precision != "bfloat16":
        return None
    peak = PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(world.device))
    return speed * flops_per_token(config.model, plan.context_length) / (peak * world.size) if peak else None
