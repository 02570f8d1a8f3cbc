"""The run folder: it explains itself, moves between machines, and refuses to become another run by accident.

runs/NAME/config.yaml  tokenizer/  run.json  metrics.jsonl  samples.jsonl  log.txt  checkpoints/
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import fcntl
import json
import math
import os
import platform
import time
import typing
from pathlib import Path

import torch

from data.dataset import Prepared
from data.integrity import damage
from data.tokenizer import Tokenizer
from train import checkpoint
from train.config import RunConfig, to_dict, to_yaml
from train.distributed import World
from train.files import replace_file
from train.metrics import append_text, read_rows
from train.progress import Progress, TrainingState
from train.validate import loss_that_decides

# What may change when a run goes on: how it is executed and watched, not what it computes.
FREE_SECTIONS = ("eval", "wandb")
FREE_KEYS = frozenset(
    ("name", "runs_dir", "tensorboard", "data.cache_dir", "data.verify", "tokenizer.path", "model.expert_backend", "train.steps",
     "train.epochs", "train.micro_batch_size", "train.device", "train.threads", "train.precision", "train.compile",
     "train.activation_checkpointing", "train.deterministic", "train.checkpoint_every", "train.keep_checkpoints",
     "train.keep_every", "train.async_checkpoint", "train.stall_timeout", "train.log_every", "train.max_bad_steps",
     "train.init_from")
)  # fmt: skip
LOCK_PATIENCE = 10  # seconds
FREE_SOURCE_KEYS = (
    "path",
    "data_files",
    "streaming",
)  # where a source's text lies: what it says is compared by content

# What training writes into; none may be a link, which could lead anywhere.
OWN = (".lock", "config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "log.txt", "tokenizer", "checkpoints", "wandb", "wandb_id",
       "tensorboard")  # fmt: skip


class RunFolder:
    """A run's folder while it is trained: claimed by one process, compared with what is about to go on in it."""

    def __init__(self, config: RunConfig) -> None:
        self.path = config.run_dir
        self._lock: typing.IO | None = None
        self._began = time.monotonic()

    def claim(self, tokenizer: Tokenizer) -> None:
        """Makes the folder this process's own until it ends, sees to its checkpoints, and says what was wrong with them.

        ValueError if another process trains it, if it holds something else, if a file of it is a link, or if all its
        checkpoints are damaged.
        """
        if self.path.is_dir() and any(self.path.iterdir()) and not any((self.path / name).exists() for name in OWN[:2]):
            raise ValueError(f"name: {self.path} is a folder with other things in it; give the run another name")
        for name in OWN:
            if (self.path / name).is_symlink():
                raise ValueError(
                    f"{self.path / name}: is a link, and training would write where it leads; put the file itself there "
                    "(the run folder as a whole may be a link)"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"runs_dir: cannot make the folder {self.path} ({error.strerror}); choose another"
            ) from None
        self._lock = open(self.path / ".lock", "a+")  # held as long as this process lives
        self._take_lock()
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        self.check_tokenizer(tokenizer)
        checkpoint.sweep(self.path)
        for name in ("config.yaml", "run.json"):
            for leftover in self.path.glob(f".{name}.*.partial"):
                leftover.unlink(missing_ok=True)
        newest, notes = checkpoint.newest_intact(self.path)
        if newest is not None:
            self._mend_best(newest)
        for note in notes:
            going_on = f"going on from {newest.name}"
            print(f"{note}; {going_on}", flush=True)
            append_text(self.path / "log.txt", f"{note}; {going_on}\n")

    def _take_lock(self) -> None:
        """Waits LOCK_PATIENCE seconds for a training that is just ending, such as one whose launcher was killed."""
        for second in range(LOCK_PATIENCE + 1):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._lock.seek(0)
                holder = f"another training (process {self._lock.read(20).strip() or 'unknown'})"
                if second == 0:
                    print(
                        f"{self.path}: {holder} is writing this run; waiting {LOCK_PATIENCE} s for its end", flush=True
                    )
                time.sleep(1)
            except OSError as error:  # a file system without locks
                print(
                    f"{self.path}: cannot be locked ({error.strerror}); start no second training of this run",
                    flush=True,
                )
                return
        raise ValueError(
            f"{self.path}: {holder} is writing this run; wait for it, stop it, or give this run another name"
        )

    def _mend_best(self, newest: Path) -> None:
        """Points `best`, where it names nothing, at the step that was the best when `newest` was saved, if that is still there."""
        step = checkpoint.read_training_state(newest).progress.best_step
        if step is None or checkpoint.pointed(self.path, "best") is not None:
            return
        best = newest.with_name(checkpoint.checkpoint_name(step))
        if best in checkpoint.complete_checkpoints(self.path) and damage(best, checkpoint.FILES) is None:
            checkpoint.point(self.path, "best", best.name)

    def close(self) -> None:
        """Lets another process have it."""
        if self._lock is not None:
            self._lock.close()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """ValueError if the run began with another tokenizer."""
        own = self.path / "tokenizer"
        if (own / "tokenizer.json").exists() and Tokenizer.load(own).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"tokenizer.path: this is another tokenizer ({tokenizer.fingerprint[:8]}) than the one the run began with ({own}); "
                "give the run another name, or remove its folder to start afresh"
            )

    def newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = checkpoint.complete_checkpoints(self.path)
        return found[-1] if found else None

    def settle_config(self, config: RunConfig, newest: Path | None, resolved_backend: str) -> RunConfig:
        """The config with its expert backend decided: as the run began, or as resolved now.

        ValueError, naming the first key, if `newest` was trained with another value of a key that matters.
        """
        config = copy.deepcopy(config)
        if newest is None:
            config.model.expert_backend = resolved_backend
            return config
        saved = checkpoint.read_config(newest)
        before, now = _identity(saved), _identity(config)
        for key in sorted(before.keys() | now.keys()):
            free = key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS
            if not free and before.get(key) != now.get(key):
                raise ValueError(
                    f"{key}: {now.get(key)!r}, but the run in {self.path} was started with {before.get(key)!r}; "
                    "give the run another name, or remove its folder to start afresh"
                )
        if config.model.expert_backend == "auto":
            config.model.expert_backend = saved.model.expert_backend
        return config

    def best_so_far(self, progress: Progress, config: RunConfig) -> tuple[float, float]:
        """Step and held-out loss of the checkpoint that `best` names; (-1, NaN) if it names none, or none whose loss is known.

        A checkpoint is saved before its own evaluation, so the newest one may not know yet that it is the best.
        """
        best = checkpoint.pointed(self.path, "best")
        if best is None:
            return -1.0, math.nan
        step = int(best.name.removeprefix("step-"))
        if step == progress.best_step and progress.best_loss is not None:
            return step, progress.best_loss
        for row in reversed(read_rows(self.path / "metrics.jsonl")):
            if row.get("kind") == "held_out" and row.get("step") == step:
                with contextlib.suppress(KeyError, TypeError, ValueError):  # a row that someone else wrote
                    return step, float(loss_that_decides(row, config))
        return -1.0, math.nan

    def check_data(self, state: TrainingState, digests: dict[str, str]) -> None:
        """ValueError, naming the source, if the shards hold other tokens than those the run was trained on."""
        for name, digest in digests.items():
            before = state.data.get(name)
            if before != digest:
                raise ValueError(
                    f"source {name!r}: its training data is no longer what the run in {self.path} began with (SHA-256 {digest[:12]}, "
                    f"was {str(before)[:12]}); bring the text back as it was, or give the run another name"
                )

    def write(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """config.yaml and tokenizer/."""
        tokenizer.save(self.path / "tokenizer")
        replace_file(self.path / "config.yaml", to_yaml(config))

    def is_finished(self, newest: Path, steps: int, prepared: Prepared) -> bool:
        """Whether the last checkpoint and, where anything is held out, the last held-out losses are there."""
        if checkpoint.read_training_state(newest).step < steps:
            return False
        if not any(source["held_out"]["documents"] for source in prepared.index["sources"]):
            return True
        evaluated = [row.get("step") for row in read_rows(self.path / "metrics.jsonl") if row.get("kind") == "held_out"]
        return any(isinstance(step, int) and step >= steps for step in evaluated)

    def begin_session(self, world: World, step: int) -> None:
        """Notes in run.json the machine and where this session starts."""
        if not world.is_main:
            return
        record = self._record()
        record["machine"] = describe_machine(world)
        record["sessions"].append({"started": _now(), "from_step": step, "to_step": None, "seconds": None})
        self._write_record(record)

    def end_session(self, world: World, started_at: int, step: int, train_seconds: float) -> None:
        """Notes in run.json how far this start of the processes came, and how long it took."""
        if not world.is_main:
            return
        record = self._record()
        session = record["sessions"][-1]
        elapsed = time.monotonic() - self._began
        session.update(to_step=step, seconds=round(elapsed, 1), train_seconds=round(train_seconds, 1))
        self._write_record(record)

    def _record(self) -> dict:
        path = self.path / "run.json"
        if not path.is_file():
            return {"machine": {}, "started": _now(), "sessions": []}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("sessions"), list):
            raise ValueError(f"{path}: this file is damaged; remove it (it only keeps dates and the machine)")
        return record

    def _write_record(self, record: dict) -> None:
        replace_file(self.path / "run.json", json.dumps(record, indent=1))


def describe_machine(world: World) -> dict:
    """What a reader needs to judge a speed; no host name, user or path."""
    machine = {
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "processes": world.size,
        "threads_per_process": world.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    return machine


def processor_name() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _identity(config: RunConfig) -> dict:
    """What makes a run this run, and may not change when it goes on; the free keys are still among it."""
    flat = _flat(to_dict(config))
    flat["data.sources"] = [
        {key: value for key, value in source.items() if key not in FREE_SOURCE_KEYS} for source in flat["data.sources"]
    ]
    return flat


def _flat(tree: dict, prefix: str = "") -> dict:
    """Nested mappings as a.b keys; lists stay whole."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
