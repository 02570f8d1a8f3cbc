"""Curves of one or several runs against what training costs: steps, tokens, operations, seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.charts import Line, legend, line_chart, run_look, smooth
from eval.facts import ceiling, flops_of_token
from eval.history import Stage, finite
from eval.page import count, duration, figure, pair

FEW_DOTS = 30  # evaluations of all runs together, up to which each is marked


@dataclass(frozen=True)
class Axis:
    """A cost of training; `units` are (size, words), smallest first."""

    name: str  # "at equal ..."
    title: str  # "... against ..."
    units: tuple[tuple[float, str], ...]

    def unit(self, largest: float) -> tuple[float, str]:
        """The unit in which `largest` reads well: 1 to 1000 of it."""
        fitting = [unit for unit in self.units if largest >= unit[0]]
        return fitting[-1] if fitting else self.units[0]

    def text(self, value: float) -> str:
        """A value as a person reads it, short."""
        if self.name == "steps":
            return f"{value:,.0f}"
        if self.name == "tokens":
            return count(value)
        if self.name == "time":
            return duration(value)
        size, unit = self.unit(value)
        return f"{value / size:.3g} {unit}"


STEPS = Axis("steps", "optimizer steps", ((1.0, "optimizer steps"),))
TOKENS = Axis(
    "tokens",
    "tokens",
    (
        (1.0, "tokens"),
        (1e3, "thousand tokens"),
        (1e6, "million tokens"),
        (1e9, "billion tokens"),
        (1e12, "trillion tokens"),
    ),
)
FLOPS = Axis(
    "compute",
    "training operations",
    ((1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"), (1e18, "EFLOP"), (1e21, "ZFLOP")),
)
TIME = Axis("time", "time of training", ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days")))
AXES = (STEPS, TOKENS, FLOPS, TIME)


def positions(stage: Stage, rows: list[dict], axis: Axis) -> list[float]:
    """Where each row stands on the axis; NaN where it does not say."""
    key = {"steps": "step", "tokens": "tokens", "compute": "tokens", "time": "train_seconds"}[axis.name]
    found = finite([row.get(key) for row in rows])
    if axis is FLOPS:
        each = flops_of_token(stage)
        return [x * each if each else math.nan for x in found]
    return found


@dataclass
class Curve:
    """One quantity of one run, by row."""

    name: str
    stage: Stage
    rows: list[dict]
    ys: list[float]
    place: int  # among the runs: its colour

    def against(self, axis: Axis) -> tuple[list[float], list[float]]:
        """The finite points, x rising."""
        xs = positions(self.stage, self.rows, axis)
        points = sorted((x, y) for x, y in zip(xs, self.ys, strict=True) if math.isfinite(x) and math.isfinite(y))
        return [x for x, _ in points], [y for _, y in points]

    def at(self, x: float, axis: Axis) -> float:
        """The value at x, between two points by a straight line; NaN outside of what was measured."""
        xs, ys = self.against(axis)
        return float(np.interp(x, xs, ys)) if xs and xs[0] <= x <= xs[-1] else math.nan

    def first_at_or_below(self, y: float, axis: Axis) -> float:
        """Where the curve first comes down to y; NaN if it never does."""
        xs, ys = self.against(axis)
        for i, (x, value) in enumerate(zip(xs, ys, strict=True)):
            if value <= y:
                if i == 0 or ys[i - 1] == value:
                    return x
                return min(x, xs[i - 1] + (x - xs[i - 1]) * (ys[i - 1] - y) / (ys[i - 1] - value))
        return math.nan


def held_out_curve(name: str, stage: Stage, source: str, place: int) -> Curve:
    """Bits per byte of a held-out source at each evaluation."""
    values = [row.get("sources", {}).get(source, {}).get("bits_per_byte") for row in stage.held_out]
    return Curve(name, stage, stage.held_out, finite(values), place)


def training_curve(name: str, stage: Stage, place: int) -> Curve:
    """Training loss, smoothed as in the report of one run."""
    losses = finite([row.get("loss") for row in stage.train])
    if len(losses) > 20:
        losses = smooth(losses, max(5, len(losses) // 30))
    return Curve(name, stage, stage.train, losses, place)


def chart(curves: list[Curve], axis: Axis, label: str, scale: Callable[[float], float] | None = None) -> str:
    """The curves against one axis; an empty text where none has a point."""
    points = [(curve, *curve.against(axis)) for curve in curves]
    largest = max((xs[-1] for _, xs, _ in points if xs), default=0.0)
    size, unit = axis.unit(largest)
    few = sum(len(xs) for _, xs, _ in points) <= FEW_DOTS * len(points)
    lines = []
    for curve, xs, ys in points:
        colour, dash = run_look(curve.place)
        ys = [scale(y) for y in ys] if scale else ys
        lines.append(
            Line(
                curve.name,
                [x / size for x in xs],
                ys,
                colour,
                dash=dash,
                dots=few and len(xs) <= FEW_DOTS,
                legend=False,
            )
        )
    top, _ = ceiling([y for line in lines for y in line.ys])
    return line_chart(
        lines, y_range=(None, top), x_range=(0.0, largest / size), x_label=unit, whole=axis is STEPS, height=210, label=label
    )  # fmt: skip


def against_everything(curves: list[Curve], what: str, caption: str) -> str:
    """Cards with the curves against steps, tokens, operations and time; nothing without a point."""
    shown = [curve for curve in curves if any(map(math.isfinite, curve.ys))]
    pictures = [(axis, chart(shown, axis, f"{what} against {axis.title}")) for axis in AXES]
    cards = [figure(f"Against {axis.title}", picture, "") for axis, picture in pictures if picture]
    if not cards:
        return ""
    names = legend([(curve.name, *_look(curve.place)) for curve in shown]) if len(shown) > 1 else ""
    words = f'<p class="intro">{caption}</p>' if caption else ""
    return f'<div class="group">{words}{names}{"".join(pair(*cards[i : i + 2]) for i in range(0, len(cards), 2))}</div>'


def _look(place: int) -> tuple[str, float, str]:
    colour, dash = run_look(place)
    return colour, 1.0, dash
