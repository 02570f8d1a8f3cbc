"""Pictures as HTML text, drawn by hand: line charts (SVG) and heatmaps (a grid of cells, or a PNG of one pixel a cell).

No plotting library: a report then weighs some hundred kilobytes, is sharp at every zoom, and can be made on a GPU machine
that has no more than torch. The drawing stretches with the page while every label is HTML on top of it, so that text is
as large on a phone as on a desk. All text goes through `escape`.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np

PALETTE = ("#2563c9", "#d9662b", "#1d8f6f", "#8a55c4", "#c9417b", "#1596ad", "#8f7f1f", "#5f6b7a")
DEPTH = ("#f2b134", "#e4662f", "#b3306a", "#5d2a86", "#1c2a6b")  # first layer to last
SHARE = (
    (-2.0, "#1d4d94"),
    (-1.0, "#7ea8d4"),
    (0.0, "#f4f2ec"),
    (1.0, "#efa265"),
    (2.0, "#b63a12"),
)  # log2 of load / fair share
MAX_POINTS = 400  # of one line: more than a screen resolves
DASHES = ("", "7 4", "2 4")  # one round of PALETTE each: so many lines can be told apart
DARK_LUMINANCE = 0.5  # of a line on a dark page, at least


@dataclass
class Line:
    """A curve of a chart: its points, and how they are drawn."""

    name: str
    xs: list[float]
    ys: list[float]  # NaN: a gap
    colour: str = PALETTE[0]
    width: float = 2.0
    opacity: float = 1.0
    dots: bool = False
    legend: bool = True
    dash: str = ""  # of SVG's stroke-dasharray
    low: list[float] | None = None  # of a band around the curve, beside `high`; NaN: none there
    high: list[float] | None = None


def escape(text: object) -> str:
    """Any text as HTML that shows it."""
    return html.escape(str(text), quote=True)


def depth_colours(n: int) -> list[str]:
    """Colours for n layers, from light (first) to dark (last)."""
    stops = [(i / (len(DEPTH) - 1), colour) for i, colour in enumerate(DEPTH)]
    return [_hex(_blend(stops, i / max(1, n - 1))) for i in range(n)]


def on_both(colour: str) -> str:
    """A CSS colour that is `colour` on a light page, and light enough on a dark one. Browsers without light-dark() ignore it."""
    return f"light-dark({colour},{on_dark(colour)})"


def on_dark(colour: str) -> str:
    """The colour, light enough for a dark page."""
    rgb, weights = np.array(_rgb(colour), dtype=float), np.array((0.299, 0.587, 0.114))
    wanted = 255 * DARK_LUMINANCE
    rgb *= max(1.0, min(wanted / max(1.0, rgb @ weights), 255 / max(1.0, rgb.max())))  # as bright as the hue can be
    if (luminance := rgb @ weights) < wanted:
        rgb += (255 - rgb) * (wanted - luminance) / (255 - luminance)
    return _hex(rgb)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    lines: list[Line],
    *,
    y_range: tuple[float | None, float | None] = (None, None),
    x_label: str = "optimizer step",
    x_range: tuple[float, float] | None = None,
    whole: bool = True,
    marks: tuple[tuple[float, str], ...] = (),
    height: int = 250,
    label: str = "",
) -> str:
    """Lines over a common x. `marks` are vertical lines with a word; a None bound of y_range follows the data; x is counted
    in `whole` numbers, or measured.

    Returns an empty text where no line has a finite point.
    """
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    x_low, x_high = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    y_low = min(y for _, y in points) if y_range[0] is None else y_range[0]
    y_high = max(y for _, y in points) if y_range[1] is None else y_range[1]
    margin = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low = y_low - margin if y_range[0] is None else y_low
    y_high = y_high + margin if y_range[1] is None else max(y_high, y_low + margin)
    x_high = x_high if x_high > x_low else x_low + 1.0

    def px(x: float) -> float:
        return 1000 * (x - x_low) / (x_high - x_low)

    def py(y: float) -> float:
        return 1000 * (y_high - y) / (y_high - y_low)

    y_ticks = nice_ticks(y_low, y_high)
    decimals = _decimals(y_ticks)
    x_ticks = [x for x in nice_ticks(x_low, x_high, 4) if x == int(x) or not whole]
    x_decimals = 0 if whole else _decimals(x_ticks)
    shapes = [f'<path class="grid" d="M0 {py(y):.1f}H1000"/>' for y in y_ticks]
    shapes += [f'<path class="mark" d="M{px(x):.1f} 0V1000"/>' for x, _ in marks]
    for line in lines:  # under all curves
        if line.low is not None and line.high is not None:
            edges = [[(px(x), py(y)) for x, y in zip(*_thin(line.xs, ys), strict=True)] for ys in (line.low, line.high)]
            fill = f'fill="{line.colour}" style="fill:{on_both(line.colour)}"'
            shapes += [f'<path class="band" {fill} d="{path}"/>' for path in band_paths(*edges)]
    for line in lines:
        xs, ys = _thin(line.xs, line.ys)
        style = f'stroke="{line.colour}" style="stroke:{on_both(line.colour)}" stroke-opacity="{line.opacity:g}"'
        if path := _path([(px(x), py(y)) for x, y in zip(xs, ys, strict=True)]):
            dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
            name = f"<title>{escape(line.name)}</title>"
            shapes.append(f'<path class="line" {style}{dash} stroke-width="{line.width:g}" d="{path}">{name}</path>')
        lone = sum(math.isfinite(y) for y in ys) == 1
        if (line.dots and len(xs) <= 60) or lone:
            dots = "".join(f"M{px(x):.1f} {py(y):.1f}h0" for x, y in zip(xs, ys, strict=True) if math.isfinite(y))
            shapes.append(f'<path class="line" {style} stroke-width="{line.width + 4:g}" d="{dots}"/>')

    y_labels = "".join(f'<span style="top:{py(y) / 10:.2f}%">{y:.{decimals}f}</span>' for y in y_ticks)
    x_labels = "".join(
        f'<span class="{_edge(px(x))}" style="left:{px(x) / 10:.2f}%">{x:,.{x_decimals}f}</span>' for x in x_ticks
    )
    mark_labels = "".join(
        f'<span class="{"left" if px(x) < 150 else "right" if px(x) > 850 else ""}" style="left:{px(x) / 10:.2f}%">{escape(text)}</span>'
        for x, text in marks
    )
    keys = [line for line in lines if line.legend]
    return (
        (legend([(line.name, line.colour, line.opacity, line.dash) for line in keys]) if len(keys) > 1 else "")
        + f'<div class="plot{" marked" if marks else ""}" role="img" aria-label="{escape(label)}"><div class="y-labels">{y_labels}</div>'
        f'<div class="area" style="height:{height}px"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f'{"".join(shapes)}</svg><div class="mark-labels">{mark_labels}</div></div>'
        f'<div class="x-labels">{x_labels}</div><div class="x-title">{escape(x_label)}</div></div>'
    )


def band_paths(low: list[tuple[float, float]], high: list[tuple[float, float]]) -> list[str]:
    """SVG paths of the area between two edges over the same x; one for each stretch in which both are finite."""
    paths, stretch = [], []
    for (x, bottom), (_, top) in [*zip(low, high, strict=True), ((math.nan, math.nan), (math.nan, math.nan))]:
        if math.isfinite(bottom) and math.isfinite(top):
            stretch.append((x, bottom, top))
            continue
        if len(stretch) > 1:
            around = [(x, top) for x, _, top in stretch] + [(x, bottom) for x, bottom, _ in reversed(stretch)]
            paths.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in around) + "Z")
        stretch = []
    return paths


def legend(keys: list[tuple[str, str, float, str]]) -> str:
    """What each line is: (name, colour, opacity, dash)."""
    return (
        '<div class="legend">'
        + "".join(f"<span>{swatch(*look)}{escape(name)}</span>" for name, *look in keys)
        + "</div>"
    )


def swatch(colour: str, opacity: float = 1.0, dash: str = "") -> str:
    """A short piece of a line."""
    fill, shown = on_both(colour), max(0.45, opacity)
    if dash:
        on, off = map(float, dash.split())
        fill = f"repeating-linear-gradient(90deg,{fill} 0 {on:g}px,transparent {on:g}px {on + off:g}px)"
    return f'<i class="swatch" style="background:{colour};background:{fill};opacity:{shown:g}"></i>'


def run_look(place: int) -> tuple[str, str]:
    """(colour, dash) of one of several runs."""
    return PALETTE[place % len(PALETTE)], DASHES[place // len(PALETTE) % len(DASHES)]


def smooth(ys: list[float], window: int) -> list[float]:
    """Centred moving mean over `window` values (NaN left out), shorter at the ends."""
    values = np.asarray(ys, dtype=float)
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(values))
    low, high = np.maximum(0, at - window // 2), np.minimum(len(values), at + window // 2 + 1)
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(1, n), np.nan).tolist()


def share_rgb(relative: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of loads relative to the fair share: blue below, paper at 1, orange above."""
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.clip(
            np.nan_to_num(np.log2(np.asarray(relative, dtype=float)), nan=0.0, neginf=-2.0, posinf=2.0), -2.0, 2.0
        )
    at = [stop for stop, _ in SHARE]
    channels = np.array([_rgb(colour) for _, colour in SHARE], dtype=float)
    return np.stack([np.interp(octaves, at, channels[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def share_scale() -> str:
    """The colour key of every load picture."""
    stops = ",".join(colour for _, colour in SHARE)
    names = "".join(f"<span>{name}</span>" for name in ("¼×", "½×", "fair share", "2×", "4×"))
    return f'<div class="scale"><div class="ramp" style="background:linear-gradient(90deg,{stops})"></div><div>{names}</div></div>'


def heat_grid(relative: np.ndarray, row_names: list[str], column_title: str) -> str:
    """Loads (rows, columns), relative to the fair share, as cells with their number."""
    rows, columns = relative.shape
    head = "<span></span>" + "".join(f'<span class="head">{e}</span>' for e in range(columns))
    body = []
    for r in range(rows):
        body.append(f'<span class="row-name">{escape(row_names[r])}</span>')
        for e, (value, colour) in enumerate(zip(relative[r], share_rgb(relative[r]), strict=True)):
            ink = "#fff" if colour @ (0.299, 0.587, 0.114) < 140 else "#2b2b2b"
            about = escape(f"{row_names[r]}, expert {e}: {value:.2f} times the fair share")
            style = f"background:{_hex(colour)};color:{ink}"
            body.append(f'<span class="cell" style="{style}" title="{about}"><b>{value:.1f}</b></span>')
    width = "wide" if columns > 10 else "narrow"
    return (
        f'<div class="heat" style="--columns:{columns}"><div class="grid-{width}">{head}{"".join(body)}</div>'
        f'<div class="x-title">{escape(column_title)}</div></div>'
    )


def heat_image(relative: np.ndarray, alt: str, height: int) -> str:
    """Loads (rows, columns), relative to the fair share, as a stretched PNG of one pixel a cell."""
    data = base64.b64encode(png(share_rgb(relative))).decode()
    return f'<img class="pixels" style="height:{height}px" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def png(pixels: np.ndarray) -> bytes:
    """PNG file of an (H, W, 3) uint8 array."""
    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + pixels[y].tobytes() for y in range(height))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal runs of points."""
    if len(xs) <= MAX_POINTS:
        return xs, ys
    groups = np.array_split(np.arange(len(xs)), MAX_POINTS)
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    means = [float(np.mean(y[g][np.isfinite(y[g])])) if np.isfinite(y[g]).any() else math.nan for g in groups]
    return [float(x[g].mean()) for g in groups], means


def _path(points: list[tuple[float, float]]) -> str:
    parts, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = True
    return "".join(parts) if len(parts) > 1 else ""


def _decimals(ticks: list[float]) -> int:
    return max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2


def _edge(x: float) -> str:
    return "first" if x < 30 else "last" if x > 970 else ""


def _blend(stops: list[tuple[float, str]], at: float) -> list[float]:
    positions = [position for position, _ in stops]
    return [float(np.interp(at, positions, [_rgb(colour)[c] for _, colour in stops])) for c in range(3)]


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _hex(rgb) -> str:
    return "#" + "".join(f"{round(float(c)):02x}" for c in rgb)
