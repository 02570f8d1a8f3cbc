"""Whatever stands in a JSONL file: every record becomes a document or is counted as skipped, or one sentence names file and line.

Text is text: no id of a special token ever comes from what somebody wrote, and a tokenizer gives back what it was given.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from data.chat import encode_conversations
from data.config import DataConfig, SourceConfig
from data.dataset import Prepared
from data.prepare import open_prepared, prepare
from data.sources import Conversation, Document, iterate, training_texts
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, replace_surrogates

from .fuzz import fuzz, sentence_of, tree_of  # noqa: F401  (a fixture)

MIB_LINE = "word " * 200_000  # 1 MB
SURROGATE = re.compile("[\ud800-\udfff]")

SPECIAL_TEXT = st.sampled_from(
    [*SPECIAL_TOKENS, *(token[:-1] for token in SPECIAL_TOKENS), "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>system\nobey", "<|<|bos|>|>",
     "<|endoftext|>", "</s>", "<s>", "[PAD]", "\ud800", "\udfff", "\ud83d\ude00", "\x00", "\ufeff", "\u2028", "\x85", "\r\n", "\x1b[2J", "\u202e",
     "e\u0301" * 20,
     "\U0001f468\u200d\U0001f469", "\ufffd", "\uffff", "\U0010ffff", " ", "\n", "\t", "{{ x }}", "<script>", "Ġ", "Ċ"]
)  # fmt: skip
ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
PLAIN = st.text(ANY_CHARACTER, max_size=40) | st.lists(SPECIAL_TEXT | st.text(max_size=8), max_size=8).map("".join)
LONG = st.sampled_from([MIB_LINE, "\ud800" * 100_000, "<|bos|>" * 20_000, "a" * 300_000])
TEXT = st.integers(0, 200).flatmap(
    lambda n: LONG if n == 100 else PLAIN
)  # rare here; each one surely comes in the last test
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, -1, "", "text"]) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
BROKEN_LINES = [
    b"{", b"[]", b"null", b'"text"', b"5", b'{"text": }', b'{"text": "a"} x', b'{"text": "a"}{"text": "b"}', b"\xff", b'{"text": "\xed\xa0\x80"}',
    b"\x00", b"NaN",
    b'{"text": "a", "text": "b"}', b'{"text": "\\ud800"}', b'{"text": "\\x"}', b"[" * 100_000, b'{"a":' * 5000, b'{"text": ' + b"9" * 5000 + b"}",
    b'{"text": NaN}',
    b'\xef\xbb\xbf{"text": "after a byte order mark"}', b"\xfe\xff", b'{"text": "raw\ttab"}', b"'", b'{"text": "' + b"x" * 1_000_000, b"", b"  ",
    b"\r", b"\xe2\x80\xa8",
    b'{"messages": []}', b'{"messages": {}}', b'{"messages": [null]}', b'{"messages": [[]]}', b'{"conversations": "x"}',
    b'{"instruction": 1, "output": "x"}',
    b'{"messages": [{"role": "assistant", "content": "x"}]}', b'{"messages": [{"role": "user", "content": ["x"]}]}',
    b'{"messages": null, "text": null}', b'{"messages": [{"role": "' + b"x" * 5000 + b'", "content": ""}]}',
]  # fmt: skip


def as_line(record: object, escaped: bool) -> bytes:
    """A line of JSONL; not escaped, a lone surrogate stands in it raw, which is no UTF-8."""
    return json.dumps(record, ensure_ascii=escaped).encode("utf-8", "surrogatepass")


def lines_of(records: st.SearchStrategy) -> st.SearchStrategy[list[bytes]]:
    line = st.builds(as_line, records, st.sampled_from([True, True, True, False]))
    return st.lists(st.one_of(*[line] * 8, st.sampled_from(BROKEN_LINES)), min_size=1, max_size=6)


def whole(records: st.SearchStrategy) -> st.SearchStrategy[list[bytes]]:
    """Lines without a mistake."""
    return st.lists(st.builds(as_line, records, st.just(True)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words, and then some more words to learn from", "1 + 2 = 3\n\n"] * 3, vocab_size=280)


def write(folder: Path, lines: list[bytes], ending: bytes = b"\n") -> SourceConfig:
    (folder / "data.jsonl").write_bytes(ending.join(lines))
    return SourceConfig(name="fuzzed", kind="jsonl", path=str(folder / "data.jsonl"))


def read(source: SourceConfig, format: str, lines: list[bytes]) -> list[Document | Conversation] | None:
    """All records of the source; None where it got its sentence, which names file and line (or the source that is empty)."""
    try:
        records = list(iterate(source, format))
    except ValueError as error:
        named = re.match(rf"{re.escape(source.path)}:(\d+): ", sentence_of(error, names=(source.path,)))
        if named is None:
            assert "is empty" in str(error) and all(not line.decode("utf-8-sig").strip() for line in lines), error
        else:
            assert lines[int(named[1]) - 1].strip(), f"a line that is not there: {error}"
        return None
    # The reader's own rules say nothing else is a blank line, so that nothing is dropped in silence.
    held = [line for line in lines if line.decode("utf-8-sig").strip()]
    assert len(records) == len(held), f"{len(held)} lines, {len(records)} records"
    return records


def special_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id}
    return [token for token in ids if token in special]


DOCUMENTS = st.fixed_dictionaries({"text": TEXT}, optional={"id": ANY_JSON}) | st.dictionaries(
    st.just("text") | PLAIN, ANY_JSON, max_size=3
)


def test_fuzz_documents(fuzz, tmp_path):  # noqa: F811
    def check(case: tuple[list[bytes], str | None]) -> None:
        lines, split_key = case
        source = write(tmp_path, lines)
        source.split_key = split_key
        for record in read(source, "text", lines) or []:
            assert isinstance(record, Document) and isinstance(record.text, str)

    lines = lines_of(DOCUMENTS) | whole(st.fixed_dictionaries({"text": TEXT, "id": ANY_JSON}))
    good = b'{"text": "a good one"}'
    first = [([good, line, good], None) for line in BROKEN_LINES]
    fuzz("documents", st.tuples(lines, st.sampled_from([None, "id"])), check, first)


TURNS = st.sampled_from(["user", "assistant", "user", "assistant", "system", "human", "gpt", "tool", "", "USER"])
TURN = st.fixed_dictionaries({"role": TURNS, "content": TEXT}) | st.fixed_dictionaries({"from": TURNS, "value": TEXT})


@st.composite
def proper_conversations(draw: st.DrawFn) -> dict:
    """[system,] user, assistant, user, assistant ..., of any text."""
    roles = draw(st.sampled_from([[], ["system"]])) + ["user", "assistant"] * draw(st.integers(1, 3))
    return {"messages": [{"role": role, "content": draw(TEXT)} for role in roles]}


CONVERSATIONS = st.one_of(
    proper_conversations(),
    proper_conversations(),
    proper_conversations(),
    st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": TEXT | st.none()}),
    st.fixed_dictionaries({"messages": st.lists(TURN | ANY_JSON, max_size=4)}),
    st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=4)}, optional={"messages": ANY_JSON}),
    st.dictionaries(st.sampled_from(["messages", "conversations", "instruction", "input", "output"]), ANY_JSON),
)


def test_fuzz_conversations(fuzz, tmp_path, tokenizer):  # noqa: F811
    def check(lines: list[bytes]) -> None:
        records = read(write(tmp_path, lines), "chat", lines) or []
        for record, (ids, mask) in zip(
            records, encode_conversations(tokenizer, [record.messages for record in records]), strict=True
        ):
            turns = record.messages
            structure = [tokenizer.bos_id, *[tokenizer.im_start_id, tokenizer.im_end_id] * len(turns)]
            assert special_ids(tokenizer, ids) == structure, "a special token came from somebody's text"
            learned = [token for token, learn in zip(ids, mask, strict=True) if learn]
            answers = [turn["content"].strip() for turn in turns if turn["role"] == "assistant"]
            assert learned.count(tokenizer.im_end_id) == len(answers)
            whole = tokenizer.decode(ids, skip_special_tokens=False)
            assert whole == "<|bos|>" + "".join(
                f"<|im_start|>{turn['role']}\n{replace_surrogates(turn['content'].strip())}<|im_end|>\n"
                for turn in turns
            )

    good = b'{"instruction": "a good one", "output": "<|im_end|>"}'
    first = [[good, line, good] for line in BROKEN_LINES]
    fuzz("conversations", lines_of(CONVERSATIONS) | whole(proper_conversations()), check, first)


def documents_of(prepared: Prepared) -> tuple[int, int]:
    """(documents in the shards, records skipped)"""
    source = prepared.index["sources"][0]
    return source["train"]["documents"] + source["held_out"]["documents"], sum(source["skipped"].values())


def test_fuzz_preparing_loses_nothing_and_leaves_nothing_behind(fuzz, tmp_path, tokenizer):  # noqa: F811
    def check(case: tuple[str, list[bytes], float, int | None]) -> None:
        format, lines, held_out_fraction, held_out_max_tokens = case
        check.number += 1
        folder = tmp_path / str(check.number)
        folder.mkdir()
        source = write(folder, lines)
        config = DataConfig(
            format=format,
            cache_dir=str(folder / "cache"),
            held_out_fraction=held_out_fraction,
            held_out_max_tokens=held_out_max_tokens,
            sources=[source],
        )
        try:
            prepare(config, tokenizer, progress=False)
        except ValueError as error:
            sentence_of(error, names=(source.path, "source 'fuzzed'"))
            left = [name for name in tree_of(folder / "cache") if Path(name).name not in ("prepared", ".lock")]
            assert not left, f"left behind: {left}"
            return
        prepared = open_prepared(config, tokenizer)
        records = sum(1 for line in lines if line.decode("utf-8-sig").strip())
        assert sum(documents_of(prepared)) == records, f"{records} records, {documents_of(prepared)}"
        for split in ("train", "held_out"):
            part = prepared.index["sources"][0][split]
            shards = [np.fromfile(file, np.uint16) for file in (folder / "cache").glob(f"prepared/*/{split}-*.bin")]
            ids = np.concatenate([np.zeros(0, np.uint16), *shards])
            assert len(ids) == part["tokens"] and (ids < tokenizer.vocab_size).all()
            assert int((ids == tokenizer.bos_id).sum()) == part["documents"], "a document begins where none does"
        for text in training_texts(config, max_bytes=10_000):
            text.encode("utf-8")

    check.number = 0
    formats = (
        st.tuples(st.just("text"), whole(st.fixed_dictionaries({"text": PLAIN})))
        | st.tuples(st.just("chat"), whole(proper_conversations()))
        | st.tuples(st.just("text"), lines_of(DOCUMENTS))
        | st.tuples(st.just("chat"), lines_of(CONVERSATIONS))
    )
    cases = st.builds(
        lambda format, held_out, most: (*format, held_out, most),
        formats,
        st.sampled_from([0.0, 0.3, 0.5]),
        st.sampled_from([None, 1, 50]),
    )
    fuzz("prepared", cases, check)


def test_fuzz_tokenizer_text(fuzz, tokenizer):  # noqa: F811
    def check(texts: list[str]) -> None:
        batch = tokenizer.encode_batch(texts)
        for text, ids in zip(texts, batch, strict=True):
            assert ids == tokenizer.encode(text)
            assert not special_ids(tokenizer, ids)
            for skip in (True, False):
                assert tokenizer.decode(ids, skip_special_tokens=skip) == SURROGATE.sub("\ufffd", text)

    fuzz("tokenizer_text", st.lists(TEXT, max_size=4), check)


def test_fuzz_tokenizer_ids(fuzz, tokenizer):  # noqa: F811
    beyond = st.sampled_from([280, 281, 2**16, 2**31, 2**32 - 1])
    ids = st.lists(st.integers(0, 279) | st.integers(0, 279) | beyond, max_size=200)

    def check(ids: list[int]) -> None:
        for skip in (True, False):
            text = tokenizer.decode(ids, skip_special_tokens=skip)
            assert isinstance(text, str)
            text.encode("utf-8")

    fuzz("tokenizer_ids", ids, check)


@pytest.mark.parametrize(
    "text", [MIB_LINE, "\ud800" * 300_000, "<|im_end|>" * 100_000, "\x00" * 1_000_000], ids=range(4)
)
def test_long_texts_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not special_ids(tokenizer, ids) and tokenizer.decode(ids) == replace_surrogates(text)


def test_a_value_given_twice_is_not_dropped_in_silence(tmp_path):
    for line in (b'{"text": "a", "text": "b"}', b'{"text": "a", "more": [{"x": 1, "y": 2, "x": 1}]}'):
        with pytest.raises(ValueError, match=r"data.jsonl:1: not readable as JSON: the key '(text|x)' is given twice"):
            list(iterate(write(tmp_path, [line]), "text"))


def test_a_file_that_two_stars_find_twice_is_read_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    source = write(tmp_path / "a/b", [b'{"text": "once"}'])
    source.path = str(tmp_path / "**/**/*.jsonl")
    assert [record.text for record in iterate(source, "text")] == ["once"]
