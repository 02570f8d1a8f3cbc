"""What a checkpoint costs the training that it interrupts: written beside it, and written while it waits."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from scripts import contestants
from scripts.contestants import Field, Size
from train import checkpoint
from train.config import RunConfig, TrainConfig
from train.writer import CheckpointWriter

STEPS = 10  # of one measurement; a checkpoint is asked for before the first
EVERY = 100  # steps between checkpoints, at which the cost is a share of the time; our configs have 100 to 500


def measure(size: Size, field: Field, rounds: int) -> dict:
    """Seconds of STEPS training steps without a checkpoint, with one written in the background, and with one waited for;
    interleaved in one process. `share`: what a checkpoint every EVERY steps adds to the time of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        contestant = contestants.training(contestants.OURS, size, field)
        model, optimizer = contestant.trained
        writers = {
            "none": None,
            "background": _writer(Path(folder), size, in_background=True),
            "in line": _writer(Path(folder), size, in_background=False),
        }
        seconds: dict[str, list[float]] = {way: [] for way in writers}
        blocked: dict[str, list[float]] = {way: [] for way in writers}
        for _ in range(rounds + 1):  # the first to warm up
            for way, writer in writers.items():
                contestant.work()
                start = time.perf_counter()
                if writer is not None:
                    writer.save(1, model, optimizer, {})
                blocked[way].append(time.perf_counter() - start)
                for _ in range(STEPS):
                    contestant.work()
                seconds[way].append(time.perf_counter() - start)
                if writer is not None:
                    writer.wait()
        written = sum(
            path.stat().st_size for path in checkpoint.complete_checkpoints(Path(folder) / "run")[0].iterdir()
        )
    step = statistics.median(seconds["none"][1:]) / STEPS
    ways = {}
    for way in ("background", "in line"):
        added = statistics.median(a - b for a, b in zip(seconds[way][1:], seconds["none"][1:], strict=True))
        ways[way] = {
            "waited_seconds": statistics.median(blocked[way][1:]),
            "added_seconds": added,
            "share": added / (EVERY * step),
        }
    return {"precision": field.precision, "step_seconds": step, "bytes": written, "ways": ways}


def text(figures: list[dict]) -> str:
    """The figures as a table in Markdown, a row for each precision and way of writing."""
    lines = [
        f"| precision | step, ms | checkpoint, MB | written | training waits, ms | added in all, ms | every {EVERY} steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for figure in figures:
        for way, cost in figure["ways"].items():
            lines.append(
                f"| {figure['precision']} | {figure['step_seconds'] * 1e3:.0f} | {figure['bytes'] / 1e6:.0f} | {way} | "
                f"{cost['waited_seconds'] * 1e3:.0f} | {cost['added_seconds'] * 1e3:.0f} | {cost['share']:.2%} |"
            )
    return "\n".join(lines)


def _writer(folder: Path, size: Size, in_background: bool) -> CheckpointWriter:
    train = TrainConfig(steps=1, async_checkpoint=in_background)
    return CheckpointWriter(
        RunConfig(name="run", runs_dir=str(folder), model=dataclasses.replace(size.model), train=train)
    )
