"""scripts.watch: it must say what the files say, whatever the terminal's size, and obey nothing that a file says."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.watching.files import Tail, Watched, lock_holder
from scripts.watching.screen import frame
from scripts.watching.text import BLOCKS, Style, chart, clean, cut, width, wrapped

from ..eval.run_folders import make_run

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Style(colour=False)
SGR = re.compile(r"\x1b\[\d*m")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write("4711\\n")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def held(folder: Path):
    """The folder's lock, held by another process, as a training holds it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def seen(folder: Path, columns: int = 100, rows: int | None = None, style: Style = PLAIN) -> str:
    run = Watched(folder)
    run.look()
    return "\n".join(frame(run, style, columns, rows))


def append(path: Path, *rows: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


# The files.


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(st.sampled_from(['{"a": 1}', '{"ä": "€"}', "", "[1]", '{"torn', "\x00", '{"b": [2]}']), max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_rows_come_once_however_the_file_grows(tmp_path, lines, cuts):
    """Cut anywhere, inside a character too: the same rows as read at once, each once."""
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    edges = [0, *sorted(min(c, len(content)) for c in cuts), len(content)]
    tail, found = Tail(path), []
    for start, end in zip(edges, edges[1:], strict=False):
        with open(path, "ab") as file:
            file.write(content[start:end])
        assert not tail.restarted() or not found
        found += tail.rows()
    whole = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    assert found == whole


def test_another_file_in_its_place_is_read_anew(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    watched = Watched(run)
    watched.look()
    assert watched.step == 50
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "new").write_text("\n".join(rows[:2]) + "\n")
    (run / "new").rename(run / "metrics.jsonl")
    watched.look()
    assert watched.step == 10 and len(watched.losses) == 2 and not watched.held_out, (
        "what was there before is forgotten"
    )


def test_a_file_that_was_replaced_is_read_once_more_and_not_at_every_look(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    watched = Watched(run)
    watched.look()
    (run / "new").write_text((run / "metrics.jsonl").read_text())
    (run / "new").rename(run / "metrics.jsonl")
    watched.look()
    tails = watched._metrics, watched._samples
    watched.look()
    assert (watched._metrics, watched._samples) == tails and watched.step == 50


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    watched = Watched(run)
    watched.look()
    append(run / "metrics.jsonl", {"kind": "train", "step": 30, "loss": 9.5, "tokens": 30 * 8192, "train_seconds": 1.0})
    watched.look()
    assert watched.step == 30 and list(watched.losses) == [5, 10, 15, 20, 25, 30], "what came after is trained again"
    assert not watched.held_out, "the evaluation at step 50 too"
    assert "loss 9.5000" in seen(run) and "step 30 of 50" in seen(run)


def test_the_lock_tells_whether_the_process_lives(tmp_path):
    assert lock_holder(tmp_path / ".lock") == (False, ""), "no lock, no training"
    with held(tmp_path):
        assert lock_holder(tmp_path / ".lock") == (True, "4711")
    assert lock_holder(tmp_path / ".lock") == (False, "")


def test_looking_does_not_hold_the_lock(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    assert lock_holder(tmp_path / ".lock") == (False, "")
    with open(tmp_path / ".lock", "a+") as training:
        fcntl.flock(training, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where the look before had kept it


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / ".lock"
    if kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert lock_holder(path) == (None, "")


# What is shown.


def test_a_running_run(tmp_path):
    run = make_run(tmp_path / "run", steps=200)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= 120))
    with held(run):
        text = seen(run)
    for words in (
        "run  ● running (process 4711)",
        "step 120 of 200",
        " 60 %",
        "983k tokens",
        "50 s of training",
        "1.40 GiB",
        "0 skipped",
    ):
        assert words in text, f"{words!r} is missing from\n{text}"
    assert re.search(r"about 3\d s left", text), "80 steps of 8192 tokens at about 19,000 tokens a second"
    assert (
        re.search(r"bbe +[\d.]+ at step 100", text)
        and "learning rate 1.20e-03" in text
        and "gradient norm 0.500" in text
    )
    assert "sample at step 200" in text and "In the beginning" in text


def test_every_state_has_its_words(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    assert "✓ finished" in seen(run)
    with held(run):
        assert "● running" in seen(run), "its last words are still being written"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 50", "steps: 90"))
    assert "✗ not running, not finished" in seen(run) and "the same command goes on" in seen(run)
    (run / "log.txt").write_text(
        "step 50/90  loss 2\nstopped after step 50 with a checkpoint; the same command goes on from there\n"
    )
    assert "■ stopped" in seen(run)
    with held(run):
        old = time.time() - 300
        for name in ("metrics.jsonl", "samples.jsonl", "log.txt"):
            os.utime(run / name, (old, old))
        text = seen(run)
        assert "● running (process 4711), but silent" in text and re.search(r"5 min \d s ago", text), text
    for name in ("metrics.jsonl", "samples.jsonl", "log.txt"):
        (run / name).unlink()
    assert "nothing is trained yet" in seen(run)
    with held(run):
        assert "● running (process 4711)" in seen(run) and "step 0 of 90" in seen(run)


def test_epochs_instead_of_steps_are_counted_by_the_log(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 50", "epochs: 2"))
    (run / "log.txt").write_text("plan  ...\nstep   50/1234  loss 2.1\n")
    assert "step 50 of 1,234" in seen(run)


def test_dead_and_overloaded_experts_stand_out(tmp_path):
    run = make_run(tmp_path / "run", steps=50, layers=[1, 2])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "routing" in row:
            row["routing"]["load"] = [[0.125] * 8, [0.0, 0.0, 0.4, 0.12, 0.12, 0.12, 0.12, 0.12]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = seen(run).splitlines()
    even, uneven = (next(line for line in lines if line.startswith(f"layer {i}")) for i in (1, 2))
    assert even == f"layer 1    {f'{BLOCKS[5] * 2} ' * 8}  busiest 0: 1.0×"
    assert uneven == f"layer 2    ×× ×× {BLOCKS[8] * 2} {f'{BLOCKS[4] * 2} ' * 5}  busiest 2: 3.2×  2 dead: 0, 1"
    assert f"layer 2    ××{BLOCKS[8]}{BLOCKS[4] * 5}  busiest 2" in seen(run, 56), "narrow"
    coloured = seen(run, style=Style())
    assert "\x1b[31m×" in coloured and f"\x1b[33m{BLOCKS[8]}" in coloured, "red the dead, yellow the busy"


def test_a_small_screen_shows_the_most_uneven_layers(tmp_path):
    run = make_run(tmp_path / "run", steps=50, layers=list(range(40)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "routing" in row:
            row["routing"]["load"][33] = [1.0] + [0.0] * 7
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "log.txt").write_text("first words\nlast words\n")
    text = seen(run, 100, 24)
    assert text.splitlines()[-1] == "last words" and len(text.splitlines()) == 24
    assert seen(run, 100, 8).splitlines()[-1] == "last words", "the end of the log has its place on the smallest screen"
    assert "layer 33" in text and "layers that are more even" in text
    shown = len(re.findall(r"^layer \d", text, re.MULTILINE))
    assert f"and {40 - shown} layers" in text


def test_a_dense_run_has_no_experts(tmp_path):
    assert "experts" not in seen(make_run(tmp_path / "run", experts=0, steps=50))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    columns=st.integers(20, 200),
    rows=st.one_of(st.none(), st.integers(5, 70)),
    n=st.integers(0, 3),
    colour=st.booleans(),
)
def test_no_line_is_wider_or_frame_taller_than_the_terminal(many_runs, columns, rows, n, colour):
    run = many_runs[n]
    lines = frame(run, Style(colour=colour), columns, rows)
    assert rows is None or len(lines) <= rows
    for line in lines:
        text = SGR.sub("", line)
        assert width(text) <= columns, line
        assert "\x1b" not in text and (colour or text == line)
    assert run.name[:5] in lines[0]


@pytest.fixture(scope="module")
def many_runs(tmp_path_factory):
    """A chat model whose text is wide, a dense one, one with many experts and layers, an empty one."""
    folder = tmp_path_factory.mktemp("runs")
    chat = make_run(folder / "chat", chat=True, steps=100)
    append(chat / "samples.jsonl", {"step": 100, "prompt": "用中文回答", "text": "混合专家模型 " * 40 + "e\u0301" * 50})
    empty = make_run(folder / "empty", steps=5, evaluated=False)
    (empty / "metrics.jsonl").unlink()
    many = make_run(folder / "many-experts", steps=50, experts=300, layers=list(range(30)))
    found = [Watched(run) for run in (chat, make_run(folder / "dense", steps=50, experts=0), many, empty)]
    for run in found:
        run.look()
    return found


def test_text_of_strangers_gives_the_terminal_no_orders(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202eesrever\u2028\u200b\x00end"
    append(run / "samples.jsonl", {"step": 60, "prompt": evil, "text": evil})
    append(run / "metrics.jsonl", {"kind": "held_out", "step": 50, "sources": {evil: {"bits_per_byte": 1.0}}})
    (run / "log.txt").write_text(f"finished: {evil}\n")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: run", f"name: {json.dumps(evil)}", 1))
    for style in (PLAIN, Style()):
        text = SGR.sub("", seen(run, style=style))
        assert not any(
            ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2028\u200b" for c in text.replace("\n", "")
        ), repr(text)
        assert text.count("esrever") >= 4, "the text itself is shown"


@pytest.mark.parametrize("digits", [16, 400, 5000])
def test_a_log_with_endless_numbers_and_a_date_that_no_clock_has(tmp_path, digits):
    run = make_run(tmp_path / "run", steps=50)
    (run / "log.txt").write_text(f"step 5/{'9' * digits} loss\n")
    assert "step 50 of 50" in seen(run)
    (run / "metrics.jsonl").rename(run / "rows")
    watched = Watched(run)
    watched.look()
    watched._samples.changed = 10.0**digits if digits < 300 else float("inf")
    assert watched.silence == 0 and "not running, not finished" in "\n".join(frame(watched, PLAIN, 80, None))


VALUES = st.one_of(
    st.sampled_from([None, True, 10**400, -1, 0, 2**63, 1e308, -1e308, float("nan"), float("inf"), "", "x", [], {}, [[]], [None], [["a"]], [[-1.0]]]),
    st.text(max_size=5),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_anywhere(spoilt_run, data):
    rows = [json.loads(line) for line in (spoilt_run / "original.jsonl").read_text().splitlines()]
    node = data.draw(st.sampled_from(rows))
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(VALUES)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (spoilt_run / "metrics.jsonl").write_text(text)
    (spoilt_run / "samples.jsonl").write_text(text)
    assert len(seen(spoilt_run, 80, 24).splitlines()) > 2


@pytest.fixture(scope="module")
def spoilt_run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("spoilt") / "run", steps=30)
    samples = (run / "samples.jsonl").read_text()
    (run / "original.jsonl").write_text((run / "metrics.jsonl").read_text() + samples)
    return run


# Its parts.


def test_cutting_counts_columns_not_characters():
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "ab…" and cut("混合专家", 5) == "混合…" and cut("ab", 0) == ""
    assert width("e\u0301") == 1 and clean("a\nb\tc\x1b[31m") == "a↵b c[31m"


@settings(deadline=None)
@given(st.text(alphabet="ab c混", max_size=80), st.integers(4, 30), st.integers(1, 5))
def test_wrapping_loses_nothing_that_has_room(text, columns, rows):
    lines = wrapped(text, columns, rows)
    assert len(lines) <= rows and all(width(line) <= columns for line in lines)
    if not any(line.endswith("…") for line in lines):
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_chart_falls_with_its_values_and_fills_the_width():
    lines, low, high = chart([4.0, 3.0, 2.0, 1.0], 8, 2, BLOCKS)
    assert (low, high) == (1.0, 4.0) and [len(line) for line in lines] == [8, 8]
    heights = [sum(BLOCKS.index(line[i]) for line in lines) for i in range(8)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 16 and heights[-1] == 1
    assert chart([float("nan")], 8, 2, BLOCKS)[0] == []


def test_a_terminal_without_unicode_gets_ascii(tmp_path):
    assert seen(make_run(tmp_path / "run", chat=True, steps=50), style=Style(False, False)).replace("é", "").isascii()


# The command.


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "scripts.watch", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=60)


def test_a_pipe_gets_one_look_without_colours(tmp_path):
    done = command(make_run(tmp_path / "run", steps=50), COLUMNS="70")
    assert done.returncode == 0 and not done.stderr and "\x1b" not in done.stdout
    assert done.stdout.startswith("run  ✓ finished\n") and max(map(width, done.stdout.splitlines())) <= 70


@pytest.mark.parametrize("arguments", [["gone"], ["run", "--every", "0"], ["run", "--every", "nan"]])
def test_mistakes_end_in_a_sentence(tmp_path, arguments, monkeypatch, capsys):
    from scripts.watch import main

    make_run(tmp_path / "run", steps=10)
    monkeypatch.setattr(sys, "argv", ["watch", str(tmp_path / arguments[0]), *arguments[1:]])
    with pytest.raises(ValueError, match="no run folder|--every"):
        main()


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments: object, columns: int = 90, rows: int = 40, **environment: str) -> None:
        self.main, self.other = pty.openpty()
        self.resize(columns, rows)
        words = [sys.executable, "-m", "scripts.watch", *map(str, arguments)]
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stdin=self.other,
            stdout=self.other,
            stderr=self.other,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
        )
        self.text = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, until, seconds: float = 60) -> str:
        """All output so far, once `until(output)` is true; TimeoutError with it otherwise."""
        deadline, pending = time.monotonic() + seconds, b""
        while not until(self.text):
            if time.monotonic() > deadline:
                raise TimeoutError(self.text[-3000:])
            if select.select([self.main], [], [], 0.1)[0]:
                pending += os.read(self.main, 65536)
                with contextlib.suppress(UnicodeDecodeError):
                    self.text, pending = self.text + pending.decode(), b""
            elif self.process.poll() is not None:
                raise TimeoutError(f"ended with {self.process.returncode}: {self.text[-3000:]}")
        return self.text

    def frames(self) -> list[list[str]]:
        """The frames drawn so far, without colours."""
        parts = SGR.sub("", self.text).split("\x1b[H")[1:]
        return [part.split("\x1b[J")[0].replace("\x1b[K", "").split("\r\n") for part in parts if "\x1b[J" in part]

    def end(self) -> int:
        """The exit code; everything that was still said is in `text`. Reads all the while: a full terminal holds its writer up."""
        deadline = time.monotonic() + 90
        ended = False
        while not ended:
            ended = self.process.poll() is not None  # and once more after the end
            with contextlib.suppress(TimeoutError):
                self.read(lambda _: False, seconds=0.3)
            assert time.monotonic() < deadline, f"still going: {self.text[-2000:]}"
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)
        os.close(self.other)


RESTORED = ("\x1b[?1049l", "\x1b[?25h", "\x1b[?7h")


def test_in_a_terminal_it_follows_the_run_and_the_window_and_ends_by_control_c(tmp_path):
    run = make_run(tmp_path / "run", steps=200)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= 100))
    with held(run), contextlib.closing(Terminal(run, "--every", "0.2")) as terminal:
        terminal.read(lambda text: "step 100 of 200" in text)
        append(run / "metrics.jsonl", *(row for row in rows if 100 < row["step"] <= 150))
        terminal.read(lambda text: "step 150 of 200" in text)
        assert "\x1b[32m" in terminal.text, "a terminal has colours"
        terminal.resize(50, 12)
        os.kill(terminal.process.pid, signal.SIGWINCH)
        terminal.read(lambda _: len(terminal.frames()[-1]) <= 12)
        assert max(map(width, terminal.frames()[-1])) <= 50
        os.kill(terminal.process.pid, signal.SIGTSTP)
        terminal.read(lambda text: text.endswith(RESTORED[0]))
        n = len(terminal.frames())
        deadline = time.monotonic() + 30
        while (
            time.monotonic() < deadline
            and "T" not in Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        ):
            time.sleep(0.01)
        os.kill(terminal.process.pid, signal.SIGCONT)
        terminal.read(lambda _: len(terminal.frames()) > n)
        assert terminal.text.count("\x1b[?1049h") == 2, "back on its own screen"
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.end() == 0
    after = terminal.text.rpartition(RESTORED[0])
    assert all(code in terminal.text for code in RESTORED) and "Traceback" not in terminal.text
    assert "run  " in SGR.sub("", after[2]) and "step 150 of 200" in after[2], (
        "what was seen last stays in the terminal"
    )


def test_it_ends_by_itself_when_the_run_is_finished(tmp_path):
    run = make_run(tmp_path / "run", steps=100)
    with (
        contextlib.ExitStack() as training,
        contextlib.closing(Terminal(run, "--every", "0.2", NO_COLOR="1")) as terminal,
    ):
        training.enter_context(held(run))
        terminal.read(lambda text: "running" in text or "finished" in text)
        training.close()
        assert terminal.end() == 0
    assert "✓ finished" in terminal.text.rpartition(RESTORED[0])[2]
    assert not SGR.search(terminal.text), "NO_COLOR"


@pytest.mark.slow
def test_a_real_training_is_watched_to_its_end_and_after_its_death(trained):
    """Two trainings: one runs to its end while it is watched, one is killed."""
    words = [
        sys.executable,
        "-m",
        "train.pretrain",
        str(trained.folder / "pretrain.yaml"),
        "train.log_every=2",
        "eval.every=10",
    ]
    for name, steps in (("watched", 40), ("killed", 4000)):
        training = subprocess.Popen(
            [*words, f"name={name}", f"train.steps={steps}"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        folder = trained.folder / "runs" / name
        try:
            while not (folder / "config.yaml").is_file():
                assert training.poll() is None
                time.sleep(0.1)
            with contextlib.closing(Terminal(folder, "--every", "0.3")) as terminal:
                terminal.read(lambda text, pid=training.pid: f"● running (process {pid})" in text and "layer 2" in text)
                if name == "killed":
                    training.kill()
                    terminal.read(lambda text: "not running, not finished" in text)
                    os.kill(terminal.process.pid, signal.SIGTERM)
                    assert terminal.end() == 0 and RESTORED[0] in terminal.text
                    continue
                assert terminal.end() == 0
                last = SGR.sub("", terminal.text.rpartition(RESTORED[0])[2])
                assert "✓ finished" in last and "step 40 of 40" in last and "100 %" in last
                assert "sample at step 40" in last and "text" in last and "finished: 40 steps" in last
                counts = [int(n) for frame in terminal.frames() for n in re.findall(r"step (\d+) of 40", frame[1])]
                assert counts == sorted(counts)
            assert training.wait(timeout=60) == 0
        finally:
            training.kill()
            training.wait()
