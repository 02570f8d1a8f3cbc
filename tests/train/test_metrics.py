"""metrics.jsonl survives kills and odd text; the console, log.txt and wandb get what it gets."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import RunConfig, WandbConfig
from train.metrics import Reporter, _flat, append_row, read_rows

from .conftest import ROOT, environment

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


def test_a_row_becomes_flat_for_wandb():
    row = {"step": 1, "mfu": None, "routing": {"layers": [0, 2], "load": [[0.5, 0.5], [1.0, 0.0]]}}
    assert _flat(row) == {
        "step": 1, "routing/layers/0": 0, "routing/layers/1": 2,
        "routing/load/0/0": 0.5, "routing/load/0/1": 0.5, "routing/load/1/0": 1.0, "routing/load/1/1": 0.0,
    }  # fmt: skip


def test_wandb_that_is_not_installed_is_one_sentence(reporter, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    reporter().close()
    with pytest.raises(
        ValueError, match="wandb.mode: 'offline' needs wandb; run: pip install wandb, or set wandb.mode to disabled"
    ):
        reporter(mode="offline")


@pytest.mark.slow
def test_wandb_writes_a_real_offline_run_and_online_without_a_key_falls_back(tmp_path):
    """The real wandb in a process of its own, twice as a resumed run would, with no account and no home."""
    code = (
        "import sys; from pathlib import Path\n"
        "from train.config import RunConfig, WandbConfig; from train.metrics import Reporter\n"
        "reporter = Reporter(RunConfig(wandb=WandbConfig(mode=sys.argv[1])), Path(sys.argv[2]), 10, 0, True)\n"
        "for step in (1, 2): reporter.log({'kind': 'train', 'step': step, 'loss': 2.0, 'routing': {'load': [[0.25, 0.75]]}})\n"
        "reporter.log({'kind': 'train', 'step': 1, 'loss': 2.0})\n"
        "reporter.close()"
    )
    clean = {key: value for key, value in environment().items() if not key.startswith("WANDB")}
    said = []
    for mode in ("offline", "online"):
        result = subprocess.run(
            [sys.executable, "-c", code, mode, str(tmp_path)],
            cwd=ROOT, env={**clean, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        said.append("no API key found (WANDB_API_KEY or `wandb login`), so this run is logged offline" in result.stdout)
    assert said == [False, True]
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({run.name for run in runs}) == 1, "a resumed run must keep its id"
    for run in runs:
        assert b"routing/load/0/1" in run.read_bytes()


def test_what_is_not_finite_is_null_because_json_has_no_nan(tmp_path):
    append_row(tmp_path / "m.jsonl", {"norm": float("nan"), "more": [1.0, float("inf"), {"x": float("-inf")}]})
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    assert read_rows(tmp_path / "m.jsonl") == [{"norm": None, "more": [1.0, None, {"x": None}]}]
