"""Means of a few seeds, and their doubt, are those of the statistics books."""

from __future__ import annotations

import numpy as np
import pytest

from eval.intervals import band, mean_of, paired, t_quantile


def test_the_quantiles_are_those_of_students_distribution():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 10, 29, 100, 101):
        for p in (0.5, 0.8, 0.975, 0.995):
            assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-9), (p, freedom)


def test_a_paired_difference_and_its_interval_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = {1: 0.91, 2: 0.95, 3: 0.97, 4: 0.93}, {1: 1.0, 2: 1.02, 3: 1.07, 5: 3.0}
    found = paired(ours, theirs)
    seeds = [1, 2, 3]  # those that both have
    interval = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.n == 3 and found.sd == pytest.approx(np.std([-0.09, -0.07, -0.10], ddof=1))


def test_one_seed_has_no_interval_and_shows_nothing():
    single = mean_of([-5.0])
    assert (single.mean, single.sd, single.half, single.is_shown) == (-5.0, None, None, False)
    assert mean_of([]) is None and paired({1: 1.0}, {2: 1.0}) is None


def test_what_a_band_is_by_the_number_of_seeds():
    assert band([1.0]) is None
    assert band([3.0, 1.0]) == (1.0, 3.0)
    three = [1.0, 2.0, 3.0]
    assert band(three) == pytest.approx((2 - mean_of(three).half, 2 + mean_of(three).half))
