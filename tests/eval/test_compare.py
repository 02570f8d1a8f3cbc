"""The comparison: its numbers must be those of the runs, its warnings given when they are due, its texts never HTML."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.charts import DEPTH, PALETTE, on_both, run_look
from eval.compare import MOST_RUNS, default_path, labels, notices, write_comparison
from eval.config_differences import PRESENT, config_differences, flattened
from eval.curves import FLOPS, STEPS, TIME, TOKENS, held_out_curve, positions
from eval.history import read_stage
from eval.report import main, write_report

from .run_folders import Page, make_run

ROOT = Path(__file__).resolve().parents[2]


def edit(run: Path, name: str, change) -> None:
    """Rewrites one of a run's files: `change` gets and gives back its value (a list of rows for JSONL)."""
    path = run / name
    text = path.read_text()
    if name.endswith(".jsonl"):
        rows = change([json.loads(line) for line in text.splitlines()])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        read, write = (yaml.safe_load, yaml.safe_dump) if name.endswith(".yaml") else (json.loads, json.dumps)
        path.write_text(write(change(read(text))))


def with_curve(run: Path, bits, seconds_per_step: float) -> Path:
    """The run with held-out bits per byte of `bits(step)` and another pace."""

    def change(rows: list[dict]) -> list[dict]:
        for row in rows:
            row["train_seconds"] = row["step"] * seconds_per_step
            for figures in row.get("sources", {}).values():
                figures["bits_per_byte"] = bits(row["step"])
        return rows

    edit(run, "metrics.jsonl", change)
    return run


class Tables(HTMLParser):
    """{title of the card: {first cell of a row: texts of its cells}}; a cell's small text follows after a |."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self._title, self._row, self._into = {}, "", None, ""
        self.strong, self._is_strong = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("h3", "summary"):
            self._into, self._title = "title", ""
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._into, self._is_strong = "cell", "strong" in dict(attrs).get("class", "")
            self._row.append("")
        elif tag == "small" and self._into == "cell":
            self._row[-1] += "|"

    def handle_endtag(self, tag):
        if tag in ("td", "th", "h3", "summary"):
            if self._is_strong and tag == "td":
                self.strong.append((self._title, self._row[0], len(self._row) - 1))
            self._into, self._is_strong = "", False
        elif tag == "tr":
            self.found.setdefault(self._title, {})[self._row[0]] = self._row[1:]
            self._row = None

    def handle_data(self, data):
        if self._into == "title":
            self._title += data
        elif self._into == "cell":
            self._row[-1] += data


def compare(*runs: Path) -> tuple[Page, Tables, str]:
    """The page, checked as that of one run is: nested, nothing loaded, no NaN."""
    path = write_comparison(runs)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    without_pictures = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert not re.search(r"\b(nan|inf)\b", without_pictures, re.IGNORECASE), "a NaN reached the page"
    page = Page(text)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads), page.loads
    assert not {"script", "link", "iframe", "form", "input"} & set(page.tags)
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    return page, Tables(text), text


def test_a_moe_beside_its_dense_twin(tmp_path):
    moe, dense = make_run(tmp_path / "moe", steps=100), make_run(tmp_path / "dense", experts=0, steps=100)
    page, tables, _ = compare(moe, dense)
    assert tables.found["Config"]["n_routed_experts"] == ["8", "0"]
    assert set(tables.found["Config"]) == {"", "model", "n_routed_experts"}, "keys that are equal are no difference"
    assert tables.found["Balance"]["experts in a layer"] == ["8", "–"]
    assert tables.found["Balance"]["measured"] == ["on held-out text", "–"], "not on what it was trained on"
    sizes = tables.found["Size, compute and speed"]
    assert sizes["tokens"] == ["819k", "819k"]
    assert [cell.endswith("M") for cell in sizes["parameters"]] == [True, True]
    words = "\n".join(page.texts)
    for expected in (
        "moe",
        "dense",
        "Against training operations",
        "Against time of training",
        "the tokens that most favour",
    ):
        assert expected in words, f"{expected!r} is missing"
    assert sum(text == "In the beginning" for text in page.texts) == 1, "samples of a prompt stand side by side"


def test_figures_are_those_of_the_runs_and_differences_are_from_the_first(tmp_path):
    a, b = make_run(tmp_path / "a", steps=100), make_run(tmp_path / "b", steps=100)
    for run, bits in ((a, 1.5), (b, 1.25)):
        edit(
            run,
            "evaluation.json",
            lambda e, bits=bits: {**e, "heldout": {"bbe": {"bits_per_byte": bits, "tokens": 9, "bytes": 30}}},
        )
    _, tables, text = compare(a, b)
    assert tables.found["Held-out text"]["bbe"] == ["1.500", "1.250|−0.250"]
    assert ("Held-out text", "bbe", 2) in tables.strong and ("Held-out text", "bbe", 1) not in tables.strong
    assert "On held-out bbe, b is best with 1.250 bits per byte, 0.250 less than a." in text


def test_equal_steps_are_not_equal_time(tmp_path):
    """`slow` is better step for step, `fast` needs a quarter of the seconds: each table row must say who wins by that measure."""
    slow = with_curve(make_run(tmp_path / "slow", steps=600), lambda step: 2.0 - step / 600, 4.0)
    fast = with_curve(make_run(tmp_path / "fast", steps=600), lambda step: 2.2 - step / 600, 1.0)
    _, tables, _ = compare(slow, fast)
    rows = tables.found["At equal cost, on held-out bbe"]
    assert rows["after 600 steps"] == ["1.000", "1.200|+0.200"]
    assert rows["after 10 min"] == ["1.750", "1.200|−0.550"], "600 s are 150 steps of the slow one"
    assert rows["optimizer steps"] == ["480", "600|1.25×"], "1.2 bits per byte"
    assert rows["time of training"] == ["32 min", "10 min|0.31×"]
    assert ("At equal cost, on held-out bbe", "after 10 min", 2) in tables.strong
    assert ("At equal cost, on held-out bbe", "optimizer steps", 1) in tables.strong


def test_operations_are_tokens_times_the_operations_of_a_token(tmp_path):
    """By the count of the twin's matrices: the dense run's cost a token differs from the MoE's by the experts chosen."""
    moe, dense = (read_stage(make_run(tmp_path / name, steps=50, experts=e)) for name, e in (("moe", 8), ("dense", 0)))
    for stage in (moe, dense):
        steps, tokens, seconds = (positions(stage, stage.train, axis) for axis in (STEPS, TOKENS, TIME))
        assert tokens == [8192 * step for step in steps]
        assert seconds == pytest.approx([0.42 * step for step in steps])
    each = [
        positions(stage, stage.train, FLOPS)[0] / positions(stage, stage.train, TOKENS)[0] for stage in (moe, dense)
    ]
    d, layers, expert, router = (
        192,
        4,
        3 * 192 * 128,
        8 * 192,
    )  # (k + shared) experts and a router against one dense FFN
    assert each[0] - each[1] == 6 * layers * ((2 + 1) * expert + router - 3 * d * 512)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ys=st.lists(st.floats(0.5, 9), min_size=2, max_size=12),
    at=st.floats(0, 1),
    goal=st.floats(0.5, 9),
)
def test_reading_off_a_curve(curve_stage, ys, at, goal):
    """Between two evaluations along a line, nothing outside; what is needed for a quality is where the curve first has it."""
    curve_stage.held_out = [
        {"step": 10 * i, "tokens": 10 * i, "sources": {"x": {"bits_per_byte": y}}} for i, y in enumerate(ys)
    ]
    curve = held_out_curve("run", curve_stage, "x", 0)
    for i, y in enumerate(ys):
        assert curve.at(10 * i, STEPS) == y
    last = 10 * (len(ys) - 1)
    i = min(int(at * last / 10), len(ys) - 2)
    assert min(ys[i : i + 2]) - 1e-9 <= curve.at(at * last, STEPS) <= max(ys[i : i + 2]) + 1e-9
    assert math.isnan(curve.at(last + 1, STEPS)) and math.isnan(curve.at(-1, STEPS))
    first = curve.first_at_or_below(goal, STEPS)
    assert math.isnan(first) == (min(ys) > goal)
    if math.isfinite(first):
        assert curve.at(first, STEPS) <= goal + 1e-6
        assert all(y > goal for i, y in enumerate(ys) if 10 * i < first - 1e-6)


@pytest.fixture
def curve_stage(tmp_path):
    return read_stage(make_run(tmp_path / "run", steps=10))


COSTS = (
    (STEPS, 1600.0, "1,600"), (TOKENS, 6553600, "6.55M"), (FLOPS, 4.4e13, "44 TFLOP"), (FLOPS, 3e15, "3 PFLOP"), (TIME, 3700, "1 h 1 min"),
)  # fmt: skip


@pytest.mark.parametrize(("axis", "value", "text"), COSTS)
def test_costs_as_a_person_reads_them(axis, value, text):
    assert axis.text(value) == text
    assert 1 <= value / axis.unit(value)[0] < 2000


def test_equal_runs_need_no_warning(tmp_path):
    stages = [read_stage(make_run(tmp_path / name, steps=50)) for name in "ab"]
    assert notices(stages, "ab") == []


def test_warnings(tmp_path):
    """Each reason for doubt is named, with the run it concerns."""
    cases = {
        "a is not finished: 50 of 90": ("config.yaml", lambda c: {**c, "train": {**c["train"], "steps": 90}}),
        "a was evaluated at step 20": ("evaluation.json", lambda e: {**e, "step": 20}),
        "bbe is not the same text": ("evaluation.json", lambda e: scaled(e, "bytes")),
        "tokenizers or context lengths differ": ("evaluation.json", lambda e: scaled(e, "tokens")),
        "different machines (a laptop CPU and a toaster)": (
            "run.json",
            lambda r: {**r, "machine": {"device": "a toaster"}},
        ),
    }
    for i, (words, (name, change)) in enumerate(cases.items()):
        a, b = (make_run(tmp_path / f"{i}{run}", steps=50) for run in "ab")
        edit(a, name, change)
        found = notices([read_stage(a), read_stage(b)], "ab")
        assert len(found) == 1 and words in found[0], (words, found)
        assert "warn" not in found[0] and words.split(" (")[0] in compare(a, b)[2].replace(f"{i}a", "a")


def scaled(evaluation: dict, key: str) -> dict:
    evaluation["heldout"]["bbe"][key] *= 2
    return evaluation


def test_tasks_with_and_without_a_share(tmp_path):
    a, b = make_run(tmp_path / "a", steps=50), make_run(tmp_path / "b", steps=50)
    for run, right, perplexity in ((a, 0.5, 31.25), (b, 0.75, 28.5)):
        piqa = {"score": right, "standard_error": 0.0123, "chance": 0.5, "n": 1838, "metric": "acc"}
        wiki = {"score": perplexity, "n": 62, "metric": "word_perplexity", "higher_is_better": False}
        sums = {"score": right / 2, "n": 50, "metric": "exact_match (strict)"}
        edit(run, "evaluation.json", lambda e, t={"piqa": piqa, "wikitext": wiki, "sums": sums}: {**e, "tasks": t})
    _, tables, _ = compare(a, b)
    assert tables.found["Tasks"]["piqa|chance 50\u00a0%"] == ["50\u00a0%|± 1.2", "75\u00a0%|± 1.2"]
    assert tables.found["Tasks"]["wikitext|word_perplexity"] == ["31.25", "28.5"]
    assert tables.found["Tasks"]["sums|exact_match (strict)"] == ["25\u00a0%", "38\u00a0%"]
    assert {place for title, _, place in tables.strong if title == "Tasks"} == {2}, "less perplexity is better"
    page = Tables(write_report(a).read_text())
    assert page.found["Tasks"]["piqa|acc"][1:] == ["50\u00a0%|± 1.2", "50\u00a0%", "–", "1,838"]
    assert page.found["Tasks"]["wikitext|word_perplexity"][1:] == ["31.25", "–", "–", "62"]


def test_a_lead_within_the_error_is_no_lead(tmp_path):
    runs = [make_run(tmp_path / name, steps=50) for name in "abc"]
    for run, score in zip(runs, (0.5, 0.52, 0.4), strict=True):
        near = {"score": score, "standard_error": 0.02, "chance": 0.25, "trivial": 0.3, "n": 600, "metric": "acc"}
        sure = near | {"standard_error": 0.005}
        edit(run, "evaluation.json", lambda e, t={"near": near, "sure": sure}: {**e, "tasks": t})
    _, tables, _ = compare(*runs)
    name = "|chance 25\u00a0%, trivial 30\u00a0%"
    assert [place for title, *place in tables.strong if title == "Tasks"] == [["sure" + name, 2]]


def test_sources_of_a_config_are_compared_by_name(tmp_path):
    a, b = make_run(tmp_path / "a", steps=50), make_run(tmp_path / "b", steps=50)

    def change(config: dict) -> dict:
        config["data"]["sources"] = [
            {**s, "weight": 3.0} if s["name"] == "web" else s for s in config["data"]["sources"][::-1]
        ]
        config["train"]["new_key"] = [1, 2]
        return config

    edit(b, "config.yaml", change)
    _, tables, _ = compare(a, b)
    assert tables.found["Config"] == {
        "": ["a", "b"],
        "data": [],
        "sources.web.weight": ["–", "3.0"],
        "train": [],
        "new_key": ["–", "[1, 2]"],
    }


def test_a_source_that_only_one_run_has_is_one_row(tmp_path):
    a, b, chat = (make_run(tmp_path / name, steps=50, chat=name == "chat") for name in ("a", "b", "chat"))
    _, tables, text = compare(a, b, chat)
    rows = tables.found["Config"]
    assert rows["sources.bbe"] == ["yes", "yes", "–"] and rows["sources.exercises"] == ["–", "–", "yes"]
    assert not any(row.startswith("sources.bbe.") for row in rows)
    assert "Not measured on held-out bbe: chat." in text and "How they learned: held-out bbe" in text


def test_flattening_keeps_what_has_no_names():
    tree = {
        "a": {"b": 1, "c": {}},
        "d": [],
        "e": [{"name": "x"}, {"name": "x"}],
        "f": [{"name": "y", "g": 2}],
        "h": None,
    }
    flat = flattened(tree)
    assert flat.pop("f.y") is PRESENT
    assert flat == {"a.b": 1, "a.c": {}, "d": [], "e": [{"name": "x"}, {"name": "x"}], "f.y.g": 2, "h": None}


def test_a_huge_config_is_compared_in_a_moment(tmp_path):
    """A mebibyte of odd keys: one of 200,000 dots, 20,000 others."""
    runs = [make_run(tmp_path / name, steps=50) for name in "ab"]
    trees = [{".".join("a" * 200_000): 1, "m": {f"k{i}.{'.' * 90}": name for i in range(3000)}} for name in "ab"]
    start = time.perf_counter()
    page = config_differences(
        [dataclasses.replace(read_stage(r), tree=t) for r, t in zip(runs, trees, strict=True)], "ab"
    )
    assert time.perf_counter() - start < 5 and "2880 more differ" in page


def test_runs_that_differ_in_nothing_say_so(tmp_path):
    runs = [make_run(tmp_path / place / "twin", steps=50) for place in "ab"]
    _, tables, text = compare(*runs)
    assert tables.strong == [], "none is better than the other"
    assert "All keys of the configs that matter are equal." in text
    assert labels([read_stage(run) for run in runs]) == ["a/twin", "b/twin"], "two of one name"


def test_text_of_strangers_is_never_html(tmp_path):
    evil = '</pre><script>alert(1)</script><img src="http://x/y" onerror=alert(2)>"\' & ça'
    runs = [make_run(tmp_path / name, chat=True, steps=20) for name in "ab"]
    figures = {"bits_per_byte": 1.0, "perplexity": 2.0, "tokens": 5, "bytes": 9}
    task = {"score": 0.5, "chance": 0.1, "n": 3, "metric": evil, "trivial": 0.2, "trivial_name": evil}

    def spoil_config(config: dict) -> dict:
        config["train"]["init_from"] = evil
        return {**config, "name": evil, evil: evil + config["name"]}

    def spoil_evaluation(evaluation: dict) -> dict:
        evaluation["routing"]["typical_tokens"][0][0] = [{"token": evil, "lift": 2.0}]
        return {**evaluation, "heldout": {evil: figures}, "tasks": {evil: task}}

    for run in runs:
        edit(run, "samples.jsonl", lambda rows: [{"step": 10, "prompt": evil, "text": evil}])
        edit(run, "evaluation.json", spoil_evaluation)
        edit(run, "config.yaml", spoil_config)
        edit(run, "run.json", lambda record, run=run: {"machine": {"device": evil + run.name}})
        edit(
            run,
            "metrics.jsonl",
            lambda rows: [{**r, "sources": {evil: figures}} if "sources" in r else r for r in rows],
        )
    page, _, text = compare(*runs)
    assert "<script" not in text and "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", text)
    assert sum(evil in piece for piece in page.texts) >= 20, "the text itself should be readable on the page"


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json"])
def test_a_missing_file_is_a_missing_part(tmp_path, missing):
    whole, part = make_run(tmp_path / "whole", steps=40), make_run(tmp_path / "part", steps=40)
    (part / missing).unlink()
    compare(whole, part)
    compare(part, whole)
    (whole / missing).unlink()
    compare(part, whole)


def test_nothing_but_configs_is_enough(tmp_path):
    runs = [make_run(tmp_path / name, steps=5, evaluated=False) for name in "ab"]
    for run in runs:
        for name in ("metrics.jsonl", "samples.jsonl", "run.json"):
            (run / name).unlink()
    page, _, _ = compare(*runs)
    assert "a is not finished: 0 of 5 steps." in page.texts


def test_many_runs_are_told_apart_and_more_are_refused(tmp_path):
    looks = [run_look(i) for i in range(MOST_RUNS)]
    assert len(set(looks)) == MOST_RUNS
    runs = [make_run(tmp_path / f"run{i:02}", steps=10) for i in range(MOST_RUNS + 1)]
    _, tables, text = compare(*runs[:-1])
    assert len(text) < 4_000_000
    assert len(tables.found["Held-out text"]["bbe"]) == 6, "the last of four tables"
    assert text.count("run23") > 5
    with pytest.raises(ValueError, match="25 runs are more than the 24"):
        write_comparison(runs)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    for others, words in (([tmp_path / "gone"], "no run folder"), ([tmp_path / "." / "run"], "given twice")):
        with pytest.raises(ValueError, match=words):
            write_comparison([run, *others])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_page_is_named_by_its_runs_and_lies_beside_the_first(tmp_path, monkeypatch):
    assert default_path([Path("runs/a"), Path("elsewhere/b")]) == Path("runs/compare-a-b.html")
    assert len(default_path([Path(f"runs/{'x' * 70}{i}") for i in range(9)]).name) < 120
    run = make_run(tmp_path / "a", steps=10)
    monkeypatch.chdir(run)
    assert default_path([Path("."), Path("../b")]) == tmp_path / "compare-a-b.html"


def test_a_line_can_be_seen_on_a_dark_page():
    for colour in (*PALETTE, *DEPTH):
        light, dark = re.fullmatch(r"light-dark\((#\w{6}),(#\w{6})\)", on_both(colour)).groups()
        assert light == colour
        red, green, blue = (int(dark[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert 0.299 * red + 0.587 * green + 0.114 * blue >= 0.49, f"{colour} is dark on dark"


VALUES = st.one_of(
    st.sampled_from([None, True, 10**400, -1, 0, 2**63, 1e308, -1e308, 5e-324, float("nan"), float("inf")]),
    st.sampled_from(["", "1", "<b>", [], {}, [[]], [None], [0], [[0.5, None]], [["a"]], [[-1.0, 2.0]], [{}], {"a": {"b": []}}]),
    st.text(max_size=5),
)  # fmt: skip


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_any_value_anywhere(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("spoilt")
    runs = [make_run(folder / "a", chat=True, steps=20), make_run(folder / "b", steps=20)]
    names = ("metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json")
    originals = {name: (runs[0] / name).read_text() for name in names}

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def try_one(data):
        name = data.draw(st.sampled_from(names))
        text = originals[name]
        records = [json.loads(line) for line in (text.splitlines() if name.endswith("l") else [text])]
        node = data.draw(st.sampled_from(records))
        while True:
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            key = data.draw(st.sampled_from(list(keys)))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
                break
            node = node[key]
        node[key] = data.draw(VALUES)
        (runs[0] / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        try:
            compare(*runs)
            compare(*runs[::-1])
        finally:
            (runs[0] / name).write_text(text)

    try_one()


def run_main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    assert main() == 0


def test_out_is_a_page_and_no_other_file_is_ever_replaced(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, steps=10) for name in "ab"]
    for out in (runs[0] / "metrics.jsonl", tmp_path, tmp_path / "page"):
        with pytest.raises(ValueError, match="--out"):
            run_main(monkeypatch, *runs, "--out", out)
    assert (runs[0] / "metrics.jsonl").read_text().startswith("{")
    run_main(monkeypatch, *runs, "--out", tmp_path / "page.html")
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert "MiniMoE comparison" in (tmp_path / "page.html").read_text()
    run_main(monkeypatch, runs[0], "--out", tmp_path / "one.html")
    assert "MiniMoE training report" in (tmp_path / "one.html").read_text()
    assert not (runs[0] / "report.html").exists()


def test_each_run_keeps_the_page_at_wandb_where_that_is_wanted(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, steps=10) for name in "ab"]
    kept = []
    monkeypatch.setattr("train.trackers.publish", lambda run, files: kept.append((Path(run), files)) or "kept")
    run_main(monkeypatch, *runs)
    assert kept == []
    run_main(monkeypatch, *runs, "--wandb")
    assert kept == [(run, [tmp_path / "compare-a-b.html"]) for run in runs]
    assert "kept" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command(tmp_path):
    runs = [make_run(tmp_path / name, steps=10) for name in "ab"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for arguments, code in (([*runs], 0), ([*runs, tmp_path / "gone"], 2), (["--help"], 0)):
        words = [sys.executable, "-m", "eval.report", *map(str, arguments)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "compare-a-b.html").read_text().endswith("</html>\n")


A4_WIDTH = 695  # CSS pixels between the margins of the page
BEYOND = """() => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.scroll') && !e.closest('svg') && getComputedStyle(e).display != 'none').map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "several"])
def test_in_a_browser(tmp_path, browser, kind):
    """Phone, desk, dark, paper: nothing sticks out, nothing is refused by the page's own policy, charts have a size."""
    base = make_run(tmp_path / "base", steps=100)
    runs = [
        make_run(tmp_path / "chat", chat=True, steps=60, init_from=str(base)),
        make_run(tmp_path / "dense", experts=0, steps=60),
        base,
    ]
    page_path = (
        write_report(runs[0])
        if kind == "one"
        else write_comparison([*runs, make_run(tmp_path / ("long-" * 12), steps=60)])
    )
    said = []
    for width, scheme, media in (
        (390, "light", "screen"),
        (390, "dark", "screen"),
        (1280, "light", "screen"),
        (A4_WIDTH, "dark", "print"),
    ):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.emulate_media(media=media)
        page.goto(page_path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (width, media, page.evaluate(BEYOND))
        assert page.evaluate(BEYOND) == []
        charts = page.evaluate(
            "[...document.querySelectorAll('.area')].filter(a => !a.closest('details')).map(a => a.clientHeight)"
        )
        assert len(charts) >= 4 and min(charts) > 100
        paper, ink = (page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
        dark = sum(map(int, re.findall(r"\d+", paper)[:3])) < sum(map(int, re.findall(r"\d+", ink)[:3]))
        assert dark == (scheme == "dark" and media == "screen"), f"{paper} under {ink}"
        page.close()
    assert said == []
