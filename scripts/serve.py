"""Serves a run to OpenAI clients, and a chat page that shows which experts read each token.

    python -m scripts.serve runs/quickstart-sft            then open http://127.0.0.1:8000/

Endpoints: /v1/models, /v1/chat/completions, /v1/completions (both with `stream`), /health. Requests are answered together
in one batch that they join and leave token by token (model/batching.py). The server listens on this machine alone unless
--host says otherwise. Ctrl-C ends it: whoever waits is told.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from model.batching import cache_bytes
from train import cli
from train.checkpoint import Run, open_run

if TYPE_CHECKING:
    import uvicorn

    from scripts.serving.engine import Engine

WANTED_BY = "scripts.serve"
MOST_CONNECTIONS = 1000
GRACE = 5  # seconds in which answers that were told to end may do so
EPILOG = """

  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "What is 47 + 38?"}]}'

  Any OpenAI client: base_url http://127.0.0.1:8000/v1, any api_key. Beyond OpenAI's fields it takes top_k,
  repetition_penalty, and "experts": true, which adds to answers and chunks, under "minimoe", the experts of each MoE
  layer that read each new token."""


def main() -> int:
    arguments = _arguments()
    for package in ("fastapi", "uvicorn"):
        cli.need(package, WANTED_BY)
    api_key = _api_key(arguments.api_key_env)
    listening = _listen(arguments.host, arguments.port)
    with listening:
        run = open_run(arguments.run, device=arguments.device)
        return _serve(run, listening, arguments, api_key)


def _serve(run: Run, listening: socket.socket, arguments: argparse.Namespace, api_key: str) -> int:
    from scripts.serving.api import build_app
    from scripts.serving.engine import Engine

    engine = Engine(run, arguments.max_batch, arguments.max_queue)
    name = arguments.model_name or run.config.name
    address, port = listening.getsockname()[:2]
    local = ipaddress.ip_address(address).is_loopback
    hosts = {"localhost", "127.0.0.1", "::1", address, arguments.host.lower()} if local else None
    app = build_app(run, engine, name, hosts=hosts, api_key=api_key)
    listening.listen()  # from now on who comes is answered, at the latest when uvicorn has started
    shown = f"[{address}]" if ":" in address else address
    is_chat = run.config.data.format == "chat"
    kind = "a chat model" if is_chat else "only pretrained: it continues texts (/v1/completions)"
    _say(f"{run.run_dir}, step {run.step}, on {run.device}: {kind}; model name {name!r}")
    with run.autocast():  # which decides the cache's dtype
        cache = cache_bytes(run.model, arguments.max_batch) / 2**20
    _say(
        f"{arguments.max_batch} answers at once, whose cache may grow to {cache:.0f} MiB; "
        f"{arguments.max_queue} more may wait"
    )
    if not local:
        who = (
            "whoever has the API key"
            if api_key
            else "ANYONE who reaches it, without an API key (--api-key-env sets one),"
        )
        _say(
            f"warning: --host {arguments.host} opens this server to other machines; {who} can use it; traffic is not encrypted"
        )
    _say(f"page http://{shown}:{port}/   API http://{shown}:{port}/v1   (Ctrl-C ends)")
    _server(app, engine, arguments.access_log).run(sockets=[listening])
    _say("ended")
    return 0


def _server(app: object, engine: Engine, access_log: bool) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Tells the engine of the signal, so that answers end at once rather than when they are done."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:  # a second Ctrl-C would only tear uvicorn's own end apart, which GRACE bounds
                engine.stop()
                super().handle_exit(sig, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises it again after its own end, which is then ours
    config = uvicorn.Config(
        app,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        lifespan="on",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is read, so that a port that is taken is known at once. ValueError if it cannot be."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host: {host!r} is no address of this machine ({error}); try 127.0.0.1") from None
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror}; choose others (port 0: any free one)"
        ) from None
    return listening


def _api_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env: the environment variable {variable} is empty; put the key there")
    if not key.isascii() or not key.isprintable():
        raise ValueError(
            f"--api-key-env: the key in {variable} has characters that no client can send; use plain ASCII"
        )
    return key


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _whole(least: int, most: int):
    def convert(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} to {most}")
        return int(text)

    return convert


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Serve a run over an OpenAI-compatible API, with a chat page that shows the experts at work.",
        "python -m scripts.serve runs/quickstart-sft" + EPILOG,
    )
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=_whole(0, 65535), default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (default: the run's name)")
    parser.add_argument(
        "--max-batch", type=_whole(1, 1024), default=16, metavar="N", help="answers written at once (default: 16)"
    )
    parser.add_argument(
        "--max-queue",
        type=_whole(0, 100_000),
        default=64,
        metavar="N",
        help="more that may wait (default: 64); then 429",
    )
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable that holds the key to ask for")
    parser.add_argument("--access-log", action="store_true", help="write a line for each request")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
