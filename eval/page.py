"""The report's HTML vocabulary: sections, cards, tables, and numbers as a person reads them. `escape` guards every text."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.charts import escape, run_look, swatch

DASH = "–"
RUNS_PER_TABLE = 6  # columns that can be read beside each other
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a report runs nothing and asks nobody


def document(title: str, body: str, command: str) -> str:
    """The whole page: `body` is HTML, `command` what writes it again."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    now = datetime.datetime.now()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body><main>{body}"
        f"<footer>Written by <code>{escape(command)}</code> on {now.day} {now:%B %Y, %H:%M}.</footer></main></body></html>\n"
    )


def headline(eyebrow: str, title: str, lead: str, notices: Sequence[str], tiles: Sequence[tuple[str, str]]) -> str:
    """The top of a page; `tiles` are (value, what it is)."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles
    )
    return (
        f'<p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        + "".join(f'<p class="notice">{escape(notice)}</p>' for notice in notices)
        + (f'<div class="tiles">{shown}</div>' if shown else "")
    )


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
    """A heading within a table."""
    return f'<tr class="group"><td colspan="{columns}">{escape(text)}</td></tr>'


class Cell(NamedTuple):
    """A number in a table that compares runs."""

    text: str
    small: str = ""  # beneath it
    strong: bool = False


def run_tables(names: Sequence[str], rows: Sequence[tuple[str | tuple[str, str], Sequence[Cell] | None]]) -> str:
    """A column for each run, in a table for every few of them. A row is (what, cells), or (what, None) for a heading;
    `what` may have a second, small text."""
    if not any(cells for _, cells in rows):
        return ""
    tables, columns = [], math.ceil(len(names) / math.ceil(len(names) / RUNS_PER_TABLE))
    for start in range(0, len(names), columns):
        some = range(start, min(start + columns, len(names)))
        looks = [run_look(i) for i in some]
        heads = [
            f'<th class="run">{swatch(colour, 1.0, dash)}{escape(names[i])}</th>'
            for i, (colour, dash) in zip(some, looks)
        ]
        body = []
        for what, cells in rows:
            if cells is None:
                body.append(group_row(str(what), len(some) + 1))
                continue
            title, note = what if isinstance(what, tuple) else (what, "")
            small = f"<small>{escape(note)}</small>" if note else ""
            body.append(f"<tr><td>{escape(title)}{small}</td>{''.join(_run_cell(cells[i]) for i in some)}</tr>")
        head = f"<tr><th></th>{''.join(heads)}</tr>"
        tables.append(
            f'<div class="scroll"><table class="compared"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
        )
    return "".join(tables)


def _run_cell(cell: Cell) -> str:
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return f'<td class="run{" strong" if cell.strong else ""}">{escape(cell.text)}{small}</td>'


def words(key: object) -> str:
    """A key as words: memory_gib -> memory gib."""
    return str(key).replace("_", " ")


def number(value: object, decimals: int) -> str:
    """With so many decimals; a dash for what is no finite number."""
    return f"{value:,.{decimals}f}" if is_number(value) else DASH


def percent(fraction: float) -> str:
    """0.0123 -> 1.2 %, 0.5 -> 50 %."""
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


def enumeration(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def spread(items: Sequence, n: int) -> list:
    """At most n of them, evenly spread, the first and the last among them."""
    last = len(items) - 1
    return list(items) if len(items) <= n else [items[round(i * last / (n - 1))] for i in range(n)]


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
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
