"""Who may ask, and how much: in front of every request, before a byte of it is understood.

A server on this machine alone is still within reach of every web page its owner opens. Such a page can send a form to
127.0.0.1 (so a body must say it is JSON, which a page of another origin may not without our leave, and there is none), and can
point a name of its own at 127.0.0.1 (so the Host header must be one of ours).
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.serving.errors import ApiError

LARGEST_BODY = 2**20  # bytes
OPEN_PATHS = ("/", "/health")  # need no key: the page holds nothing, and asks for it
ALWAYS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Guard:
    """ASGI middleware. `hosts` None: any Host header; `api_key` "": no key needed."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, api_key: str) -> None:
        self.app, self.hosts, self.api_key = app, hosts, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *ALWAYS.items()]}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, _bounded(receive), send_with_headers)
        except ApiError as error:
            await _answer(error, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = _without_port(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts:
            raise ApiError(
                403,
                f"Host: {host[:80]!r} is not this server; it answers as {', '.join(sorted(self.hosts))}",
                code="wrong_host",
            )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "Content-Type: must be application/json", code="wrong_content_type")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or len(length) > 18 or int(length) > LARGEST_BODY:
                raise _too_large()
        if self.api_key and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode()):
                raise ApiError(
                    401,
                    "Authorization: no or wrong API key",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def _without_port(host: str) -> str:
    """`localhost:8000` -> localhost, `[::1]:8000` -> ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _bounded(receive: Receive) -> Receive:
    """The same messages, until the bodies' sum is too large, whatever the header said."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > LARGEST_BODY:
            raise _too_large()
        return message

    return bounded


def _too_large() -> ApiError:
    message = f"the body is larger than {LARGEST_BODY:,} bytes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})  # the rest is not read


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
