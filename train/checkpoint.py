"""Checkpoints: a folder of safetensors and JSON that exists only when it is whole; and opening a run to use it.

    RUN/checkpoints/step-00000200/{model.safetensors, optimizer.safetensors, state.json, config.yaml, SHA256SUMS}
    RUN/checkpoints/latest, best      text files, each with the name of a folder beside it

A checkpoint is written beside its place, flushed to disk and renamed; the pointers are replaced the same way; what is
removed loses its name first. Its bytes are checked when it is read. Nothing is a pickle: opening a stranger's checkpoint
runs no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.integrity import SUMS, damage, write_checksums
from data.tokenizer import Tokenizer
from model import ModelConfig, MoEForCausalLM
from train import config as run_config
from train.config import RunConfig
from train.distributed import choose_device
from train.files import flush_to_disk, replace_file
from train.optim import expected_state, load_state_tensors, state_tensors
from train.precision import Autocast, autocast_for, resolve_precision
from train.progress import TrainingState

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml")
_NAME = re.compile(r"step-\d{8}")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass
class Snapshot:
    """What a checkpoint holds, on the CPU: training may go on while it is written."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict
    config: str  # YAML


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    state: dict,
    config: RunConfig,
    previous: Snapshot | None = None,
) -> Snapshot:
    """A copy of weights and moments, into the memory of `previous` where that fits."""
    old = previous or Snapshot(step, {}, {}, {}, "")
    return Snapshot(
        step,
        weights={name: _copied(tensor, old.weights.get(name)) for name, tensor in model_tensors(model).items()},
        moments={
            name: _copied(tensor, old.moments.get(name)) for name, tensor in state_tensors(optimizer, model).items()
        },
        state={"step": step, **state},
        config=run_config.to_yaml(config),
    )


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, config: RunConfig
) -> Path:
    """`write` of the model and optimizer as they are, without a copy."""
    weights, moments = (
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        for tensors in (model_tensors(model), state_tensors(optimizer, model))
    )
    return write(run_dir, Snapshot(step, weights, moments, {"step": step, **state}, run_config.to_yaml(config)))


def write(run_dir: Path, snapshot: Snapshot) -> Path:
    """Writes checkpoints/step-NNNNNNNN whole or not at all and points `latest` at it. OSError if the disk refuses."""
    folder = run_dir / "checkpoints"
    final = folder / checkpoint_name(snapshot.step)
    partial = folder / f".partial-{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(snapshot.weights, partial / "model.safetensors")
        save_file(snapshot.moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
        (partial / "config.yaml").write_text(snapshot.config, encoding="utf-8")
        for name in FILES:
            flush_to_disk(partial / name)
        write_checksums(partial, FILES)
        flush_to_disk(partial)
        _remove(final)  # the same step saved again
        os.replace(partial, final)
        flush_to_disk(folder)
        point(run_dir, "latest", final.name)
    except (OSError, SafetensorError) as error:  # SafetensorError: how save_file reports a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{final}: cannot write this checkpoint ({error}); free some disk space and repeat the command: "
            "earlier checkpoints are untouched"
        ) from None
    return final


def point(run_dir: Path, pointer: str, name: str) -> None:
    """Makes `latest` or `best` name a checkpoint, in one atomic step."""
    replace_file(run_dir / "checkpoints" / pointer, name + "\n")


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    return [path for path in _named_checkpoints(run_dir) if not _missing(path)]


def newest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose bytes are those that were written, None if the run has none yet; and a sentence for each
    newer one that is damaged. Those are set aside as damaged-step-NNNNNNNN, and `latest` and `best` name none of them.

    ValueError if there are checkpoints and all are damaged: a run is never started afresh in silence.
    """
    found, damaged = _named_checkpoints(run_dir), {}
    while found and (reason := damage(found[-1], FILES)) is not None:
        damaged[found.pop()] = reason
    if damaged and not found:
        raise ValueError(
            f"{next(iter(damaged.values()))}, and no other checkpoint in {run_dir / 'checkpoints'} is whole; copy one back, or remove "
            f"{run_dir} to start afresh"
        )
    best = pointed(run_dir, "best")
    if best is not None and (reason := damage(best, FILES)) is not None:
        damaged[best] = reason
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    notes = [f"{reason}; the checkpoint is set aside as damaged-{path.name}" for path, reason in damaged.items()]
    intact = complete_checkpoints(run_dir)
    if intact and pointed(run_dir, "latest") != intact[-1]:
        point(run_dir, "latest", intact[-1].name)
    if pointed(run_dir, "best") is None:
        (run_dir / "checkpoints" / "best").unlink(missing_ok=True)
    return (intact[-1] if intact else None), notes


def pointed(run_dir: Path, pointer: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, None if there is none."""
    path = run_dir / "checkpoints" / pointer
    if not path.is_file():
        return None
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    target = path.parent / name
    return target if _NAME.fullmatch(name) and target in complete_checkpoints(run_dir) else None


def prune(run_dir: Path, keep: int, keep_every: int = 0) -> None:
    """Removes what is neither among the newest `keep`, nor the best, nor of a multiple of `keep_every` steps; and what an
    interrupted save left behind."""
    best = pointed(run_dir, "best")
    for path in complete_checkpoints(run_dir)[:-keep]:
        archived = keep_every > 0 and int(path.name.removeprefix("step-")) % keep_every == 0
        if path != best and not archived:
            _remove(path)
    sweep(run_dir)


def sweep(run_dir: Path) -> None:
    """Removes what an interrupted save or removal left behind."""
    for leftover in (run_dir / "checkpoints").glob(".*partial*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def find_checkpoint(path: str | Path) -> Path:
    """A run folder (its newest checkpoint), a checkpoint folder, or a pointer file -> the checkpoint folder."""
    path = Path(path)
    if path.is_file() and path.name in ("latest", "best") and path.parent.name == "checkpoints":
        target = pointed(path.parent.parent, path.name)
        if target is None:
            raise ValueError(f"{path}: names no whole checkpoint; give the run folder, or a checkpoint in it")
        return target
    if _NAME.fullmatch(path.resolve().name) and path.is_dir():
        missing = _missing(path)
        if missing:
            raise ValueError(f"{path}: this checkpoint lacks {', '.join(missing)}; use another checkpoint")
        return path
    found = complete_checkpoints(path) if path.is_dir() else []
    if not found:
        why = "has no complete checkpoint" if path.is_dir() else "is not there"
        raise ValueError(f"{path}: {why}; give a run folder such as runs/NAME, or a checkpoint in it")
    return found[-1]


def read_state(checkpoint: Path) -> dict:
    """What `save` was given as state, and `step`. ValueError if it cannot be read."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{path}: is no checkpoint's state, it has no step; use another checkpoint")
    return state


def read_config(checkpoint: Path) -> RunConfig:
    return run_config.load_config(checkpoint / "config.yaml")


def read_training_state(checkpoint: Path) -> TrainingState:
    """state.json, checked. ValueError where its step is not the one that the folder's name says."""
    path = checkpoint / "state.json"
    state = run_config.build(TrainingState, read_state(checkpoint), str(path))
    if checkpoint.name != checkpoint_name(state.step) or state.progress.step != state.step:
        raise ValueError(
            f"{path}: says step {state.step} and {state.progress.step}, which is not {checkpoint.name}; use another checkpoint"
        )
    return state


def check_intact(checkpoint: Path, names: Iterable[str] = FILES) -> None:
    """ValueError, naming the file, unless these files' bytes are those that were written."""
    reason = damage(checkpoint, names)
    if reason is not None:
        raise ValueError(f"{reason}; use another checkpoint of this run, such as {checkpoint.parent}/step-...")


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fills the model from a checkpoint; ValueError naming the first tensor that does not fit."""
    path, expected = checkpoint / "model.safetensors", model_tensors(model)
    tensors = _read_tensors(path, expected, "give the model section the values the checkpoint was made with")
    model.load_state_dict(tensors, strict=False)  # tied head and derived buffers are not stored; names were checked


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Path) -> None:
    """Fills the optimizer from a checkpoint; one saved before the first step leaves it as it is. ValueError as `load_weights`."""
    path = checkpoint / "optimizer.safetensors"
    remedy = "use another checkpoint, or the train.optimizer that it was made with"
    tensors = _read_tensors(path, expected_state(model, optimizer), remedy, may_be_empty=True)
    load_state_tensors(optimizer, model, tensors)


@dataclass
class Run:
    """A trained model, ready to use. `autocast()` is the context its forward passes run in."""

    config: RunConfig
    model: MoEForCausalLM  # in eval mode, on `device`
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    step: int
    run_dir: Path
    checkpoint: Path
    autocast: Autocast


def open_run(path: str | Path, device: str = "auto", precision: str = "auto") -> Run:
    """Opens a run folder (newest checkpoint) or one checkpoint. ValueError if it cannot be used as it is.

    Of a run that is being trained the newest checkpoint may be removed while it is read: then the newest one of now is taken.
    """
    while True:
        checkpoint = find_checkpoint(path)
        try:
            return _open_checkpoint(checkpoint, path, device, precision)
        except (ValueError, OSError):
            if checkpoint.exists():
                raise


def _open_checkpoint(checkpoint: Path, path: str | Path, device: str, precision: str) -> Run:
    check_intact(checkpoint, ("model.safetensors", "state.json", "config.yaml"))
    config = read_config(checkpoint)
    run_dir = checkpoint.resolve().parent.parent if not (Path(path) / "checkpoints").is_dir() else Path(path)
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    where = choose_device(device)
    precision = resolve_precision(precision, where)
    model = MoEForCausalLM(config.model)
    load_weights(model, checkpoint)
    return Run(
        config=config,
        model=model.to(where).eval(),
        tokenizer=tokenizer,
        device=where,
        precision=precision,
        step=read_state(checkpoint)["step"],
        run_dir=run_dir,
        checkpoint=checkpoint,
        autocast=autocast_for(precision, where),
    )


def check_same_shape(config: ModelConfig, checkpoint: Path) -> None:
    """ValueError, naming the first key, if a model of `config` cannot take the checkpoint's weights."""
    saved = read_config(checkpoint).model
    for field in dataclasses.fields(ModelConfig):
        if field.name in FREE_MODEL_KEYS:
            continue
        ours, theirs = getattr(config, field.name), getattr(saved, field.name)
        if ours != theirs:
            raise ValueError(
                f"model.{field.name}: {ours!r} here, but {checkpoint} was trained with {theirs!r}; use its value"
            )


# Keys that may change between stages: they shape training, or the context, but no tensor.
FREE_MODEL_KEYS = frozenset(
    ("max_position_embeddings", "rope_scaling", "rope_theta", "dropout", "initializer_range", "zero_init_output", "aux_loss_level",
     "aux_loss_alpha", "router_z_loss_coef", "router_jitter_noise", "expert_backend")
)  # fmt: skip


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The persistent state, without the head where it is the embedding itself."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _copied(tensor: Tensor, old: Tensor | None) -> Tensor:
    """A copy on the CPU, in the memory of `old` where that has the same shape and type."""
    tensor = tensor.detach()
    if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True).contiguous()
    return old.copy_(tensor)


def _read_tensors(
    path: Path, expected: dict[str, Tensor], remedy: str, may_be_empty: bool = False
) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a name, shape or type that is not as in `expected` is refused before it is read."""
    try:
        with safe_open(path, "pt") as file:
            there = {name: file.get_slice(name) for name in file.keys()}
            if may_be_empty and not there:
                return {}
            for name in sorted(expected.keys() | there.keys()):
                found = _described(there[name].get_shape(), there[name].get_dtype()) if name in there else "absent"
                wanted = (
                    _described(list(expected[name].shape), _DTYPES[expected[name].dtype])
                    if name in expected
                    else "absent"
                )
                if found != wanted:
                    raise ValueError(f"{path}: {name} is {found} there, but this config's model has {wanted}; {remedy}")
            return {name: file.get_tensor(name) for name in there}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); use another checkpoint") from None


_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def _described(shape: list[int], dtype: str) -> str:
    return f"{dtype} of shape {tuple(shape)}"


def _named_checkpoints(run_dir: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest first."""
    folder = run_dir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def _missing(checkpoint: Path) -> list[str]:
    return [name for name in (*FILES, SUMS) if not (checkpoint / name).is_file()]


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: what is called step-NNNNNNNN is whole, even if a kill comes between."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".partial-removed-{checkpoint.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)
