"""One process or many: what torchrun's environment says, and the two collectives the loop needs."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.cli import USER_ERROR
from train.config import TrainConfig
from train.memory import keep_freed_memory


@dataclass(frozen=True)
class World:
    """Where this process stands. `size` 1 without torchrun: then every collective is the identity."""

    rank: int
    size: int
    device: torch.device
    threads: int  # CPU threads of this process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs `action` on rank 0 while the others wait. If it fails there, they leave too: rank 0 says why."""
        failure = None
        if self.is_main:
            try:
                action()
            except (ValueError, OSError) as error:
                failure = error
        failed = self.sum(torch.tensor(float(failure is not None), device=self.device)).item()
        if failed:
            stop(self)
            if failure is not None:
                raise failure
            sys.exit(USER_ERROR)


def start(config: TrainConfig) -> World:
    """Joins the process group that torchrun describes (NCCL on CUDA, gloo on CPU) and sets device and threads."""
    size, rank, local_rank = (int(os.environ.get(key, default)) for key, default in
                              (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(config.device, local_rank)
    threads = config.threads or max(
        1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) // here
    )
    torch.set_num_threads(threads)
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        # Hours, because the others wait while rank 0 prepares the data; a rank that dies is noticed by torchrun at once.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
    return World(rank, size, device, threads)


def stop(world: World) -> None:
    """Leaves the process group. The last collective's tensors are dropped by gloo's threads, which need Python for it."""
    if world.size > 1:
        time.sleep(0.2)  # a thread that has not had its turn when Python ends aborts the process (1 run in 20)
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device; ValueError for cuda on a machine without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device: 'cuda' was asked for, but torch sees no CUDA device here; use auto or cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun: process {local_rank} has no GPU of its own, this machine has {torch.cuda.device_count()}; "
            "lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)
