"""What the experts do, as the report shows it: load now and over training, the routers' decidedness, typical tokens."""

from __future__ import annotations

import math

import numpy as np

from eval.charts import (
    Line,
    depth_colours,
    escape,
    heat_grid,
    heat_image,
    legend,
    line_chart,
    share_scale,
    smooth,
)
from eval.facts import Balance, balance, measured_on, routing_shape
from eval.history import Stage, finite
from eval.page import details, figure, pair

MAX_GRID_EXPERTS = 32  # above, the final load is a picture without numbers
MAX_COLUMNS = 240  # of a load-over-training picture
MAX_LISTED_EXPERTS = 32  # of a layer's typical-token list
MAX_LISTED_LAYERS = 8  # with a name of their own in a legend


def final_load(stages: list[Stage]) -> str:
    """Layer x expert, of the last run that has any."""
    found = next((load for stage in reversed(stages) if (load := balance(stage))), None)
    if found is None:
        return ""
    caption = (
        f"Each cell is one expert: 1.0 means that it gets its fair share of the tokens (one in {found.load.shape[1]} of the "
        "choices). Orange experts are busier, blue ones idler."
    )
    return load_figure(found, f"Load of every expert {found.where}", caption)


def load_figure(load: Balance, title: str, caption: str) -> str:
    """A card with layer x expert; `caption` is followed by what is seen here."""
    layers, relative = load.layers, load.relative
    n_experts = relative.shape[1]
    if n_experts <= MAX_GRID_EXPERTS:
        picture = heat_grid(relative, [f"layer {layer}" for layer in layers], "expert")
    else:
        axes = f"experts 0 to {n_experts - 1}, left to right; layers {layers[0]} to {layers[-1]}, top to bottom"
        picture = heat_image(relative, f"Load of {axes}", max(60, 22 * len(layers)))
        picture += f'<div class="x-title">{axes}</div>'
    verdict = "every expert is in use" if not load.dead else f"{load.dead} of {load.load.size} experts got no token"
    busiest = f"the busiest takes {relative.max():.1f} times its share"
    return figure(title, share_scale() + picture, f"{caption} Here {verdict}; {busiest}.")


def load_over_training(stages: list[Stage]) -> str:
    """A picture per layer, expert x step; a fine-tuned run's pretraining stands left of it."""
    parts = _routed(stages)
    rows = [(offset + row["step"], row["routing"]) for offset, rows in parts for row in rows]
    if len(rows) < 2:
        return ""
    steps = np.array([step for step, _ in rows], dtype=float)
    load = np.array([routing["load"] for _, routing in rows], dtype=float)  # (rows, L, E)
    layers, n_experts = rows[-1][1]["layers"], load.shape[2]
    columns = np.linspace(steps[0], steps[-1], min(MAX_COLUMNS, len(steps)))
    nearest = np.abs(steps[None, :] - columns[:, None]).argmin(1)
    border = parts[1][0] if len(parts) > 1 else None
    divider = ""
    if border is not None:
        at = 100 * (border - steps[0]) / (steps[-1] - steps[0])
        divider = f'<div class="divider" style="left:{at:.2f}%"></div>'
    height = min(160, max(64, 8 * n_experts))
    ends = f'<div class="steps"><span>step {steps[0]:,.0f}</span><span>{steps[-1]:,.0f}</span></div>'
    pictures = []
    for i, layer in enumerate(layers):
        image = heat_image((load[nearest, i] * n_experts).T, f"Load of layer {layer}'s experts over training", height)
        numbers = f'<div class="experts"><span>0</span><span>{n_experts - 1}</span></div>'
        pictures.append(
            f'<div class="multiple"><b>layer {layer}</b><div class="picture">{numbers}{image}{divider}</div>{ends}</div>'
        )
    two = " two" if len(pictures) in (2, 4) else ""
    return figure(
        "Load while training",
        share_scale() + f'<div class="multiples{two}">{"".join(pictures)}</div>',
        "One picture a layer, one line an expert, time from left to right: coloured stripes are experts that the router "
        "prefers or neglects, paper-white means that all carry their share."
        + (f" The black line is where fine-tuning starts, after step {border:,}." if border is not None else ""),
    )


def router_curves(stages: list[Stage]) -> str:
    """Router entropy and MaxVio of every layer over training."""
    parts = _routed(stages)
    if not parts:
        return ""
    newest = parts[-1][1][-1]["routing"]
    layers, n_experts = newest["layers"], len(newest["load"][0])
    colours = depth_colours(len(layers))
    marks = tuple((float(offset), "fine-tuning") for offset, _ in parts[1:])
    x_range = (0.0, float(parts[-1][0] + parts[-1][1][-1]["step"]))

    def chart(key: str, scale: float, y_range: tuple[float | None, float | None], label: str) -> str:
        lines = []
        for offset, rows in parts:  # a line of its own for each stage: nothing is smoothed or drawn across the border
            steps, lists = [offset + row["step"] for row in rows], [row["routing"].get(key) or [] for row in rows]
            for i, layer in enumerate(layers):
                values = [scale * v for v in finite([v[i] if i < len(v) else None for v in lists])]
                values = smooth(values, len(values) // 40) if len(values) > 40 else values
                lines.append(Line(f"layer {layer}", steps, values, colours[i], legend=False))
        return line_chart(lines, y_range=y_range, x_range=x_range, marks=marks, height=210, label=label)

    entropy = chart("router_entropy", 1 / math.log(max(2, n_experts)), (0.0, 1.0), "Router entropy by optimizer step")
    violation = chart("max_vio", 1.0, (0.0, None), "MaxVio by optimizer step")
    names = [(f"layer {layer}", colour, 1.0, "") for layer, colour in zip(layers, colours, strict=True)]
    if len(names) > MAX_LISTED_LAYERS:
        names = [names[0], ("…", names[len(names) // 2][1], 1.0, ""), names[-1]]
    return pair(
        figure(
            "How decided the router is",
            legend(names) + entropy if entropy else "",
            "Router entropy of a token, as a fraction of the largest possible: 1 is a router that likes all experts "
            "equally, 0 one that is certain.",
        ),
        figure(
            "How uneven the load is",
            legend(names) + violation if violation else "",
            "MaxVio: how far the busiest expert of a layer lies above its fair share. 0 is perfect balance, 1 means twice "
            "the share.",
        ),
    )


def typical_tokens(stages: list[Stage]) -> str:
    """The tokens each expert is favoured by, a drawer per layer."""
    stage = next((s for s in reversed(stages) if has_typical_tokens(s)), None)
    if stage is None:
        return ""
    return (
        '<h3 class="alone">What each expert learned</h3><p class="intro">The tokens that most favour an expert, on '
        f"{measured_on(stage)}: 3.0× means that the expert gets this token three times as often as an average token. "
        f"A pale dot is a space.</p>{token_drawers(stage)}"
    )


def has_typical_tokens(stage: Stage) -> bool:
    """Whether the run was evaluated as a MoE."""
    return bool((stage.evaluation.get("routing") or {}).get("typical_tokens"))


def token_drawers(stage: Stage) -> str:
    """Layer by layer, the one in the middle open."""
    routing = stage.evaluation["routing"]
    drawers = []
    for i, (layer, experts) in enumerate(zip(routing["layers"], routing["typical_tokens"], strict=True)):
        lines = []
        for e, tokens in enumerate(experts[:MAX_LISTED_EXPERTS]):
            chips = "".join(f"<span>{_visible(t['token'])} <small>{t['lift']:.1f}×</small></span>" for t in tokens)
            chips = chips or "<small>no token stands out</small>"
            lines.append(f'<div class="expert"><b>expert {e}</b><div class="chips">{chips}</div></div>')
        if len(experts) > MAX_LISTED_EXPERTS:
            lines.append(f"<p><small>and {len(experts) - MAX_LISTED_EXPERTS} experts more</small></p>")
        drawers.append(details(f"layer {layer}", "".join(lines), opened=i == len(routing["layers"]) // 2))
    return "".join(drawers)


def _routed(stages: list[Stage]) -> list[tuple[int, list[dict]]]:
    """(step offset, rows with routing) of each stage, on one line of time; stages of another shape than the last left out."""
    with_routing = [[row for row in stage.train if row.get("routing")] for stage in stages]
    last = next((rows[-1]["routing"] for rows in reversed(with_routing) if rows), None)
    parts, offset = [], 0
    for stage, rows in zip(stages, with_routing, strict=True):
        rows = [row for row in rows if routing_shape(row["routing"]) == routing_shape(last)]
        if rows:
            parts.append((offset, rows))
            offset += stage.last_step
    return parts


def _visible(token: str) -> str:
    """A token as HTML in which white space can be seen."""
    return escape(token).replace(" ", "<i>·</i>").replace("\n", "<i>↵</i>").replace("\t", "<i>⇥</i>")
