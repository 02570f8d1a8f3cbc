"""Tokens to text: whole characters only, and no character of a stop string, wherever the tokens' borders lie."""

from hypothesis import given, settings
from hypothesis import strategies as st

from model.batching import Token
from scripts.serving.text import Decoder, Piece, StopStrings

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_pieces_are_the_text_and_hold_no_half_characters(small_tokenizer, before, text):
    prompt = small_tokenizer.encode(before)
    for beginning in ([], prompt[-1:]):
        decoder = Decoder(small_tokenizer, beginning)
        pieces = [decoder.push(token) for token in small_tokenizer.encode(text)]
        assert "".join(pieces) + decoder.rest() == text
        assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 511), max_size=12))
def test_any_tokens_are_decoded_as_they_would_be_together(small_tokenizer, tokens):
    decoder = Decoder(small_tokenizer)
    assert "".join([decoder.push(token) for token in tokens]) + decoder.rest() == small_tokenizer.decode(tokens)


def test_a_space_in_front_survives_where_a_tokenizer_drops_that_of_a_beginning():
    class Metaspace:
        def decode(self, tokens):
            return "".join(("a", " b", " c")[token] for token in tokens).removeprefix(" ")

    decoder = Decoder(Metaspace(), [0])
    assert [decoder.push(token) for token in (1, 2, 0)] == [" b", " c", "a"]
    assert Decoder(Metaspace()).push(1) == "b", "at a text's beginning the tokenizer decides"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abX", max_size=4), max_size=10),
    st.lists(st.text("abX", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_wherever_the_borders_are(texts, stops):
    searcher, given_on, pushed = StopStrings(stops), [], 0
    for i, text in enumerate(texts):
        given_on += searcher.push(Piece(Token(i), text))
        pushed += 1
        if searcher.stopped:
            break
    whole = "".join(texts[:pushed])
    at = min((whole.find(stop) for stop in stops if stop in whole), default=-1)
    assert searcher.stopped == (at >= 0)
    if not searcher.stopped:
        shown = "".join(piece.text for piece in given_on)
        held = whole[len(shown) :]
        assert not held or any(stop.startswith(held[i:]) for stop in stops for i in range(len(held))), (
            "held for a reason"
        )
        given_on += searcher.rest()
    assert "".join(piece.text for piece in given_on) == (whole if at < 0 else whole[:at])
    assert [piece.token.id for piece in given_on] == list(range(len(given_on))), "every token once, in order"
    if at < 0:
        assert len(given_on) == len(texts)


def test_a_stop_string_is_found_as_soon_as_it_is_there():
    searcher = StopStrings(["\n\n", "END"])
    assert [piece.text for piece in searcher.push(Piece(Token(1), "one\n"))] == []
    assert [piece.text for piece in searcher.push(Piece(Token(2), "two E"))] == ["one\n"]
    assert [piece.text for piece in searcher.push(Piece(Token(3), "NDs"))] == ["two "] and searcher.stopped
