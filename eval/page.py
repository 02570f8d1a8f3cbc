"""The report's HTML vocabulary: sections, cards, tables, and numbers as a person reads them. `escape` guards every text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.charts import escape

DASH = "–"


def section(title: str, intro: str, parts: Sequence[str]) -> str:
    """A heading, a sentence and its parts; nothing where no part has anything to show."""
    content = "".join(parts)
    if not content:
        return ""
    lead = f'<p class="intro">{escape(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def figure(title: str, content: str, caption: str) -> str:
    """A card with a picture or a table; `content` is HTML, the texts are escaped. Nothing without content."""
    if not content:
        return ""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{heading}{content}{words}</figure>"


def pair(*figures: str) -> str:
    """Cards side by side, below each other on a phone."""
    return f'<div class="pair">{"".join(figures)}</div>' if any(figures) else ""


def details(title: str, content: str, opened: bool = False) -> str:
    """A drawer; `content` is HTML."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{escape(title)}</summary><div>{content}</div></details>"


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """`rows` are HTML (`row`, `group_row`); every column but the first holds numbers."""
    first, *others = (escape(text) for text in head)
    cells = f"<th>{first}</th>" + "".join(f'<th class="number">{text}</th>' for text in others)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(first: str, *numbers: str, strong: int = -1) -> str:
    """A table row of texts; number `strong` (from 0) stands out."""
    cells = "".join(
        f'<td class="number{" strong" if i == strong else ""}">{escape(text)}</td>' for i, text in enumerate(numbers)
    )
    return f"<tr><td>{escape(first)}</td>{cells}</tr>"


def group_row(text: str, columns: int) -> str:
    return f'<tr class="group"><td colspan="{columns}">{escape(text)}</td></tr>'


def words(key: object) -> str:
    """A key as words: memory_gib -> memory gib."""
    return str(key).replace("_", " ")


def number(value: object, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if is_number(value) else DASH


def percent(fraction: float) -> str:
    value = 100 * fraction
    return f"{value:.1f}\u00a0%" if 0 < value < 9.95 else f"{value:.0f}\u00a0%"


def count(value: object) -> str:
    """1234567 -> 1.23M."""
    if not is_number(value):
        return DASH
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """59.2 -> 59 s, 192 -> 3 min 12 s, 7300 -> 2 h 1 min."""
    if 0 < seconds < 9.95:
        return f"{seconds:.2g} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min" + (f" {seconds % 60} s" if seconds % 60 else "")
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
