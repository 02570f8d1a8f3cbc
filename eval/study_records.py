"""A study as its folder describes it: study.json, the runs that it names, and each one's held-out figure.

    runs/ablations/NAME/study.json         written by scripts.ablate: variants, seeds, cells, the clock's step times
    runs/ablations/cells/*                 the runs, ordinary run folders that several studies may share

A cell is one run: a variant trained with one seed. It counts as done when its evaluation is that of the last step its config
asks for. Like a run folder, a study may come from a stranger: what does not fit is left out (eval/history.py).
"""

from __future__ import annotations

import math
import posixpath
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.facts import describe_device, skipped_steps, wanted_steps
from eval.history import LARGEST, Stage, read_json, read_stage
from eval.page import is_number

MOST_VARIANTS, MOST_CELLS = 48, 1000  # of a study
NO_TIME = 1e-9  # seconds that no step can take
CELL = {"seed": int, "folder": str, "state": str, "commit": str}
VARIANT = {
    "name": str, "of": str, "longer": bool, "unequal": str, "set": {str: object}, "total": int, "active": int,
    "active_without_router": int, "matmul": int, "flops_per_token": float, "tokens": float, "cells": [CELL],
}  # fmt: skip
CLOCK = {
    "rounds": int, "steps_a_round": int, "threads": int, "machine": {str: object}, "commit": str,
    "seconds": {str: [[float]]}, "tokens_per_step": {str: int},
}  # fmt: skip
STUDY = {
    "study": str, "question": str, "config": str, "base": str, "overrides": [str], "scale": str, "seeds": [int], "compare_with": [str], "tolerance": float,
    "commit": str, "dirty": bool, "machine": {str: object}, "variants": [VARIANT], "clock": CLOCK,
}  # fmt: skip


@dataclass
class Cell:
    """One run of a study."""

    seed: int
    link: str  # the run folder as study.json has it, relative to the study's
    state: str = ""  # as scripts.ablate left it: done, running, to do, failed
    commit: str = ""
    stage: Stage | None = None  # None where the run folder is not there
    bits: float | None = None  # per byte of the judged held-out text, all of it, after the last step
    nats: float | None = None  # per token of it
    judged_bytes: float | None = None  # size of that text

    @property
    def is_done(self) -> bool:
        return self.bits is not None

    @property
    def seconds(self) -> float | None:
        """The run's own count of its training time: of a machine that did other things too."""
        return (self.stage.seconds or None) if self.stage else None


@dataclass
class Variant:
    """A column of the study: one set of settings, trained once a seed. Counts are parameters, None where they are not known."""

    name: str
    of: str = ""  # the variant whose settings these are based on
    longer: bool = False  # the same model trained longer: for comparisons at equal cost alone
    unequal: str = ""  # why it may have other active parameters
    settings: dict = field(default_factory=dict)
    total: int | None = None
    active: int | None = None
    active_without_router: int | None = None
    flops_per_token: float | None = None
    tokens: float | None = None  # of a whole training
    steps: int | None = None  # optimizer steps of a whole training
    ratio: float | None = (
        None  # time of a step over that of the first compare_with variant, the median of the clock's rounds
    )
    ratio_range: tuple[float, float] | None = None  # and their quartiles
    step_seconds: float | None = None  # by the clock
    cells: list[Cell] = field(default_factory=list)

    @property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_done]

    @property
    def seconds(self) -> float | None:
        """Time of a whole training by the clock."""
        return self.steps * self.step_seconds if self.steps and self.step_seconds else None

    @property
    def compute(self) -> float | None:
        """Operations of a whole training."""
        return self.flops_per_token * self.tokens if self.flops_per_token and self.tokens else None

    @property
    def tokens_per_active(self) -> float | None:
        return self.tokens / self.active if self.tokens and self.active else None

    def by_seed(self, what: str) -> dict[int, float]:
        """`bits` or `nats` of the cells that are done."""
        return {cell.seed: value for cell in self.done if is_number(value := getattr(cell, what))}

    def of_source(self, source: str) -> dict[int, float]:
        """Bits per byte of any held-out source, by seed, of the cells that are done."""
        found = {cell.seed: judged(cell.stage.sources(), source) for cell in self.done if cell.stage}
        return {seed: figures[0] for seed, figures in found.items() if figures}


@dataclass
class Study:
    """All that is known of a study; one scale, the base config's, so that no table mixes two."""

    folder: Path
    name: str
    question: str = ""
    config: str = ""  # as it was typed
    base: str = ""  # of the command line, in place of the config's own
    overrides: list[str] = field(default_factory=list)  # of the command line
    scale: str = ""
    seeds: list[int] = field(default_factory=list)
    compare_with: list[str] = field(default_factory=list)
    tolerance: float | None = None  # largest relative difference of active parameters
    commit: str = ""
    dirty: bool = False
    machine: dict = field(default_factory=dict)
    clock: dict = field(default_factory=dict)
    source: str = ""  # the held-out source by which is judged; empty: all of them together
    variants: list[Variant] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What runs it, or goes on with it, as a shell takes it; empty where study.json does not say."""
        base = ["--base", self.base] if self.base else []
        words = ["python", "-m", "scripts.ablate", self.config, *self.overrides, *base]
        return shlex.join(words) if self.config else ""

    def variant(self, name: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.name == name), None)

    @property
    def references(self) -> list[Variant]:
        """The variants that the others are compared with, the main one first."""
        return [variant for name in self.compare_with if (variant := self.variant(name))]

    @property
    def full_length(self) -> list[Variant]:
        """The variants of the comparison at equal tokens."""
        return [variant for variant in self.variants if not variant.longer]

    def lengths_of(self, reference: Variant) -> list[Variant]:
        """The reference and its longer runs."""
        return [reference, *(v for v in self.variants if v.longer and v.of == reference.name)]


def read_study(folder: str | Path) -> Study:
    """Reads a study and its runs. ValueError where there is no study.json with variants in it, or more than MOST_VARIANTS
    or MOST_CELLS."""
    folder = Path(folder)
    tree = read_json(folder / "study.json", STUDY)
    variants = [variant for variant in tree.get("variants") or [] if variant.get("name")]
    if not variants:
        raise ValueError(
            f"{folder}: no study (study.json is missing or names no variants); give a folder that python -m scripts.ablate wrote, "
            "such as runs/ablations/NAME"
        )
    if len(variants) > MOST_VARIANTS:
        raise ValueError(f"{folder}: {len(variants)} variants are more than {MOST_VARIANTS}; split the study")
    if (n_cells := sum(len(entry.get("cells") or ()) for entry in variants)) > MOST_CELLS:
        raise ValueError(f"{folder}: {n_cells} runs are more than {MOST_CELLS}; split the study")
    study = Study(
        folder=folder,
        name=tree.get("study") or folder.resolve().name,
        question=tree.get("question", ""),
        config=tree.get("config", ""),
        base=tree.get("base", ""),
        overrides=[text for text in tree.get("overrides") or [] if text],
        scale=tree.get("scale", ""),
        seeds=[seed for seed in tree.get("seeds") or [] if seed is not None],
        compare_with=[name for name in tree.get("compare_with") or [] if name] or [variants[0]["name"]],
        tolerance=tree.get("tolerance"),
        commit=tree.get("commit", ""),
        dirty=tree.get("dirty", False),
        machine=tree.get("machine") or {},
        clock=tree.get("clock") or {},
    )
    for entry in variants:
        cells = [_read_cell(folder, cell) for cell in entry.get("cells") or [] if "seed" in cell]
        counts = ("total", "active", "active_without_router", "flops_per_token", "tokens")
        known = {key: value for key in counts if (value := entry.get(key)) and value >= 1}
        study.variants.append(
            Variant(
                name=entry["name"],
                of=entry.get("of", ""),
                longer=entry.get("longer", False),
                unequal=entry.get("unequal", ""),
                settings=entry.get("set") or {},
                steps=next(filter(None, map(_steps, cells)), None),
                cells=cells,
                **known,
            )
        )
    _judge(study)
    _read_clock(study)
    return study


def judged(sources: dict[str, dict], source: str) -> tuple[float, float, float] | None:
    """(bits per byte, nats per token, bytes) of one held-out source, or, without a name, of all sources' targets together."""
    chosen = [sources.get(source, {})] if source else list(sources.values())
    if not chosen or not all(
        is_number(f.get(key)) and f[key] > 0 for f in chosen for key in ("loss", "tokens", "bytes")
    ):
        return None
    nats = math.fsum(figures["loss"] * figures["tokens"] for figures in chosen)
    n_bytes = sum(figures["bytes"] for figures in chosen)
    found = nats / math.log(2) / n_bytes, nats / sum(figures["tokens"] for figures in chosen), n_bytes
    return found if max(found) <= LARGEST else None


def problems(study: Study) -> list[str]:
    """What a reader must know before believing a difference: what is missing, and what was not the same for all."""
    found = []
    for variant in study.variants:
        missing = [cell for cell in variant.cells if not cell.is_done]
        if missing or not variant.cells:
            states = ", ".join(f"seed {cell.seed} {_lacks(cell)}" for cell in missing) or "no run"
            found.append(f"{variant.name} is not complete: {states}.")
    cells = [cell for variant in study.variants for cell in variant.done]
    sizes = sorted({cell.judged_bytes for cell in cells})
    if len(sizes) > 1:
        shown = ", ".join(f"{size:,.0f}" for size in sizes)
        found.append(
            f"The runs were not judged by the same held-out text ({shown} bytes): the differences mean nothing."
        )
    devices = sorted({describe_device(cell.stage) for cell in cells if cell.stage} - {""})
    if len(devices) > 1:
        found.append(f"The runs were trained on different machines ({', '.join(devices)}).")
    for variant in study.variants:
        if skipped := sum(skipped_steps(cell.stage) or 0 for cell in variant.done if cell.stage):
            found.append(
                f"{variant.name}: {skipped:,} training steps were skipped as bad, over its {len(variant.done)} runs."
            )
    if few := [v.name for v in study.full_length if v.tokens_per_active and v.tokens_per_active < 20]:
        found.append(f"Fewer than 20 tokens per active parameter, where little is settled: {', '.join(few)}.")
    first = study.references[0] if study.references else None
    for variant in study.full_length if first and first.active and study.tolerance is not None else ():
        off = variant.active / first.active - 1 if variant.active else 0.0
        if abs(off) > study.tolerance and not variant.unequal:
            found.append(f"{variant.name} has {off:+.1%} active parameters against {first.name}: no equal models.")
    found += [f"{v.name} has other active parameters on purpose: {v.unequal}." for v in study.variants if v.unequal]
    if not any(variant.step_seconds for variant in study.variants):
        found.append("The time of a step has not been measured yet, so nothing is compared at equal wall clock.")
    return found


def _lacks(cell: Cell) -> str:
    """Why a cell is not done, after "seed 1"."""
    if cell.state != "done":
        return cell.state or "not there"
    return "done, but its run is not there" if cell.stage is None else "done, but its run has no evaluation of its end"


def _read_cell(folder: Path, entry: dict) -> Cell:
    cell = Cell(entry["seed"], entry.get("folder", ""), entry.get("state", ""), entry.get("commit", ""))
    try:
        cell.stage = read_stage(folder / cell.link) if _is_beside(cell.link) else None
    except (ValueError, OSError):  # no run yet, one that was cleared away, or no path at all
        cell.stage = None
    if cell.stage and cell.stage.tree.get("seed", cell.seed) != cell.seed:
        cell.stage = None  # one run for several seeds would look like seeds that agree
    return cell


def _steps(cell: Cell) -> int | None:
    """Optimizer steps of its whole training."""
    steps = wanted_steps(cell.stage) if cell.stage else None
    return steps if steps and steps > 0 else None


def _is_beside(link: str) -> bool:
    """Whether it leads into the study's folder or one beside it: a stranger's study shows no other run of this machine."""
    way = posixpath.normpath(link)
    return link != "" and not way.startswith(("/", "../..")) and way != ".."


def _judge(study: Study) -> None:
    """Gives every cell that is done its figures, by the source that most of the configs name."""
    stages = [cell.stage for variant in study.variants for cell in variant.cells if cell.stage]
    named = [stage.section("eval").get("best_source") or "" for stage in stages]
    study.source = max(named, key=named.count, default="")
    for variant in study.variants:
        for cell in variant.cells:
            if cell.stage is None or cell.stage.evaluation.get("step") != (_steps(cell) or math.nan):
                continue
            measured = cell.stage.evaluation.get("heldout") or {}  # of all the text, as training's own figures are not
            if found := judged(measured, study.source):
                cell.bits, cell.nats, cell.judged_bytes = found


def _read_clock(study: Study) -> None:
    """Step times from the clock's rounds: within a round the variants took turns, so its ratios hold on a machine that drifts."""
    times = {
        name: {
            (i, j): s
            for i, rounds in enumerate(lists)
            for j, s in enumerate(rounds or ())
            if is_number(s) and s > NO_TIME
        }
        for name, lists in (study.clock.get("seconds") or {}).items()
    }
    main = times.get(study.references[0].name if study.references else "", {})
    for variant in study.variants:
        own = times.get(variant.name) or times.get(variant.of if variant.longer else "") or {}
        ratios = [own[at] / main[at] for at in own if at in main]
        if ratios:
            low, variant.ratio, high = map(float, np.quantile(ratios, (0.25, 0.5, 0.75)))
            variant.ratio_range = low, high
            variant.step_seconds = variant.ratio * float(np.median(list(main.values())))
        elif own:
            variant.step_seconds = float(np.median(list(own.values())))
