"""The experts' load as pictures for wandb and TensorBoard: layers x experts now, and over the run so far.

Colours are the report's: paper where an expert takes its fair share of tokens, blue below it, orange above. Drawn with
Pillow (requirements-extra.txt).
"""

from __future__ import annotations

import math
import typing

import numpy as np

if typing.TYPE_CHECKING:
    from PIL.Image import Image

# log2 of load / fair share, red, green, blue; eval/charts.py has the same
COLOURS = np.array(
    [(-2, 29, 77, 148), (-1, 126, 168, 212), (0, 244, 242, 236), (1, 239, 162, 101), (2, 182, 58, 18)], float
)
PAPER, INK = (255, 255, 255), (60, 60, 60)
MOST_MOMENTS = 400  # columns of the picture over time; beyond, every second moment is left out
CAPTION = "load / fair share: blue a quarter or less, pale 1, dark orange 4 and more"


class Loads:
    """The load of every expert in every layer, from the training rows of a run."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self._moments: dict[int, np.ndarray] = {}  # step -> (L, E), 1 is the fair share
        self._every, self._count = 1, 0  # of so many moments one is kept
        self._since: list[np.ndarray] = []  # the last picture
        self._shape: tuple[int, ...] = ()

    def add(self, row: dict) -> None:
        """A row of metrics.jsonl; one without routing changes nothing."""
        routing = row.get("routing")
        if row.get("kind") != "train" or not routing:
            return
        load = np.array(routing["load"], dtype=np.float32)
        if (routing["layers"], load.shape) != (self.layers, self._shape):
            self._moments, self._since, self._every, self._count = {}, [], 1, 0
        self.layers, self._shape = routing["layers"], load.shape
        load *= load.shape[1]
        self._since.append(load)
        self._count += 1
        if self._count % self._every == 0:
            self._moments[row["step"]] = load
        if len(self._moments) > MOST_MOMENTS:
            self._moments = dict(list(self._moments.items())[1::2])
            self._every *= 2

    def pictures(self) -> dict[str, Image]:
        """expert_load: layers x experts, the mean since these were last drawn; expert_load_over_time: experts, layer by layer,
        x steps. Empty where nothing came since."""
        if not self._since:
            return {}
        now, self._since = np.mean(self._since, axis=0), []
        moments = np.stack(list(self._moments.values()) or [now])  # (moments, L, E)
        steps = list(self._moments) or [0]
        return {
            "expert_load": _now(now, self.layers),
            "expert_load_over_time": _over_time(moments, self.layers, steps),
        }


def colours(load: np.ndarray) -> np.ndarray:
    """(...) loads, 1 the fair share -> (..., 3) uint8."""
    octaves = np.log2(np.clip(load, 0.25, 4.0))
    return np.stack([np.interp(octaves, COLOURS[:, 0], COLOURS[:, c]) for c in (1, 2, 3)], axis=-1).astype(np.uint8)


def _now(load: np.ndarray, layers: list[int]) -> Image:
    """(L, E) -> a row a layer, a column an expert, with names and, where there is room, the number in each cell."""
    cell = 34 if load.shape[1] <= 32 else max(6, 1200 // load.shape[1])
    height = 22
    image, draw = _sheet(left=62, top=22, cells=load, width=cell, height=height)
    for e in range(0, load.shape[1], math.ceil(26 / cell)):
        draw.text((62 + (e + 0.5) * cell, 12), str(e), fill=INK, anchor="mm")
    for i, layer in enumerate(layers):
        draw.text((6, 22 + (i + 0.5) * height), f"layer {layer}", fill=INK, anchor="lm")
        for e, value in enumerate(load[i] if cell >= 30 else ()):
            ink = INK if 0.45 < value < 2.5 else PAPER
            draw.text((62 + (e + 0.5) * cell, 22 + (i + 0.5) * height), f"{value:.2f}", fill=ink, anchor="mm")
    return image


def _over_time(moments: np.ndarray, layers: list[int], steps: list[int]) -> Image:
    """(moments, L, E) -> a column a moment, a band a layer, in it a line an expert."""
    n, _, experts = moments.shape
    width, height = max(1, 800 // n), max(2, min(16, 160 // experts))
    gap = math.ceil(8 / height)  # lines between bands
    cells = (
        np.pad(moments, ((0, 0), (0, 0), (0, gap)), constant_values=np.nan).reshape(n, -1).T
    )  # (L * (E + gap), moments)
    image, draw = _sheet(left=62, top=6, cells=cells, width=width, height=height, below=18)
    for i, layer in enumerate(layers):
        draw.text((6, 6 + (i * (experts + gap) + experts / 2) * height), f"layer {layer}", fill=INK, anchor="lm")
    draw.text((62, image.height - 9), f"step {steps[0]}", fill=INK, anchor="lm")
    if n * width > 150:
        draw.text((62 + n * width, image.height - 9), f"step {steps[-1]}", fill=INK, anchor="rm")
    return image


def _sheet(left: int, top: int, cells: np.ndarray, width: int, height: int, below: int = 6) -> tuple:
    """A white sheet with (rows, columns) cells on it, NaN for none; and what draws on it."""
    from PIL import Image, ImageDraw

    pixels = colours(np.nan_to_num(cells, nan=1.0))
    pixels[np.isnan(cells)] = PAPER
    grid = Image.fromarray(pixels.repeat(height, axis=0).repeat(width, axis=1))
    image = Image.new("RGB", (max(left + grid.width + 8, 200), top + grid.height + below), PAPER)
    image.paste(grid, (left, top))
    return image, ImageDraw.Draw(image)
