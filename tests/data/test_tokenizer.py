"""Any text to ids and back; special ids only where we put them."""

import json

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
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


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
    theirs = json.loads(tokenizer._json)
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
