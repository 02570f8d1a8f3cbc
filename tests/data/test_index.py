"""A broken or hostile index.json is one sentence that names the file, whatever stands in it."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.index import LARGEST_INDEX, read_index
from data.integrity import write_checksums

GOOD = {
    "version": 2,
    "fingerprint": "a" * 64,
    "fingerprint_without_tokenizer": "b" * 64,
    "tokenizer_fingerprint": "c" * 64,
    "vocab_size": 600,
    "format": "chat",
    "dtype": "uint16",
    "train": {
        "tokens": 30,
        "documents": 3,
        "bytes": 90,
        "files": [
            {"name": "train-00000.bin", "tokens": 20},
            {"name": "train-00001.bin", "tokens": 10},
            {"name": "train-00000.mask", "tokens": 20},
            {"name": "train-00001.mask", "tokens": 10},
        ],
    },
    "held_out": {"tokens": 0, "documents": 0, "bytes": 0, "files": []},
    "skipped": {"empty text": 2},
    "seconds": 0.5,
}

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**40, 2**64, -1, 10**400, 0])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "train-00000.bin", "uint8", "float64", "object", "chat"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(tree, at=()):
    """Paths to every value of a nested mapping or list."""
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def changed(place, value):
    tree = copy.deepcopy(GOOD)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    if not place:
        return value
    inner[place[-1]] = value
    return tree


def written(folder, content):
    """A folder with this index.json (text, bytes, or a tree), its checksum right."""
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (folder / "index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    write_checksums(folder, ["index.json"])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


def sentence(folder, content):
    with pytest.raises(ValueError) as error:
        read_index(written(folder, content))
    text = str(error.value)
    remedy = f"; remove {folder} and run: python -m scripts.prepare_data CONFIG"
    assert text.startswith(f"{folder}/index.json: ") and text.endswith(remedy), text
    assert "\n" not in text and len(text) < 400 + 2 * len(str(folder)), text
    return text.removeprefix(f"{folder}/index.json: ").removesuffix(remedy)


def test_the_good_one_is_read(folder, tmp_path):
    assert read_index(written(folder, GOOD)) == GOOD
    assert read_index(tmp_path) is None


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("train", "files", 0, "name"), "../../../etc/passwd", "names of files are not those of shards"),
        (("train", "files", 0, "name"), "/etc/train-00000.bin", "names of files are not those of shards"),
        (("train", "files", 0, "name"), "train-00000.bin\n", "names of files are not those of shards"),
        (("train", "files", 1, "name"), "train-00000.bin", "names of files are not those of shards"),
        (("held_out", "files"), [{"name": "train-00000.bin", "tokens": 1}], "held_out: names of files"),
        (("train", "files", 0, "tokens"), 2**40, "tokens are not those of its bin files"),
        (("train", "files", 0, "tokens"), -20, "tokens of a file is no count"),
        (("train", "files", 3, "tokens"), 9, "tokens are not those of its mask files"),
        (("train", "tokens"), 2**70, "tokens is no count"),
        (("train", "tokens"), True, "tokens is no count"),
        (("train", "documents"), 31, "more documents than tokens"),
        (("train", "documents"), 0, "more documents than tokens, or none"),
        (("train",), {"tokens": 0, "documents": 0, "bytes": 0, "files": []}, "train: no tokens"),
        (("dtype",), "uint8", "dtype is neither uint16 nor uint32"),
        (("dtype",), ["uint16"], "dtype is neither uint16 nor uint32"),
        (("format",), "text", "a mask, but format is text"),
        (("vocab_size",), 2**16 + 1, "vocab_size is none of uint16 ids"),
        (("version",), 1, "version is not 2"),
        (("version",), 2.5, "version is not 2"),
        (("fingerprint",), "a" * 63, "fingerprint is no SHA-256"),
        (("seconds",), float("nan"), "seconds is no time"),
        (("skipped",), {"\x1b[2J": 1}, "skipped is no {reason: count}"),
        (("folder",), "/etc", "unknown key 'folder'"),
        ((), [GOOD], "it is no JSON object"),
        ((), {}, "missing: dtype"),
    ],
)
def test_what_is_wrong_is_said(folder, place, value, problem):
    assert problem in sentence(folder, changed(place, value))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{", b"{", "[" * 100_000, '{"a":' * 100_000, '{"version": ' + "9" * 5000 + "}", "null", b"\0" * 64],
    ids=["empty", "no UTF-8", "cut", "deep lists", "deep mappings", "5,000 digits", "null", "NULs"],
)
def test_what_is_no_index_at_all(folder, content):
    assert sentence(folder, content).startswith("not readable (")


def test_a_huge_one_is_not_read(folder):
    with (folder / "index.json").open("wb") as file:
        file.truncate(LARGEST_INDEX + 1)
    with pytest.raises(ValueError, match="index.json: damaged, 16,777,217 bytes are too many; remove"):
        read_index(folder)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(place=st.sampled_from(list(places(GOOD))), value=anything)
def test_any_value_anywhere_is_read_or_refused(folder, place, value):
    try:
        text = json.dumps(changed(place, value))
    except ValueError:  # 10**400 has too many digits for some Pythons
        return
    try:
        index = read_index(written(folder, text))
    except ValueError as error:
        assert str(error).startswith(f"{folder}/index.json: not readable (") and "\n" not in str(error), error
    else:
        assert index.keys() == GOOD.keys() and index["train"]["tokens"] == 30
        assert [file["name"] for file in index["train"]["files"]] == [file["name"] for file in GOOD["train"]["files"]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(place=st.sampled_from([place for place in places(GOOD) if place]))
def test_every_field_is_needed(folder, place):
    tree = copy.deepcopy(GOOD)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    if place == ("skipped", "empty text"):
        assert read_index(written(folder, tree)) == tree
    else:
        sentence(folder, tree)
