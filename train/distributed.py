"""One process or many: what torchrun's environment says, how ranks agree, and what happens when one is lost."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import itertools
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from train.cli import USER_ERROR, Unfinished
from train.config import TrainConfig
from train.memory import keep_freed_memory
from train.pulse import PERIOD, Pulses

PR_SET_PDEATHSIG = 1  # linux/prctl.h
JOIN_TIMEOUT = datetime.timedelta(minutes=10)  # from the first process at the start to the last
MAIN_PATIENCE = 60  # seconds that the others wait for a silent rank 0
WAITING = "waiting for the other ranks"


@dataclass
class World:
    """Where this process stands. `size` 1 without torchrun: then every collective is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    threads: int = 1  # CPU threads of this process
    store: dist.Store | None = None  # the key-value store of torchrun's rendezvous, for these processes alone
    pulses: Pulses | None = None  # signs of life of these processes
    doing: str = "starting"  # what this process is at, for whoever asks why nothing moves
    beats: int = 0  # how often it has moved on; equal ones on all ranks where each waits for the others
    _calls: Iterator[int] = field(default_factory=itertools.count)
    _looked: float = 0.0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def place(self) -> str:
        return f"{self.beats} {self.doing}"

    def beat(self, doing: str, beats: int | None = None) -> None:
        """Notes what comes next: the sign of life that `train.watchdog` looks for. `beats` sets their number anew."""
        self.doing = doing
        self.beats = self.beats + 1 if beats is None else beats

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the GPU, or of the machine, and how many processes share them."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory, 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), here

    def tell(self, word: str) -> None:
        """Leaves a word for the other ranks, which see it with `told`."""
        if self.store is not None:
            self.store.set(word, "")

    def told(self, word: str) -> bool:
        """Whether a rank has left this word; looks once a second at most."""
        now = time.monotonic()
        if self.store is None or now - self._looked < 1.0:
            return False
        self._looked = now
        return self.store.check([word])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def from_main(self, values: Sequence[float]) -> list[float]:
        """Rank 0's numbers, on every rank."""
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.broadcast(numbers, src=0)
        return numbers.tolist()

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs `action` on rank 0 while the others wait, for hours if need be. If it fails, they leave too: rank 0 says why."""
        if self.size == 1:
            action()
            return
        key = f"on_main/{next(self._calls)}"
        if self.is_main:
            try:
                action()
            except BaseException:
                self.store.set(key, "failed")
                raise
            self.store.set(key, "done")
            return
        while not self.store.check([key]):  # asking, because a wait that times out writes a warning each time
            if self.pulses.silence(0) > MAIN_PATIENCE:
                raise Unfinished(
                    f"rank {self.rank} of {self.size}, {self.doing}: rank 0 has said nothing for {MAIN_PATIENCE} s; the same command goes on "
                    "from the newest checkpoint"
                )
            time.sleep(0.02)
        if self.store.get(key) == b"failed":
            sys.exit(USER_ERROR)

    def fail(self, message: str) -> None:
        """Ends a run for a reason that every rank sees alike: ValueError on rank 0, which says it; the others leave."""
        if self.is_main:
            raise ValueError(message)
        sys.exit(USER_ERROR)

    def agree(self, value: int, otherwise: str) -> None:
        """`fail` with `otherwise` unless every rank has the same value (of at most 52 bits)."""
        if self.size == 1:
            return
        extremes = torch.tensor([value, -value], dtype=torch.float64, device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        high, low = extremes.tolist()
        if high != -low:
            self.fail(otherwise)


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[World]:
    """Joins the process group that torchrun describes and leaves it at the end; sets device and threads.

    A connection that breaks, because another process has died or cannot be reached, is raised as Unfinished.
    """
    world = World()
    try:
        _join(world, config)
        yield world
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error) and world.doing.endswith("saving"):
            raise ValueError(
                f"train.async_checkpoint: no memory is left for the copy of weights and moments ({world.doing}); set it to false"
            ) from None
        if _is_out_of_memory(error):
            raise ValueError(
                f"train.micro_batch_size: {config.micro_batch_size} rows at once need more memory than there is (rank {world.rank}, "
                f"{world.doing}); lower it, accumulation makes up for it; or set train.activation_checkpointing: true"
            ) from None
        if world.size > 1 and _is_lost_connection(error):
            if "remote=[127." in str(error) and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
                raise ValueError(
                    f"rank {world.rank} of {world.size}: another machine's name resolves to 127.0.0.1 there; set GLOO_SOCKET_IFNAME on "
                    "all of them to the network interface they share (ip addr shows it), such as eth0"
                ) from None
            raise Unfinished(
                f"rank {world.rank} of {world.size}, {world.doing}: another process is lost ({_reason(error)}); the same command "
                "goes on from the newest checkpoint, and so does torchrun --max-restarts by itself"
            ) from None
        _leave(world)
        raise
    except BaseException:
        _leave(world)
        raise
    _leave(world)


def _join(world: World, config: TrainConfig) -> None:
    world.size, world.rank, local_rank = (int(os.environ.get(key, default)) for key, default in
                                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world.device = choose_device(config.device, local_rank)
    world.threads = config.threads or max(
        1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) // here
    )
    torch.set_num_threads(world.threads)
    keep_freed_memory()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    world.store = dist.PrefixStore(_roll_call(store, world.rank, world.size), store)
    period = config.stall_timeout / 10 if config.stall_timeout else PERIOD
    world.pulses = Pulses(world.store, world.rank, world.size, period, lambda: world.place)
    # The watchdog ends what stands still long before a collective gives up by itself.
    patience = datetime.timedelta(seconds=max(2 * config.stall_timeout, 60) if config.stall_timeout else 6 * 3600)
    dist.init_process_group(
        "nccl" if world.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", world.store),
        rank=world.rank,
        world_size=world.size,
        timeout=patience,
    )


def _roll_call(store: dist.Store, rank: int, size: int) -> str:
    """A prefix for keys of `store` that the processes started together share, and nobody had before them.

    torchrun hosts one store for all its restarts (torch 2.5 to 2.13), in which gloo and NCCL would find the addresses of
    processes long dead, and fail or hang (pytorch/pytorch#135712); and its restart count is each host's own. So rank 0 calls
    the roll until every process has answered to the word that it chose now. Unfinished if one does not come.
    """
    word = secrets.token_hex(8)
    store.set(f"answer of {rank}", "")
    store.set(f"word of {rank}", word)
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            if store.check([f"word of {r}" for r in range(size)]):
                roll = ",".join(store.get(f"word of {r}").decode() for r in range(size))
                store.set("roll", roll)
                if all(store.get(f"answer of {r}").decode() == roll for r in range(1, size)):
                    store.set("closed roll", roll)
                    return hashlib.sha256(roll.encode()).hexdigest()
        else:
            if store.check(["closed roll"]) and word in (roll := store.get("closed roll").decode()):
                return hashlib.sha256(roll.encode()).hexdigest()
            if store.check(["roll"]) and word in (roll := store.get("roll").decode()):
                store.set(f"answer of {rank}", roll)
        time.sleep(0.02)
    raise Unfinished(
        f"rank {rank}: not all {size} processes came to the start within {JOIN_TIMEOUT.total_seconds():.0f} s; repeat the command, the "
        "same on all hosts"
    )


def _leave(world: World) -> None:
    """Leaves the process group. The last collective's tensors are dropped by gloo's threads, which need Python for it."""
    if world.pulses is not None:
        world.pulses.close()
    if world.size > 1 and dist.is_initialized():
        _see_others_off(world)
        time.sleep(0.2)  # a thread that has not had its turn when Python ends aborts the process (1 run in 20)
        dist.destroy_process_group()


def _see_others_off(world: World) -> None:
    """Rank 0 leaves last, or after 5 s: with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 the store, from which the others may still
    have to read that all is done, is its own."""
    with contextlib.suppress(dist.DistError):
        world.store.set(f"leaving/{world.rank}", "")
        deadline = time.monotonic() + 5
        while world.is_main and time.monotonic() < deadline:
            if world.store.check([f"leaving/{rank}" for rank in range(world.size)]):
                break
            time.sleep(0.02)


def _end_with_parent() -> None:
    """Asks Linux for a SIGTERM when torchrun, the parent, dies: a killed launcher leaves no process that trains on alone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _is_lost_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset"))


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rpartition("] ")[2][:120]


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
