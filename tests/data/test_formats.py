"""The formats people's conversations come in, and the files: each gives the right turns, and what is no use is told or counted."""

import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from data.chat import to_messages
from data.config import SourceConfig
from data.prepare import fingerprint, open_prepared, prepare
from data.sources import Conversation, Skipped, iterate

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
TEXT = {"type": "text", "text": "q"}


def source(**settings):
    return SourceConfig(**{"name": "mine", "kind": "jsonl", **settings})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}], "id": "x"}, ASKED),
        ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}, [SYSTEM, *ASKED]),
        ({"system": "other", "messages": [SYSTEM, *ASKED]}, [SYSTEM, *ASKED]),
        ({"system": "", "tools": "[]", "messages": ASKED}, ASKED),
        ({"messages": [{"role": "developer", "content": "s"}, *ASKED]}, [SYSTEM, *ASKED]),
        ({"messages": [{"role": "user", "content": [TEXT, TEXT], "name": "Ann"}, ASKED[1]]},
         [{"role": "user", "content": "qq"}, ASKED[1]]),
        ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": None, "reasoning_content": "hm", "weight": 1}]}, ASKED),
        ({"instruction": "q", "output": "a", "text": "Below is ..."}, ASKED),
        ({"instruction": "q", "input": None, "output": "a", "history": [["q", "a"]], "system": "s"}, [SYSTEM, *ASKED, *ASKED]),
        ({"prompt": "q", "completion": "a"}, ASKED),
        ({"prompt": [SYSTEM, ASKED[0]], "completion": [ASKED[1]]}, [SYSTEM, *ASKED]),
        ({"prompt": "other", "prompt_id": "1f", "messages": ASKED}, ASKED),
    ],
)  # fmt: skip
def test_a_conversation_however_it_is_written(record, expected):
    assert to_messages(record, "x") == expected


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]},
         r"conversations\[1\]: a conversation with tools \(role 'function_call'\)"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "1"}]}, "a conversation with tools"),
        ({"tools": '[{"name": "clock"}]', "conversations": ASKED}, r"f:3: a conversation with tools \(tools\)"),
        ({"messages": [{**SYSTEM, "tools": '[{"name": "clock"}]'}, *ASKED]}, r"messages\[0\]: a conversation with tools \(tools\)"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "with tools"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0}]}, r"messages\[1\]: a turn that is not to be learned \(weight: 0\)"),
        ({"messages": [{"role": "user", "content": [TEXT, {"type": "image_url"}]}, ASKED[1]]}, "no text .type 'image_url'"),
        ({"messages": [{"role": "user", "content": ["q"]}, ASKED[1]]}, "a part that is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}, ASKED[1]]}, "text of a part is int"),
        ({"messages": [{"role": "user"}, ASKED[1]]}, "content is NoneType; it must be text"),
        ({"instruction": "q", "output": "a", "history": ["q", "a"]}, "history is no list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["q", None]]}, "history is NoneType"),
        ({"prompt": "q", "completion": 3}, "completion is int"),
        ({"prompt": "q", "completion": "bad", "label": False}, r"a completion that is not to be learned \(label: false\)"),
        ({"prompt": [ASKED[1]], "completion": [ASKED[1]]}, "roles out of order"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "no conversation in the columns 'prompt', 'chosen', 'rejected'"),
        ({"system": ["s"], "messages": ASKED}, "system is list; it must be text"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_one_sentence(record, problem):
    with pytest.raises(ValueError, match=problem) as error:
        to_messages(record, "f:3")
    assert str(error.value).startswith("f:3: ") and "\n" not in str(error.value)


def test_own_records_that_are_no_use_stop_the_reading_or_are_counted_as_the_config_says(
    jsonl, config, tokenizer, chats
):
    tools = {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "1"}]}
    path = jsonl([*chats(8), tools, '{"messages": [{"role": "us', tools, {"messages": [ASKED[0]]}])
    with pytest.raises(
        ValueError, match=r"data.jsonl:9: conversations\[1\]: .* or set bad_records: skip in its source"
    ):
        list(iterate(source(path=path), "chat"))
    settings = config({"path": path, "bad_records": "skip"}, format="chat")
    found = list(iterate(settings.sources[0], "chat"))
    assert [type(record) for record in found] == [Conversation] * 8 + [Skipped] * 4
    prepare(settings, tokenizer, progress=False)
    index = open_prepared(settings, tokenizer).index["sources"][0]
    assert index["train"]["documents"] == 8
    assert index["skipped"] == {
        "a conversation with tools": 2,
        "not readable as JSON": 1,
        "the conversation has no assistant turn": 1,
    }


def test_reasons_stay_few_whatever_the_records_hold(jsonl):
    odd = [{"messages": [{"role": f"wizard {i} (or: so)", "content": "q"}]} for i in range(20)]
    odd += [{f"column {i}": "q", "other": i} for i in range(20)]
    found = Counter(record.reason for record in iterate(source(path=jsonl(odd), bad_records="skip"), "chat"))
    assert found == {"a role is none of system, user, assistant": 20, "no conversation in the columns": 20}


def test_a_text_that_is_none_is_counted_only_where_asked_for(jsonl):
    path = jsonl([{"text": "one"}, {"text": None}, {"text": ["two"]}, "{", {"body": "three"}])
    found = list(iterate(source(path=path, bad_records="skip"), "text"))
    assert [getattr(record, "reason", "") for record in found] == [
        "", "column 'text' is no text", "column 'text' is no text", "not readable as JSON", "no column 'text'"
    ]  # fmt: skip


def test_another_choice_for_bad_records_makes_other_shards(config, tokenizer, jsonl):
    plain = config({"path": jsonl([{"text": "x"}])})
    before = fingerprint(plain, plain.sources[0], tokenizer)
    plain.sources[0].bad_records = "skip"
    assert fingerprint(plain, plain.sources[0], tokenizer) != before


def test_conversations_read_otherwise_are_prepared_anew_and_texts_are_not(config, tokenizer, jsonl, monkeypatch):
    text, chat = (config({"path": jsonl([{"text": "x"}])}, format=format) for format in ("text", "chat"))
    before = [fingerprint(each, each.sources[0], tokenizer) for each in (text, chat)]
    monkeypatch.setattr("data.prepare.READING_VERSION", 99)
    same = [fingerprint(each, each.sources[0], tokenizer) for each in (text, chat)]
    assert [a == b for a, b in zip(before, same)] == [True, False]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.json", "a.json.gz", "lines.json", "indented.json", "a.txt.gz", "a.parquet"]
)
def test_files_of_every_kind_give_the_same_texts(tmp_path, name):
    texts = ["one", "zwei ü\n\n日本語", ""]
    records = [{"text": text} for text in texts]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    kind = {"parquet": "parquet", "a.txt.gz": "text"}.get(name if "txt" in name else name.rpartition(".")[2], "jsonl")
    content = {
        "a.json": json.dumps(records),
        "a.json.gz": json.dumps(records),
        "indented.json": f"\ufeff\n {json.dumps(records, indent=2)}\n",
    }.get(name, lines)
    path = tmp_path / name
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress((texts[1] if kind == "text" else content).encode("utf-8")))
    else:
        path.write_text(content, encoding="utf-8")
    found = [record.text for record in iterate(source(kind=kind, path=str(path)), "text")]
    assert found == ([texts[1]] if kind == "text" else texts)


def test_an_array_of_conversations_as_sharegpt_and_alpaca_are_published(tmp_path):
    path = tmp_path / "ShareGPT_V3.json"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path.write_text(
        json.dumps([{"id": "x", "conversations": turns}, {"instruction": "q", "input": "", "output": "a"}, "no"])
    )
    with pytest.raises(ValueError, match="ShareGPT_V3.json, record 3: 'no' is no JSON object"):
        list(iterate(source(path=str(path)), "chat"))
    found = list(iterate(source(path=str(path), bad_records="skip"), "chat"))
    assert [record.messages for record in found[:2]] == [ASKED, ASKED] and found[
        2
    ].reason == "a record is no JSON object"


def test_damaged_and_oversized_files_are_one_sentence(tmp_path, monkeypatch):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for content in (whole[: len(whole) // 2], b"no gzip at all", whole[:20] + b"\x00" * 20 + whole[40:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="a.jsonl.gz: not readable as gzip: .*; pack it anew"):
            list(iterate(source(path=str(tmp_path / "a.jsonl.gz")), "text"))
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text"')
    with pytest.raises(ValueError, match="a.json: not readable as JSON: .*; mend it"):
        list(iterate(source(path=str(tmp_path / "a.json")), "text"))
    monkeypatch.setattr("data.readers.LONGEST_LINE", 1000)
    monkeypatch.setattr("data.readers.LARGEST_FILE", 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"x" * 5000))
    with pytest.raises(ValueError, match="bomb.jsonl.gz:1: a line of more than"):
        list(iterate(source(path=str(tmp_path / "bomb.jsonl.gz")), "text"))
    for name, kind in (("bomb.json.gz", "jsonl"), ("bomb.txt.gz", "text")):
        (tmp_path / name).write_bytes(gzip.compress(b"[" + b" " * 5000))
        with pytest.raises(ValueError, match=f"{name}: more than 0 GiB in one piece"):
            list(iterate(source(kind=kind, path=str(tmp_path / name)), "text"))
