"""Text for a terminal: cleaned of what a terminal would obey, measured in columns, coloured, cut, and drawn as bars."""

from __future__ import annotations

import math
import os
import typing
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "36"}
BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = " .:-=+*%#"  # where the terminal cannot show BLOCKS
WRITABLE = {
    "●": "*",
    "✓": "*",
    "■": "*",
    "✗": "x",
    "×": "x",
    "·": "-",
    "…": "~",
    "→": ">",
    "↵": " ",
    "━": "=",
    "─": "-",
}

Piece = tuple[str, str]  # a text and its colour; "" for none


@dataclass(frozen=True)
class Style:
    """What the terminal can show."""

    colour: bool = True
    unicode: bool = True

    @staticmethod
    def of(stream: typing.TextIO) -> Style:
        """What this stream's terminal can show; NO_COLOR is heeded."""
        wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        try:
            (BLOCKS + "".join(WRITABLE)).encode(stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return Style(wanted, False)
        return Style(wanted, True)

    @property
    def blocks(self) -> str:
        """Bars from none to full."""
        return BLOCKS if self.unicode else PLAIN_BLOCKS

    def line(self, pieces: Sequence[Piece], columns: int) -> str:
        """The pieces beside each other, cut at the last column."""
        shown, left = [], columns
        for text, colour in pieces:
            text = cut(clean(text), left)
            left -= width(text)
            if not self.unicode:
                text = "".join(WRITABLE.get(c, c) for c in text)
            shown.append(f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if colour and self.colour and text else text)
            if left <= 0:
                break
        return "".join(shown)


def clean(text: str) -> str:
    """One line without control characters, or marks that turn the direction of writing around."""
    text = text.replace("\n", "↵").replace("\t", " ")
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def width(text: str) -> int:
    """Columns that the text takes in a terminal."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """At most so many columns of it; what is left out is shown by an ellipsis."""
    return text if width(text) <= columns else _beginning(text, columns - 1) + "…" * (columns > 0)


def _beginning(text: str, columns: int) -> str:
    """As much of the text as has room."""
    used = 0
    for i, character in enumerate(text):
        used += _columns(character)
        if used > columns:
            return text[:i]
    return text


def wrapped(text: str, columns: int, rows: int) -> list[str]:
    """The text in at most so many rows, broken between words where there are any."""
    lines, rest = [], text
    while rest and len(lines) < rows - 1 and width(rest) > columns:
        line = _beginning(rest, columns)
        at = line.rfind(" ")
        if rest[len(line)] != " " and at > len(line) // 2:
            line = line[:at]
        lines.append(line)
        rest = rest[len(line) :].removeprefix(" ")
    return [*lines, cut(rest, columns)] if rest else lines


def chart(values: Sequence[float], columns: int, rows: int, blocks: str) -> tuple[list[str], float, float]:
    """(rows of a filled curve as wide as there are columns, its bottom, its top); the first steep part is cut off at the top."""
    good = [v for v in values if math.isfinite(v)]
    if not good or columns < 1:
        return [], math.nan, math.nan
    points = _resampled(good, columns)
    low, high = min(points), _top(points)
    span = (high - low) or 1.0
    steps = (len(blocks) - 1) * rows
    heights = [max(1, min(steps, round(1 + (steps - 1) * (v - low) / span))) for v in points]
    full = len(blocks) - 1
    lines = ["".join(blocks[max(0, min(full, h - full * below))] for h in heights) for below in range(rows - 1, -1, -1)]
    return lines, low, high


def _resampled(values: Sequence[float], n: int) -> list[float]:
    """n numbers: means of equal runs, or each value several times."""
    if len(values) <= n:
        return [values[i * len(values) // n] for i in range(n)]
    edges = [i * len(values) // n for i in range(n + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _top(points: Sequence[float]) -> float:
    """What the first steep part of a curve would flatten is measured by the rest."""
    ordered = sorted(points)
    low, usual = ordered[0], ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return min(ordered[-1], usual + 0.35 * (usual - low)) if len(ordered) > 10 else ordered[-1]


def bar(share: float, columns: int, unicode: bool) -> list[Piece]:
    """A line of which a share is done."""
    done = round(columns * min(1.0, max(0.0, share)))
    full, empty = ("━", "─") if unicode else ("#", "-")
    return [(full * done, "green"), (empty * (columns - done), "dim")]
