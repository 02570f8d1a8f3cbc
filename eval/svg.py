"""One standalone picture of a study for a README: bits per byte against wall clock or tokens, a line and a band a variant.

    picture(study, "time")        the text of an SVG file; runs/ablations/NAME/clock.svg and tokens.svg are written by eval.study

Text is SVG text, names stand at the ends of their lines, the ground is the picture's own (a page around it may be dark while the
reader's system is light), and dark mode is a media query: nothing is loaded and nothing runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.charts import band_paths, escape, nice_ticks, on_dark
from eval.curves import TIME, TOKENS, Axis
from eval.study_curves import Band, Ends, bands_of, ends_by_time, held_out_points, later_part, looks
from eval.study_numbers import TIME as AT_TIME
from eval.study_numbers import TOKENS as AT_TOKENS
from eval.study_numbers import final, leader
from eval.study_records import Study, Variant

WIDTH, HEIGHT = 860, 480  # GitHub shows a README 830 to 1,010 pixels wide
LEFT, TOP, BOTTOM = 66, 106, 62
SHOWN_FROM = 0.6  # of each curve's length: what lies above is cut off
SIZE, CHARACTER = 14, 7.6  # of a label: font size, and an upper bound of a letter's mean width
LONGEST_NAME = 24  # characters of a label
MOST_LINES = 8  # that can be told apart with their names at the ends
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML

Scale = Callable[[float], float]  # a value's place in the picture

STYLE = """
text { font: 14px Inter, "Segoe UI", system-ui, -apple-system, Roboto, "Helvetica Neue", Arial, sans-serif; fill: #5c6570; }
.title { font-size: 18px; font-weight: 600; fill: #1f2328; } .axis { font-size: 13px; }
.label { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round; }
.paper { fill: #fff; stroke: #e4e5e1; } .grid { stroke: #ecece8; fill: none; } .band { fill-opacity: 0.17; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.leader { stroke-width: 1; fill: none; opacity: 0.6; }
"""
DARK_STYLE = (
    "text { fill: #a4abb3; } .title { fill: #e3e5e8; } .label { stroke: #1e2125; } "
    ".paper { fill: #1e2125; stroke: #33383e; } .grid { stroke: #2e3237; }"
)


@dataclass
class Label:
    """A name at the end of a line: where the line ends, and the middle of the text's left edge."""

    place: int
    text: str
    end: tuple[float, float]
    x: float
    y: float

    def overlaps(self, other: Label) -> bool:
        """Whether the two texts, or this text and the other's dot, would touch."""
        beside = self.x < other.x + len(other.text) * CHARACTER and other.x < self.x + len(self.text) * CHARACTER
        return beside and abs(self.y - other.y) < SIZE + 3


def picture(study: Study, at: str) -> str:
    """The SVG for "time" or "tokens"; an empty text where no variant can stand on that axis."""
    axis = TIME if at == AT_TIME else TOKENS
    bands = [each for each in bands_of(_chosen(study, axis), held_out_points(study)) if _is_on(each, axis)]
    if not bands:
        return ""
    size, unit = axis.unit(max(each.xs(axis)[-1] for each in bands))
    right = 22 + CHARACTER * max(len(_name(each)) for each in bands)
    (x_low, x_high), (y_low, y_high) = later_part(bands, axis, SHOWN_FROM)
    x_low, x_high = x_low / size, x_high / size
    width, height = WIDTH - LEFT - right, HEIGHT - TOP - BOTTOM

    def px(x: float) -> float:
        return LEFT + width * (x - x_low) / (x_high - x_low)

    def py(y: float) -> float:
        return TOP + height * (y_high - y) / (y_high - y_low)

    main = study.references[0] if study.references else None
    ends = ends_by_time(study, main, held_out_points(study)) if main and axis is TIME else None
    of_main = next((place for place, each in enumerate(bands) if each.variant is main), None)
    shapes = _dotted(ends, of_main, px, py, size) if ends and of_main is not None else []
    labels = []
    for place, each in enumerate(bands):
        xs = [px(x / size) for x in each.xs(axis)]
        shapes += _curve(each, xs, py, place, looks(study)[each.variant.name][1])
        labels.append(Label(place, _name(each), (xs[-1], py(each.mean[-1])), xs[-1] + 11, py(each.mean[-1])))
    frame = f'<clipPath id="inside"><rect x="{LEFT}" y="{TOP - 8}" width="{width + 8:.0f}" height="{height + 8}"/></clipPath>'
    clipped = f'<g clip-path="url(#inside)">{"".join(shapes)}</g>'
    title = f"Bits per byte of held-out {_short(study.source) or 'text'} against {axis.title}"
    said = _subtitle(study, bands, at, main.name if main and ends else "")
    body = [
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12"/>',
        f'<text class="title" x="24" y="34">{_xml(title)}</text>',
        *(f'<text x="24" y="{58 + 20 * i}">{_xml(text)}</text>' for i, text in enumerate(said)),
        *_axes(px, py, (x_low, x_high), (y_low, y_high), f"{unit} of training" if axis is TIME else unit, width),
        clipped,
        *(_label(label) for label in _apart(labels)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
        f"<title>{_xml(title)}</title><desc>{_xml(' '.join(said))}</desc><style>{_styles(bands, looks(study))}</style><defs>{frame}</defs>"
        f"{''.join(body)}</svg>\n"
    )


def _curve(each: Band, xs: Sequence[float], py: Scale, place: int, dash: str) -> list[str]:
    """A variant's band and line."""
    low, high, mean = (list(zip(xs, map(py, ys), strict=True)) for ys in (each.low, each.high, each.mean))
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<path class="line s{place}"{dashed} d="{_line(mean)}"><title>{_xml(each.variant.name)}</title></path>'
    return [*(f'<path class="band f{place}" d="{path}"/>' for path in band_paths(low, high)), line]


def _dotted(ends: Ends, place: int, px: Scale, py: Scale, size: float) -> list[str]:
    """What the reference reaches by the length of its training, in its colour."""
    xs = [px(at / size) for at in ends.seconds]
    low, high, mean = (list(zip(xs, map(py, ys), strict=True)) for ys in (ends.low, ends.high, ends.mean))
    line = f'<path class="line s{place}" stroke-dasharray="1 5" d="{_line(mean)}"/>'
    return [*(f'<path class="band f{place}" d="{path}"/>' for path in band_paths(low, high)), line]


def _chosen(study: Study, axis: Axis) -> list[Variant]:
    """The main reference, its longer runs where the axis is time, and the best others that the picture has room for: first the
    one of which the subtitle speaks."""
    main = study.references[0] if study.references else study.variants[0]
    first = study.lengths_of(main) if axis is TIME else [main]
    others = [variant for variant in study.full_length if variant is not main]
    best = leader(study, AT_TIME if axis is TIME else AT_TOKENS)
    told = best.variant if best else ""
    others.sort(key=lambda variant: (variant.name != told, bits.mean if (bits := final(variant)) else math.inf))
    chosen = {variant.name for variant in (*first, *others[: max(0, MOST_LINES - len(first))])}
    return [variant for variant in study.variants if variant.name in chosen]


def _is_on(each: Band, axis: Axis) -> bool:
    return len(each.steps) > 1 and all(map(math.isfinite, each.xs(axis)))


def _subtitle(study: Study, bands: Sequence[Band], at: str, dotted: str) -> list[str]:
    """Two lines: how to read the picture, and what it shows."""
    seeds = sorted({each.runs for each in bands})
    mean = f"mean of {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seed{'s' * (seeds != [1])}"
    interval = "95 % interval, or both of two seeds" if 2 in seeds else "95 % interval of the mean"
    band = {1: "", 2: "; band: from one seed to the other"}.get(seeds[-1], f"; band: {interval}")
    how = f"Lower is better; {mean}{band}" + (f"; dotted: {_short(dotted)} trained just so long" if dotted else "")
    best = leader(study, at)
    if best is None:
        return [how]
    difference = f"{best.bits.mean:+.3f}".replace("-", "−") + f" ± {best.bits.half:.3f} bits per byte"
    what = f"{_short(best.variant)} against {_short(best.reference)} {'in equal time' if at == AT_TIME else 'for equal tokens'}"
    return [how, f"{what}: {difference}" + ("" if best.bits.is_shown else ", no difference shown")]


def _axes(
    px: Scale, py: Scale, x_range: tuple[float, float], y_range: tuple[float, float], x_title: str, width: float
) -> list[str]:
    x_ticks, y_ticks = nice_ticks(*x_range, 6), nice_ticks(*y_range, 5)
    base, parts = HEIGHT - BOTTOM, []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {py(tick):.1f}h{width:.1f}"/>')
        parts.append(
            f'<text class="axis" x="{LEFT - 9}" y="{py(tick) + 4.5:.1f}" text-anchor="end">{_tick(tick, y_ticks)}</text>'
        )
    parts += [
        f'<text class="axis" x="{px(tick):.1f}" y="{base + 21}" text-anchor="middle">{_tick(tick, x_ticks)}</text>'
        for tick in x_ticks
    ]
    parts.append(
        f'<text class="axis" x="{LEFT + width / 2:.1f}" y="{base + 44}" text-anchor="middle">{_xml(x_title)}</text>'
    )
    middle = (TOP + base) / 2
    turned = f'transform="rotate(-90 20 {middle:.1f})" text-anchor="middle"'
    return [*parts, f'<text class="axis" x="20" y="{middle:.1f}" {turned}>bits per byte</text>']


def _tick(value: float, ticks: Sequence[float]) -> str:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    return f"{value:,.{decimals}f}"


def _apart(labels: list[Label]) -> list[Label]:
    """The labels moved up or down, each as little as is needed to touch no other, the highest first."""
    placed: list[Label] = []
    for label in sorted(labels, key=lambda label: label.end[1]):
        moves = [0.0] + [sign * step for step in range(2, HEIGHT, 2) for sign in (-1, 1)]
        for move in moves:
            label.y = min(max(label.end[1] + move, TOP), HEIGHT - BOTTOM)
            if not any(label.overlaps(other) for other in placed):
                break
        placed.append(label)
    return placed


def _label(label: Label) -> str:
    (x, y), place = label.end, label.place
    leader = ""
    if abs(label.y - y) > 6:
        leader = f'<path class="leader s{place}" d="M{x + 4:.1f} {y:.1f}L{label.x - 2:.1f} {label.y:.1f}"/>'
    text = f'<text class="label f{place}" x="{label.x:.1f}" y="{label.y + 5:.1f}">{_xml(label.text)}</text>'
    return f'{leader}<circle class="f{place}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>{text}'


def _styles(bands: Sequence[Band], colours: dict[str, tuple[str, str]]) -> str:
    light, dark = [], []
    for place, each in enumerate(bands):
        colour = colours[each.variant.name][0]
        light.append(f".s{place} {{ stroke: {colour}; }} .f{place}, text.f{place} {{ fill: {colour}; }}")
        shown = on_dark(colour)
        dark.append(f".s{place} {{ stroke: {shown}; }} .f{place}, text.f{place} {{ fill: {shown}; }}")
    return f"{STYLE}{' '.join(light)}\n@media (prefers-color-scheme: dark) {{ {DARK_STYLE} {' '.join(dark)} }}"


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _name(each: Band) -> str:
    """What stands at a line's end: the name, and of how many seeds it is where some are missing."""
    done, cells = len(each.variant.done), len(each.variant.cells)
    return _short(each.variant.name) + (
        " (so far)" if not done else f" ({done} of {cells} seeds)" if done < cells else ""
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _xml(text: object) -> str:
    """Any text as XML that shows it."""
    return escape(ILLEGAL.sub("\ufffd", str(text)))
