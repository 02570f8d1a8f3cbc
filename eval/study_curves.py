"""A study's curves: the mean of a variant's runs at each step, with the band in which the seeds leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.charts import DASHES, PALETTE
from eval.curves import FLOPS, TIME, TOKENS, Axis
from eval.history import finite
from eval.intervals import band
from eval.study_records import Cell, Study, Variant, judged

BAND = (
    "The band is the 95 % interval of the mean over the seeds (of two seeds: from one to the other; of one: none); differences are "
    "paired by seed, and surer than the bands look."
)
Points = dict[int, float]  # step -> value


@dataclass
class Band:
    """A quantity of a variant by step; low and high are NaN where there is no band."""

    variant: Variant
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int  # over how many the mean is

    def xs(self, axis: Axis) -> list[float]:
        """Where each step stands on the axis: tokens, operations, or seconds by the clock; NaN where that is not known."""
        variant = self.variant
        per_step = variant.tokens / variant.steps if variant.tokens and variant.steps else math.nan
        each = {
            TOKENS.name: per_step,
            FLOPS.name: per_step * (variant.flops_per_token or math.nan),
            TIME.name: variant.step_seconds or math.nan,
        }[axis.name]
        return [step * each for step in self.steps]


def held_out_points(study: Study) -> Callable[[Cell], Points]:
    """Bits per byte of the judged text at each evaluation while training. That is a sample of the text (eval.max_tokens), harder or
    easier than the whole: each run's points are moved by its own offset (sample_offsets), a run without one by the others' mean."""
    offsets = sample_offsets(study)
    usual = float(np.mean(list(offsets.values()))) if offsets else 0.0

    def points(cell: Cell) -> Points:
        offset = offsets.get(cell.link, usual)
        return {step: bits + offset for step, bits in _measured(study, cell).items()}

    return points


def sample_offsets(study: Study) -> dict[str, float]:
    """{run folder: bits per byte of all held-out text less that of the sample, after the last step} of the finished runs."""
    found = {}
    for cell in (cell for variant in study.variants for cell in variant.done):
        if measured := _measured(study, cell):
            found[cell.link] = cell.bits - measured[max(measured)]
    return found


def _measured(study: Study, cell: Cell) -> Points:
    rows = cell.stage.held_out if cell.stage else []
    found = {row["step"]: judged(row.get("sources", {}), study.source) for row in rows if row["step"] > 0}
    return {step: figures[0] for step, figures in found.items() if figures}


def routing_points(key: str, of_log_experts: bool = False) -> Callable[[Cell], Points]:
    """A routing figure of training's rows, mean of the layers; as a fraction of log E if asked for."""

    def points(cell: Cell) -> Points:
        found = {}
        for row in cell.stage.train if cell.stage else ():
            routing = row.get("routing") or {}
            good = [value for value in finite(routing.get(key) or []) if math.isfinite(value)]
            if good:
                largest = math.log(max(2, len(routing["load"][0]))) if of_log_experts else 1.0
                found[row["step"]] = float(np.mean(good)) / largest
        return found

    return points


def band_of(variant: Variant, points: Callable[[Cell], Points]) -> Band | None:
    """The mean over the finished runs, or over all where none is, at the steps that all of them have; None without any."""
    found = [run for cell in variant.done or variant.cells if (run := points(cell))]
    if not found:
        return None
    steps = sorted(set.intersection(*(set(run) for run in found)))
    values = [[run[step] for run in found] for step in steps]
    bands = [band(each) or (math.nan, math.nan) for each in values]
    if not steps:
        return None
    means = [float(np.mean(v)) for v in values]
    return Band(variant, steps, means, [b[0] for b in bands], [b[1] for b in bands], len(found))


@dataclass
class Ends:
    """What a reference reaches when it is trained just so long, by seconds of its training; the band as in `Band`."""

    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def ends_by_time(study: Study, reference: Variant, points: Callable[[Cell], Points]) -> Ends | None:
    """Through the last points of the reference's runs of different lengths, as differences at equal wall clock are taken
    (eval/study_numbers.py). None with fewer than two lengths."""
    lengths = [(variant, variant.seconds) for variant in study.lengths_of(reference) if variant.seconds]
    last = {
        variant.name: {cell.seed: run[max(run)] for cell in variant.done if (run := points(cell))}
        for variant, _ in lengths
    }
    lengths = sorted(((variant, at) for variant, at in lengths if last[variant.name]), key=lambda pair: pair[1])
    seeds = set.intersection(*(set(last[variant.name]) for variant, _ in lengths)) if lengths else set()
    if len(lengths) < 2 or not seeds or lengths[0][1] == lengths[-1][1]:
        return None
    knots = [math.log(at) for _, at in lengths]
    grid = np.unique([*knots, *np.linspace(knots[0], knots[-1], 40)])
    by_seed = [np.interp(grid, knots, [last[variant.name][seed] for variant, _ in lengths]) for seed in sorted(seeds)]
    values = np.array(by_seed).T.tolist()
    bands = [band(each) or (math.nan, math.nan) for each in values]
    seconds, means = np.exp(grid).tolist(), [float(np.mean(each)) for each in values]
    return Ends(seconds, means, [b[0] for b in bands], [b[1] for b in bands])


def bands_of(variants: Sequence[Variant], points: Callable[[Cell], Points]) -> list[Band]:
    """Those variants' bands that exist, in order."""
    return [found for variant in variants if (found := band_of(variant, points))]


def looks(study: Study) -> dict[str, tuple[str, str]]:
    """{variant: (colour, dash)}: a longer run has the colour of the variant it belongs to, and dashes."""
    found: dict[str, tuple[str, str]] = {}
    for place, variant in enumerate(study.full_length):
        found[variant.name] = (PALETTE[place % len(PALETTE)], ("", "2 4")[place // len(PALETTE) % 2])
    for variant in study.variants:
        if variant.longer:
            found[variant.name] = (found.get(variant.of, (PALETTE[-1], ""))[0], DASHES[1])
    return found


def later_part(
    bands: Sequence[Band], axis: Axis, start: float = 0.5
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(x range, y range) in which the curves can be read from `start` of their length on: what lies above, and the emptiness
    before the first curve comes into sight, is cut off. There is at least one curve, and each stands on the axis."""
    tops = [float(np.interp(start * b.steps[-1], b.steps, b.mean)) for b in bands]
    lows = [low if math.isfinite(low) else mean for b in bands for low, mean in zip(b.low, b.mean, strict=True)]
    top, bottom = max(tops), min(lows)
    height = top - bottom or 0.1
    bottom, top = bottom - 0.06 * height, top + 0.12 * height
    first, last = [], []
    for b in bands:
        xs = b.xs(axis)
        i = next((i for i, y in enumerate(b.mean) if y <= top), len(xs) - 1)
        enters = i > 0 and b.mean[i - 1] > top
        first.append(xs[i] - (xs[i] - xs[i - 1]) * (top - b.mean[i]) / (b.mean[i - 1] - b.mean[i]) if enters else xs[i])
        last.append(xs[-1])
    x_low = min(first) - 0.05 * (max(last) - min(first))
    return (max(0.0, x_low), max(last)), (bottom, top)
