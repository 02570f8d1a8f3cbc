"""Files and hub sets -> records: dictionaries of columns, and where each one stands.

JSON lines, a .json file of lines or of one array, Parquet, text, data sets of the hub. JSON and text may be compressed with
gzip (*.gz). Everything is read as a stream but what is one piece: a text, an array.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.config import SourceConfig
from data.words import one_line, short, short_name

LONGEST_LINE = 2**28  # bytes of a line of JSON, unpacked; what is longer is no line
LARGEST_FILE = 2**31  # bytes, unpacked, of a file that is read as a whole: a text, or a .json file that is one array


def files(source: SourceConfig) -> list[Path]:
    """The files a local source reads, sorted. ValueError when its path matches none."""
    path = source.path or ""
    if os.path.isfile(path):  # unlike Path's, false for a name too long to be one
        return [Path(path)]
    if os.path.isdir(path):
        example = f"{path.rstrip('/')}/*"
        raise ValueError(f"source {source.name!r}: path: {path!r} is a folder; name its files, such as {example}")
    if not glob.has_magic(path):
        problem = "is no regular file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"source {source.name!r}: path: {path!r} {problem}; give the path of a file or a glob")
    names = set(glob.glob(path, recursive=True))  # two ** find a file more than once
    found = sorted(Path(name) for name in names if os.path.isfile(name))
    if not found:
        raise ValueError(
            f"source {source.name!r}: path: {path!r} matches no file; mend the glob (** reaches into folders)"
        )
    return found


def read_text(file: Path, source: SourceConfig) -> str:
    """The whole text of a file. ValueError where it cannot be read, is no UTF-8 or too large."""
    with _open(file, source) as content:
        return _decode(_whole(content, short_name(file)), short_name(file))


def records(source: SourceConfig) -> Iterator[tuple[dict | ValueError, str]]:
    """(columns, where it stands) of each record of a source with columns; a ValueError in place of an unreadable one."""
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}[source.kind]
    return reader(source)


def _read_jsonl(source: SourceConfig) -> Iterator[tuple[dict | ValueError, str]]:
    for file in files(source):
        with _open(file, source) as content:
            yield from _json_records(content, file.name, short_name(file))


def _json_records(content: BinaryIO, name: str, shown: str) -> Iterator[tuple[dict | ValueError, str]]:
    """The objects in a file of JSON lines; or, where it is called *.json and begins so, in one array."""
    if name.removesuffix(".gz").endswith(".json") and _first_character(content) == b"[":
        for number, record in enumerate(_array(content, shown), 1):
            where = f"{shown}, record {number}"
            yield record if isinstance(record, dict) else _no_object(record, where), where
        return
    for number, line in enumerate(_lines(content, shown), 1):
        where = f"{shown}:{number}"
        try:
            text = _decode(line, where)
            if not text.strip():
                continue
            record = json.loads(text, object_pairs_hook=_once)
            yield record if isinstance(record, dict) else _no_object(record, where), where
        except (ValueError, RecursionError) as error:
            yield error if str(error).startswith(where) else _not_json(where, error), where


def _no_object(record: object, where: str) -> ValueError:
    return ValueError(f"{where}: {short(record)} is no JSON object; write one {{...}} a line")


def _not_json(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where}: not readable as JSON: {error}; mend or remove this line")


def _first_character(content: BinaryIO) -> bytes:
    """The first byte that is no space, without moving on."""
    start = content.peek(1)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1]


def _array(content: BinaryIO, shown: str) -> list:
    try:
        return json.loads(_decode(_whole(content, shown), shown), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        message = str(error)
        raise ValueError(
            message if message.startswith(shown) else f"{shown}: not readable as JSON: {message}; mend it"
        ) from None


def _whole(content: BinaryIO, shown: str) -> bytes:
    raw = content.read(LARGEST_FILE + 1)
    if len(raw) > LARGEST_FILE:
        raise ValueError(
            f"{shown}: more than {LARGEST_FILE >> 30} GiB in one piece; write JSON lines, one record a line"
        )
    return raw


def _lines(content: BinaryIO, shown: str) -> Iterator[bytes]:
    number = 0
    while line := content.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{shown}:{number}: a line of more than {LONGEST_LINE >> 20} MiB; write one record a line")
        yield line


def _once(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs. ValueError for a key given twice: json itself would drop the first one's value."""
    record = dict(pairs)
    if len(record) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short(twice)} is given twice")
    return record


def _read_parquet(source: SourceConfig) -> Iterator[tuple[dict, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"source {source.name!r}: kind parquet needs pyarrow; run: pip install pyarrow") from None

    for path in files(source):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1000):
                    for record in batch.to_pylist():
                        number += 1
                        yield record, f"{short_name(path)}, row {number}"
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{short_name(path)}: not readable as Parquet: {one_line(error)}; write it anew") from None


def _read_hub(source: SourceConfig) -> Iterator[tuple[dict | ValueError, str]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"source {source.name!r}: kind hub needs datasets; run: pip install datasets") from None

    try:
        if _is_one_json_file(source):
            with _hub_file(source) as packed, _unpacked(packed, source.data_files) as content:
                yield from _json_records(content, source.data_files, f"{source.path}/{source.data_files}")
            return
        rows = datasets.load_dataset(
            source.path, source.subset, split=source.split, data_files=source.data_files, streaming=source.streaming
        )
        for number, record in enumerate(rows):
            yield record, f"{source.path}, row {number}"
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise their own
        raise ValueError(
            f"source {source.name!r}: the hub set {source.path!r} (subset {source.subset}, split {source.split}) could "
            f"not be read: {one_line(error)}; check the name and the network, or use local files"
        ) from None


def _is_one_json_file(source: SourceConfig) -> bool:
    """Whether `data_files` names one file of JSON lines, whose records may have different columns.

    `datasets` takes the columns from the first ten megabytes and fails on a later record that has others, such as the
    conversations with tools in MiniMind's file.
    """
    name = source.data_files or ""
    plain = source.split == "train" and source.subset is None and not glob.has_magic(name)
    if source.path == "json" or "://" in name:  # files from elsewhere, which `datasets` finds
        return False
    return plain and name.endswith((".jsonl", ".jsonl.gz"))


def _hub_file(source: SourceConfig) -> BinaryIO:
    """One file of a hub repository (or of a folder laid out like one), fetched into the hub's cache, or read as it comes."""
    import huggingface_hub

    if os.path.isdir(source.path):
        name = os.path.join(source.path, source.data_files)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"there is no file {source.data_files!r} in this folder")
    elif source.streaming:
        remote = huggingface_hub.HfFileSystem().open(f"datasets/{source.path}/{source.data_files}", "rb")
        return io.BufferedReader(remote, 2**20)
    else:
        name = huggingface_hub.hf_hub_download(source.path, source.data_files, repo_type="dataset")
    return open(name, "rb")


@contextlib.contextmanager
def _open(file: Path, source: SourceConfig) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where it is called *.gz. ValueError where it cannot be read or unpacked."""
    try:
        with file.open("rb") as packed, _unpacked(packed, file.name) as content:
            yield content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{short_name(file)}: not readable as gzip: {one_line(error)}; pack it anew") from None
    except OSError as error:
        raise _unreadable(file, source, error) from None


def _unpacked(content: BinaryIO, name: str) -> BinaryIO:
    return gzip.GzipFile(fileobj=content) if name.endswith(".gz") else content


def _unreadable(file: Path, source: SourceConfig, error: OSError) -> ValueError:
    return ValueError(
        f"source {source.name!r}: cannot read {short_name(file)} ({error.strerror}); check path and permissions"
    )


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is {raw[error.start]:#04x}"
        raise ValueError(f"{where}: not UTF-8 text ({byte}); save it as UTF-8") from None
