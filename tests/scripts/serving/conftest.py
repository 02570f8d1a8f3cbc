"""A server in this process, for what a request may say; and a real one, for what only a real one shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def serve(random_run) -> Iterator[Callable]:
    """serve(format="chat", api_key="", hosts=None, max_batch=4, max_queue=8, **model_keys) -> (client, run, engine)."""
    from starlette.testclient import TestClient

    from scripts.serving.api import build_app
    from scripts.serving.engine import Engine
    from train.checkpoint import open_run

    clients = []

    def make(format="chat", api_key="", hosts=None, max_batch=4, max_queue=8, **model_keys):
        run = open_run(random_run(format=format, **model_keys), device="cpu")
        engine = Engine(run, max_batch, max_queue)
        app = build_app(run, engine, run.config.name, hosts=hosts, api_key=api_key)
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client, run, engine

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@dataclass
class Process:
    """A server that listens. `url` is without a slash at its end."""

    process: subprocess.Popen
    url: str
    words: list[str]  # what it said until it was ready

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def _started(run: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Process]:
    command = [sys.executable, "-m", "scripts.serve", str(run), "--port", "0", "--device", "cpu", *options]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
    process = subprocess.Popen(command, cwd=ROOT, env=surroundings, stderr=subprocess.PIPE, text=True)
    words: list[str] = []
    try:
        for line in process.stderr:
            words.append(line)
            found = re.match(r"page (http://\S+)/ ", line)
            if found:
                break
        else:
            raise AssertionError(f"the server ended: {''.join(words)}")
        yield Process(process, found[1], words)
        if process.poll() is None:
            process.terminate()
        assert process.wait(timeout=20) == 0, "SIGTERM is the usual end, and no failure"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def started():
    """started(run, *options, environment=None): a context with a real process on a free port."""
    return _started
