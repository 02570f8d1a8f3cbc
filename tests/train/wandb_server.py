"""A small stand-in for wandb's server on 127.0.0.1: it keeps what the real client uploads, and misbehaves when told to."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field

KEY = "k" * 40  # of a length that wandb takes
PROJECT = {"id": "p", "name": "minimoe", "entity": {"id": "e", "name": "someone"}}


@dataclass
class StoredRun:
    """What the server has of one run."""

    config: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)  # rows, over all sessions
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, bytes]] = field(default_factory=dict)  # name -> its files and manifest.json
    state: str = "running"
    exit_code: int | None = None


class WandbServer(http.server.ThreadingHTTPServer):
    """`runs` by id. mood: "good", "500" (every request fails), "hangs" (a request is never answered); it may change any time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, StoredRun] = {}
        self.mood, self.asked = "good", 0
        self.unknown: list[str] = []  # requests that it has no answer to
        self._artifacts: dict[str, tuple[str, str]] = {}  # id -> run, name
        self.ended = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def graphql(self, query: str, given: dict) -> dict:
        """The data that a query or mutation asks for."""
        run_id = given.get("run") or given.get("name") or given.get("runName")
        if "UpsertBucket" in query:
            run = self.runs.setdefault(given["name"], StoredRun())
            run.config |= json.loads(given.get("config") or "{}")
            return {"upsertBucket": {"bucket": self._bucket(given["name"]), "inserted": not run.history}}
        if "RunResumeStatus" in query:
            bucket = self._bucket(run_id) if run_id in self.runs else None
            return {"model": {**PROJECT, "bucket": bucket}}
        if "CreateRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.address}/put/{run_id}/{n}"} for n in given["files"]]
            return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
        if "Viewer" in query:
            viewer = {"id": "v", "entity": "someone", "username": "someone", "email": "", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        if "ArtifactType(" in query:
            return {"project": {"artifact": None}}
        if "ArtifactByID" in query:
            return {"artifact": self._committed(given["id"])}
        if "ServerFeatures" in query:
            return {"serverInfo": {"features": []}}
        if "mutation" in query and "Artifact" in query:
            return self._artifact(query, given.get("input") or given)
        self.unknown.append(f"{query} {given}")
        return {}

    def _artifact(self, query: str, given: dict) -> dict:
        """The steps in which the client uploads an artifact: create, manifest, files, commit."""
        if "CreateArtifact " in query:
            key = f"a{len(self._artifacts)}"
            self._artifacts[key] = (given["runName"], given["artifactCollectionName"])
            artifact = {"id": key, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "ArtifactManifest" in query:  # asked for twice: without, then with a place to put it
            key = given.get("artifactID") or given["artifactManifestID"]
            put = {"uploadUrl": f"{self.address}/artifact/{key}/manifest.json", "uploadHeaders": []}
            made = {"artifactManifest": {"id": key, "file": {"id": key, **(put if given["includeUpload"] else {})}}}
            return {"createArtifactManifest": made, "updateArtifactManifest": made}
        if "CreateArtifactFiles" in query:
            edges = [
                {"node": {"storagePath": file["name"], "uploadHeaders": [], "uploadMultipartUrls": None,
                          "uploadUrl": f"{self.address}/artifact/{file['artifactID']}/{file['name']}",
                          "artifact": {"id": file["artifactID"]}}}
                for file in given["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if "CommitArtifact" in query:
            return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}
        self.unknown.append(f"{query} {given}")
        return {}

    def _committed(self, key: str) -> dict:
        collection = {"name": self._artifacts[key][1], "project": {**PROJECT, "internalId": "p"}}
        return {
            "__typename": "Artifact", "id": key, "versionIndex": 0, "artifactType": {"name": "report"}, "description": None,
            "metadata": "{}", "ttlDurationSeconds": 0, "ttlIsInherited": True, "tags": [], "historyStep": None, "size": 1,
            "state": "COMMITTED", "digest": "", "commitHash": "", "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None, "aliases": [], "artifactSequence": {"__typename": "ArtifactSequence", **collection},
        }  # fmt: skip

    def _bucket(self, run_id: str) -> dict:
        run = self.runs[run_id]
        lines = len(run.history)
        return {
            "id": run_id, "name": run_id, "displayName": run_id, "description": "", "sweepName": "", "project": PROJECT,
            "historyLineCount": lines, "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}",
            "historyTail": json.dumps([json.dumps(run.history[-1])] if lines else []), "config": json.dumps(run.config),
            "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip

    def stream(self, run_id: str, sent: dict) -> None:
        """A request to the file stream: lines of the history, and at the end the exit code."""
        run = self.runs.setdefault(run_id, StoredRun())
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
        if sent.get("complete"):
            run.state, run.exit_code = "finished", sent.get("exitcode")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.asked += 1
        if self.server.mood == "hangs":
            self.server.ended.wait()
            return
        if self.server.mood == "500":
            return self._send(500, b"{}")
        path = self.path.split("/")
        content: dict[str, typing.Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            content = {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(path[-2], json.loads(body))
        elif path[1] == "put":
            self.server.runs.setdefault(path[2], StoredRun()).files["/".join(path[3:])] = body
        elif path[1] == "artifact":
            run, name = self.server._artifacts[path[2]]
            self.server.runs[run].artifacts.setdefault(name, {})["/".join(path[3:])] = body
        else:
            self.server.unknown.append(f"{self.command} {self.path}")
        self._send(200, json.dumps(content).encode())

    do_GET = do_POST = do_PUT = _answer

    def _send(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client was killed
            super().handle()

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":  # python -m tests.train.wandb_server: to try a run by hand
    with wandb_server() as server:
        print(f"export WANDB_BASE_URL={server.address} WANDB_API_KEY={KEY}", flush=True)
        while True:
            time.sleep(5)
            for name, run in server.runs.items():
                print(name, run.state, len(run.history), "rows", *run.files, *run.artifacts, flush=True)
            while server.unknown:
                print("?", server.unknown.pop(0), flush=True)
