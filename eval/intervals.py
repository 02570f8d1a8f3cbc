"""Means over a few seeds, with the 95 % interval that so few measurements allow (Student's t).

Two variants are compared seed by seed: the differences of runs that saw the same rows in the same order are what is averaged,
so that what the seed does to both cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of some measurements, in their unit. `sd` and `half` are None for a single one."""

    values: tuple[float, ...]
    mean: float
    sd: float | None  # sample standard deviation, of n - 1
    half: float | None  # half the width of the 95 % interval of the mean

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return None if self.half is None else self.mean + self.half

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out zero: a difference is then more than the noise of the seeds."""
        return self.half is not None and abs(self.mean) > self.half


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean with its interval: mean ± t(0.975, n - 1) * sd / sqrt(n). None without values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(tuple(values), mean, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Mean(tuple(values), mean, sd, t_quantile((1 + CONFIDENCE) / 2, n - 1) * sd / math.sqrt(n))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """Ours minus theirs for every seed that both have; None where they share no seed."""
    return mean_of([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def band(values: Sequence[float]) -> tuple[float, float] | None:
    """What a picture shows around a mean: the 95 % interval from three values, smallest to largest of two; None for fewer."""
    found = mean_of(values)
    if found is None or found.half is None:
        return None
    return (min(values), max(values)) if len(values) == 2 else (found.mean - found.half, found.mean + found.half)


@functools.lru_cache
def t_quantile(p: float, freedom: int) -> float:
    """The t below which Student's distribution of `freedom` (at least 1) degrees has the share p, 0.5 <= p < 1; by bisection."""
    assert 0.5 <= p < 1.0 and freedom >= 1, (p, freedom)
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom)), which is bounded
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_between(middle, freedom) < 2 * p - 1 else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _share_between(angle: float, freedom: int) -> float:
    """The probability of [-t, t] at t = tan(angle) * sqrt(freedom): a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cos, sin = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for k in range(2 if odd else 1, freedom, 2):  # the next term is this one times k / (k + 1) * cos²
        total += term
        term *= k / (k + 1) * cos * cos
    return 2 / math.pi * (angle + sin * total) if odd else sin * total
