"""Which runs of a study count, and what is shown of partial, odd and hostile ones: no text of theirs is HTML, nothing is invented."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval.study import main, write_results
from eval.study_numbers import TOKENS
from eval.study_records import MOST_CELLS, judged, problems, read_study

from .study_folders import Made, cell_folder, change, dense_of_lengths, example, figures, make_study, of, written

ROOT = Path(__file__).resolve().parents[2]


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
