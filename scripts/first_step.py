"""Two costs that no step time shows: from typing the command to the first step, and what the data cost in each step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data.prepare import open_prepared
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from train.config import RunConfig, load_config
from train.optim import build_optimizer
from train.plan import rows_of_step
from train.precision import autocast_for, resolve_precision


def check_prepared(config_path: str | Path) -> None:
    """ValueError, with what to run, if the data of this config are not prepared."""
    config = load_config(config_path)
    open_prepared(config.data, Tokenizer.load(config.tokenizer.path))


def seconds_to_first_step(config_path: str | Path, rounds: int, device: torch.device) -> list[float]:
    """Wall clock of `python -m train.pretrain`, data prepared, until it reports its first optimizer step; one a round.

    ValueError, with the command's own words, if it fails.
    """
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                "name=first-step",
                f"runs_dir={folder}",
                "train.steps=1",
                "train.epochs=null",
                "train.log_every=1",
            ]
            overrides += [
                f"train.device={device.type}",
                "train.threads=1",
                "eval.every=0",
                "train.warmup_steps=0",
                "train.compile=off",
            ]
            command = [sys.executable, "-u", "-m", "train.pretrain", str(config_path), *overrides]
            start = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            lines = []
            for line in process.stdout:
                lines.append(line.strip())
                if line.startswith("step 1/1"):
                    seconds.append(time.perf_counter() - start)
                    break
            else:
                raise ValueError(f"{config_path}: {lines[-1] if lines else 'no output'}")
            process.kill()
            process.communicate()
    return seconds


def data_share(config: RunConfig, steps: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of reading a step's rows, and of the step that learns from them."""
    prepared = open_prepared(config.data, Tokenizer.load(config.tokenizer.path))
    masked = config.data.document_mask or config.data.format == "chat"
    rows = prepared.train_rows(config.context_length, masked, config.seed)
    count, micro = rows_of_step(config, 1), config.train.micro_batch_size
    model = MoEForCausalLM(config.model).to(device).train()
    optimizer = build_optimizer(model, config.train)
    autocast = autocast_for(resolve_precision("auto", device), device)
    reading, learning = [], []
    for step in range(steps + 3):
        start = time.perf_counter()
        batches = [rows.batch(step * count + first, micro) for first in range(0, count, micro)]
        read = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            with autocast():
                out = model(**{key: value.to(device) for key, value in batch.items()}, return_logits=False)
            (out.loss / len(batches) + out.aux_loss / len(batches)).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        reading.append(read - start)
        learning.append(time.perf_counter() - read)
    return statistics.median(reading[3:]), statistics.median(learning[3:])


def measure(config_path: str | Path, rounds: int, device: torch.device) -> dict:
    """Both, for the run that a config describes; its data must be prepared."""
    config = load_config(config_path)
    reading, learning = data_share(config, 4 * rounds, device)
    start_up = sorted(seconds_to_first_step(config_path, rounds, device))
    return {
        "config": str(config_path),
        "seconds_to_first_step": statistics.median(start_up),
        "seconds_to_first_step_low": start_up[0],
        "seconds_to_first_step_high": start_up[-1],
        "seconds_reading_rows": reading,
        "seconds_learning": learning,
        "data_share": reading / (reading + learning),
    }


def text(figures: dict) -> str:
    return (
        f"{figures['config']}: {figures['seconds_to_first_step']:.1f} s "
        f"({figures['seconds_to_first_step_low']:.1f}-{figures['seconds_to_first_step_high']:.1f}) from the command to the end of "
        f"its first step; reading the rows of a step {1e3 * figures['seconds_reading_rows']:.2f} ms, "
        f"{figures['data_share']:.2%} of {1e3 * (figures['seconds_reading_rows'] + figures['seconds_learning']):.0f} ms"
    )
