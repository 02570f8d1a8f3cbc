"""wandb and TensorBoard: what they are told, that a resume draws nothing twice, and that training never waits for them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from eval.charts import share_rgb
from train import load_picture, metrics
from train.config import RunConfig, TrainConfig, WandbConfig, to_yaml
from train.load_picture import Loads, colours
from train.metrics import Reporter, append_row, read_rows
from train.trackers import MOST_WAITING, Beside, Earlier, Tracker, flat, publish

from .conftest import ROOT, environment, finish
from .conftest import start as start_command
from .wandb_server import KEY, wandb_server

NOTHING = Earlier(0, [], [])


def train_row(step: int, layers: tuple = (0, 2), experts: int = 4, loss: float = 2.0) -> dict:
    load = [[(1 + (e + layer + step) % experts) for e in range(experts)] for layer in layers]
    return {
        "kind": "train", "step": step, "tokens": 100 * step, "train_seconds": step / 2, "loss": loss, "mfu": None, "skipped_steps": 0,
        "routing": {
            "layers": list(layers), "load": [[share / sum(each) for share in each] for each in load],
            "max_vio": [0.5] * len(layers), "dead": [0] * len(layers),
        },
    }  # fmt: skip


def held_out_row(step: int, loss: float = 3.0) -> dict:
    figures = {"loss": loss, "bits_per_byte": 1.5, "tokens": 10, "bytes": 30}
    row = {"kind": "held_out", "step": step, "tokens": 100 * step, "train_seconds": step / 2}
    return {**row, "sources": {"bible": figures}, "loss": loss}


BAD_ROW = {
    "kind": "bad_step", "step": 7, "rows": [12, 15], "loss": float("nan"), "grad_norm": 1e9, "mean_norm": 1.0,
    "micro_batches": [{"rows": [12, 13], "loss": 2.0, "sources": {"bible": 2}}],
}  # fmt: skip


def numbers_of(value: object) -> list[float]:
    """Every number that stands anywhere in a row, but for the names of its layers."""
    if isinstance(value, dict):
        return [number for key, item in value.items() if key != "layers" for number in numbers_of(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_of(item)]
    return [value] if isinstance(value, int | float) else []


# What they are told


@pytest.mark.parametrize("row", [train_row(3), train_row(4, layers=(1,), experts=12), held_out_row(5)])
def test_every_number_of_a_row_has_a_name(row):
    assert sorted(flat(row).values()) == sorted(numbers_of(row))


def test_names_say_the_kind_the_layer_and_the_expert():
    """A held-out loss and a training loss are two charts."""
    row = flat(train_row(3, layers=(2,), experts=12))
    assert {
        "step",
        "tokens",
        "train_seconds",
        "train/loss",
        "routing/max_vio/layer_2",
        "load/layer_2/expert_05",
    } <= row.keys()
    assert {"held_out/loss", "held_out/bible/bits_per_byte"} <= flat(held_out_row(3)).keys()
    assert flat(BAD_ROW).keys() == {"step", "bad_step/loss", "bad_step/grad_norm", "bad_step/mean_norm"}


class Told(Tracker):
    """Keeps what it is told; does `trouble` when told of step 3."""

    name, patience = "told", 0.3

    def __init__(self, trouble=lambda: None) -> None:
        self.heard, self.trouble, self.thread = [], trouble, None

    def start(self, earlier, note) -> None:
        self.heard.append(("start", earlier.step))
        self.thread = threading.current_thread()

    def log(self, row) -> None:
        if row["step"] == 3:
            self.trouble()
        self.heard.append(("log", row["step"]))

    def close(self, failed) -> None:
        self.heard.append(("close", failed))


def notes_of(beside: Beside) -> list[str]:
    return [beside.notes.get() for _ in range(beside.notes.qsize())]


@pytest.mark.parametrize("failed", [False, True])
def test_a_tracker_is_told_everything_in_order_in_another_thread(failed):
    beside = Beside(tracker := Told(), lambda: Earlier(5, [], []))
    for step in range(100):
        beside.tell("log", {"step": step})
    beside.close(failed)
    assert tracker.heard == [("start", 5), *(("log", step) for step in range(100)), ("close", failed)]
    assert tracker.thread is not threading.current_thread() and notes_of(beside) == []


def test_a_tracker_that_fails_is_dropped_and_this_is_said_once():
    def trouble() -> None:
        raise ConnectionResetError("gone")

    beside = Beside(tracker := Told(trouble), lambda: NOTHING)
    for step in range(10):
        beside.tell("log", {"step": step})
    beside.close(False)
    assert tracker.heard[-1] == ("log", 2), "nothing more is told after the failure"
    assert notes_of(beside) == [
        "told: ConnectionResetError: gone; the run goes on without it, metrics.jsonl has every row"
    ]


def test_a_tracker_that_hangs_costs_nothing_but_its_patience_at_the_end():
    """Its memory is bounded too: MOST_WAITING rows behind, it is given up."""
    beside = Beside(Told(threading.Event().wait), lambda: NOTHING)
    began = time.monotonic()
    for step in range(MOST_WAITING + 100):
        beside.tell("log", {"step": step})
    assert time.monotonic() - began < 2
    assert f"told: is {MOST_WAITING} rows behind" in " ".join(notes_of(beside))

    beside = Beside(Told(threading.Event().wait), lambda: NOTHING)
    beside.tell("log", {"step": 3})
    began = time.monotonic()
    beside.close(False)
    assert time.monotonic() - began < Told.patience + 7
    assert ["told: did not finish within 0 s; the run goes on without it, metrics.jsonl has every row"] == notes_of(
        beside
    )


def test_a_process_that_a_hanging_tracker_waits_for_is_killed():
    """As wandb's own exit hook would wait for wandb's process, for ever."""
    processes = []

    def wait() -> None:
        processes.append(subprocess.Popen(["sleep", "1000"]))
        processes[0].wait()

    beside = Beside(Told(wait), lambda: NOTHING)
    beside.tell("log", {"step": 3})
    beside.close(False)
    assert processes[0].poll() is not None


def test_a_full_disk_that_refuses_a_note_does_not_hide_in_the_trackers_thread(tmp_path, monkeypatch):
    """The note is written by the run's own thread, where an OSError ends the run as any other line's would."""
    reporter = Reporter(RunConfig(), tmp_path, steps=10, start=0, speaks=True)
    reporter._trackers = [beside := Beside(Told(), lambda: NOTHING)]
    beside.notes.put("told: something")
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(OSError):
        reporter.log({"kind": "train", "step": 1})
    reporter.close()


@pytest.mark.parametrize(("hurried", "stall_timeout"), [(True, 600.0), (False, 1.0)])
def test_who_was_asked_to_stop_or_is_watched_waits_less_for_a_tracker(tmp_path, monkeypatch, hurried, stall_timeout):
    """A scheduler kills 30 s after its SIGTERM; the watchdog ends what has not moved for train.stall_timeout."""
    monkeypatch.setattr(metrics, "HURRIED", 0.3)
    monkeypatch.setattr(Told, "patience", 20.0)
    config = RunConfig(train=TrainConfig(steps=10, stall_timeout=stall_timeout))
    reporter = Reporter(config, tmp_path, steps=10, start=0, speaks=True)
    reporter._trackers = [Beside(Told(threading.Event().wait), lambda: NOTHING)]
    reporter.log({"kind": "train", "step": 3})
    reporter.close(hurried=hurried)
    assert "told: did not finish within 0 s" in (tmp_path / "log.txt").read_text()


# Pictures of the load


def test_the_colours_are_those_of_the_report():
    load = np.linspace(0, 5, 40)
    assert np.abs(colours(load).astype(int) - share_rgb(load)).max() <= 1


def test_colours_say_more_or_less_than_the_fair_share():
    below, fair, above = colours(np.array([0.25, 1.0, 4.0])).astype(int)
    assert below[2] > below[0] + 50 and above[0] > above[2] + 50, "blue below, orange above"
    assert fair.min() > 220, "paper at the fair share"
    assert (colours(np.array([0.0, 9.0])) == colours(np.array([0.25, 4.0]))).all()


def test_a_picture_shows_the_mean_load_since_the_last_one():
    pytest.importorskip("PIL")
    loads = Loads()
    assert loads.pictures() == {}, "nothing yet"
    for step, share in (
        (1, 0.0),
        (2, 0.5),
    ):  # expert 0 takes 0 and 0.5 of 4 experts' tokens: the fair share in the mean
        rest = (1 - share) / 3
        loads.add({"kind": "train", "step": step, "routing": {"layers": [1], "load": [[share, rest, rest, rest]]}})
    picture = loads.pictures()["expert_load"]
    assert np.abs(np.asarray(picture)[24, 64].astype(int) - colours(np.array(1.0)).astype(int)).max() <= 2
    assert loads.pictures() == {}, "drawn once"


def test_the_picture_over_time_is_bounded_and_a_run_of_another_shape_starts_anew(monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(load_picture, "MOST_MOMENTS", 10)
    loads = Loads()
    for step in range(1, 200):
        loads.add(train_row(step))
    assert len(loads._moments) <= 10 and max(loads._moments) > 150 and min(loads._moments) < 40
    assert set(loads.pictures()) == {"expert_load", "expert_load_over_time"}
    for step, (layers, experts) in enumerate((((0, 1, 2), 4), ((0, 1, 2), 6)), start=201):
        loads.add(train_row(step, layers, experts))
        assert [load.shape for load in loads._moments.values()] == [(3, experts)]
        loads.pictures()


# TensorBoard


def reporter_in(folder: Path, start: int = 0, **config: object) -> Reporter:
    return Reporter(RunConfig(name="x", **config), folder, steps=10, start=start, speaks=True)


def events(folder: Path) -> dict[str, list]:
    """{tag: [(step, value)]} as TensorBoard's own reader has them; values are numbers, texts, or images as bytes."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).ravel()[-1]) for event in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
        if not tag.startswith("_hparams_")
    } | {"hparams": accumulator.summary_metadata}


def steps_of(values: list[tuple]) -> list[int]:
    return [step for step, _ in values]


def test_tensorboard_has_numbers_pictures_texts_and_the_config(tmp_path):
    pytest.importorskip("tensorboard")
    with reporter_in(tmp_path, tensorboard=True) as reporter:
        for step in (1, 2, 3):
            reporter.log(train_row(step, loss=4.0 - step))
        reporter.sample(3, "Once", " upon <b>a</b>\n time")
        reporter.log(held_out_row(3))
        reporter.log(BAD_ROW)
    seen = events(tmp_path)
    assert seen["train/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert set(flat(train_row(1))) | set(flat(held_out_row(1))) | set(flat(BAD_ROW)) - {"step"} <= {*seen, "step"}
    assert steps_of(seen["expert_load"]) == [3] and steps_of(seen["expert_load_over_time"]) == [3]
    assert seen["samples/Once/text_summary"] == [(3, b"    Once upon <b>a</b>\n     time\n")], "as it is, not as HTML"
    assert b'"vocab_size": 6400' in seen["config/text_summary"][0][1]
    assert b"micro_batches" in seen["bad_step/text_summary"][0][1]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    start = HParamsPluginData.FromString(seen["hparams"]["_hparams_/session_start_info"].plugin_data.content)
    values = start.session_start_info.hparams
    assert values["train.learning_rate"].number_value == 1e-3 and values["size.active_parameters"].number_value > 1e6


def test_a_resumed_run_draws_no_step_twice(tmp_path):
    """Killed at step 9, resumed at the checkpoint of step 6, which is evaluated again; then from step 0, its checkpoints gone."""
    with reporter_in(tmp_path, tensorboard=True) as reporter:
        for step in range(1, 10):
            reporter.log(train_row(step, loss=1.0))
            if step % 3 == 0:
                reporter.sample(step, "a", "first")
                reporter.log(held_out_row(step))
    with reporter_in(tmp_path, start=6, tensorboard=True) as reporter:
        reporter.sample(6, "a", "second")
        reporter.log(held_out_row(6))
        for step in range(7, 11):
            reporter.log(train_row(step, loss=2.0))
    seen = events(tmp_path)
    assert seen["train/loss"] == [(step, 1.0 + (step > 6)) for step in range(1, 11)]
    for tag in ("held_out/loss", "samples/a/text_summary", "expert_load", "expert_load_over_time"):
        assert steps_of(seen[tag]) == [3, 6], tag
    with reporter_in(tmp_path, start=0, tensorboard=True) as reporter:
        reporter.log(train_row(1, loss=3.0))
    assert events(tmp_path)["train/loss"] == [(1, 3.0)]


def test_tensorboard_that_is_turned_on_later_begins_with_what_the_run_has(tmp_path):
    with reporter_in(tmp_path) as reporter:
        for step in range(1, 5):
            reporter.log(train_row(step))
        reporter.log(held_out_row(4))
    with reporter_in(tmp_path, start=4, tensorboard=True) as reporter:
        reporter.log(train_row(5))
    seen = events(tmp_path)
    assert steps_of(seen["train/loss"]) == [1, 2, 3, 4, 5] and steps_of(seen["held_out/loss"]) == [4]


def test_its_files_do_not_name_the_machine_and_sort_by_session(tmp_path):
    for start_step in (0, 0, 0):  # within one second
        reporter_in(tmp_path, start=start_step, tensorboard=True).close()
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert len(names) == 3 and all(
        name.startswith("events.out.tfevents.") and name.endswith(".minimoe") for name in names
    )
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert socket.gethostname().encode() not in "".join(names).encode() + content


def test_rows_are_on_the_disk_while_the_run_goes_on(tmp_path):
    """Someone looks at a run that is alive."""
    with reporter_in(tmp_path, tensorboard=True) as reporter:
        reporter.log(train_row(1))
        deadline = time.monotonic() + 20
        while not (tmp_path / "tensorboard").exists() or "train/loss" not in events(tmp_path):
            assert time.monotonic() < deadline, "the row was never flushed"
            time.sleep(0.05)


def test_a_tensorboard_folder_that_is_a_link_is_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "elsewhere").mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="tensorboard: is a link"):
        reporter_in(run_dir, tensorboard=True)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("package", "config", "sentence"),
    [
        ("wandb", {"wandb": WandbConfig(mode="offline")}, "wandb.mode: 'offline' needs wandb; run: pip install wandb"),
        (
            "tensorboard",
            {"tensorboard": True},
            "tensorboard: true needs the package tensorboard, which is not installed",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, package, config, sentence):
    monkeypatch.delitem(sys.modules, package, raising=False)
    real = importlib.import_module

    def missing(name: str, *rest: object) -> object:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match=sentence):
        reporter_in(tmp_path, **config)
    assert not any(tmp_path.iterdir())


# The report


def test_nothing_is_published_of_a_run_in_training_or_of_no_run(tmp_path):
    pytest.importorskip("wandb")
    with pytest.raises(ValueError, match="config.yaml"):
        publish(tmp_path, [])
    import fcntl

    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig(wandb=WandbConfig(mode="offline"))))
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being trained"):
            publish(tmp_path, [])


# wandb, the real one, in processes of its own

REPORTS = """
import os, signal, sys, threading, time
from pathlib import Path
import train.wandb_tracker
from tests.train.test_trackers import BAD_ROW, held_out_row, train_row
from train.config import RunConfig, WandbConfig
from train.metrics import Reporter
run_dir, mode, seconds, trouble = sys.argv[1:]
train.wandb_tracker.WANDB_SECONDS = float(seconds)
train.wandb_tracker.GOING_OFFLINE = 25.0 if trouble == "none" else 5.0
Path(run_dir).mkdir(parents=True, exist_ok=True)
longest = 0.0

def timed(call, *arguments):
    global longest
    began = time.monotonic()
    call(*arguments)
    longest = max(longest, time.monotonic() - began)

def service():
    for child in Path(f"/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)

with Reporter(RunConfig(name="x", wandb=WandbConfig(mode=mode)), Path(run_dir), 10, 0, True) as reporter:
    for step in range(1, 61):
        timed(reporter.log, train_row(step))
        if step % 20 == 0:
            timed(reporter.sample, step, "Once", " upon a time")
            timed(reporter.log, held_out_row(step))
        if step == 7:
            timed(reporter.log, BAD_ROW)
        if step == 20 and trouble != "none":
            while reporter._trackers[0].notes.empty():  # it says where it is when it is there
                time.sleep(0.05)
            if trouble in ("SIGKILL", "SIGSTOP"):
                os.kill(service(), getattr(signal, trouble))
            elif trouble == "waits":
                Path(run_dir, "now").touch()
                while Path(run_dir, "now").exists():
                    time.sleep(0.05)
            elif trouble == "full":
                with open(Path(run_dir, "wandb/ballast"), "wb", buffering=0) as ballast:
                    try:
                        while ballast.write(b"x" * 4096) == 4096: pass
                    except OSError: pass
    ended = time.monotonic()
print(f"longest {longest:.2f} end {time.monotonic() - ended:.1f}")
"""


def report(
    run_dir: Path, mode: str, seconds: float = 20, trouble: str = "none", before: Sequence[int] = (), **variables: str
) -> tuple[str, float]:
    """Sixty rows and three evaluations by a process of its own; (what it said, the longest that a call of it took)."""
    kept = {key: value for key, value in environment().items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", REPORTS, run_dir, mode, str(seconds), trouble], cwd=run_dir.parent, capture_output=True, text=True,
        env={**kept, "HOME": str(run_dir.parent), "NETRC": str(run_dir.parent / "none"), **variables}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [*before, *range(1, 61)], (
        "every row is in metrics.jsonl"
    )
    return (run_dir / "log.txt").read_text(), float(done.stdout.split("longest ")[1].split()[0])


def records(path: Path) -> Iterator:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def history(path: Path) -> list[dict]:
    """The rows of a .wandb file, nested names joined by a slash."""
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/*run-*/run-*.wandb"))


@pytest.mark.slow
def test_offline_wandb_has_every_number_tables_and_pictures_and_online_without_a_key_falls_back(tmp_path):
    """The real wandb, twice as a resumed run would, with no account. Its files are read back."""
    pytest.importorskip("wandb")
    pytest.importorskip("PIL")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    append_row(run_dir / "metrics.jsonl", train_row(0))  # from before wandb was turned on
    said, _ = report(run_dir, "offline", before=[0])
    assert "wandb: to upload this run: wandb sync run/wandb/offline-run-" in said
    (run_dir / "metrics.jsonl").unlink()
    said, _ = report(run_dir, "online")
    assert "no API key found (WANDB_API_KEY or `wandb login`), so this run is logged offline" in said
    first, second = wandb_files(run_dir)
    assert first.name == second.name, "a resumed run keeps its id"
    assert [row["step"] for row in history(first)][:2] == [0, 1]
    rows = history(second)
    for row in read_rows(run_dir / "metrics.jsonl"):
        wanted = {name: number for name, number in flat(row).items() if number == number}.items()  # a NaN is no equal
        assert any(wanted <= there.items() for there in rows), f"{row['kind']} {row['step']} is not in wandb's file"
    for name, kind in (
        ("samples", "table-file"),
        ("expert_load", "image-file"),
        ("expert_load_over_time", "image-file"),
    ):
        shown = [row for row in rows if row.get(f"{name}/_type") == kind]
        assert [row["step"] for row in shown] == [20, 40, 60], name
        assert all((second.parent / "files" / row[f"{name}/path"]).stat().st_size > 50 for row in shown)
    table = json.loads((second.parent / "files" / rows[-1]["samples/path"]).read_text())
    assert table == {"columns": ["step", "prompt", "text"], "data": [[s, "Once", " upon a time"] for s in (20, 40, 60)]}
    (bad,) = [row for row in rows if "bad_steps/path" in row]
    table = json.loads((second.parent / "files" / bad["bad_steps/path"]).read_text())
    assert table["data"][0][0] == 7 and table["data"][0][4] == "[12, 15]" and "bible" in table["data"][0][5]
    kept = {record.WhichOneof("record_type"): record for record in records(second)}
    config = {update.key: json.loads(update.value_json) for update in kept["run"].run.config.update}
    assert config["train"]["learning_rate"] == 1e-3 and config["size"]["active_parameters"] > 1e6
    metrics = {record.metric.name or record.metric.glob_name: record.metric.step_metric for record in records(second)}
    assert metrics["*"] == "step", "charts are drawn against our step"
    for path in (first, second):
        assert str(tmp_path).encode() not in path.read_bytes(), "nothing says where the run lies"


@pytest.mark.slow
def test_wandb_in_trouble_neither_stops_nor_slows_a_run(tmp_path):
    """All at once: a server that fails from the start, one that begins to fail and one that falls silent in the middle, and a
    process of wandb's that stands still."""
    pytest.importorskip("wandb")
    cases = {
        "500": ("none", "so this run is logged offline"),
        "then 500": ("waits", "the run goes on without it"),
        "then hangs": ("waits", "the run goes on without it"),
        "stopped": ("SIGSTOP", "did not finish within"),
    }
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(wandb_server()) for name in cases}
        servers["500"].mood = "500"
        together = stack.enter_context(ThreadPoolExecutor(len(cases)))
        ends = {
            name: together.submit(
                report, tmp_path / name, "online", 4, trouble, WANDB_BASE_URL=servers[name].address, WANDB_API_KEY=KEY
            )
            for name, (trouble, _) in cases.items()
        }
        for name in ("then 500", "then hangs"):
            while not (tmp_path / name / "now").exists():
                assert not ends[name].done(), ends[name].result()
                time.sleep(0.05)
            servers[name].mood = name.split()[1]
            (tmp_path / name / "now").unlink()
        for name, (_, expected) in cases.items():
            said, longest = ends[name].result()
            assert expected in said, f"{name}: {said}"
            assert longest < 3, f"{name}: a call of the training's took {longest} s"
    (offline,) = (tmp_path / "500").glob("wandb/offline-run-*/run-*.wandb")
    steps = {row.get("step") for row in history(offline)}
    assert steps >= set(range(1, 61)), "the rows that came while it looked for its server are there too"


@pytest.mark.slow
def test_a_full_disk_in_wandbs_folder_stops_no_run(tmp_path):
    pytest.importorskip("wandb")
    (folder := tmp_path / "run/wandb").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        said, longest = report(tmp_path / "run", "offline", 4, "full")
        assert longest < 3 and "wandb: to upload this run" in said
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


HURRIED_TRAINING = """
import sys
import train.metrics
from train import cli, pretrain
train.metrics.HURRIED = float(sys.argv.pop(1))
cli.run(pretrain.main)
"""


@pytest.mark.slow
def test_a_signal_ends_a_run_that_has_wandb(workplace, tmp_path):
    """Saved and gone; a healthy server knows that it ended, a silent one is not waited for."""
    pytest.importorskip("wandb")
    with contextlib.ExitStack() as stack:
        cases = {}
        for mood in ("good", "hangs"):
            server = stack.enter_context(wandb_server())
            seconds = 4.0 if mood == "hangs" else 60.0  # a busy machine takes its time
            config = [workplace / "pretrain.yaml", f"runs_dir={tmp_path}", f"name={mood}", "wandb.mode=online"]
            words = [sys.executable, "-c", HURRIED_TRAINING, seconds, *config, "train.steps=100000"]
            place = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY}
            process = subprocess.Popen(
                list(map(str, words)), cwd=ROOT, env=environment() | place, stdout=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            cases[mood] = server, process
        for mood, (server, process) in cases.items():
            patience = time.monotonic() + 120
            while not server.runs or not read_rows(tmp_path / mood / "metrics.jsonl"):
                assert process.poll() is None and time.monotonic() < patience, (tmp_path / mood / "log.txt").read_text()
                time.sleep(0.05)
            server.mood = mood
            process.send_signal(signal.SIGTERM)
        for mood, (_, process) in cases.items():
            assert process.wait(timeout=120) == 128 + signal.SIGTERM, mood
            assert "stopped after step" in (tmp_path / mood / "log.txt").read_text()
            assert list((tmp_path / mood / "checkpoints").glob("step-*")), "saved"
        (run,) = cases["good"][0].runs.values()
        assert run.state == "finished" and run.exit_code == 0
        assert "did not finish within 4 s" in (tmp_path / "hangs/log.txt").read_text()


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_run_at_wandb_and_in_tensorboard(workplace, tmp_path):
    """Real training with both, to a server here; killed without warning, resumed, and its report published."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    config = [workplace / "pretrain.yaml", f"runs_dir={tmp_path}", "name=both", "wandb.mode=online", "tensorboard=true"]
    run_dir = tmp_path / "both"
    with wandb_server() as server:
        os.environ.update(place := {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY})
        try:
            process = start_command("train.pretrain", *config, "train.steps=100000", "train.log_every=2")
            wanted, patience = 24, time.monotonic() + 120
            while (
                max((row["step"] for row in read_rows(run_dir / "metrics.jsonl")), default=0) < wanted
                or not server.runs
            ):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < patience, (run_dir / "log.txt").read_text()
                time.sleep(0.02)
            process.kill()
            process.communicate()
            killed_at = max(row["step"] for row in read_rows(run_dir / "metrics.jsonl"))
            end = killed_at + 16
            said = finish(start_command("train.pretrain", *config, f"train.steps={end}", "train.log_every=2"))
            assert "resumed at step" in said and f"wandb: {server.address}" in said
            (run_dir / "report.html").write_text("<h1>report</h1>")
            sentence = publish(run_dir, [run_dir / "report.html"])
        finally:
            for name in place:
                del os.environ[name]
        (run_id,) = server.runs
        run = server.runs[run_id]
    steps = {row["step"] for row in run.history if "train/loss" in row}
    assert steps >= set(range(killed_at + 2, end + 1, 2)) and max(steps) == end, steps
    assert run.state == "finished" and run.exit_code == 0
    assert run.config["train"]["value"]["steps"] == end, "the config of the newest session"
    assert run.artifacts[f"report-{run_id}"]["report.html"] == b"<h1>report</h1>" and "report.html" in sentence
    assert any(name.startswith("media/html/report") for name in run.files)
    seen = events(run_dir)
    newest = {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"}
    assert steps_of(seen["train/loss"]) == list(range(2, end + 1, 2)), "each step once, none missing"
    assert [value for _, value in seen["train/loss"]] == pytest.approx(list(newest.values()), rel=1e-6)
