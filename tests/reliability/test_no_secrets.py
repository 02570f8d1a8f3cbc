"""What a run folder and wandb learn of the machine and its user: nothing. Real runs with marked keys, names and folders."""

from __future__ import annotations

import base64
import ctypes
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from train.config import RunConfig, WandbConfig
from train.files import without_home
from train.metrics import Reporter, append_row, read_rows
from train.trackers import Beside, Earlier, Tracker

from ..train.conftest import ROOT, environment
from .attempts import attempt

KEY = "MARKERkey" + "0" * 31  # of a length that wandb takes
MARKER = b"MARKER"


def can_rename_the_machine() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--uts", "hostname", "x"], capture_output=True).returncode == 0
    )


@pytest.fixture
def home(workplace, tmp_path) -> Path:
    """A home folder with a mark in its name; lab/ in it has the tiny run, its paths relative."""
    lab = tmp_path / "MARKERhome/lab"
    lab.mkdir(parents=True)
    shutil.copy(workplace / "text.jsonl", lab)
    shutil.copytree(workplace / "tokenizer", lab / "tokenizer")
    config = yaml.safe_load((workplace / "pretrain.yaml").read_text())
    config |= {"runs_dir": "runs", "tokenizer": {"path": "tokenizer"}}
    config["data"] |= {"cache_dir": "cache", "sources": [{"name": "topics", "kind": "jsonl", "path": "text.jsonl"}]}
    config["train"] |= {"steps": 2, "checkpoint_every": 1}
    config["eval"] |= {"every": 1, "max_tokens": 200}
    (lab / "pretrain.yaml").write_text(yaml.safe_dump(config))
    return lab.parent


def marked(home: Path) -> dict[str, str]:
    names = (
        "WANDB_USERNAME",
        "USER",
        "LOGNAME",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "HOSTNAME",
        "SLURM_JOB_USER",
        "WANDB_HOST",
        "WANDB_DOCKER",
    )
    return {
        **environment(),
        "HOME": str(home),
        "WANDB_API_KEY": KEY,
        "WANDB_EMAIL": "MARKER@x.org",
        **{name: f"MARKER{name}" for name in names},
    }


def command(home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """`python arguments` in the home's lab folder, on a machine with a marked name where one may be made."""
    call = [sys.executable, *map(str, arguments)]
    if can_rename_the_machine():
        call = ["unshare", "--uts", "sh", "-c", 'hostname MARKERhost && exec "$@"', "sh", *call]
    return subprocess.run(
        call, cwd=home / "lab", env={**marked(home), **variables}, capture_output=True, text=True, timeout=300
    )


def traces(folder: Path, *more: str) -> list[str]:
    """Every file, name and link under `folder` that holds a mark, this machine's name, or where Python and our sources lie."""
    found = []
    words = [
        MARKER,
        base64.b64encode(KEY.encode())[4:-4],
        str(ROOT).encode(),
        sys.prefix.encode(),
        *(text.encode() for text in more),
    ]
    if len(socket.gethostname()) > 4:
        words.append(socket.gethostname().encode())
    for path in folder.rglob("*"):
        name = os.fsencode(path.relative_to(folder))
        content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found += [f"{path.relative_to(folder)}: {word.decode()}" for word in words if word in name + b"\0" + content]
    return found


def become_marked(home: Path) -> None:
    """This process, from now on, belongs to the marked user on the marked machine."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ.update(marked(home))
    if ctypes.CDLL(None).unshare(0x04000000) == 0:  # CLONE_NEWUTS: a machine name of its own, where this is permitted
        socket.sethostname("MARKERhost")


COMMANDS = (("train.pretrain", "pretrain.yaml"), ("eval.evaluate", "runs/pre"), ("eval.report", "runs/pre"))
MADE = {
    "log.txt",
    "metrics.jsonl",
    "samples.jsonl",
    "run.json",
    "evaluation.json",
    "report.html",
    "checkpoints",
    "tokenizer",
}


def test_a_run_folder_knows_nothing_of_who_made_it_and_where(home):
    for arguments in COMMANDS:
        result = attempt(*arguments, allowed=home, cwd=home / "lab", before=lambda: become_marked(home))
        assert result.code == 0, result.err
    assert {path.name for path in (home / "lab/runs/pre").iterdir()} >= MADE
    assert not traces(home / "lab/runs/pre") + traces(home / "lab/cache")


@pytest.mark.slow
def test_nor_do_wandb_offline_and_tensorboard(home):
    """Real commands and the real packages, whose own files are searched too; a published report among them."""
    for arguments in (COMMANDS[0] + ("wandb.mode=offline", "tensorboard=true"), COMMANDS[2]):
        result = command(home, "-m", *arguments)
        assert result.returncode == 0, result.stderr
    published = "from train.trackers import publish; publish('runs/pre', ['runs/pre/report.html'])"
    result = command(home, "-c", published)
    assert result.returncode == 0, result.stderr
    assert any((home / "lab/runs/pre").glob("tensorboard/events.out.tfevents.*"))
    assert any((home / "lab/runs/pre").glob("wandb/offline-run-*/run-*.wandb"))
    assert not traces(home / "lab/runs/pre") + traces(home / "lab/cache")


def test_the_search_finds_what_there_is(home):
    (home / "lab/x").write_bytes(b"\0" + KEY.encode())
    (home / "lab/link").symlink_to(sys.prefix)
    assert {found.split(":")[0] for found in traces(home / "lab")} == {"x", "link"}


@pytest.mark.slow
def test_folders_that_the_user_names_stay_in_the_config_alone(home):
    """Given by their full names they stand in config.yaml as they were written; logs and reports have ~ for the home."""
    config = (home / "lab/pretrain.yaml").read_text().replace("runs_dir: runs", f"runs_dir: {home}/lab/runs")
    (home / "lab/pretrain.yaml").write_text(config)
    run_dir = home / "lab/runs/pre"
    for arguments in (COMMANDS[0], ("eval.report", run_dir)):
        result = attempt(*arguments, allowed=home, cwd=home / "lab", before=lambda: become_marked(home))
        assert result.code == 0, result.err
    found = {line.split(":")[0] for line in traces(run_dir)}
    assert found and {Path(name).name for name in found} == {"config.yaml"}
    assert "~/lab/runs/pre" in (run_dir / "log.txt").read_text()
    assert "~/lab/runs" in (run_dir / "report.html").read_text()


def test_the_home_folder_is_shown_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert without_home("run /home/someone/runs/x at /home/someone") == "run ~/runs/x at ~"
    monkeypatch.setenv("HOME", "/")
    assert without_home("/a/b") == "/a/b"


# ---- wandb's server -----------------------------------------------------------------------------------------------------

REPORTS = """
import os, signal, sys, time
from pathlib import Path
import train.wandb_tracker
from train.config import RunConfig, WandbConfig
from train.metrics import Reporter
train.wandb_tracker.WANDB_SECONDS = float(sys.argv[2])
Path(sys.argv[1]).mkdir(parents=True)
with Reporter(RunConfig(name="x", wandb=WandbConfig(mode="online")), Path(sys.argv[1]), 10, 0, True) as reporter:
    for step in range(1, 31):
        reporter.log({"kind": "train", "step": step, "loss": 2.0})
        if step == 10 and "kill" in sys.argv:
            while reporter._trackers[0].notes.empty():  # it says where it is when it is there
                time.sleep(0.05)
            for stat in Path("/proc").glob("[0-9]*/stat"):
                name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
                if int(rest.split()[1]) == os.getpid():
                    os.kill(int(stat.parent.name), signal.SIGKILL)
print("done")
"""
BUCKET = {
    "id": "b",
    "name": "n",
    "displayName": "n",
    "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
    "historyLineCount": 0,
}
ANSWERS = {
    "viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}},
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "model": None,
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
}  # fmt: skip


@pytest.fixture
def server():
    """A server that takes what wandb sends, and keeps it: (address, requests)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            secret = self.headers.get("authorization") or ""
            headers = "".join(f"{key}: {value}\n" for key, value in self.headers.items() if value != secret)
            requests.append(f"{self.command} {self.path}\n{headers}\n".encode() + body)
            content = json.dumps({"data": ANSWERS}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", requests
    listening.shutdown()
    listening.server_close()


def rows_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.slow
def test_nothing_of_user_and_machine_is_sent_to_wandb(home, server):
    address, requests = server
    ours = {"WANDB_USERNAME": "", "WANDB_EMAIL": ""}  # whoever sets these wants them to be sent
    result = command(home, "-c", REPORTS, "runs/x", 20, WANDB_BASE_URL=address, **ours)
    assert result.returncode == 0 and "done" in result.stdout, result.stderr
    assert any(b"UpsertBucket" in request for request in requests), "it was online"
    sent = [
        request
        for request in requests
        if any(word in request for word in (MARKER, str(ROOT).encode(), sys.prefix.encode()))
    ]
    assert not sent, sent[:3]
    assert not traces(home / "lab/runs/x")


@pytest.mark.slow
def test_training_goes_on_whatever_happens_to_wandb(home, server):
    """Every row is in metrics.jsonl and the exit code is 0; a server that is not there costs WANDB_SECONDS and about 20 s more, once."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        no_port = f"http://127.0.0.1:{gone.getsockname()[1]}"
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        ThreadPoolExecutor() as together,
    ):  # takes connections, says nothing
        no_answer = f"http://127.0.0.1:{silent.getsockname()[1]}"
        troubles = {"no-port": (no_port,), "no-answer": (no_answer,), "killed": (server[0], "kill")}
        results = {
            name: together.submit(command, home, "-c", REPORTS, f"runs/{name}", 1, *rest, WANDB_BASE_URL=address)
            for name, (address, *rest) in troubles.items()
        }
    for name, future in results.items():
        result, run_dir = future.result(), home / "lab/runs" / name
        assert result.returncode == 0 and "done" in result.stdout, f"{name}: {result.stdout}\n{result.stderr}"
        assert rows_of(run_dir) == list(range(1, 31)), name
        expected = "the run goes on without it" if name == "killed" else "logged offline"
        assert expected in (run_dir / "log.txt").read_text(), name
        assert name == "killed" or any(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
        assert not traces(run_dir)


# ---- the Reporter and its files -------------------------------------------------------------------------------------------


class Guest(Tracker):
    """Stands where wandb would."""

    name = "guest"

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.ended = fails, []

    def log(self, row: dict) -> None:
        if self.fails:
            raise ConnectionResetError("gone")

    def close(self, failed: bool) -> None:
        self.ended.append(failed)


def reporter_in(folder: Path) -> Reporter:
    return Reporter(RunConfig(wandb=WandbConfig()), folder, steps=10, start=0, speaks=True)


@pytest.mark.parametrize(
    ("error", "failed"), [(None, False), (ValueError, True), (KeyboardInterrupt, True), (SystemExit, True)]
)
def test_leaving_the_reporter_closes_its_trackers_whatever_happened(tmp_path, error, failed):
    guest = Guest()
    try:
        with reporter_in(tmp_path) as reporter:
            reporter._trackers = [Beside(guest, lambda: Earlier(0, [], []))]
            if error is not None:
                raise error("x")
    except BaseException as caught:
        assert type(caught) is error
    reporter.close()
    assert guest.ended == [failed], "once, and told whether the run failed"


def test_a_guest_that_fails_is_dropped_and_said_once(tmp_path, capsys):
    with reporter_in(tmp_path) as reporter:
        reporter._trackers = [Beside(Guest(fails=True), lambda: Earlier(0, [], []))]
        for step in (1, 2, 3):
            reporter.log({"kind": "train", "step": step})
    assert rows_of(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().out.count("the run goes on without it") == 1


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_what_is_no_plain_file_is_not_written(tmp_path, name, kind):
    other = tmp_path / "other.txt"
    if kind == "link":
        other.write_text("precious")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if kind == "pipe":
        os.mkfifo(run_dir / name)
    else:
        (run_dir / name).symlink_to(other)
    with reporter_in(run_dir) as reporter, pytest.raises(ValueError, match=f"{name}: is a link or a device"):
        reporter.log({"step": 1})
        reporter.sample(1, "a", "b")
    assert not other.exists() or other.read_text() == "precious"


def test_a_full_disk_is_an_error_once_and_the_last_words_are_printed(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with reporter_in(disk) as reporter:
            reporter.log({"step": 1})
            with pytest.raises(OSError, match="No space left"):
                reporter.log({"step": 2, "text": "x" * 100_000})
            reporter.say("last words")
            reporter.log({"step": 3})
        assert "last words" in capsys.readouterr().out
        (disk / "ballast").unlink(missing_ok=True)
        assert rows_of(disk)[:1] == [1], "what was written stays"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_row_that_the_full_disk_cut_is_closed_by_the_next(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"step": 1}\n{"step": 2, "te')
    append_row(tmp_path / "rows", {"step": 3})
    assert [row["step"] for row in read_rows(tmp_path / "rows")] == [1, 3]


def test_a_foreign_wandb_id_is_refused(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "wandb_id").write_text("../../evil")
    with pytest.raises(ValueError, match="wandb_id"):
        Reporter(RunConfig(wandb=WandbConfig(mode="offline")), tmp_path, steps=10, start=0, speaks=True)
