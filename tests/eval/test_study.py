"""A study's results: the differences must be those of the runs, their doubt that of the statistics books, and no text HTML."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.charts import Line, band_paths, line_chart
from eval.intervals import band, mean_of, paired, t_quantile
from eval.study import main, write_results
from eval.study_curves import band_of, ends_by_time, held_out_points
from eval.study_numbers import COMPUTE, TIME, TOKENS, Difference, difference, leader, use_of
from eval.study_page import dot_plot, render
from eval.study_records import MOST_CELLS, judged, problems, read_study
from eval.study_tables import at_equal_tokens, verdicts
from model.balance import load_statistics

from .run_folders import Page
from .study_folders import Made, example, figures, make_study

ROOT = Path(__file__).resolve().parents[2]


def change(path: Path, edit) -> None:
    """Rewrites a JSON file: `edit` changes its tree in place."""
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def cell_folder(study: Path, variant: str, seed: int) -> Path:
    return next((study.parent / "cells").glob(f"{variant}-cpu-seed{seed}-*"))


def of(folder: Path, variant: str, at: str, reference: str = "dense"):
    study = read_study(folder)
    return difference(study, study.variant(variant), study.variant(reference), at)


def written(folder: Path) -> tuple[dict, str, Page, str]:
    """(results.json, results.md, the page, its text), checked: valid JSON, nothing loaded but links to runs, no NaN."""
    write_results(folder)
    results = json.loads(
        (folder / "results.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON")
    )
    text, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "results.md"))
    for shown in (text, markdown):
        assert not re.search(r"\b([nN]a[nN]|inf|None)\b", shown), "a NaN or a None is shown"
    page = Page(text)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(load.startswith("./..") for load in page.loads), page.loads
    return results, markdown, page, text


# The statistics.


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


def curve(seconds: float, seed: int) -> float:
    """What a dense model reaches in the tests' world: a straight line over log(time), and something of each seed's own."""
    return 1.0 - 0.1 * math.log2(seconds / 200) + {1: 0.0, 2: 0.2, 3: -0.1}[seed]


def dense_of_lengths(steps: tuple[int, ...]) -> list[Made]:
    """Dense runs of 0.5 s a step; 400 steps are the main ones."""
    made = [Made("dense", {s: curve(200, s) for s in (1, 2, 3)})]
    for n in steps:
        bits = {s: curve(n * 0.5, s) for s in (1, 2, 3)}
        made.append(Made(f"dense-{n}", bits, steps=n, longer=True, of="dense", step_seconds=None))
    return made


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


# What counts, and what is said of what does not.


def test_a_cell_counts_when_its_evaluation_is_of_its_last_step(tmp_path):
    folder = example(tmp_path)
    change(cell_folder(folder, "experts-8", 2) / "evaluation.json", lambda tree: tree.update(step=390))
    study = read_study(folder)
    assert [cell.seed for cell in study.variant("experts-8").done] == [1, 3]
    assert of(folder, "experts-8", TOKENS).bits.n == 2
    assert any("experts-8 is not complete" in text and "seed 2" in text for text in problems(study))


def test_the_figures_of_training_are_no_evaluation(tmp_path):
    """They are of eval.max_tokens of the text."""
    folder = example(tmp_path)
    change(cell_folder(folder, "experts-8", 2) / "evaluation.json", lambda tree: tree.pop("heldout"))
    study = read_study(folder)
    assert [cell.seed for cell in study.variant("experts-8").done] == [1, 3]
    assert "experts-8 is not complete: seed 2 done, but its run has no evaluation of its end." in problems(study)


def test_one_run_is_not_several_seeds(tmp_path):
    folder = example(tmp_path)

    def edit(tree):
        cells = tree["variants"][3]["cells"]
        cells[1]["folder"] = cells[2]["folder"] = cells[0]["folder"]

    change(folder / "study.json", edit)
    assert of(folder, "experts-8", TOKENS).word == "one seed: not judged", "seeds that agree too well"


def test_other_active_parameters_are_named_unless_they_are_meant(tmp_path):
    def said(name, **more):
        made = [Made("dense", {1: 1.0}), Made("moe", {1: 0.9}, more={"active": 1_040_000, **more})]
        return " ".join(problems(read_study(make_study(tmp_path / name, made))))

    assert "moe has +4.0% active parameters against dense" in said("1")
    assert "no equal models" not in said("2", active=1_020_000)
    assert "no equal models" not in said("3", unequal="it is wider")


def test_the_command_is_one_that_a_shell_takes(tmp_path):
    folder = example(tmp_path)
    config = "configs/ablations/experts.yaml"
    assert read_study(folder).command == f"python -m scripts.ablate {config}"
    change(folder / "study.json", lambda tree: tree.update(base="scales/gpu-10m.yaml", overrides=["eval.prompts=[]"]))
    assert read_study(folder).command == (
        f"python -m scripts.ablate {config} 'eval.prompts=[]' --base scales/gpu-10m.yaml"
    )
    change(folder / "study.json", lambda tree: tree.update(config="x; touch y"))
    assert "'x; touch y'" in read_study(folder).command


def test_judged_by_best_source_or_by_all_text_together(tmp_path):
    bits = {1: 1.0}
    named = read_study(make_study(tmp_path / "1", [Made("dense", bits)]))
    assert named.variant("dense").done[0].bits == pytest.approx(1.0)
    whole = read_study(make_study(tmp_path / "2", [Made("dense", bits)], source=None))
    assert whole.variant("dense").done[0].bits == pytest.approx((1.0 * 100 + 2.0 * 50) / 150), "weighed by their bytes"
    assert judged(figures(1.0), "python") == pytest.approx((1.0, 3.5 * math.log(2), 350_000))
    assert judged(figures(1.0), "absent") is None


def test_another_held_out_text_is_a_warning(tmp_path):
    folder = example(tmp_path)
    assert not any("same held-out text" in text for text in problems(read_study(folder)))
    path = cell_folder(folder, "dense", 1) / "evaluation.json"
    change(path, lambda tree: tree["heldout"]["python"].update(bytes=99, bits_per_byte=1.0))
    assert any(
        "not judged by the same held-out text (99, 350,000 bytes)" in text for text in problems(read_study(folder))
    )


def test_partial_results_are_written_and_say_what_is_missing(tmp_path):
    made = [Made("dense", {1: 1.0}), Made("moe", {}, experts=8)]
    folder = make_study(tmp_path, made, clock=False)
    results, markdown, page, _ = written(folder)
    assert "moe is not complete: seed 1 to do, seed 2 to do, seed 3 to do." in results["problems"]
    assert "nothing is compared at equal wall clock" in markdown
    assert "1 of 6 runs are finished" in "".join(page.texts)
    assert (folder / "tokens.svg").is_file() and not (folder / "clock.svg").exists()
    shutil.rmtree(folder.parent / "cells")
    results, *_ = written(folder)
    assert "seed 1 done, but its run is not there" in results["problems"][0]
    assert not results["verdicts"] and not (folder / "tokens.svg").exists(), "an old picture would show what is gone"


def test_all_of_a_whole_study_is_on_its_page(tmp_path):
    folder = example(tmp_path)
    results, markdown, page, text = written(folder)
    shown = "\n".join(page.texts)
    for expected in (
        "At equal wall clock, against dense",
        "Against training operations",
        "Use of the experts",
        "dense-longer",
    ):
        assert expected in shown, f"{expected!r} is missing"
    by_time = next(d for d in results["differences"] if d["variant"] == "experts-8" and d["at"] == "time")
    cell = f"−{-by_time['bits']['mean']:.4f} ± {by_time['bits']['half_width_95']:.4f}"
    assert cell in markdown and cell in shown, "the same figure in JSON, Markdown and on the page"
    assert text.count('class="band"') >= 3 * 5, "every curve has its band"
    assert len(page.loads) == 18, "a link to every run"
    for load in page.loads:
        assert (folder / load).is_dir()


def test_figures_that_markdown_shows_are_a_table(tmp_path):
    folder = example(tmp_path)
    change(folder / "study.json", lambda tree: tree.update(question="a | b <script> `c`\n# not a heading"))
    _, markdown, _, _ = written(folder)
    tables = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1, table
    assert "<script>" not in markdown.replace("\\<script", "") and "\n# not a heading" not in markdown


def test_texts_of_a_strangers_study_are_never_html(tmp_path):
    evil = '"><script>alert(1)</script>&\x01\ud800'
    folder = example(tmp_path)

    def edit(tree):
        tree.update(question=evil, scale=evil, config=evil, commit=evil, study=evil, machine={"device": evil})
        tree["variants"][2].update(name=evil, unequal=evil, set={evil: evil})
        tree["variants"][3]["cells"][0].update(state=evil, commit=evil, folder="javascript:alert(1)")
        tree["variants"][4].update(cells="none", tokens=-1e300, active="many")
        tree["clock"]["seconds"]["dense"] = [None, [1e400, 0, -1, "x"]]

    change(folder / "study.json", edit)
    *_, text = written(folder)
    assert "<script" not in text and "javascript:" not in text


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree.update(compare_with=["nobody"]),
        lambda tree: tree["variants"][1].update(flops_per_token=-1, tokens=-5, active=0),
        lambda tree: tree["variants"][0].update(flops_per_token=-1),
        lambda tree: tree["variants"][0]["cells"][0].update(folder="\ud800"),
        lambda tree: tree["clock"]["seconds"].update(dense=[[5e-324, 1e15]]),
        lambda tree: tree["clock"]["seconds"].update({"experts-8": [[1e15]]}),
    ],
)
def test_odd_numbers_and_names_break_nothing(tmp_path, edit):
    folder = example(tmp_path)
    change(folder / "study.json", edit)
    written(folder)


def test_figures_beyond_all_measure_are_none(tmp_path):
    folder = example(tmp_path)
    path = cell_folder(folder, "dense", 1) / "evaluation.json"
    change(path, lambda tree: tree["heldout"]["python"].update(bytes=1e-300))
    assert [cell.seed for cell in read_study(folder).variant("dense").done] == [2, 3]
    written(folder)


@pytest.mark.parametrize("link", ["../../elsewhere", "../x/../../elsewhere", "{}/elsewhere"])
def test_a_run_elsewhere_on_the_machine_is_not_shown(tmp_path, link):
    folder = example(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    cell_folder(folder, "dense", 1).rename(elsewhere)
    link = link.format(tmp_path)
    change(folder / "study.json", lambda tree: tree["variants"][0]["cells"][0].update(folder=link))
    (folder.parent / "x").mkdir()
    assert (folder / link / "config.yaml").is_file(), "the test looks at another place"
    *_, page, text = written(folder)
    assert "elsewhere" not in text and len(page.loads) == 17


def test_more_runs_than_any_study_has_are_refused(tmp_path):
    folder = example(tmp_path)
    change(folder / "study.json", lambda tree: tree["variants"][0].update(cells=[{"seed": 1}] * (MOST_CELLS + 1)))
    with pytest.raises(ValueError, match=r"10\d\d runs are more than 1000; split the study"):
        read_study(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"variants": []}', '{"variants": [{"set": {}}]}'])
def test_a_folder_without_a_study_is_refused(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match="no study"):
        write_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_the_command_prints_the_tables_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    folder = make_study(tmp_path, dense_of_lengths((800,)))
    monkeypatch.setattr(sys, "argv", ["eval.study", str(folder)])
    assert main() == 0
    said = capsys.readouterr().out
    assert "**At equal tokens, on held-out python**" in said and str(folder / "clock.svg") in said
    command = [sys.executable, "-m", "eval.study", str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "study.json is missing" in refused.stderr


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
