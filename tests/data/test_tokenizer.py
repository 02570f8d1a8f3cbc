"""Any text to ids and back; special ids only where we put them."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer

any_text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(
            [*SPECIAL_TOKENS, "\r\n", "\n\n ", "   x", "123,456", "e\u0301\u1eaf", "\ufeff", "日本語", "\x00", "👩‍👩‍👧"]
        ),
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_any_text_round_trips_and_yields_no_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids), "text became a special token"
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode_batch(["\udc00"])[0]) == "\ufffd"


def test_digits_stand_alone(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]


def test_a_sequence_cut_inside_a_character_still_decodes(tokenizer):
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("日")[:2])


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a" / "b")
    from_folder, from_file = Tokenizer.load(tmp_path / "a" / "b"), Tokenizer.load(str(tmp_path / "a/b/tokenizer.json"))
    for loaded in (from_folder, from_file):
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("The <|eos|> 42") == tokenizer.encode("The <|eos|> 42")
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.im_start_id, loaded.im_end_id) == (0, 1, 2, 3, 4)
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == [
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_vocabulary_size_is_exact_or_refused(manual):
    assert Tokenizer.train(manual[:3], 300).vocab_size == 300
    with pytest.raises(ValueError, match=f"model.vocab_size: 100 is too small.*{SMALLEST_VOCABULARY}"):
        Tokenizer.train(manual[:3], 100)
    with pytest.raises(ValueError, match=r"lower model.vocab_size to \d+") as error:
        Tokenizer.train(["to be or not to be"], 5000)
    named = int(str(error.value).split("lower model.vocab_size to ")[1].split()[0])
    assert Tokenizer.train(["to be or not to be"], named).vocab_size == named, "the remedy does not work"


def test_training_twice_gives_the_same_tokenizer(manual):
    assert Tokenizer.train(manual[:5], 500).fingerprint == Tokenizer.train(manual[:5], 500).fingerprint


def test_a_tokenizer_from_elsewhere_is_used_with_its_own_names(tokenizer, tmp_path):
    theirs = json.loads(tokenizer.json_bytes)
    names = {"<|pad|>": "<pad>", "<|bos|>": "<|endoftext|>", "<|eos|>": "<other>"}
    for token in theirs["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    theirs["model"]["vocab"] = {names.get(token, token): i for token, i in theirs["model"]["vocab"].items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(theirs))
    loaded = Tokenizer.load(path)
    assert (loaded.bos_id, loaded.eos_id, loaded.im_end_id) == (1, 4, 4), "without an own EOS a document ends in im_end"
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == path.read_bytes(), "the fingerprint must survive"


def test_a_missing_special_token_is_named(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.add_special_tokens(["</s>", "<s>", "<|im_end|>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no special token for im_start"):
        Tokenizer.load(tmp_path)


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nowhere.*scripts.train_tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(ValueError, match="tokenizer.json: not readable as a tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "SHA256SUMS"])
def test_a_damaged_file_of_its_folder_is_named(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    at = len(whole) // 2
    for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:-3], b""):
        (tmp_path / name).write_bytes(damaged)
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            with pytest.raises(
                ValueError, match=f"^{tmp_path}/.*: .*; put back a whole copy .*train_tokenizer"
            ) as error:
                Tokenizer.load(path)
            assert name in str(error.value) or name == "SHA256SUMS"
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint, "saving again must mend it"
    (tmp_path / "SHA256SUMS").unlink()
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint, "a folder from elsewhere has no checksums"


def test_saving_the_same_again_writes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    tokenizer.save(tmp_path)
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("there", ["nothing", "the same without checksums", "another tokenizer", "an older template"])
def test_a_kill_at_any_moment_of_saving_leaves_one_whole_or_none(tokenizer, manual, tmp_path, monkeypatch, there):
    """After each of save's changes to the folder in turn: what loads is the tokenizer before or the one after."""
    other = Tokenizer.train(manual[:3], 300)

    def lay_out(folder):
        if there == "another tokenizer":
            other.save(folder)
        elif there != "nothing":
            with pytest.MonkeyPatch.context() as patch:
                if there == "an older template":
                    patch.setattr("data.tokenizer.CHAT_TEMPLATE", "older")
                tokenizer.save(folder)
            if there == "the same without checksums":
                (folder / "SHA256SUMS").unlink()

    class Kill(BaseException):
        pass

    def save_until(folder, n):
        """Lets save make n changes to names in the folder; returns whether it wanted more. Leftovers stay, as after SIGKILL."""
        left = n

        def counted(real):
            def change(path, *args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Kill
                left -= 1
                return real(path, *args, **kwargs)

            return change

        with pytest.MonkeyPatch.context() as patch:
            for name in ("unlink", "replace"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                tokenizer.save(folder)
            except Kill:
                return True
        return False

    for n in range(30):
        folder = tmp_path / str(n)
        lay_out(folder)
        more = save_until(folder, n)
        try:
            found = Tokenizer.load(folder).fingerprint
        except ValueError as error:
            assert "cannot read" in str(error) and there in ("nothing", "another tokenizer"), f"after {n}: {error}"
        else:
            assert found == tokenizer.fingerprint or there == "another tokenizer" and found == other.fingerprint
        tokenizer.save(folder)
        assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint
        assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "tokenizer.json", "tokenizer_config.json"]
        if not more:
            break
    assert 4 <= n < 29, n


def hostile(change):
    """tokenizer.json's tree -> a changed one."""
    return lambda tree: [tree, change(tree)][0]


def of_part(key, **part):
    return hostile(lambda tree: tree.update({key: part}))


HOSTILE = {
    "id 2**40": hostile(lambda tree: tree["added_tokens"][0].update(id=2**40)),
    "id 2**40 in the vocabulary": hostile(lambda tree: tree["model"]["vocab"].update(x=2**40)),
    "id 2**32 - 1": hostile(lambda tree: tree["model"]["vocab"].update(x=2**32 - 1)),
    "negative id": hostile(lambda tree: tree["model"]["vocab"].update(x=-1)),
    "an id that is 1e308": hostile(lambda tree: tree["model"]["vocab"].update(x=1e308)),
    "an id with two tokens": hostile(lambda tree: tree["model"]["vocab"].update(xyzzy=2)),
    "no added tokens": hostile(lambda tree: tree.pop("added_tokens")),
    "no model": hostile(lambda tree: tree.pop("model")),
    "no vocabulary": hostile(lambda tree: tree["model"].pop("vocab")),
    "no splitter": hostile(lambda tree: tree.pop("pre_tokenizer")),
    "no decoder": hostile(lambda tree: tree.pop("decoder")),
    "a list for the model": hostile(lambda tree: tree.update(model=[1])),
    "a number for the splitter": hostile(lambda tree: tree.update(pre_tokenizer=7)),
    "merges of no tokens": hostile(lambda tree: tree["model"].update(merges=[["nope", "neither"]])),
    "dropout: another encoding each time": hostile(lambda tree: tree["model"].update(dropout=0.5)),
    "a prefix that aborts tokenizers 0.23": hostile(lambda tree: tree["model"].update(continuing_subword_prefix="x")),
    "a normaliser that aborts": of_part("normalizer", type="Precompiled", precompiled_charsmap="/////////w=="),
    "a normaliser that panics": of_part("normalizer", type="Replace", pattern={"String": ""}, content=""),
    "a normaliser that doubles the text 40 times": of_part(
        "normalizer",
        type="Sequence",
        normalizers=[{"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}] * 40,
    ),
    "a splitter that panics": of_part("pre_tokenizer", type="FixedLength", length=0),
    "a splitter whose expression is cut": of_part(
        "pre_tokenizer", type="Split", pattern={"Regex": "(("}, behavior="Isolated", invert=False
    ),
    "a hundred splitters": of_part(
        "pre_tokenizer",
        type="Sequence",
        pretokenizers=[{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}] * 100,
    ),
    "a decoder that panics": of_part("decoder", type="Strip", content="a", start=10**9, stop=10**9),
    "a normaliser that removes text": of_part("normalizer", type="Replace", pattern={"String": "e"}, content=""),
    "another kind of model": of_part("model", type="WordLevel", vocab={"x": 0}, unk_token="x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_sentence(tokenizer, tmp_path, name):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(HOSTILE[name](json.loads(tokenizer.json_bytes))))
    with pytest.raises(ValueError) as error:
        Tokenizer.load(file)
    text = str(error.value)
    assert text.startswith(f"{file}: ") and ";" in text and "\n" not in text and len(text) < 400 + len(str(file)), text


@pytest.mark.parametrize(
    "content",
    ["", "[" * 100_000, '{"model":' * 100_000, "null", '{"a": 1, "a": 2}', '{"version": ' + "9" * 5000 + "}", "\0" * 9],
    ids=["empty", "deep lists", "deep mappings", "null", "a key twice", "5,000 digits", "NULs"],
)
def test_what_is_no_tokenizer_at_all(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json: not readable as a tokenizer.json .*; make it anew") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))


def test_what_is_no_plain_or_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="268,435,457 bytes are too many"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json: no plain file"):
        Tokenizer.load(tmp_path)


def test_a_regular_expression_without_end_is_one_sentence(tokenizer, tmp_path):
    """Oniguruma gives up after ten million steps; the library panics then, which is no Exception in Python."""
    theirs = json.loads(tokenizer.json_bytes)
    theirs["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(z+)+$"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
    loaded = Tokenizer.load(tmp_path)
    for encode in (loaded.encode, lambda text: loaded.encode_batch([text, "a"])):
        with pytest.raises(ValueError, match="tokenizer.json: this tokenizer fails .*retry-limit.*; make it anew"):
            encode("z" * 40 + "b")
