"""The files of a transformers folder from a stranger: JSON of bounded size, tensors of safetensors in one file or in shards.

Nothing is run, a pickle is never opened, names that lead out of the folder are refused; errors are ValueErrors of one sentence.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.words import short, short_name

LARGEST_JSON = 2**26  # bytes; the index of a model with 100,000 tensors has 10 MB
MOST_SHARDS = 1000
FLOATS = ("F64", "F32", "F16", "BF16")
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def read_json(path: Path) -> dict:
    """A JSON object from a stranger. ValueError where it is missing, too large or none."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{short_name(path)}: no plain file; put the JSON file itself there")
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{short_name(path)}: larger than the {LARGEST_JSON >> 20} MiB that are read")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{short_name(path)}: cannot be read ({error.strerror}); give a folder that transformers saved, with config.json, "
            "*.safetensors and tokenizer.json"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise ValueError(
            f"{short_name(path)}: is no JSON ({' '.join(str(error).split())[:100]}); copy it anew"
        ) from None
    if not isinstance(tree, dict):
        raise ValueError(f"{short_name(path)}: is no JSON object; copy it anew")
    return tree


class Tensors:
    """The tensors of a folder's safetensors, each taken once; a name that is missing or of another shape is a ValueError."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, {}
        for name in _shards(folder):
            path = folder / name
            try:
                self.open[name] = safe_open(path, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{short_name(path)}: cannot be read ({' '.join(str(error).split())[:100]}); copy it anew"
                ) from None
        self.place = {name: file for file in self.open.values() for name in file.keys()}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_error: object) -> None:
        self.open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.place

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor as float32, contiguous, which is then gone from here. ValueError unless it has this shape and finite numbers."""
        if name not in self.place:
            raise ValueError(f"{short_name(self.folder)}: the tensor {name} is missing; copy the folder anew")
        part = self.place.pop(name).get_slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(
                f"{short_name(self.folder)}: the tensor {name} has the shape {tuple(part.get_shape())}, but config.json says {shape}"
            )
        if part.get_dtype() not in FLOATS:
            raise ValueError(
                f"{short_name(self.folder)}: the tensor {name} is {part.get_dtype()}; float weights are needed ({', '.join(FLOATS)})"
            )
        tensor = part[:].float().contiguous()
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{short_name(self.folder)}: the tensor {name} holds what is not a number; copy the folder anew"
            )
        return tensor

    def drop(self, pattern: str) -> int:
        """Forgets the tensors whose whole name matches; how many there were."""
        names = [name for name in self.place if re.fullmatch(pattern, name)]
        for name in names:
            del self.place[name]
        return len(names)


def _shards(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise ValueError(
            f"{short_name(folder)}: neither model.safetensors nor its index; weights in other files (pickles) are not read: save them "
            "with save_pretrained"
        )
    table = read_json(index).get("weight_map")
    names = (
        sorted(set(table.values()))
        if isinstance(table, dict) and all(isinstance(v, str) for v in table.values())
        else []
    )
    if not 0 < len(names) <= MOST_SHARDS:
        raise ValueError(f"{short_name(index)}: weight_map names no files, or more than {MOST_SHARDS}; copy it anew")
    for name in names:
        if not SHARD.fullmatch(name) or not (folder / name).is_file():
            raise ValueError(f"{short_name(index)}: {short(name)} is no file of this folder; copy the folder anew")
    return names
