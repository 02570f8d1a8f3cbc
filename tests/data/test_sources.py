"""Every kind of source gives its records, and every mistake in one is a sentence that names file, line and remedy."""

import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataConfig, SourceConfig
from data.sources import Conversation, Document, Skipped, files, is_held_out, iterate, training_texts


def source(**settings):
    return SourceConfig(**{"name": "mine", "kind": "jsonl", **settings})


def texts(source):
    return [document.text for document in iterate(source, "text")]


def test_jsonl_text_and_conversations(jsonl, chats):
    assert texts(source(path=jsonl([{"text": "one"}, "", {"text": "zwei ü"}]))) == ["one", "zwei ü"]
    found = list(iterate(source(path=jsonl(chats(3))), "chat"))
    assert [type(record) for record in found] == [Conversation] * 3
    assert found[1].messages[0]["content"].startswith("question 1")


def test_another_column_and_a_split_key(jsonl):
    path = jsonl([{"story": "one", "author": 7}])
    assert list(iterate(source(path=path, text_key="story", split_key="author"), "text")) == [Document("one", "7")]


def test_a_column_may_say_itself_what_is_held_out(jsonl):
    path = jsonl([{"text": "one", "test": True}, {"text": "two", "test": False}])
    found = list(iterate(source(path=path, held_out_key="test"), "text"))
    config = DataConfig(held_out_fraction=0.5)
    assert [is_held_out(document, source(path=path), config) for document in found] == [True, False]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl([{"messages": turns, "test": False}, {"messages": turns, "test": True}])
    found = list(iterate(source(path=path, held_out_key="test"), "chat"))
    assert [conversation.held_out for conversation in found] == [False, True]


@pytest.mark.parametrize("value", ["true", 1, None, "test"])
def test_a_held_out_column_that_says_neither_true_nor_false(jsonl, value):
    path = jsonl([{"text": "one", "test": value}])
    with pytest.raises(
        ValueError, match=r"data.jsonl:1: held_out_key: column 'test' is neither true nor false \(but .*\); name"
    ):
        texts(source(path=path, held_out_key="test"))
    with pytest.raises(ValueError, match="held_out_key: no column 'other'; the columns are 'text', 'test'"):
        texts(source(path=path, held_out_key="other"))
    [skipped] = iterate(source(path=path, held_out_key="test", bad_records="skip"), "text")
    assert skipped == Skipped("column 'test' is neither true nor false"), "the same whatever it holds, to be counted"


@pytest.mark.parametrize("other", [{"split_key": "author"}, {"held_out_fraction": 0.1}])
def test_what_a_held_out_column_leaves_without_effect_is_refused(other):
    with pytest.raises(ValueError, match=f"source 'mine': held_out_key decides .* {next(iter(other))} nothing"):
        source(path="x.jsonl", held_out_key="test", **other)


def test_globs_are_read_in_order_and_text_files_whole(tmp_path):
    for name in ("b/two.txt", "a/one.txt", "a/deep/three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name + "\n")
    found = texts(source(kind="text", path=f"{tmp_path}/**/*.txt"))
    assert found == ["a/deep/three.txt\n", "a/one.txt\n", "b/two.txt\n"]


def test_a_file_name_with_glob_characters_is_a_file_name(tmp_path):
    (tmp_path / "notes [1].txt").write_text("hello")
    assert texts(source(kind="text", path=str(tmp_path / "notes [1].txt"))) == ["hello"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert texts(source(kind="text", path=str(tmp_path / "a.txt"))) == ["hello"]
    assert texts(source(path=str(tmp_path / "a.jsonl"))) == ["hello"]


def test_parquet_over_row_groups(tmp_path, chats):
    table = pyarrow.table({"text": [f"text {i}" for i in range(25)], "id": range(25)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    assert texts(source(kind="parquet", path=str(tmp_path / "*.parquet"))) == [f"text {i}" for i in range(25)]
    with pytest.raises(ValueError, match="a.parquet, row 1: text_key: no column 'body'; the columns are 'text', 'id'"):
        texts(source(kind="parquet", path=str(tmp_path / "a.parquet"), text_key="body"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats(5)), tmp_path / "chat.parquet")
    assert len(list(iterate(source(kind="parquet", path=str(tmp_path / "chat.parquet")), "chat"))) == 5


def test_max_documents(jsonl):
    assert texts(source(path=jsonl([{"text": str(i)} for i in range(9)]), max_documents=4)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_set_stands_in_a_local_folder(jsonl, tmp_path, chats, monkeypatch, streaming):
    """`datasets` reads a folder as it reads a repository; what a person cannot mend there is skipped and counted."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()
    broken = {"messages": [{"role": "user", "content": "no answer"}]}
    (tmp_path / "repository").mkdir()
    jsonl([*chats(3), broken], "repository/data.jsonl")
    hub = source(kind="hub", path=str(tmp_path / "repository"), streaming=streaming)
    found = list(iterate(hub, "chat"))
    assert [type(record) for record in found] == [Conversation] * 3 + [Skipped]
    assert found[3].reason == "the conversation has no assistant turn"


def test_no_network_for_a_hub_set_is_one_sentence():
    code = (
        "from data.config import SourceConfig; from data.sources import iterate\n"
        "list(iterate(SourceConfig(name='stories', kind='hub', path='roneneldan/TinyStories', streaming=True), 'text'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: source 'stories': the hub set 'roneneldan/TinyStories'"), result.stderr
    assert "check the name and the network, or use local files" in last


def test_a_broken_line_is_named(jsonl):
    path = jsonl([{"text": "good"}, '{"text": "cut of'])
    with pytest.raises(ValueError, match=r"data.jsonl:2: not readable as JSON: .*; mend or remove this line"):
        texts(source(path=path))
    with pytest.raises(ValueError, match=r"data.jsonl:1: \[1, 2\] is no JSON object"):
        texts(source(path=jsonl(["[1, 2]"])))


def test_a_bad_conversation_is_named_by_line(jsonl, chats):
    path = jsonl([*chats(2), {"messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(ValueError, match="data.jsonl:3: the conversation has no assistant turn"):
        list(iterate(source(path=path), "chat"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8 text \(byte 4 is 0xe9\); save it as UTF-8"):
        texts(source(kind="text", path=str(tmp_path / "latin.txt")))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl:2: not UTF-8"):
        texts(source(path=str(tmp_path / "latin.jsonl")))


def test_a_missing_column_comes_with_those_there_are(jsonl):
    path = jsonl([{"story": "one", "id": 3}])
    with pytest.raises(ValueError, match="data.jsonl:1: text_key: no column 'text'; the columns are 'story', 'id'"):
        texts(source(path=path))
    with pytest.raises(ValueError, match="split_key: no column 'author'; the columns are 'story', 'id'"):
        texts(source(path=path, text_key="story", split_key="author"))
    with pytest.raises(ValueError, match=r"text_key: column 'id' is no text \(but 3\)"):
        texts(source(path=path, text_key="id"))


def test_missing_files_and_globs_that_match_nothing(tmp_path):
    with pytest.raises(ValueError, match="source 'mine': path: '.*/no.jsonl' does not exist"):
        files(source(path=str(tmp_path / "no.jsonl")))
    with pytest.raises(ValueError, match=r"path: '.*/\*.jsonl' matches no file"):
        files(source(path=str(tmp_path / "*.jsonl")))
    with pytest.raises(ValueError, match="is a folder; name its files, such as"):
        files(source(path=str(tmp_path)))


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    for kind in ("text", "jsonl"):
        with pytest.raises(ValueError, match=r"cannot read .*secret.txt \(Permission denied\); check path"):
            texts(source(kind=kind, path=str(path)))


def test_an_unreadable_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="a.parquet: not readable as Parquet"):
        texts(source(kind="parquet", path=str(tmp_path / "a.parquet")))


def test_an_empty_source_is_an_error(jsonl):
    with pytest.raises(ValueError, match="source 'mine': '.*data.jsonl' is empty"):
        texts(source(path=jsonl([])))


def test_settings_that_do_not_go_together(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="kind text holds documents"):
        list(iterate(source(kind="text", path=str(tmp_path / "a.txt")), "chat"))
    with pytest.raises(ValueError, match="split_key: 'author': kind text has no columns"):
        texts(source(kind="text", path=str(tmp_path / "a.txt"), split_key="author"))


def test_the_split_is_stable_and_near_its_fraction():
    config = DataConfig(held_out_fraction=0.1)
    held = [is_held_out(Document("", str(i)), source(path="x"), config) for i in range(5000)]
    assert 400 < sum(held) < 600
    assert held == [is_held_out(Document("other text", str(i)), source(path="x"), config) for i in range(5000)]
    own = source(path="x", held_out_fraction=0.0)
    assert not any(is_held_out(Document("", str(i)), own, config) for i in range(1000)), "the source's own fraction"
    assert is_held_out(Document("", "0", held_out=True), own, config)


def test_the_tokenizer_learns_from_training_documents_alone_and_by_weight(jsonl):
    common, rare = ([{"text": word * 10} for _ in range(500)] for word in "ab")
    sources = [source(name="a", path=jsonl(common, "a.jsonl"), weight=3), source(name="b", path=jsonl(rare, "b.jsonl"))]
    found = list(training_texts(DataConfig(sources=sources, held_out_fraction=0.0), max_bytes=1005))
    together = "".join(found)
    assert len(together) == 1005 and abs(together.count("a") - 3 * together.count("b")) < 40
    everything = "".join(training_texts(DataConfig(sources=sources, held_out_fraction=0.0), max_bytes=10**9))
    assert len(everything) == 10_000, "where one source runs dry the others go on"
    documents = [{"text": f"document {i}"} for i in range(300)]
    halved = DataConfig(sources=[source(path=jsonl(documents))], held_out_fraction=0.5)
    learned = set(training_texts(halved, max_bytes=10**9))
    held_out = {d.text for d in iterate(halved.sources[0], "text") if is_held_out(d, halved.sources[0], halved)}
    assert learned.isdisjoint(held_out) and len(learned) + len(held_out) == 300
