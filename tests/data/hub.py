"""A Hugging Face hub of seven small repositories: files, cards and columns as the real ones have them, odd rows included.

`lay_out(folder)` writes them; `datasets` reads such a folder as it reads a repository. `serve(folder)` answers for them on
127.0.0.1 as the hub does (point HF_ENDPOINT there), as far as `datasets` 5 and `huggingface_hub` 2 ask.

Columns, file names and configurations were taken from the data sets' public cards, MiniMind's turns from its own reader
(dataset/lm_dataset.py). The odd rows are of the kinds that are in them: empty lines, answers left empty, a user's turn at the
end, conversations with tools, columns that only later records have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet

STORY = "One day, a little girl named Lily found a needle in her room. She shared it with her mom, number {}."
PAGE = "The water cycle begins when the sun warms the sea. Lesson {} explains how vapour becomes rain."
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def user(text: str) -> dict:
    return {"content": text, "role": "user"}


def assistant(text: str) -> dict:
    return {"content": text, "role": "assistant"}


def lay_out(folder: Path) -> None:
    """Writes folder/OWNER/NAME/... of each repository."""
    _tiny_stories(folder / "roneneldan/TinyStories")
    _fineweb_edu(folder / "HuggingFaceFW/fineweb-edu")
    _wikitext(folder / "Salesforce/wikitext")
    _minimind(folder / "jingyaogong/minimind_dataset")
    _smol_smoltalk(folder / "HuggingFaceTB/smol-smoltalk")
    _ultrachat(folder / "HuggingFaceH4/ultrachat_200k")
    _alpaca(folder / "tatsu-lab/alpaca")


def _tiny_stories(repo: Path) -> None:
    _card(repo, "license: cdla-sharing-1.0\ntask_categories:\n- text-generation\nlanguage:\n- en")
    stories = [STORY.format(i) for i in range(40)]
    stories[7], stories[8] = "", "\nâ€œHelloâ€\x9d, said the cat.\n\n"
    for part in range(4):
        rows = {"text": stories[part * 10 : part * 10 + 10]}
        _parquet(repo / f"data/train-0000{part}-of-00004-2d5a1467fff1081b.parquet", rows)
    _parquet(repo / "data/validation-00000-of-00001-869c898b519ad725.parquet", {"text": ["Not to be trained on."] * 3})
    for name in ("TinyStories-train.txt", "TinyStories-valid.txt", "TinyStoriesV2-GPT4-train.txt"):
        (repo / name).write_text("The same stories again, as text.\n<|endoftext|>\n")


def _fineweb_edu(repo: Path) -> None:
    configs = [("default", "data/*/*"), ("sample-10BT", "sample/10BT/*"), ("sample-100BT", "sample/100BT/*")]
    lines = [f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {p}" for n, p in configs]
    _card(repo, "license: odc-by\nconfigs:\n" + "\n".join(lines))
    for part in range(2):
        rows = {
            "text": [PAGE.format(20 * part + i) for i in range(20)],
            "id": [f"<urn:uuid:{part}-{i}>" for i in range(20)],
            "dump": ["CC-MAIN-2024-10"] * 20,
            "url": ["http://example.org/lesson"] * 20,
            "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * 20,
            "language": ["en"] * 20,
            "language_score": [0.97] * 20,
            "token_count": [24] * 20,
            "score": [3.5] * 20,
            "int_score": [4] * 20,
        }
        _parquet(repo / f"sample/10BT/00{part}_00000.parquet", rows)
    _parquet(repo / "data/CC-MAIN-2024-10/train-00000-of-00001.parquet", {"text": ["Another configuration."]})


def _wikitext(repo: Path) -> None:
    names = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    lines = [
        f"- config_name: {name}\n  data_files:\n"
        + "\n".join(f"  - split: {split}\n    path: {name}/{split}-*" for split in ("test", "train", "validation"))
        for name in names
    ]
    features = "\n".join(f"- config_name: {n}\n  features:\n  - name: text\n    dtype: string" for n in names)
    _card(repo, "license: cc-by-sa-3.0\ndataset_info:\n" + features + "\nconfigs:\n" + "\n".join(lines))
    article = [
        "",
        " = Valkyria Chronicles {} = \n",
        "",
        " It was released in 2011 , chapter {} @-@ by @-@ chapter . \n",
    ]
    for name in names:
        for part in range(2):
            rows = {"text": [line.format(10 * part + i) for i in range(10) for line in article]}
            _parquet(repo / f"{name}/train-0000{part}-of-00002.parquet", rows)
        for split in ("test", "validation"):
            _parquet(repo / f"{name}/{split}-00000-of-00001.parquet", {"text": ["", " = Robert Boulter = \n"]})


def _minimind(repo: Path) -> None:
    _card(repo, "license: apache-2.0\nlanguage:\n- multilingual")
    _jsonl(
        repo / "pretrain_t2t_mini.jsonl", [{"text": f"人类大脑的主要功能，第 {i} 条。The brain."} for i in range(40)]
    )
    plain = [[user(f"为什么天空是蓝色的？{i}"), assistant("因为散射。")] for i in range(40)]
    filler = "，".join(["很长的回答"] * 500)
    # More than the ten megabytes that `datasets` looks at first; without an answer, so that no test tokenises them.
    plain += [[user(f"{filler}{i}")] for i in range(1500)]
    tools = json.dumps([{"type": "function", "function": {"name": "get_current_time"}}])
    with_tools = [
        {"role": "system", "content": "", "tools": tools},
        {"role": "user", "content": "现在几点？"},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": "get_current_time", "arguments": {}}])},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "现在是 12 点。"},
    ]
    thinking = [user("2+2=?"), {**assistant("4"), "reasoning_content": "两个二。"}]
    _jsonl(repo / "sft_t2t_mini.jsonl", [{"conversations": turns} for turns in [*plain, with_tools, thinking]])
    _jsonl(repo / "dpo.jsonl", [{"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}])


def _smol_smoltalk(repo: Path) -> None:
    _card(repo, _features(("train", "test"), "messages", "source"))
    for split, parts in (("train", 4), ("test", 1)):
        for part in range(parts):
            talks = [
                [user(f"What is {i} times 2?"), assistant(f"It is {2 * i}.")] for i in range(part * 10, part * 10 + 10)
            ]
            talks[0].insert(0, {"content": "You are a helpful AI assistant named SmolLM.", "role": "system"})
            rows = {"messages": talks, "source": ["smol-magpie-ultra-short"] * 10}
            _parquet(repo / f"data/{split}-0000{part}-of-0000{parts}.parquet", rows, messages=True)


def _ultrachat(repo: Path) -> None:
    splits = ("train_sft", "test_sft", "train_gen", "test_gen")
    _card(repo, _features(splits, "prompt", "prompt_id", "messages"))
    for split in splits:
        talks = [
            [user(f"Write about snow {i}."), assistant("White."), user("More."), assistant("Cold.")] for i in range(20)
        ]
        talks[3] = talks[3][:3]  # ends with the user
        talks[4] = talks[4][1:]  # begins with the assistant
        rows = {
            "prompt": [turns[0]["content"] for turns in talks],
            "prompt_id": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(20)],
            "messages": talks,
        }
        _parquet(repo / f"data/{split}-00000-of-00001-a3ecf92756993583.parquet", rows, messages=True)


def _alpaca(repo: Path) -> None:
    _card(repo, "license: cc-by-nc-4.0\nlanguage:\n- en\ntags:\n- instruction-finetuning")
    rows = [
        {
            "instruction": f"Give me {i} ideas.",
            "input": "For a birthday." if i % 2 else "",
            "output": "" if i == 4 else f"Here are {i}: a cake.",
            "text": "Below is an instruction that describes a task. ...",
        }
        for i in range(40)
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    _parquet(repo / "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", columns)


def _features(splits: tuple[str, ...], *columns: str) -> str:
    turns = "\n    list:\n    - name: content\n      dtype: string\n    - name: role\n      dtype: string"
    features = "\n".join(f"  - name: {c}" + (turns if c == "messages" else "\n    dtype: string") for c in columns)
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits)
    return f"dataset_info:\n  features:\n{features}\nconfigs:\n- config_name: default\n  data_files:\n{files}"


def _card(repo: Path, header: str) -> None:
    repo.mkdir(parents=True)
    (repo / "README.md").write_text(f"---\n{header}\n---\n# A data set\n", encoding="utf-8")


def _parquet(path: Path, columns: dict, messages: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if messages:
        turn = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
        index = table.column_names.index("messages")
        table = table.set_column(index, "messages", pyarrow.array(columns["messages"], pyarrow.list_(turn)))
    pyarrow.parquet.write_table(table, path)


def _jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


class _Hub(BaseHTTPRequestHandler):
    """HEAD and GET of files (ranges too), and the three questions about a repository: its commit, its tree, some paths."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = urllib.parse.parse_qs(body).get("paths", [])
        self._answer(paths)

    def _answer(self, paths: list[str] | None = None) -> None:
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        self.server.asked.append(f"{self.command} {url.path}")
        if parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            return self._file(self.server.folder / "/".join(parts[1:3]) / "/".join(parts[5:]))
        repo = self.server.folder / "/".join(parts[2:4])
        if parts[:2] != ["api", "datasets"] or not repo.is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[4:5] == ["tree"]:
            recursive = "recursive=true" in url.query.lower()
            return self._json(_entries(repo, repo / "/".join(parts[6:]), recursive))
        if parts[4:5] == ["paths-info"]:
            return self._json([_entry(repo, repo / path) for path in paths or [] if (repo / path).exists()])
        names = [{"rfilename": str(f.relative_to(repo))} for f in sorted(repo.rglob("*")) if f.is_file()]
        return self._json({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": names, "private": False, "tags": []})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content, status = path.read_bytes(), 200
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            content, status = content[int(first) : end + 1], 206
        self._send(status, content, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(repo: Path, path: Path) -> dict:
    name = str(path.relative_to(repo))
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
    return {"type": "file", "oid": _oid(path), "size": path.stat().st_size, "path": name}


def _entries(repo: Path, folder: Path, recursive: bool) -> list[dict]:
    return [_entry(repo, path) for path in sorted(folder.rglob("*") if recursive else folder.glob("*"))]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """The hub, at http://127.0.0.1:PORT (`.server_port`); `.asked` lists what was asked of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder, server.asked = folder, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
