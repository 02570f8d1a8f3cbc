"""A study's results: the differences must be those of the runs, their doubt that of the statistics books, and no text HTML."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.charts import Line, band_paths, line_chart
from eval.intervals import band, mean_of
from eval.study_curves import band_of, ends_by_time, held_out_points
from eval.study_numbers import COMPUTE, TIME, TOKENS, Difference, leader, use_of
from eval.study_page import dot_plot, render
from eval.study_records import read_study
from eval.study_tables import at_equal_tokens, tables, verdicts
from model.balance import load_statistics

from .study_folders import Made, cell_folder, change, curve, dense_of_lengths, example, figures, make_study, of, written

ROOT = Path(__file__).resolve().parents[2]


# Equal tokens.


def test_equal_tokens_compares_seed_by_seed(tmp_path):
    # What the seed does to both, far more than the difference, cancels.
    dense, moe = {1: 1.0, 2: 1.5, 3: 0.7}, {1: 0.951, 2: 1.450, 3: 0.649}
    folder = make_study(tmp_path, [Made("dense", dense), Made("moe", moe, experts=8)])
    found = of(folder, "moe", TOKENS)
    assert found.bits.mean == pytest.approx(-0.05) and found.bits.half < 0.003
    assert found.verdict.startswith("better by 0.0500 ± 0.00")
    assert found.nats.mean == pytest.approx(-0.05 * math.log(2) * 3.5), "bytes per token turn bits per byte into nats"


@pytest.mark.parametrize(
    ("moe", "word"),
    [
        ({1: 0.95, 2: 0.96, 3: 0.94}, "better"),
        ({1: 1.05, 2: 1.06, 3: 1.04}, "worse"),
        ({1: 0.95, 2: 1.06, 3: 1.00}, "no difference shown (3 seeds)"),
        ({1: 0.10}, "one seed: not judged"),
        ({}, "not measured yet"),
    ],
)
def test_the_verdict_is_plain(tmp_path, moe, word):
    folder = make_study(tmp_path, [Made("dense", {1: 1.0, 2: 1.001, 3: 0.999}), Made("moe", moe, experts=8)])
    assert of(folder, "moe", TOKENS).word == word


def test_a_longer_run_is_never_compared_at_equal_tokens(tmp_path):
    folder = example(tmp_path)
    table = at_equal_tokens(read_study(folder))
    assert [row[0] for row in table.rows] == ["dense", "experts-4", "experts-8", "experts-16", "experts-32"]
    results, markdown, _, _ = written(folder)
    assert "dense-longer at equal tokens" not in markdown
    assert not [d for d in results["differences"] if d["variant"] == "dense-longer"]


def test_every_reference_has_its_own_differences(tmp_path):
    variants = [Made(name, {1: b, 2: b + 0.001, 3: b - 0.001}) for name, b in (("dense", 1.0), ("a", 0.9), ("b", 0.8))]
    folder = make_study(tmp_path, variants, compare_with=("dense", "a"))
    assert of(folder, "b", TOKENS, "a").bits.mean == pytest.approx(-0.1)
    assert of(folder, "b", TOKENS).bits.mean == pytest.approx(-0.2)
    head = at_equal_tokens(read_study(folder)).head
    assert [h for h in head if h.startswith("against")] == [
        "against dense, bits per byte",
        "against dense, nats per token",
        "against a, bits per byte",
        "against a, nats per token",
    ]


def test_other_tokens_are_no_equal_tokens(tmp_path):
    made = [Made("dense", {1: 1.0}), Made("moe", {1: 0.5}, more={"tokens": 4_000_000})]
    found = of(make_study(tmp_path, made, seeds=(1,)), "moe", TOKENS)
    assert found.bits is None
    assert found.verdict == "not covered: 4,000,000 tokens, and 3,276,800 tokens of dense"


def test_the_leader_is_the_lowest_that_is_shown_to_be_better(tmp_path):
    dense = {1: 1.0, 2: 1.0, 3: 1.0}
    noisy = Made("noisy", {1: 0.80, 2: 1.00, 3: 0.90}, experts=8)  # lower by 0.1, and nobody knows
    sure = Made("sure", {1: 0.950, 2: 0.951, 3: 0.949}, experts=8)
    study = read_study(make_study(tmp_path / "1", [Made("dense", dense), noisy, sure]))
    assert leader(study, TOKENS).variant == "sure"
    assert "At equal tokens, sure beats dense by 0.050 ± 0.002 bits per byte (3 seeds)" in render(study)
    study = read_study(make_study(tmp_path / "2", [Made("dense", dense), noisy]))
    assert "no variant is shown to be better than dense; lowest is noisy" in render(study)


# Equal wall clock and operations.


@pytest.mark.parametrize("step_seconds", [0.55, 0.8, 1.3, 2.0])
def test_a_variant_that_is_as_good_as_a_dense_run_of_its_time_shows_no_difference(tmp_path, step_seconds):
    bits = {s: curve(400 * step_seconds, s) for s in (1, 2, 3)}
    made = [*dense_of_lengths((800, 1600)), Made("moe", bits, experts=8, step_seconds=step_seconds)]
    found = of(make_study(tmp_path, made), "moe", TIME)
    assert found.cost == pytest.approx(400 * step_seconds)
    assert found.bits.mean == pytest.approx(0.0, abs=1e-9), "the reference is interpolated in log(time), seed by seed"
    assert found.reference_bits == pytest.approx(np.mean(list(bits.values())))


def test_equal_time_is_covered_by_the_lengths_there_are_and_a_little_beyond(tmp_path):
    bits = dict.fromkeys((1, 2, 3), 0.5)
    paces = {"near": 0.99, "far": 1.1, "beyond": 1.02}
    made = [*dense_of_lengths((800,)), *(Made(n, bits, experts=8, step_seconds=p) for n, p in paces.items())]
    folder = make_study(tmp_path, made)
    assert of(folder, "near", TIME).bits is not None
    beyond = of(folder, "beyond", TIME)  # 2 % longer than the longest: the line goes on
    assert beyond.reference_bits == pytest.approx(np.mean([curve(408, s) for s in (1, 2, 3)]))
    far = of(folder, "far", TIME)
    assert far.bits is None and "not covered" in far.verdict and "3 min 20 s to 6 min 40 s" in far.verdict


def test_with_one_length_only_equal_costs_are_compared(tmp_path):
    bits = dict.fromkeys((1, 2, 3), 0.5)
    made = [Made("dense", bits), Made("same", bits, step_seconds=0.501), Made("slower", bits, step_seconds=0.51)]
    folder = make_study(tmp_path, made)
    assert of(folder, "same", TIME).bits is not None
    assert of(folder, "slower", TIME).bits is None


def test_a_machine_that_drifts_hits_all_variants_alike(tmp_path):
    made = [Made("dense", {1: 1.0}), Made("moe", {1: 0.9}, experts=8, step_seconds=0.6)]
    steady = read_study(make_study(tmp_path / "1", made)).variant("moe").ratio
    drifting = make_study(tmp_path / "2", made, pace=lambda round: 1 + 0.3 * round)
    assert steady == pytest.approx(1.2)
    assert read_study(drifting).variant("moe").ratio == pytest.approx(1.2)

    def slow(tree):  # some of the moe's steps, and some of the dense model's, hit a busy moment
        rounds = tree["clock"]["seconds"]
        for name, at in (("moe", (0, 1, 2)), ("dense", (9, 10, 11))):
            for i in at:
                rounds[name][0][i] *= 5

    change(drifting / "study.json", slow)
    assert read_study(drifting).variant("moe").ratio == pytest.approx(1.2), "the median of the rounds' ratios"


def test_longer_runs_share_the_step_time_of_their_variant(tmp_path):
    study = read_study(make_study(tmp_path, dense_of_lengths((800,))))
    assert study.variant("dense-800").step_seconds == pytest.approx(0.5)
    assert study.variant("dense-800").seconds == pytest.approx(400)


def test_equal_operations_count_what_a_token_costs(tmp_path):
    bits = dict.fromkeys((1, 2, 3), 0.9)
    moe = Made("moe", bits, experts=8, more={"flops_per_token": 9_000_000})  # the dense model's are 6,000,000
    folder = make_study(tmp_path, [*dense_of_lengths((800,)), moe])
    expected = {s: curve(300, s) for s in (1, 2, 3)}  # half as many again: as 300 seconds are to 200
    assert of(folder, "moe", COMPUTE).reference_bits == pytest.approx(np.mean(list(expected.values())))


def test_the_dotted_line_goes_through_the_ends_of_the_references_curves(tmp_path):
    study = read_study(make_study(tmp_path, dense_of_lengths((800, 1600))))
    ends = ends_by_time(study, study.variant("dense"), held_out_points(study))
    for seconds in (200, 400, 800):
        at = next(i for i, s in enumerate(ends.seconds) if s == pytest.approx(seconds))
        assert ends.mean[at] == pytest.approx(np.mean([curve(seconds, s) for s in (1, 2, 3)]))
    assert ends.seconds[0] == pytest.approx(200) and ends.seconds[-1] == pytest.approx(800)


def test_of_two_references_nothing_is_said_twice(tmp_path):
    """A second reference of one length has no table of empty times, and its difference to the first is said once."""
    moe = {
        name: Made(name, {s: curve(300, s) + at for s in (1, 2, 3)}, experts=8, step_seconds=0.75)
        for name, at in (("a", -0.05), ("b", 0.03))
    }
    folder = make_study(tmp_path, [*dense_of_lengths((800,)), *moe.values()], compare_with=("dense", "a"))
    study = read_study(folder)
    titles = [table.title for table in tables(study)]
    assert "At equal wall clock, against dense" in titles and "At equal tokens, on held-out python" in titles
    assert "At equal wall clock, against a" in titles, "b takes just the time of a"
    said = [
        (s.split(" at equal ")[0], s.split(" at equal ")[1].split(" ")[0], s.split(" than ")[1].split(":")[0])
        for s in verdicts(study)
    ]
    assert said.count(("a", "tokens", "dense")) == 1 and ("dense", "tokens", "a") not in said
    assert said.count(("b", "tokens", "a")) == 1 and len(said) == len(set(said))
    change(folder / "study.json", lambda tree: tree["clock"]["seconds"].update(b=[[0.9] * 15]))
    titles = [table.title for table in tables(read_study(folder))]
    assert "At equal wall clock, against a" not in titles and "At equal wall clock, against dense" in titles


# The experts, and the bands.


def test_the_use_of_the_experts_is_that_of_their_load(tmp_path):
    folder = make_study(tmp_path, [Made("dense", {1: 1.0}), Made("moe", {1: 0.9}, experts=4)], seeds=(1,))
    counts = torch.tensor([[10, 0, 30, 60], [25, 25, 25, 25], [70, 10, 10, 10]])
    load = (counts / 100).tolist()
    entropy = [0.5, 1.0, 0.75]
    routing = {"layers": [1, 2, 3], "load": load, "router_entropy": entropy}
    change(cell_folder(folder, "moe", 1) / "evaluation.json", lambda tree: tree.update(routing=routing))
    study = read_study(folder)
    use, expected = use_of(study.variant("moe")), load_statistics(counts)
    assert use.max_vio == pytest.approx(expected["max_vio"].mean().item())
    assert use.worst_max_vio == pytest.approx(expected["max_vio"].max().item())
    assert use.load_entropy == pytest.approx(expected["load_entropy"].mean().item())
    assert (use.dead, use.routed) == (expected["dead"].sum().item(), 12)
    assert use.router_entropy == pytest.approx(np.mean(entropy) / math.log(4))
    assert use_of(study.variant("dense")) is None


def test_a_mean_curve_has_the_steps_that_all_its_runs_have(tmp_path):
    folder = make_study(tmp_path, [Made("dense", {1: 1.0, 2: 1.2, 3: 1.4})])
    path = cell_folder(folder, "dense", 3) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["kind"] == "train" or row["step"] > 200))
    study = read_study(folder)
    found = band_of(study.variant("dense"), held_out_points(study))
    assert found.steps[0] == 220 and found.steps[-1] == 400
    assert found.mean[-1] == pytest.approx(1.2)
    assert (found.low[-1], found.high[-1]) == pytest.approx(band([1.0, 1.2, 1.4]))


def test_curves_measured_on_a_sample_end_at_the_figures_of_the_whole_text(tmp_path):
    """Training measures a part of the text, here one that is harder by 0.08 bits per byte, and by 0.06 in one run."""
    folder = make_study(tmp_path, [Made("dense", {1: 1.0, 2: 1.2, 3: 1.4})])
    assert "Training measures a part of it" not in render(read_study(folder))
    harder = {1: 0.08, 2: 0.08, 3: 0.06}
    first = {}
    for seed, more in harder.items():
        path = cell_folder(folder, "dense", seed) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in (row for row in rows if row["kind"] == "held_out"):
            first.setdefault(seed, row["sources"]["python"]["bits_per_byte"])
            row["sources"] = figures(row["sources"]["python"]["bits_per_byte"] + more)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (
        cell_folder(folder, "dense", 1) / "evaluation.json"
    ).unlink()  # a run that is not done: no figure of the whole text
    study = read_study(folder)
    points = held_out_points(study)
    ours = {cell.seed: points(cell) for cell in study.variant("dense").cells}
    assert ours[2][400] == pytest.approx(1.2) and ours[3][400] == pytest.approx(1.4)
    assert ours[2][20] == pytest.approx(first[2]), "all of a run's points are moved alike"
    assert ours[1][400] == pytest.approx(1.0 + 0.08 - (0.08 + 0.06) / 2)
    assert "moved by −0.080 to −0.060" in render(study)


def test_a_band_is_drawn_where_its_numbers_are_and_breaks_at_gaps():
    line = Line("a", [0, 10], [2.0, 2.0], low=[1.0, 1.0], high=[3.0, 2.0])
    chart = line_chart([line], y_range=(0.0, 4.0))
    assert 'd="M0.0 250.0L1000.0 500.0L1000.0 750.0L0.0 750.0Z"' in chart
    gap = [(0, 1.0), (1, 1.0), (2, math.nan), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert [path.count("L") for path in band_paths(gap, gap)] == [3, 5]
    assert band_paths(gap[:1], gap[:1]) == []


def test_a_dot_without_an_interval_is_a_ring(tmp_path):
    """A dot without a bar would look like one whose bar is too short to be seen."""
    for seeds, looks in (((1,), "border:2px"), ((1, 2), "background:")):
        bits = {seed: 1.0 + 0.01 * seed for seed in seeds}
        made = [Made("dense", bits), Made("moe", {seed: 0.9 * b for seed, b in bits.items()})]
        page = render(read_study(make_study(tmp_path / str(len(seeds)), made, seeds=seeds, clock=False)))
        assert set(re.findall(r'<em style="left:[\d.]+%;(\w+:(?:2px)?)', page)) == {looks}


@pytest.mark.parametrize("ends", [(-0.45, 0.31), (-0.05, -0.04), (1e-5, 9e-5), (-3.0, 400.0), (0.0, 0.0)])
def test_a_dot_plot_has_a_scale(ends):
    found = [Difference("moe", "dense", TOKENS, bits=mean_of([end])) for end in ends]
    found = dot_plot(found, found, {})
    ticks = re.findall(r'<span style="left:[-\d.]+%">([^<]+)</span>', found)
    assert len(ticks) == len(set(ticks)) > 2 and "0" in ticks, "one number alone says nothing of how long a bar is"


def test_sentences_say_which_way_and_how_sure(tmp_path):
    made = [
        Made("dense", {1: 1.0, 2: 1.01, 3: 1.02}),
        Made("good", {1: 0.95, 2: 0.961, 3: 0.969}),
        Made("equal", {1: 1.01, 2: 1.0, 3: 1.02}),
    ]
    said = verdicts(read_study(make_study(tmp_path, made)))
    assert said[0].startswith("good at equal tokens (3,276,800 tokens): better than dense: −0.0500 ± ")
    assert said[1].startswith("equal at equal tokens (3,276,800 tokens): no difference from dense shown (+0.0000 ± ")
