"""The command: mistakes in one sentence before the model is read, and what it says about who can reach it."""

import argparse
import socket
import sys

import pytest

from scripts import serve
from train.checkpoint import open_run


def test_a_mistake_is_one_sentence_and_known_before_the_model_is_read(monkeypatch, capsys):
    monkeypatch.setattr(serve, "open_run", lambda *_, **__: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        for options, message in (
            (["--port", taken], f"--host 127.0.0.1 --port {taken}: Address already in use"),
            (["--host", "no.such.host.invalid"], "--host: 'no.such.host.invalid'"),
            (["--port", "0", "--api-key-env", "NOT_SET_ANYWHERE"], "environment variable NOT_SET_ANYWHERE is empty"),
            (["--port", "70000"], "must be a whole number from 0 to 65535"),
            (["--max-batch", "0"], "--max-batch"),
            (["--max-queue", "-1"], "--max-queue"),
        ):
            monkeypatch.setattr(sys, "argv", ["serve", "runs/none", *options])
            with pytest.raises((ValueError, SystemExit)) as caught:
                serve.main()
            assert message in str(caught.value) + capsys.readouterr().err, options


def test_a_key_that_no_client_can_send_is_refused(monkeypatch):
    monkeypatch.setenv("KEY_OF_TEST", " s3cret\n")
    assert serve._api_key("KEY_OF_TEST") == "s3cret"
    for key in ("schlüssel", "two\nlines"):
        monkeypatch.setenv("KEY_OF_TEST", key)
        with pytest.raises(ValueError, match="KEY_OF_TEST.*plain ASCII") as caught:
            serve._api_key("KEY_OF_TEST")
        assert key not in str(caught.value)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(sys, "argv", ["serve", "runs/none"])
    with pytest.raises(ValueError, match="scripts.serve needs the package fastapi.*requirements-extra"):
        serve.main()


@pytest.mark.parametrize("host, key", [("127.0.0.1", ""), ("0.0.0.0", ""), ("0.0.0.0", "s3cret")])
def test_who_can_reach_it_is_said_aloud(random_run, monkeypatch, capsys, host, key):
    served = []

    class Nothing:
        def run(self, sockets):
            served.extend(sockets)

    def server(app, engine, access_log):
        served.append(app.hosts)
        return Nothing()

    monkeypatch.setattr(serve, "_server", server)
    arguments = argparse.Namespace(host=host, max_batch=1, max_queue=1, model_name=None, access_log=False)
    with serve._listen(host, 0) as listening:
        assert serve._serve(open_run(random_run(), device="cpu"), listening, arguments, key) == 0
    words = capsys.readouterr().err
    assert ("opens this server to other machines" in words) == (host == "0.0.0.0")
    assert ("without an API key" in words) == (host == "0.0.0.0" and not key) and "s3cret" not in words
    assert (served[0] is None) == (host == "0.0.0.0"), "the Host header is checked where only this machine can ask"
