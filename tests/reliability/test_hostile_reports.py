"""Reports of a stranger's run: whatever stands in its records, the page is whole, runs none of it and shows nothing of ours."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.report import write_report

from .attempts import assert_refused
from .strangers import REPORT, RESUME, RUN, tried

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json", "stages.json"]
)
def test_a_report_shows_nothing_that_a_link_leads_to(place, name):
    """A stranger's run folder with a link to a secret of ours, of which we then publish the report."""
    path = place / RUN / name
    path.unlink(missing_ok=True)
    path.symlink_to(place.parent / "victim.txt")
    assert_refused(tried(place, REPORT), name, "link")


def test_a_report_refuses_what_is_far_too_large(place):
    with open(place / RUN / "evaluation.json", "r+b") as file:
        file.truncate(2**40)
    assert_refused(tried(place, REPORT), "evaluation.json", "at most")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}


def spoil(value: object) -> object:
    """The same structure with a script in every name and text of it."""
    if isinstance(value, dict):
        return {key: spoil(item) for key, item in value.items()} | {SCRIPT: SCRIPT}
    if isinstance(value, list):
        return [spoil(item) for item in value]
    return SCRIPT if isinstance(value, str) else value


def test_a_report_runs_no_text_of_the_run(place):
    run_dir = place / RUN
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        kinds = [row.get("kind") for row in rows]
        rows = [spoil(row) | ({"kind": kind} if kind else {}) for row, kind in zip(rows, kinds, strict=True)]
        for row in rows:
            if "sources" in row:
                row["sources"] = {SCRIPT: {"loss": 2.0, "bits_per_byte": 1.0}}
        (run_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("run.json", "evaluation.json"):
        record = spoil(json.loads((run_dir / name).read_text()))
        (run_dir / name).write_text(json.dumps(record))
    task = {"score": 0.5, "chance": 0.1, "trivial": 0.2, "n": 3, "metric": SCRIPT, "trivial_name": SCRIPT}
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["tasks"] = {
        SCRIPT: task | {"examples": [{"question": SCRIPT, "answer": SCRIPT, "wanted": SCRIPT, "score": 0}]}
    }
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    (run_dir / "stages.json").write_text(json.dumps({SCRIPT: 3}))
    (run_dir / "config.yaml").write_text(
        (run_dir / "config.yaml").read_text().replace("name: pre", f"name: {json.dumps(SCRIPT)}")
    )
    assert tried(place, REPORT).code == 0
    page = (run_dir / "report.html").read_text()
    assert page.count("alert(1)") > 10, "the texts are in the report"
    tags = Tags(page)
    assert "script" not in tags.names and not any(name.startswith("on") for name in tags.attributes)


VALUES = st.one_of(
    st.sampled_from([None, True, 10**400, -1, 0, 2**63, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "1", SCRIPT, [], {}, [[]], [None], [0], [[0.5, None]], [[1], [1, 2]], [["a"]], [[-1.0, 2.0]], [{}], {"a": {"b": []}}]),
    st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
)  # fmt: skip
RECORDS = ("metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json", "stages.json")


@pytest.mark.parametrize("examples", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_report_survives_any_value_anywhere(innocent, tmp_path_factory, examples):
    """One to three values of a real run's records replaced by anything."""
    originals = {name: (innocent / RUN / name).read_text() for name in ("config.yaml", *RECORDS[:-1])}
    originals["stages.json"] = '{"setup": 3, "pretrain": 60}'
    task = {
        "score": 0.5,
        "chance": 0.1,
        "trivial": 0.2,
        "n": 3,
        "metric": "exact",
        "trivial_name": "a copy",
        "standard_error": 0.1,
    }
    task["examples"] = [{"question": "2 + 2?", "answer": "4", "wanted": "4", "score": 1}]
    originals["evaluation.json"] = json.dumps(json.loads(originals["evaluation.json"]) | {"tasks": {"sums": task}})
    folder = tmp_path_factory.mktemp("spoilt")

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def try_one(data):
        texts = dict(originals)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(RECORDS))
            records = [json.loads(line) for line in (texts[name].splitlines() if name.endswith("l") else [texts[name]])]
            node = data.draw(st.sampled_from(records))
            while True:  # down to some place, each level as likely as the next
                keys = sorted(node) if isinstance(node, dict) else range(len(node))
                deep = [key for key in keys if isinstance(node[key], dict | list)]
                last = data.draw(st.sampled_from(deep if deep and data.draw(st.booleans()) else keys))
                if not isinstance(node[last], dict | list) or not node[last] or data.draw(st.booleans()):
                    break
                node = node[last]
            node[last] = data.draw(VALUES)
            texts[name] = "".join(json.dumps(record) + "\n" for record in records)
        for name, text in texts.items():
            (folder / name).write_text(text)
        assert write_report(folder).read_text().endswith("</html>\n")

    try_one()


ODD_VALUES = {
    "step": (-1, 10**400, 1e15, None, "4", True),
    "loss": (1e308, -1e308, 10**400, "x", [1.0]),
    "train_seconds": (1e308, -5, "x"),
    "tokens_per_second": (float("inf"), 10**300, [1]),
    "routing": (
        5, [], {"layers": [0]}, {"load": [[1.0]]}, {"layers": [0], "load": 3}, {"layers": [0], "load": [[]]}, {"layers": [0], "load": [[0.5, None]]},
        {"layers": [0, 1], "load": [[0.5, 0.5], [1.0]]}, {"layers": [0, 1], "load": [[0.5, 0.5]]}, {"layers": [SCRIPT], "load": [[0.5, 0.5]]},
        {"layers": [0], "load": [["a", "b"]]}, {"layers": [0], "load": [[-1.0, 2.0]]}, {"layers": [0], "load": [[1e308, 1e308]]},
        {"layers": [0], "load": [[0.5, 0.5]], "max_vio": [None], "router_entropy": "x"}, {"layers": [10**400], "load": [[0.5, 0.5]]},
    ),
}  # fmt: skip


def test_a_report_survives_odd_rows(place):
    """Values in the last row of training, and in all rows, that are of no size or shape that a picture can have."""
    rows = [json.loads(line) for line in (place / RUN / "metrics.jsonl").read_text().splitlines()]
    last = max(i for i, row in enumerate(rows) if row["kind"] == "train")
    for key, values in ODD_VALUES.items():
        for value in values:
            for spoilt in (
                [*rows[:last], rows[last] | {key: value}, *rows[last + 1 :]],
                [row | {key: value} for row in rows],
            ):
                (place / RUN / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoilt))
                try:
                    page = write_report(place / RUN).read_text()
                except Exception as error:
                    raise AssertionError(f"{key}: {value!r:.60}: {error!r}") from error
                assert page.endswith("</html>\n") and SCRIPT not in page


ANCESTORS = (
    "a\0b", "x" * 5000, 5, ["runs/pre"], "/", "/dev", "..", ".", "runs/pre", "../innocent", "/etc/passwd", "~", 1e300, None, {"a": 1},
)  # fmt: skip


@pytest.mark.parametrize("init_from", ANCESTORS, ids=range(len(ANCESTORS)))
def test_a_report_survives_any_ancestor(place, init_from, monkeypatch):
    monkeypatch.chdir(place)
    path = place / RUN / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["init_from"] = init_from
    path.write_text(yaml.safe_dump(tree))
    assert write_report(RUN).read_text().endswith("</html>\n")


ODD_ROWS = (
    '{"kind": "held_out"}', '{"kind": "held_out", "step": "4"}', '{"kind": ["held_out"], "step": 4}', "5", "[]", "null",
    '{"step": 4}', "[" * 50_000, '{"kind": "train", "step": 1e999}', '{"kind": "held_out", "step": 10000000000}',
)  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [REPORT, *(pytest.param(c, marks=pytest.mark.slow) for c in (RESUME, ("train.pretrain", "pretrain.yaml")))],
    ids=["report", "resume", "finished"],
)
def test_rows_of_wrong_types_stop_nobody(place, command):
    with open(place / RUN / "metrics.jsonl", "a") as file:
        file.writelines(row + "\n" for row in ODD_ROWS)
    outcome = tried(place, command)
    assert outcome.code == 0, outcome.err


RUN_RECORDS = (
    "5",
    '"x"',
    "[]",
    '{"sessions": 5}',
    '{"sessions": [5], "machine": 3}',
    "[" * 50_000,
    '{"sessions": [{"seconds": "x"}]}',
)


@pytest.mark.slow
@pytest.mark.parametrize("record", RUN_RECORDS, ids=range(len(RUN_RECORDS)))
def test_a_run_record_of_wrong_types(place, record):
    (place / RUN / "run.json").write_text(record)
    assert tried(place, REPORT).code == 0
    outcome = tried(place, RESUME)
    if outcome.code != 0:
        assert_refused(outcome, "run.json")
