"""The report: it must be right about resumed runs, silent about what is missing, and never run a model's text as HTML."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.charts import Line, line_chart, nice_ticks, png, share_rgb, smooth
from eval.history import read_lineage, read_stage
from eval.page import count, duration
from eval.report import write_report

from .run_folders import LAYERS, Page, make_run


def report(folder: Path) -> tuple[Page, str]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    without_pictures = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert not re.search(r"\bnan\b", without_pictures, re.IGNORECASE), "a NaN reached the page"
    page = Page(text)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads), page.loads
    assert not {"script", "link", "iframe"} & set(page.tags)
    return page, text


def headings(page: Page) -> str:
    return "\n".join(page.texts)


def test_a_fine_tuned_run_shows_both_stages(tmp_path):
    make_run(tmp_path / "base", steps=100)
    sft = make_run(tmp_path / "chat", chat=True, steps=60, init_from="runs/base/checkpoints/step-00000100")
    page, _ = report(sft)
    words = headings(page)
    for expected in (
        "Loss of base",
        "Loss of chat",
        "bbe",
        "exercises",
        "small sums",
        "What each expert learned",
        "fine-tuning",
    ):
        assert expected in words, f"{expected!r} is missing"
    assert "What is 17 + 25?" in words and "In the beginning" in words
    assert page.tags.count("img") == len(LAYERS), "one load-over-training picture a layer"
    assert page.tags.count("figure") > 10


def test_text_of_models_and_configs_is_never_html(tmp_path):
    evil = '</pre><script>alert(1)</script><img src="http://x/y" onerror=alert(2)>"\' & ça'
    run = make_run(tmp_path / "run", chat=True, steps=20)
    (run / "samples.jsonl").write_text(json.dumps({"step": 10, "prompt": evil, "text": evil}) + "\n")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["routing"]["typical_tokens"][0][0] = [{"token": evil, "lift": 2.0, "count": 9}]
    evaluation["heldout"] = {evil: next(iter(evaluation["heldout"].values()))}
    task = {"score": 1.0, "chance": 0.0, "trivial": 0.0, "n": 1, "trivial_name": evil, "metric": evil}
    evaluation["tasks"] = {
        evil: {**task, "examples": [{"question": evil, "answer": evil, "wanted": evil, "score": 0.0}]}
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["name"] = config["data"]["sources"][0]["name"] = evil
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "run.json").write_text(json.dumps({"machine": {"device": evil, evil: [evil]}}))
    (run / "stages.json").write_text(json.dumps({evil: 3}))

    page, text = report(run)  # report() refuses scripts and anything loaded
    assert "<script" not in text
    assert sum(evil in piece for piece in page.texts) >= 8, "the text itself should be readable on the page"


def test_the_last_row_of_a_step_wins_and_a_torn_line_is_skipped(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = {**next(row for row in rows if row["kind"] == "train" and row["step"] == 10), "loss": 3.25}
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 15, "lo\n' + json.dumps(again) + '\n{"kind": "tra')
    stage = read_stage(run)
    assert [row["step"] for row in stage.train] == sorted({row["step"] for row in rows if row["kind"] == "train"})
    assert [row["loss"] for row in stage.train if row["step"] == 10] == [3.25]
    report(run)


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json"])
def test_a_missing_file_is_a_missing_part(tmp_path, missing):
    run = make_run(tmp_path / "run", steps=40)
    (run / missing).unlink()
    report(run)


@pytest.mark.parametrize("name", ["evaluation.json", "run.json", "metrics.jsonl"])
def test_a_number_that_python_does_not_read_is_a_missing_part(tmp_path, name):
    run = make_run(tmp_path / "run", steps=40)
    (run / name).write_text(f'{{"step": {"9" * 5000}}}')
    report(run)


def test_one_row_is_enough(tmp_path):
    run = make_run(tmp_path / "run", steps=5, evaluated=False)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    page, _ = report(run)
    assert "Load of every expert at the end of training" in headings(page)


def test_nothing_but_a_config_is_enough(tmp_path):
    run = make_run(tmp_path / "run", steps=5, evaluated=False)
    for name in ("metrics.jsonl", "samples.jsonl", "run.json"):
        (run / name).unlink()
    page, _ = report(run)
    assert "0 of 5 steps are done" in headings(page)


def test_a_dense_run_shows_no_experts(tmp_path):
    page, _ = report(make_run(tmp_path / "run", experts=0, steps=40))
    assert "5 dense layers" in headings(page)
    assert "What the experts do" not in headings(page)


def test_many_experts_become_a_picture(tmp_path):
    page, text = report(make_run(tmp_path / "run", experts=64, steps=200, log_every=2, layers=[1, 2, 3, 4]))
    assert page.tags.count("img") == 5, "final load and one a layer"
    assert len(text) < 600_000


def test_numbers_that_are_none_or_nan_leave_gaps(tmp_path):
    run = make_run(tmp_path / "run", steps=40)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"loss": math.nan, "tokens_per_second": None, "grad_norm": math.inf}
    rows[2]["loss"] = None
    rows[3]["routing"]["max_vio"] = []
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        write_report(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_runs_that_start_from_each_other_end(tmp_path):
    make_run(tmp_path / "a", steps=10, init_from=str(tmp_path / "b"))
    b = make_run(tmp_path / "b", steps=10, init_from=str(tmp_path / "a"))
    assert [stage.name for stage in read_lineage(b)] == ["a", "b"]


def test_stages_of_one_name_are_each_counted(tmp_path):
    first = make_run(tmp_path / "1/same", steps=100)
    second = make_run(tmp_path / "2/same", steps=60, init_from=str(first))
    page, _ = report(make_run(tmp_path / "3/same", steps=40, init_from=str(second)))
    assert page.texts.count("training same") == 3 and page.texts.count("evaluation of same") == 3


def test_a_checkpoint_without_its_run_is_no_parent(tmp_path):
    run = make_run(tmp_path / "run", chat=True, steps=10, init_from="runs/gone/checkpoints/step-00000100")
    assert len(read_lineage(run)) == 1
    report(run)


def test_a_png_says_what_its_pixels_are():
    image = png(np.array([[[255, 0, 0], [0, 255, 0]]], dtype=np.uint8))
    width, height = struct.unpack(">II", image[16:24])
    start = image.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", image[start - 8 : start - 4])
    assert (width, height) == (2, 1)
    assert zlib.decompress(image[start : start + length]) == b"\0\xff\0\0\0\xff\0"


def test_the_colour_of_a_load_is_paper_at_the_fair_share_and_never_the_same_for_more_and_less():
    less, fair, more, dead = share_rgb(np.array([0.5, 1.0, 2.0, 0.0])).astype(int)
    assert abs(fair - fair.mean()).max() < 8, f"the fair share is tinted: {fair}"
    assert less[2] > less[0] and more[0] > more[2], "blue is less, orange is more"
    assert (dead == share_rgb(np.array(0.25))).all()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.31, 8.2), (-3, 1e-9), (1200, 1201), (0, 123456)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_smoothing_keeps_a_constant_and_leaves_out_gaps():
    assert smooth([2.0, math.nan, 2.0, 2.0], 3) == [2.0, 2.0, 2.0, 2.0]


def test_a_line_is_drawn_where_its_numbers_are():
    chart = line_chart([Line("a", [0, 10], [1.0, 3.0])], y_range=(0.0, 4.0))
    assert "M0.0 750.0L1000.0 250.0" in chart


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.42 s"), (9.96, "10 s"), (59.7, "1 min"), (192, "3 min 12 s"), (7265, "2 h 1 min")]
)
def test_durations_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1234567, "1.23M"), (999999, "1M"), (40000, "40k"), (None, "–")]
)
def test_counts_as_a_person_says_them(value, text):
    assert count(value) == text
