"""From tokens to what may be sent: characters held back until they are whole, text until it can be no stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.tokenizer import Tokenizer
from model.batching import Token

UNFINISHED = "\ufffd"  # an unfinished character decodes to exactly one of these, at the end


class Decoder:
    """Text of tokens, one by one.

    Each piece is decoded behind the one before it, the first behind `before`: some tokenizers drop the space in front of
    what they take for a text's beginning.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        text = tokenizer.decode(before)
        # The tokens of the last piece, then those whose text is not all given.
        self.window = [] if text.endswith(UNFINISHED) else list(before)
        self.read = len(self.window)  # tokens of the last piece
        self.given = len(text) if self.window else 0  # characters of the window's text

    def push(self, token: int) -> str:
        """What has become readable: nothing while a character is unfinished."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        if text.endswith(UNFINISHED):
            ready = text[self.given : -1]
            self.given += len(ready)
            return ready
        ready = text[self.given :]
        self.window = self.window[self.read :]
        self.read, self.given = len(self.window), len(self.tokenizer.decode(self.window))
        return ready

    def rest(self) -> str:
        """At the end: what was held back, bytes that are no character shown as U+FFFD."""
        return self.tokenizer.decode(self.window)[self.given :]


@dataclass
class Piece:
    """A token and the text it brings, which may be none."""

    token: Token | None  # None: what was left at the end
    text: str


class StopStrings:
    """Gives pieces on as soon as no stop string can begin in them; `stopped` once one was found.

    A stop string may lie across tokens. The text ends before it; the token in which it begins is the last one given.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held: list[Piece] = []
        self.stopped = False

    def push(self, piece: Piece) -> list[Piece]:
        """Takes a piece; gives those that can be passed on, in which no stop string can have begun."""
        self.held.append(piece)
        text = "".join(held.text for held in self.held)
        found = [text.find(stop) for stop in self.stops]
        found = [start for start in found if start >= 0]
        if found:
            self.stopped = True
            return self._release_before(min(found), cut=True)
        return self._release_before(len(text) - self._longest_beginning(text), cut=False)

    def rest(self) -> list[Piece]:
        """At the end: everything that was held back."""
        pieces, self.held = self.held, []
        return pieces

    def _longest_beginning(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release_before(self, end: int, cut: bool) -> list[Piece]:
        """The held pieces whose text ends at character `end` at the latest; with `cut`, the last one up to there."""
        pieces, at = [], 0
        while self.held and at + len(self.held[0].text) <= end:
            pieces.append(self.held.pop(0))
            at += len(pieces[-1].text)
        if cut:
            if at < end:
                pieces.append(Piece(self.held[0].token, self.held[0].text[: end - at]))
            self.held = []
        return pieces
