"""GGUF files through the `gguf` package: written one tensor at a time, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig
from scripts.formats.gguf_layout import Weights, architecture_of, entries
from train import cli

if TYPE_CHECKING:
    import gguf

WANTED_BY = "scripts.export_gguf"
TYPES = ("f32", "f16", "bf16", "q8_0")
BLOCK = 32  # numbers of a row that share one scale in q8_0
LARGEST_F16 = 65504.0


def stored_type(plain: bool, row: int, wanted: str) -> str:
    """How a tensor with rows of so many numbers is stored: as wanted, but in f16 where blocks do not divide its rows, and
    what is small and decides much (norms, biases, routers) in f32."""
    if plain:
        return "f32"
    return "f16" if wanted == "q8_0" and row % BLOCK else wanted


def packed(tensor: Tensor, kind: str, name: str) -> np.ndarray:
    """Float32 (..., n) -> what stands in the file: float32 or float16 (..., n), or bytes (..., n / block * bytes of a block)."""
    gguf = cli.need("gguf", WANTED_BY)
    numbers = tensor.detach().float().contiguous().numpy()
    largest = float(np.abs(numbers).max(initial=0.0))
    if not np.isfinite(largest):
        raise ValueError(f"{name}: holds a number that is not finite: the training diverged; use another checkpoint")
    if kind == "f16" and largest > LARGEST_F16:
        raise ValueError(f"--type: {name} holds {largest:g}, which f16 cannot; use bf16 or f32")
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind.upper()])


def unpacked(data: np.ndarray, kind: str) -> np.ndarray:
    """The float32 numbers that `packed` stored."""
    gguf = cli.need("gguf", WANTED_BY)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])


def write(path: Path, config: ModelConfig, weights: Weights, values: dict[str, object], wanted: str) -> None:
    """Writes the file, one tensor in memory at a time. OSError if the disk refuses."""
    gguf = cli.need("gguf", WANTED_BY)
    writer = gguf.GGUFWriter(path, architecture_of(config))
    for key, value in values.items():
        _add(writer, key, value)
    plan = entries(config)
    for entry in plan:
        shape = tuple(entry.make(weights).shape)
        _add_info(writer, entry.name, shape, stored_type(entry.plain, shape[-1], wanted))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in plan:
            tensor = entry.make(weights)  # anew: some are copies, and all of them at once would be a second model
            writer.write_tensor_data(packed(tensor, stored_type(entry.plain, tensor.shape[-1], wanted), entry.name))
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    gguf = cli.need("gguf", WANTED_BY)
    stored = gguf.GGMLQuantizationType[kind.upper()]
    block, n_bytes = gguf.GGML_QUANT_SIZES[stored]
    size = int(np.prod(shape)) // block * n_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=stored)


class GGUFFile:
    """A file that was written, read back: `metadata` (key -> value), and tensors by name as float32."""

    def __init__(self, path: Path) -> None:
        gguf = cli.need("gguf", WANTED_BY)
        reader = gguf.GGUFReader(path)
        self.metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def names(self) -> set[str]:
        return set(self._tensors)

    def kind(self, name: str) -> str:
        return self._tensors[name].tensor_type.name.lower()

    def tensor(self, name: str) -> Tensor | None:
        """Float32, None where the file has no such tensor."""
        if name not in self._tensors:
            return None
        found = self._tensors[name]
        shape = tuple(int(n) for n in reversed(found.shape))
        return torch.from_numpy(np.array(unpacked(found.data, self.kind(name)), dtype=np.float32)).view(shape)
