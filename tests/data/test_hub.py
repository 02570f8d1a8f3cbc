"""The ready configs that read the Hugging Face hub, against repositories with the real ones' files and columns (tests/data/hub.py).

Each source is read by the real `datasets` from a local folder here, and over HTTP from a hub on 127.0.0.1 in the slow test.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data.config import SourceConfig
from data.sources import Conversation, Document, Skipped, iterate
from train.config import load_config

from ..configs import CONFIGS, ROOT
from .hub import lay_out, serve

HUB_CONFIGS = [path for path in CONFIGS if any(source.kind == "hub" for source in load_config(path).data.sources)]

# What users expect a ready config for: (repository, subset, file, split) -> (of use, {reason: records left out}) in our hub.
EXPECTED = {
    ("roneneldan/TinyStories", None, None, "train"): (40, {}),
    ("HuggingFaceFW/fineweb-edu", "sample-10BT", None, "train"): (40, {}),
    ("Salesforce/wikitext", "wikitext-103-raw-v1", None, "train"): (80, {}),
    ("jingyaogong/minimind_dataset", None, "pretrain_t2t_mini.jsonl", "train"): (40, {}),
    ("jingyaogong/minimind_dataset", None, "sft_t2t_mini.jsonl", "train"): (
        41,
        {"the conversation has no assistant turn": 1500, "a conversation with tools": 1},
    ),
    ("HuggingFaceTB/smol-smoltalk", None, None, "train"): (40, {}),
    ("HuggingFaceH4/ultrachat_200k", None, None, "train_sft"): (
        18,
        {"the last turn is 'user'": 1, "roles out of order": 1},
    ),
    ("tatsu-lab/alpaca", None, None, "train"): (40, {}),
}


def key_of(source: SourceConfig) -> tuple:
    return source.path, source.subset, source.data_files, source.split


SOURCES = {
    key_of(source): (config.data.format, source)
    for config in map(load_config, HUB_CONFIGS)
    for source in config.data.sources
    if source.kind == "hub"
}


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    lay_out(folder)
    return folder


def test_every_set_that_users_expect_has_a_config():
    assert set(SOURCES) == set(EXPECTED)


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize("key", EXPECTED, ids=lambda key: "-".join(str(part) for part in key if part))
def test_a_configs_source_reads_the_columns_of_its_set(hub, key):
    format, source = SOURCES[key]
    records = list(iterate(dataclasses.replace(source, path=str(hub / source.path), streaming=True), format))
    of_use, skipped = EXPECTED[key]
    assert Counter(record.reason for record in records if isinstance(record, Skipped)) == skipped
    kind = Document if format == "text" else Conversation
    assert sum(isinstance(record, kind) for record in records) == of_use


@pytest.mark.usefixtures("quiet_datasets")
def test_records_with_columns_of_their_own_do_not_end_the_reading(hub):
    """`datasets` alone takes the columns of the first ten megabytes for all and fails at the first conversation with tools."""
    import datasets

    _, source = SOURCES["jingyaogong/minimind_dataset", None, "sft_t2t_mini.jsonl", "train"]
    folder = str(hub / source.path)
    *_, last = iterate(dataclasses.replace(source, path=folder), "chat")
    assert last.messages == [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "4"}]
    with pytest.raises(Exception, match="cast"):
        list(datasets.load_dataset(folder, data_files=source.data_files, split="train", streaming=True))


@pytest.mark.usefixtures("quiet_datasets")
def test_a_builder_of_datasets_with_a_file_of_ones_own_is_left_to_it(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = SourceConfig(name="x", kind="hub", path="json", data_files=str(tmp_path / "data.jsonl"), streaming=True)
    assert [record.text for record in iterate(source, "text")] == ["one", "two"]


def test_unreadable_lines_of_a_hub_set_are_counted(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "cut\n["no", "object"]\n{"text": "two"}\n')
    source = SourceConfig(name="x", kind="hub", path=str(tmp_path), data_files="data.jsonl")
    records = list(iterate(source, "text"))
    assert [getattr(record, "text", None) or record.reason for record in records] == [
        "one", "not readable as JSON", "a record is no JSON object", "two"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"data.jsonl:2: not readable as JSON"):
        list(iterate(dataclasses.replace(source, bad_records="stop"), "text"))


PREPARE = """
import json, os, sys
from data.config import SourceConfig
from data.prepare import open_prepared, prepare
from data.sources import iterate
from data.tokenizer import Tokenizer
from train.config import load_config

folder, cache, *paths = sys.argv[1:]
tokenizer = Tokenizer.load(f"{folder}/tokenizer")
for path in paths:
    config = load_config(path, [f"data.cache_dir={folder}/{cache}", "data.held_out_fraction=0.1", "data.held_out_max_tokens=null"])
    prepare(config.data, tokenizer, progress=False)
    for source in open_prepared(config.data, tokenizer).index["sources"]:
        kept = source["train"]["documents"] + source["held_out"]["documents"]
        print(json.dumps([path, source["name"], kept, source["skipped"]]))
if "HF_HUB_OFFLINE" not in os.environ:
    name = "sft_t2t_mini.jsonl"
    streamed = SourceConfig(name="x", kind="hub", path="jingyaogong/minimind_dataset", data_files=name, streaming=True)
    print(json.dumps([name, "streamed", len(list(iterate(streamed, "chat"))), {}]))
"""


def prepared(folder: Path, cache: str, paths: list[Path], **environment: str) -> list:
    """What a process of its own prepared: [path, source, documents, skipped] of each source."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", PREPARE, str(folder), cache, *map(str, paths)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_every_hub_config_is_prepared_from_a_hub_and_then_without(hub, tmp_path, tokenizer):
    """Files are fetched once, streams are read as they come, and what was prepared or fetched needs no network again."""
    tokenizer.save(tmp_path / "tokenizer")
    empty = {"Salesforce/wikitext": ("empty text", 40), "roneneldan/TinyStories": ("empty text", 1)}
    empty["tatsu-lab/alpaca"] = ("nothing to learn", 1)
    with serve(hub) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = prepared(tmp_path, "first", HUB_CONFIGS, HF_ENDPOINT=endpoint)
        asked = list(server.asked)
    expected = []
    for path in HUB_CONFIGS:
        for source in load_config(path).data.sources:
            of_use, skipped = EXPECTED[key_of(source)]
            reason, n = empty.get(source.path, ("", 0))
            expected.append([str(path), source.name, of_use - n, {**skipped, **({reason: n} if n else {})}])
    assert found == [*expected, ["sft_t2t_mini.jsonl", "streamed", 1542, {}]]
    asked = asked[: asked.index("GET /api/datasets/jingyaogong/minimind_dataset")]  # that of the stream
    fetched = [line for line in asked if line.startswith("GET /datasets/") and line.endswith(".jsonl")]
    assert len(fetched) == len(set(fetched)) == 2, f"each file of MiniMind's once: {fetched}"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert prepared(tmp_path, "first", HUB_CONFIGS, **nowhere) == expected, "prepared already"
    stored = [path for path in HUB_CONFIGS if not any(source.streaming for source in load_config(path).data.sources)]
    assert len(stored) >= 4
    again = prepared(tmp_path, "second", stored, **nowhere)
    assert again == [row for row in expected if row[0] in map(str, stored)], "prepared anew from the hub's cache"
