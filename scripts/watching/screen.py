"""What a person sees of a run: lines of text for a terminal of any size, the most important first."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from eval.history import finite
from scripts.watching.files import Watched
from scripts.watching.text import Piece, Style, bar, chart, clean, width, wrapped

OVERLOADED = 2.0  # times the fair share
CHART_ROWS, LOW_SCREEN = 4, 26  # a terminal with fewer rows gets a chart of one
SAMPLE_ROWS = 3  # of each sample
MOST_LAYERS = 64  # where the number of rows is free
LABEL = 11  # columns of the names on the left


def frame(run: Watched, style: Style, columns: int, rows: int | None) -> list[str]:
    """At most `rows` lines of at most `columns` columns (rows None: as many as it takes)."""
    low = rows is not None and rows < LOW_SCREEN
    lines = [*_head(run, style, columns), *_learning(run, style, columns, 1 if low else CHART_ROWS)]
    foot = _foot(run)
    left = (rows - len(lines) - len(foot)) if rows is not None else MOST_LAYERS + 1000
    experts = _experts(run, style, columns, max(0, min(MOST_LAYERS + 3, left - (6 if left > 12 else 0))))
    samples = _samples(run, columns, max(0, left - len(experts)))
    shown = [style.line(pieces, columns) for pieces in [*lines, *experts, *samples]]
    last = [style.line(pieces, columns) for pieces in foot]
    if rows is not None:
        shown = shown[: max(0, rows - len(last))]
    return [*shown, *last][:rows]


Line = Sequence[Piece]


def _head(run: Watched, style: Style, columns: int) -> list[Line]:
    state, about = _state(run)
    lines: list[Line] = [[(run.name, "bold"), ("  ", ""), state], *([(about, state[1])] for _ in range(bool(about)))]
    if run.steps:
        share = min(1.0, run.step / run.steps)
        text = f"step {run.step:,} of {run.steps:,}  "
        after = f"  {100 * share:.0f} %"
        if run.alive and (left := run.seconds_left):
            after += f"  about {_duration(left)} left"
        room = max(0, min(60, columns - len(text) - len(after)))
        lines.append([(text, ""), *bar(share, room, style.unicode), (after, "")])
    else:
        lines.append([(f"step {run.step:,}", "")])
    row = run.newest
    facts = [
        f"{_count(row['tokens'])} tokens" if "tokens" in row else "",
        f"{_duration(row['train_seconds'])} of training" if "train_seconds" in row else "",
        f"{_count(run.speed)} tokens/s" if run.speed else "",
        f"MFU {100 * row['mfu']:.1f} %" if "mfu" in row else "",
        f"{row['memory_gib']:.2f} GiB" if "memory_gib" in row else "",
    ]
    if any(facts):
        lines.append([(" · ".join(filter(None, facts)), "dim")])
    return lines


def _state(run: Watched) -> tuple[Piece, str]:
    """(in a word, more about it)."""
    process = f" (process {run.process})" if run.process else ""
    heard = (
        f"at {time.strftime('%H:%M:%S', time.localtime(run.heard_at))}, {_duration(run.silence)} ago"
        if run.heard_at
        else ""
    )
    if run.is_finished:
        return ("✓ finished", "green"), ""
    if run.stalled:
        usual = f", usually every {_duration(run.usual_pause)}" if run.usual_pause >= 1 else ""
        return (f"● running{process}, but silent", "yellow"), f"newest sign of life {heard}{usual}"
    if run.alive:
        return (f"● running{process}", "green"), ""
    if run.alive is None:
        return ("● running or not: this disk cannot tell", "yellow"), f"newest sign of life {heard}" if heard else ""
    if run.log and run.log[-1].startswith("stopped after"):
        return ("■ stopped", "yellow"), "the same command goes on from its newest checkpoint"
    if not run.heard_at:
        return ("■ not running", "yellow"), "nothing is trained yet"
    return ("✗ not running, not finished", "red"), f"newest sign of life {heard}; the same command goes on"


def _learning(run: Watched, style: Style, columns: int, rows: int) -> list[Line]:
    losses = finite(list(run.losses.values()))
    known = [loss for loss in losses if math.isfinite(loss)]
    lines: list[Line] = []
    if known:
        lines.append([])
        drawn, low, high = chart(losses, columns - LABEL - 1, rows, style.blocks)
        first, last = f"loss {losses[-1]:.4f}  ", f"from {known[0]:.2f}, lowest {min(known):.4f}"
        lines.append([(first, "bold"), (last, "dim")])
        edge = [f"{high:.2f}", *[""] * (len(drawn) - 2), f"{low:.2f}"] if len(drawn) > 1 else [""]
        lines += [[(f"{name:>{LABEL - 1}} ", "dim"), (text, "blue")] for name, text in zip(edge, drawn, strict=False)]
    if run.held_out:
        lines.append([("held-out", ""), ("   bits per byte", "dim")])
        lines += [[(text, "")] for text in _held_out(run)]
    row = run.newest
    facts = [
        f"learning rate {row['learning_rate']:.2e}" if "learning_rate" in row else "",
        f"gradient norm {row['grad_norm']:.3f}" if "grad_norm" in row else "",
    ]
    skipped = row.get("skipped_steps") or 0
    where = f" (the last: {run.skipped_at:,})" if skipped and run.skipped_at else ""
    line: list[Piece] = [(" · ".join(filter(None, facts)), "dim")]
    if "skipped_steps" in row:
        line.append((f" · {skipped:,} skipped steps{where}", "yellow" if skipped else "dim"))
    return [*lines, line] if any(text for text, _ in line) else lines


def _held_out(run: Watched) -> list[str]:
    """A line for each source: its newest bits per byte and its best."""
    by_source: dict[str, list[tuple[int, float]]] = {}
    for step, row in sorted(run.held_out.items()):
        for name, figures in row.get("sources", {}).items():
            if "bits_per_byte" in figures:
                by_source.setdefault(name, []).append((step, figures["bits_per_byte"]))
    widest = min(30, max(map(width, map(clean, by_source)), default=0))
    lines = []
    for name, found in by_source.items():
        step, bits = found[-1]
        best_step, best = min(found, key=lambda item: item[1])
        more = f"  best {best:.4f} at step {best_step:,}" if best_step != step else ""
        lines.append(f"  {clean(name)}{' ' * (widest - width(clean(name)))}  {bits:.4f} at step {step:,}{more}")
    return lines


def _experts(run: Watched, style: Style, columns: int, rows: int) -> list[Line]:
    """A line for each layer, a bar for each expert; where there is no room for all layers, the most uneven ones."""
    layers, load = run.load()
    if not layers or rows < 3:
        return []
    order = sorted(range(len(layers)), key=lambda i: -max(load[i]))[: rows - 2]
    more = len(layers) - len(order)
    if more:
        order = order[:-1]
        more += 1
    full = style.blocks[-1]
    legend = f"experts    load of each, from none ({style.blocks[1]}) to twice its fair share ({full}); × is dead"
    lines: list[Line] = [[], [(legend, "dim")]]
    for i in sorted(order):
        dead = [e for e, share in enumerate(load[i]) if share == 0]
        over = [e for e, share in enumerate(load[i]) if share > OVERLOADED]
        busiest = max(range(len(load[i])), key=load[i].__getitem__)
        words: list[Piece] = [(f"  busiest {busiest}: {load[i][busiest]:.1f}×", "yellow" if over else "dim")]
        if dead:
            named = ", ".join(map(str, dead[:4])) + (", …" if len(dead) > 4 else "")
            words.append((f"  {len(dead)} dead: {named}", "red"))
        room = max(4, columns - LABEL - sum(width(text) for text, _ in words))
        lines.append([(f"layer {layers[i]}".ljust(LABEL), ""), *_bars(load[i], room, style), *words])
    if more:
        lines.append([(f"and {more} layers that are more even", "dim")])
    return lines


def _bars(load: list[float], room: int, style: Style) -> list[Piece]:
    """A bar for each expert, two columns wide where there is room, or for the mean of a few neighbours where there is none."""
    wide = 3 * len(load) <= room
    size = 1 if wide else -(-len(load) // room)
    pieces = []
    for start in range(0, len(load), size):
        some = load[start : start + size]
        share, last = sum(some) / len(some), len(style.blocks) - 1
        block, colour = style.blocks[max(1, min(last, 1 + int(4 * share)))], "green"
        if max(some) == 0:
            block, colour = "×", "red"
        elif max(some) > OVERLOADED:
            colour = "yellow"
        pieces.append((f"{block * 2} " if wide else block, colour))
    return pieces


def _samples(run: Watched, columns: int, rows: int) -> list[Line]:
    lines: list[Line] = [[], [(f"sample at step {run.samples[0]['step']:,}", "dim")]] if run.samples else []
    for sample in run.samples:
        room = min(SAMPLE_ROWS, rows - len(lines))
        if room < 1:
            break
        prompt, answer = clean(sample.get("prompt", "")), clean(sample.get("text", ""))
        text = wrapped(f"{prompt} → {answer.strip()}", columns - 2, room)
        grey = len(prompt) + 2 if text[0].startswith(f"{prompt} →") else 0
        lines.append([("  ", ""), (text[0][:grey], "dim"), (text[0][grey:], "")])
        lines += [[(f"  {line}", "")] for line in text[1:]]
    return lines if len(lines) > 2 else []


def _foot(run: Watched) -> list[Line]:
    """The log's last words where there are no numbers yet, or no more."""
    if run.alive and run.newest:
        return [[], [(f"newest row {_duration(run.silence)} ago; Ctrl-C ends this view, not the training", "dim")]]
    return [[], *([(clean(line), "dim")] for line in run.log[-1 if run.is_finished else -3 :])] if run.log else []


def _count(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    seconds = round(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
