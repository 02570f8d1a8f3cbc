"""What a study shows: differences to the reference at equal tokens, wall clock and operations, and how the experts are used.

Every difference is ours minus the reference's, paired by seed, so that below zero is better, and has a 95 % interval
(eval/intervals.py). At equal wall clock or operations the reference is itself trained anew for other lengths, each with its whole
learning rate schedule: what it would have reached with a variant's time lies between two of those final values, along a
straight line in the logarithm of the time. A point of a longer run's curve would flatter us: its learning rate is still high. So
does the straight line a little, because the true curve hangs below it: by a fortieth of the step between two lengths that are a
factor of two apart, for a power law of exponent 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.curves import FLOPS
from eval.facts import LAST_ROWS, balance
from eval.history import Stage, finite
from eval.intervals import Mean, mean_of, paired
from eval.page import duration
from eval.study_records import Study, Variant

TOKENS, TIME, COMPUTE = "tokens", "time", "compute"
EQUAL = 0.005  # relative difference of costs up to which one run of the reference is at equal cost
REACH = 0.03  # and up to which the line through two lengths is drawn on beyond them


@dataclass(frozen=True)
class Difference:
    """A variant minus a reference at equal cost; `bits` per byte and `nats` per token over the seeds, None where there is none."""

    variant: str
    reference: str
    at: str  # equal what: TOKENS, TIME or COMPUTE
    cost: float | None = None  # of the variant: tokens, seconds or operations
    reference_bits: float | None = None  # of the reference at that cost, mean of the seeds
    bits: Mean | None = None
    nats: Mean | None = None
    missing: str = ""  # why there is no figure

    @property
    def word(self) -> str:
        """better, worse, no difference shown, one seed: not judged, or what is missing."""
        if self.bits is None:
            return self.missing or "not measured yet"
        if self.bits.half is None:
            return "one seed: not judged"
        if not self.bits.is_shown:
            return f"no difference shown ({self.bits.n} seeds)"
        return "better" if self.bits.mean < 0 else "worse"

    @property
    def verdict(self) -> str:
        """The word with its bits per byte: better by 0.0412 ± 0.0061."""
        if self.bits is None or not self.bits.is_shown:
            return self.word
        return f"{self.word} by {abs(self.bits.mean):.4f} ± {self.bits.half:.4f}"


@dataclass(frozen=True)
class Use:
    """How a variant's experts are used, means over its runs; on held-out text but for `step_max_vio`."""

    experts: int
    max_vio: float  # busiest expert over its fair share, less one: mean of the layers
    worst_max_vio: float  # and of the worst layer
    load_entropy: float  # over log E, mean of the layers: 1 is balance
    dead: float  # experts of all layers that got no token
    routed: int  # experts of all layers
    router_entropy: float  # of a token, over log E, mean of the layers: 0 has decided
    step_max_vio: float  # of a training step, mean of the layers, at the end of training


def differences(study: Study, at: str) -> list[Difference]:
    """Every other variant against every reference; the main reference's first."""
    return [
        difference(study, variant, reference, at)
        for reference in study.references
        for variant in study.full_length
        if variant is not reference
    ]


def difference(study: Study, variant: Variant, reference: Variant, at: str) -> Difference:
    """Of one variant from one reference at equal tokens, time or operations."""
    names = (variant.name, reference.name, at)
    if at == TOKENS:
        ours, theirs = variant.by_seed("bits"), reference.by_seed("bits")
        shared = sorted(ours.keys() & theirs.keys())
        if variant.tokens and reference.tokens and abs(variant.tokens / reference.tokens - 1) > EQUAL:
            told = f"not covered: {cost_text(variant.tokens, at)}, and {cost_text(reference.tokens, at)} of {reference.name}"
            return Difference(*names, cost=variant.tokens, missing=told)
        return Difference(
            *names,
            cost=variant.tokens,
            reference_bits=float(np.mean([theirs[seed] for seed in shared])) if shared else None,
            bits=paired(ours, theirs),
            nats=paired(variant.by_seed("nats"), reference.by_seed("nats")),
        )
    cost = cost_of(variant, at)
    if cost is None:
        return Difference(*names, missing="the time of a step is not measured" if at == TIME else "not known")
    lengths = [(length, at_cost) for length in study.lengths_of(reference) if (at_cost := cost_of(length, at))]
    lengths = sorted(((length, c) for length, c in lengths if length.done), key=lambda pair: pair[1])
    around = _around(cost, [c for _, c in lengths])
    if not around:
        return Difference(*names, cost=cost, missing=_not_covered(cost, [c for _, c in lengths], reference, at))
    chosen = [lengths[i] for i in around]
    bits, nats = (_interpolated(chosen, cost, what) for what in ("bits", "nats"))
    shared = bits.keys() & variant.by_seed("bits").keys()
    return Difference(
        *names,
        cost=cost,
        reference_bits=float(np.mean([bits[seed] for seed in shared])) if shared else None,
        bits=paired(variant.by_seed("bits"), bits),
        nats=paired(variant.by_seed("nats"), nats),
    )


def leader(study: Study, at: str) -> Difference | None:
    """The lowest difference from the main reference among those that are shown to be better, else among all that have an interval;
    None where there is none."""
    main = study.references[:1]
    found = [difference(study, v, each, at) for each in main for v in study.full_length if v is not each]
    found = [each for each in found if each.bits is not None and each.bits.half is not None]
    return min(found, key=lambda each: (each.word != "better", each.bits.mean), default=None)


def cost_of(variant: Variant, at: str) -> float | None:
    """What a whole training costs: tokens, seconds by the clock, or operations."""
    return {TOKENS: variant.tokens, TIME: variant.seconds, COMPUTE: variant.compute}[at]


def use_of(variant: Variant) -> Use | None:
    """The use of the experts over the variant's finished runs; None for a dense model."""
    found = [use for cell in variant.done if cell.stage and (use := _use(cell.stage))]
    found = [use for use in found if use.experts == found[-1].experts and use.routed == found[-1].routed]
    if not found:
        return None
    means = {
        name: float(np.mean([getattr(use, name) for use in found]))
        for name in ("max_vio", "worst_max_vio", "load_entropy", "dead", "router_entropy", "step_max_vio")
    }
    return Use(experts=found[0].experts, routed=found[0].routed, **means)


def final(variant: Variant, what: str = "bits") -> Mean | None:
    """Its final held-out `bits` per byte or `nats` per token over the seeds."""
    return mean_of(list(variant.by_seed(what).values()))


def cost_text(cost: float, at: str) -> str:
    """A cost as a person reads it."""
    return duration(cost) if at == TIME else FLOPS.text(cost) if at == COMPUTE else f"{cost:,.0f} tokens"


def _around(cost: float, costs: Sequence[float]) -> tuple[int, ...]:
    """Between which of the rising costs it lies, as places; one where that one is equal, none where it is not covered."""
    equal = [i for i, c in enumerate(costs) if abs(cost / c - 1) <= EQUAL]
    if len(costs) == 1 or not costs:
        return tuple(equal)
    if not costs[0] * (1 - REACH) <= cost <= costs[-1] * (1 + REACH):
        return ()
    above = int(np.clip(np.searchsorted(costs, cost), 1, len(costs) - 1))
    return above - 1, above


def _interpolated(lengths: Sequence[tuple[Variant, float]], cost: float, what: str) -> dict[int, float]:
    """By seed: the value at the cost, on the straight line through two lengths over log(cost)."""
    if len(lengths) == 1:
        return lengths[0][0].by_seed(what)
    (short, low), (long, high) = lengths
    part = math.log(cost / low) / math.log(high / low) if high > low else 0.0
    first, second = short.by_seed(what), long.by_seed(what)
    return {seed: first[seed] + part * (second[seed] - first[seed]) for seed in first.keys() & second.keys()}


def _not_covered(cost: float, costs: Sequence[float], reference: Variant, at: str) -> str:
    if not costs:
        return f"no finished run of {reference.name}"
    ends = " to ".join(dict.fromkeys(cost_text(c, at) for c in (costs[0], costs[-1])))
    return f"not covered: it takes {cost_text(cost, at)}, and {reference.name} was trained for {ends}"


def _use(stage: Stage) -> Use | None:
    load = balance(stage)
    if load is None:
        return None
    layers, experts = load.load.shape
    largest = math.log(max(2, experts))
    shares = np.where(load.load > 0, load.load, 1.0)
    entropies = finite((stage.evaluation.get("routing") or {}).get("router_entropy") or [])
    rows = [row["routing"] for row in stage.train if row.get("routing")][-LAST_ROWS:]
    steps = [value for row in rows for value in finite(row.get("max_vio") or [])]
    return Use(
        experts=experts,
        routed=layers * experts,
        max_vio=float(load.max_vio.mean()),
        worst_max_vio=float(load.max_vio.max()),
        load_entropy=float(-(load.load * np.log(shares)).sum(1).mean() / largest),
        dead=load.dead,
        router_entropy=_mean(entropies) / largest,
        step_max_vio=_mean(steps),
    )


def _mean(values: Sequence[float]) -> float:
    good = [value for value in values if math.isfinite(value)]
    return float(np.mean(good)) if good else math.nan
