"""metrics.jsonl survives kills and odd text; the console and log.txt get what it gets."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import RunConfig, WandbConfig
from train.metrics import Reporter, append_row, read_earlier, read_rows

ROWS = [
    {"kind": "train", "step": i, "text": text}
    for i, text in enumerate(("a", "“quoted” é \u2028 \x85 \x1c", "line\nline", "", "😀"))
]


@pytest.fixture
def reporter(tmp_path, capsys):
    """reporter(speaks=True) -> a Reporter of a run in tmp_path"""
    return lambda speaks=True, **wandb: Reporter(
        RunConfig(wandb=WandbConfig(**wandb)), tmp_path, steps=10, start=0, speaks=speaks
    )


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    for row in ROWS:
        append_row(path, row)
    assert read_rows(path) == ROWS
    assert path.read_bytes().count(b"\n") == len(ROWS), "one row, one line"


def test_a_kill_at_any_byte_costs_the_last_row_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        append_row(path, row)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        kept = len(ROWS) if cut == len(whole) - 1 else len(ROWS) - 1
        assert read_rows(path) == ROWS[:kept], f"cut after {whole[last:cut]!r}"
        append_row(path, {"after": "the kill"})
        assert read_rows(path) == [*ROWS[:kept], {"after": "the kill"}], f"cut after {whole[last:cut]!r}"


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.text(max_size=9) | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
            max_size=3,
        ),
        max_size=4,
    )
)
def test_any_rows_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    for row in rows:
        append_row(path, json.loads(json.dumps(row)))
    assert read_rows(path) == rows


def test_the_main_process_speaks_and_keeps_a_log(reporter, tmp_path, capsys):
    voice = reporter()
    voice.say("hello é")
    voice.log({"kind": "train", "step": 1})
    voice.sample(1, "once", "upon\na time")
    voice.progress()
    voice.close()
    printed = capsys.readouterr().out
    assert printed.startswith("hello é\n") and "once" in printed
    assert (tmp_path / "log.txt").read_text("utf-8") == printed
    assert read_rows(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1}]
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "once", "text": "upon\na time"}]


def test_other_ranks_are_silent(reporter, tmp_path, capsys):
    voice = reporter(speaks=False, mode="online")
    voice.say("hello")
    voice.log({})
    voice.sample(1, "", "")
    voice.progress()
    voice.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_null_because_json_has_no_nan(tmp_path):
    append_row(tmp_path / "m.jsonl", {"norm": float("nan"), "more": [1.0, float("inf"), {"x": float("-inf")}]})
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    assert read_rows(tmp_path / "m.jsonl") == [{"norm": None, "more": [1.0, None, {"x": None}]}]


def test_what_the_run_goes_on_from_has_each_thing_once(tmp_path):
    """Resumed at step 2, after a kill at 3: rows and samples up to 2, and of those that were written twice the last."""
    for step, loss in ((1, 5.0), (2, 4.0), (2, 4.5), (3, 3.0)):
        append_row(tmp_path / "metrics.jsonl", {"kind": "train", "step": step, "loss": loss})
        append_row(tmp_path / "samples.jsonl", {"step": step, "prompt": "a", "text": str(loss)})
    append_row(tmp_path / "metrics.jsonl", {"kind": "held_out", "step": 2, "loss": 4.2})
    append_row(tmp_path / "metrics.jsonl", {"no": "step"})
    earlier = read_earlier(tmp_path, 2)
    assert [(row["kind"], row["step"], row["loss"]) for row in earlier.rows] == [
        ("train", 1, 5.0),
        ("train", 2, 4.5),
        ("held_out", 2, 4.2),
    ]
    assert [sample["text"] for sample in earlier.samples] == ["5.0", "4.5"]
