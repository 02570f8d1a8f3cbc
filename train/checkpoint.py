"""Checkpoints: a folder of safetensors and JSON that exists only when it is whole; and opening a run to use it.

    RUN/checkpoints/step-00000200/{model.safetensors, optimizer.safetensors, state.json, config.yaml}
    RUN/checkpoints/latest, best      text files, each with the name of a folder beside it

A checkpoint is written beside its place, flushed to disk and renamed; the pointers are replaced the same way. Nothing
is a pickle: opening a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from model import ModelConfig, MoEForCausalLM
from train import config as run_config
from train.config import RunConfig
from train.distributed import choose_device
from train.optim import load_state_tensors, state_tensors
from train.precision import Autocast, autocast_for, resolve_precision

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml")
_NAME = re.compile(r"step-\d{8}")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, config: RunConfig
) -> Path:
    """Writes checkpoints/step-NNNNNNNN whole or not at all and points `latest` at it. OSError if the disk refuses."""
    folder = run_dir / "checkpoints"
    final, partial = folder / checkpoint_name(step), folder / f".partial-{checkpoint_name(step)}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(_model_tensors(model), partial / "model.safetensors")
        save_file(_on_cpu(state_tensors(optimizer, model)), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        (partial / "config.yaml").write_text(run_config.to_yaml(config), encoding="utf-8")
        for name in FILES:
            _flush(partial / name)
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)  # the same step saved again, after a resume that went back
        os.replace(partial, final)
        _flush(folder)
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
    path = run_dir / "checkpoints" / pointer
    temporary = path.with_name(f".{pointer}.partial")
    try:
        temporary.write_text(name + "\n", encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Every whole checkpoint of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if _NAME.fullmatch(path.name) and all((path / name).is_file() for name in FILES)
    )


def pointed(run_dir: Path, pointer: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, None if there is none."""
    path = run_dir / "checkpoints" / pointer
    if not path.is_file():
        return None
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    target = path.parent / name
    return target if _NAME.fullmatch(name) and target in complete_checkpoints(run_dir) else None


def prune(run_dir: Path, keep: int) -> None:
    """Removes what is neither among the newest `keep` nor the best, and what an interrupted save left behind."""
    best = pointed(run_dir, "best")
    for path in complete_checkpoints(run_dir)[:-keep]:
        if path != best:
            shutil.rmtree(path)
    for leftover in (run_dir / "checkpoints").glob(".*partial*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def find_checkpoint(path: str | Path) -> Path:
    """A run folder (its newest checkpoint), a checkpoint folder, or a pointer file -> the checkpoint folder."""
    path = Path(path)
    if path.is_file() and path.name in ("latest", "best") and path.parent.name == "checkpoints":
        target = pointed(path.parent.parent, path.name)
        if target is None:
            raise ValueError(f"{path}: names no whole checkpoint; give the run folder, or a checkpoint in it")
        return target
    if _NAME.fullmatch(path.resolve().name) and path.is_dir():
        missing = [name for name in FILES if not (path / name).is_file()]
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


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fills the model from a checkpoint; ValueError naming the first tensor that does not fit."""
    path = checkpoint / "model.safetensors"
    tensors, expected = _read_tensors(path), _model_tensors(model)
    for name in sorted(expected.keys() | tensors.keys()):
        there, here = tensors.get(name), expected.get(name)
        if there is None or here is None or there.shape != here.shape:
            raise ValueError(
                f"{path}: {name} is {_shape(there)} there, but this config's model has {_shape(here)}; "
                "give the model section the values the checkpoint was made with"
            )
    model.load_state_dict(
        tensors, strict=False
    )  # tied head and derived buffers are not stored; names were checked above


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Path) -> None:
    load_state_tensors(optimizer, model, _read_tensors(checkpoint / "optimizer.safetensors"))


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
    """Opens a run folder (newest checkpoint) or one checkpoint. ValueError if it cannot be used as it is."""
    checkpoint = find_checkpoint(path)
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
    ("max_position_embeddings", "rope_scaling", "rope_theta", "dropout", "initializer_range", "aux_loss_level", "aux_loss_alpha",
     "router_z_loss_coef", "router_jitter_noise", "expert_backend")
)  # fmt: skip


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The persistent state on the CPU, without the head where it is the embedding itself."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return _on_cpu(state)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); use another checkpoint") from None


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"


def _flush(path: Path) -> None:
    """Forces a file's or folder's content to disk, so that a rename never outlives what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
