"""A study on one page: who wins at equal tokens, wall clock and operations, by how much, and how sure that is.

Like every report it reads files only, runs nothing, asks nobody, and escapes every text (eval/page.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from urllib.parse import quote

from eval.charts import DASHES, Line, escape, legend, line_chart, nice_ticks, on_both, smooth, swatch
from eval.curves import FLOPS, TIME, TOKENS, Axis
from eval.facts import ceiling
from eval.page import DASH, details, document, enumeration, figure, headline, number, pair, section
from eval.study_curves import (
    BAND,
    Band,
    Ends,
    bands_of,
    ends_by_time,
    held_out_points,
    later_part,
    looks,
    routing_points,
    sample_offsets,
)
from eval.study_numbers import COMPUTE, Difference, differences, final, leader
from eval.study_numbers import TIME as AT_TIME
from eval.study_numbers import TOKENS as AT_TOKENS
from eval.study_records import Study, problems
from eval.study_tables import (
    HEADINGS,
    ONE_IN_TWENTY,
    balance,
    html_table,
    provenance,
    signed,
    tables,
    verdicts,
)
from train.files import without_home

FEW_DOTS = 30  # evaluations of a curve, up to which each is marked
LONGEST_SETTING = 60  # characters


def render(study: Study) -> str:
    """The page as text; parts of which nothing is known yet are left out, and named at the top."""
    of_balance = balance(study).title
    cards = [html_table(table, looks(study)) for table in tables(study) if table.title != of_balance]
    body = [
        _headline(study),
        section(
            "What beats the reference",
            "Differences in bits per byte of held-out text after the whole training, a dot for the mean over the seeds, a bar for "
            "its 95 % interval. Left of the line is better; a bar across the line shows no difference, nor does a ring: one seed.",
            [_dot_plots(study)],
        ),
        section("Figures", "", cards),
        section(
            "How they learned",
            f"Bits per byte on held-out text while training, lower is better, mean of the seeds.{_sample(study)} {BAND} The start lies "
            "above the pictures. A run that is not at its end has not yet lowered its learning rate: compare ends, not middles.",
            [_curves(study)],
        ),
        section(
            "What the experts do",
            "A router sends every token to a few experts of each layer. Balance costs something and buys something: the quality "
            "stands beside it.",
            [html_table(balance(study), looks(study)), _router_curves(study)],
        ),
        section("What differs", "", [_settings(study), _runs(study)]),
    ]
    command = without_home(study.command) or f"python -m eval.study {without_home(str(study.folder))}"
    return document(f"{study.name} · MiniMoE study", "".join(body), command)


def _headline(study: Study) -> str:
    reference = study.references[0] if study.references else None
    done, wanted = (sum(len(getattr(v, key)) for v in study.variants) for key in ("done", "cells"))
    lead = _story(study) or f"{done} of {wanted} runs are finished" + (
        f"; nothing can be compared with {reference.name} yet." if reference else "."
    )
    top = headline("MiniMoE study", study.question or study.name, lead, problems(study), _tiles(study))
    return f'{top}<p class="intro source">{escape(provenance(study))}</p>'


def _tiles(study: Study) -> list[tuple[str, str]]:
    shown = []
    for variant in study.full_length:
        if bits := final(variant):
            shown.append((f"{bits.mean:.3f}", f"{variant.name}, bits per byte", bits.mean))
    shown.sort(key=lambda tile: tile[2])
    best = [(value, text) for value, text, _ in shown[:3]]
    reference = study.references[0] if study.references else None
    if reference and (bits := final(reference)):
        tile = (f"{bits.mean:.3f}", f"{reference.name}, bits per byte")
        best = [each for each in best if each != tile][:3] + [tile]
    return best if len(best) > 1 else []


def _story(study: Study) -> str:
    """What the main reference is beaten by at equal tokens, and at equal wall clock, as sentences."""
    said = []
    for at in (AT_TOKENS, AT_TIME):
        best = leader(study, at)
        if best is None:
            continue
        seeds = f"({best.bits.n} seeds)"
        if best.word == "better":
            figures = f"{abs(best.bits.mean):.3f} ± {best.bits.half:.3f} bits per byte {seeds}"
            text = f"{best.variant} beats {best.reference} by {figures}, the largest gain beyond the noise"
        else:
            text = f"no variant is shown to be better than {best.reference}; lowest is {best.variant}, {signed(best.bits)} {seeds}"
        said.append(f"At {HEADINGS[at]}, {text}.")
    return " ".join(said)


def _dot_plots(study: Study) -> str:
    by_heading = {}
    for reference in study.references:
        for at in (AT_TOKENS, AT_TIME, COMPUTE):
            found = [each for each in differences(study, at) if each.reference == reference.name]
            by_heading[f"At {HEADINGS[at]}, against {reference.name}"] = [e for e in found if e.bits is not None]
    shown = [each for found in by_heading.values() for each in found]
    cards = [figure(title, dot_plot(found, shown, looks(study)), "") for title, found in by_heading.items()]
    cards = [card for card in cards if card]
    note = f'<p class="intro">{escape(ONE_IN_TWENTY)}</p>' if cards else ""
    return "".join(pair(*cards[i : i + 2]) for i in range(0, len(cards), 2)) + note


def dot_plot(found: Sequence[Difference], beside: Sequence[Difference], colours: dict[str, tuple[str, str]]) -> str:
    """A row for each difference: its mean as a dot, its interval as a bar, and a line at zero; nothing without a row. `beside`:
    all that stand in the plots next to it, which have one scale."""
    if not found:
        return ""
    ends = [each.bits.mean + side * (each.bits.half or 0.0) for each in beside for side in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.06 * (high - low) or 0.01
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    ticks = next(some for count in (4, 6, 12) if len(some := nice_ticks(low, high, count)) > 2)
    lines = "".join(f'<s style="left:{at(tick):.2f}%"></s>' for tick in ticks) + f'<u style="left:{at(0):.2f}%"></u>'
    rows = []
    for each in found:
        half, colour = each.bits.half or 0.0, colours.get(each.variant, ("#5f6b7a", ""))[0]
        fill = f"background:{colour};background:{on_both(colour)}"
        dot = fill if each.bits.half is not None else f"border:2px solid {colour};border-color:{on_both(colour)}"
        bar = f"left:{at(each.bits.mean - half):.2f}%;width:{at(low + 2 * half):.2f}%;{fill}"
        about = escape(f"{each.variant} minus {each.reference}: {signed(each.bits)} bits per byte, {each.verdict}")
        marks = f'<i style="{bar}"></i><em style="left:{at(each.bits.mean):.2f}%;{dot}"></em>'
        rows.append(
            f'<div class="row" title="{about}"><b>{escape(each.variant)}</b><div class="track">{lines}{marks}</div></div>'
        )
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 3
    names = "".join(
        f'<span style="left:{at(tick):.2f}%">{f"{tick:+.{decimals}f}".replace("-", "−") if tick else "0"}</span>'
        for tick in ticks
    )
    axis = f'<div class="row"><b></b><div class="track axis">{names}</div></div>'
    return f'<div class="dots">{"".join(rows)}{axis}</div>'


def _curves(study: Study) -> str:
    found, ends = bands_of(study.variants, held_out_points(study)), _ends(study)
    whole = [each for each in found if not each.variant.longer]
    cards = [
        figure("Against tokens", chart(whole, TOKENS, study, "Bits per byte against tokens"), ""),
        figure(
            "Against wall clock",
            chart(found, TIME, study, "Bits per byte against wall clock", ends=ends),
            "Steps times the step time of the interleaved clock."
            + (f" Dotted: what {study.references[0].name} reaches when it is trained just so long." if ends else ""),
        ),
        figure("Against training operations", chart(found, FLOPS, study, "Bits per byte against operations"), ""),
    ]
    cards = [card for card in cards if card]
    return _key(found, study) + "".join(pair(*cards[i : i + 2]) for i in range(0, len(cards), 2)) if cards else ""


def _sample(study: Study) -> str:
    """How the curves' points come to end at the tables' figures, where they are not the same."""
    offsets = sample_offsets(study).values()
    if not offsets or max(map(abs, offsets)) < 0.00005:
        return ""
    low, high = (f"{each:+.3f}".replace("-", "−") for each in (min(offsets), max(offsets)))
    return (
        f" Training measures a part of it (eval.max_tokens), so each run's points are moved by {low if low == high else f'{low} to {high}'}, "
        "what all of it differs by at the run's end: the curves end at the tables' figures."
    )


def _ends(study: Study) -> Ends | None:
    return ends_by_time(study, study.references[0], held_out_points(study)) if study.references else None


def chart(
    bands: Sequence[Band],
    axis: Axis,
    study: Study,
    label: str,
    from_later_part: bool = True,
    ends: Ends | None = None,
) -> str:
    """Mean curves with their bands against one axis, and `ends` over time; nothing where no variant stands on it."""
    known = [(each, each.xs(axis)) for each in bands]
    known = [(each, xs) for each, xs in known if all(map(math.isfinite, xs))]
    if not known:
        return ""
    colours = looks(study)
    largest = max(xs[-1] for _, xs in known)
    size, unit = axis.unit(largest)
    lines = []
    for each, xs in known:
        colour, dash = colours[each.variant.name]
        xs, few = [x / size for x in xs], len(xs) <= FEW_DOTS
        name = each.variant.name
        lines.append(Line(name, xs, each.mean, colour, dash=dash, dots=few, legend=False, low=each.low, high=each.high))
    if ends:
        xs, colour = [at / size for at in ends.seconds], colours[study.references[0].name][0]
        dotted = Line("by length", xs, ends.mean, colour, dash=DASHES[2], legend=False, low=ends.low, high=ends.high)
        lines.append(dotted)
    x_range, y_range = (0.0, largest), (None, ceiling([y for each, _ in known for y in each.mean])[0])
    if from_later_part:
        x_range, y_range = later_part([each for each, _ in known], axis)
    x_range = (x_range[0] / size, x_range[1] / size)
    return line_chart(lines, y_range=y_range, x_range=x_range, x_label=unit, whole=False, height=260, label=label)


def _router_curves(study: Study) -> str:
    uneven = [_smoothed(each) for each in bands_of(study.full_length, routing_points("max_vio"))]
    entropies = bands_of(study.full_length, routing_points("router_entropy", of_log_experts=True))
    decided = [_smoothed(each) for each in entropies]
    if not uneven and not decided:
        return ""
    return _key(uneven or decided, study) + pair(
        figure(
            "How uneven the load of a training step is",
            chart(uneven, TOKENS, study, "MaxVio against tokens", from_later_part=False),
            "MaxVio, mean of the layers and seeds: 0 is perfect balance, 1 twice the fair share.",
        ),
        figure(
            "How decided the router is",
            chart(decided, TOKENS, study, "Router entropy against tokens", from_later_part=False),
            "Router entropy of a token, as a fraction of the largest: 1 likes all experts equally, 0 is certain.",
        ),
    )


def _smoothed(each: Band) -> Band:
    window = max(1, len(each.steps) // 30)
    mean, low, high = (smooth(values, window) for values in (each.mean, each.low, each.high))
    return dataclasses.replace(each, mean=mean, low=low, high=high)


def _key(bands: Sequence[Band], study: Study) -> str:
    """Which colour is which variant."""
    colours = looks(study)
    keys = [(each.variant.name, colours[each.variant.name][0], 1.0, colours[each.variant.name][1]) for each in bands]
    return legend(keys) if len(keys) > 1 else ""


def _settings(study: Study) -> str:
    """The keys that the variants set, and to what."""
    rows = []
    for variant in study.variants:
        pairs = [f"{key} = {_short(value)}" for key, value in variant.settings.items()]
        of = f"as {variant.of}, and " * bool(variant.of)
        colour, dash = looks(study)[variant.name]
        text = of + (enumeration(pairs) or "the base config as it is")
        rows.append(
            f'<tr><td class="variant">{swatch(colour, 1.0, dash)}{escape(variant.name)}</td><td class="words">{escape(text)}</td></tr>'
        )
    content = f'<div class="scroll"><table class="study"><tbody>{"".join(rows)}</tbody></table></div>'
    return figure("Settings of each variant", content, f"Set on the base config, {study.scale}." * bool(study.scale))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SETTING else f"{text[:LONGEST_SETTING]} …"


def _runs(study: Study) -> str:
    """Every cell with its figure and the way to its folder."""
    rows = []
    for variant in study.variants:
        cells = []
        for cell in variant.cells:
            page = cell.stage is not None and (cell.stage.folder / "report.html").is_file()
            target = quote(cell.link.rstrip("/"), errors="replace") + ("/report.html" if page else "/")
            name = escape(f"seed {cell.seed}")
            shown = f'<a href="./{target}">{name}</a>' if cell.stage else name
            cells.append(f"{shown} {escape(number(cell.bits, 4) if cell.is_done else cell.state or DASH)}")
        rows.append(
            f'<tr><td class="variant">{escape(variant.name)}</td><td class="words">{" · ".join(cells) or DASH}</td></tr>'
        )
    content = f'<div class="scroll"><table class="study cells"><tbody>{"".join(rows)}</tbody></table></div>'
    said = "".join(f"<li>{escape(text)}</li>" for text in verdicts(study))
    sentences = details("All comparisons in words", f"<ul>{said}</ul>") if said else ""
    return sentences + details("The runs", content)
