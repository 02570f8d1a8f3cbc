"""The tables of a comparison, a column for each run: quality, quality at equal cost, tasks, cost, balance of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.curves import AXES, FLOPS, STEPS, Axis, Curve
from eval.facts import (
    balance,
    error_text,
    flops_of_token,
    is_share,
    memory_gib,
    model_config,
    parameters,
    score_text,
    skipped_steps,
    speed,
    tasks,
)
from eval.history import Stage
from eval.page import DASH, Cell, count, duration, figure, is_number, number, percent, run_tables, words

AFTER = {"steps": "steps", "tokens": "tokens"}  # other axes say their unit


def held_out_table(stages: Sequence[Stage], names: Sequence[str]) -> str:
    """Bits per byte and perplexity of every held-out source."""
    rows = []
    sources = list(dict.fromkeys(source for stage in stages for source in stage.sources()))
    for key, decimals, title in (("bits_per_byte", 3, "bits per byte"), ("perplexity", 2, "perplexity")):
        group = []
        for source in sources:
            values = [stage.sources().get(source, {}).get(key) for stage in stages]
            if any(map(is_number, values)):
                group.append((source, compared(values, decimals)))
        rows += [(title, None), *group] if group else []
    return figure(
        "Held-out text",
        run_tables(names, rows),
        "Bits per byte: how many bits the model needs for one byte of text it has never seen; raw text takes 8. Another random "
        "seed alone moves it by some thousandths: differences of that size need several seeds.",
    )


def equal_cost_table(curves: Sequence[Curve], names: Sequence[str], source: str) -> str:
    """The runs at the same number of tokens, operations and seconds, and what each needs for the same quality."""
    known = [curve for curve in curves if curve.against(STEPS)[0]]
    if len(known) < 2:
        return ""
    rows: list = [("bits per byte", None)]
    for axis in AXES:
        ends = [xs[-1] for curve in known if (xs := curve.against(axis)[0])]
        if len(ends) == len(known) and (common := min(ends)) > 0:
            values = [curve.at(common, axis) for curve in curves]
            rows.append((f"after {axis.text(common)} {AFTER.get(axis.name, '')}".rstrip(), compared(values, 3)))
    goal = max(curve.against(STEPS)[1][-1] for curve in known)
    rows.append((f"needed for {goal:.3f} bits per byte", None))
    for axis in AXES:
        values = [curve.first_at_or_below(goal, axis) for curve in curves]
        if any(map(math.isfinite, values)):
            rows.append((axis.title, _needs(values, axis)))
    return figure(
        f"At equal cost, on held-out {source}",
        run_tables(names, rows),
        "Read off the curves below, which are measured while training (on eval.max_tokens of the text), between two "
        "evaluations along a straight line. A run that is measured before its end has "
        "not yet lowered its learning rate, and would do better if it had been planned for that length. The quality asked for "
        "in the lower part is that with which the last of them ended. × is relative to the first run.",
    )


def _needs(values: Sequence[float], axis: Axis) -> list[Cell]:
    finite = {value for value in values if math.isfinite(value)}
    first, least = values[0], min(finite) if len(finite) > 1 else math.nan
    cells = []
    for i, value in enumerate(values):
        if not math.isfinite(value):
            cells.append(Cell(DASH))
            continue
        ratio = f"{value / first:.2f}×" if i and math.isfinite(first) and first > 0 else ""
        cells.append(Cell(axis.text(value), ratio, value == least))
    return cells


def compared(values: Sequence[object], decimals: int) -> list[Cell]:
    """Numbers with their differences from the first one; the lowest stands out."""
    good = [value for value in values if is_number(value)]
    best = min(good, default=None)
    cells = []
    for i, value in enumerate(values):
        difference = ""
        if i and is_number(value) and is_number(values[0]):
            difference = f"{value - values[0]:+,.{decimals}f}".replace("-", "−")
        stands_out = is_number(value) and len(set(good)) > 1 and f"{value:.{decimals}f}" == f"{best:.{decimals}f}"
        cells.append(Cell(number(value, decimals), difference, stands_out))
    return cells


def task_table(stages: Sequence[Stage], names: Sequence[str]) -> str:
    """Scores of every task that one of the runs was asked."""
    found = [tasks(stage) for stage in stages]
    rows = []
    for task in dict.fromkeys(name for each in found for name in each):
        of_runs = [each.get(task) for each in found]
        known = [t for t in of_runs if t]
        cells = [Cell(score_text(t), error_text(t), _is_ahead(t, known)) if t else Cell(DASH) for t in of_runs]
        share = next((t for t in known if is_share(t)), {})
        floors = [f"{by} {percent(share[by])}" for by in ("chance", "trivial") if is_number(share.get(by))]
        note = ", ".join(floors) or known[0].get("metric", "")
        rows.append(((words(task), note), cells))
    return figure(
        "Tasks",
        run_tables(names, rows),
        "Scores with one standard error (±). One stands out where it is ahead of all others by more than two standard errors of "
        "the difference. Chance is what guessing gets; trivial, the best answer that needs no understanding.",
    )


def _is_ahead(task: dict, all_runs: Sequence[dict]) -> bool:
    sign = -1 if task.get("higher_is_better") is False else 1
    others = [other for other in all_runs if other is not task]
    doubt = task.get("standard_error") or 0.0
    leads = [
        (sign * (task["score"] - other["score"]), math.hypot(doubt, other.get("standard_error") or 0.0))
        for other in others
    ]
    return bool(leads) and all(lead > 2 * error for lead, error in leads)


def cost_table(stages: Sequence[Stage], names: Sequence[str]) -> str:
    """Size of the models, and what training them took."""
    models = [model_config(stage) for stage in stages]
    each = [flops_of_token(stage) for stage in stages]
    compute = [flops * stage.tokens_seen if flops else None for flops, stage in zip(each, stages, strict=True)]
    rows: list = [("model", None)]
    rows.append(("parameters", [Cell(count(parameters(model)[0])) for model in models]))
    rows.append(("active for a token", [Cell(count(parameters(model)[1])) for model in models]))
    rows.append(
        (
            "operations per token",
            [Cell(FLOPS.text(flops) if flops else DASH) for flops in each],
        )
    )
    rows.append(("training", None))
    rows.append(("steps", [Cell(f"{stage.last_step:,}") for stage in stages]))
    rows.append(("tokens", [Cell(count(stage.tokens_seen)) for stage in stages]))
    rows.append(("operations", [Cell(FLOPS.text(flops) if flops else DASH) for flops in compute]))
    rows.append(("time", [Cell(duration(stage.seconds) if stage.seconds else DASH) for stage in stages]))
    rows.append(("tokens per second", _fastest([speed(stage) for stage in stages])))
    rows.append(("memory, GiB", [Cell(number(memory_gib(stage), 2)) for stage in stages]))
    rows.append(("skipped steps", [Cell(number(skipped_steps(stage), 0)) for stage in stages]))
    rows.append(("started from", [Cell(str(stage.section("train").get("init_from") or DASH)) for stage in stages]))
    rows = [row for row in rows if row[1] is None or any(cell.text != DASH for cell in row[1])]
    return figure(
        "Size, compute and speed",
        run_tables(names, rows),
        "Time is that of training alone, without evaluations and checkpoints; memory is the peak of one process. Operations "
        "are those of forward and backward pass (model/flops.py).",
    )


def _fastest(values: Sequence[float | None]) -> list[Cell]:
    first = values[0]
    return [
        Cell(count(value), f"{value / first:.2f}×" if i and value and first else "") for i, value in enumerate(values)
    ]


def balance_table(stages: Sequence[Stage], names: Sequence[str]) -> str:
    """How evenly the experts of each run are used; nothing where all runs are dense."""
    found = [balance(stage) for stage in stages]
    if not any(found):
        return ""
    models = [model_config(stage) for stage in stages]

    def cells(text) -> list[Cell]:
        return [Cell(text(load)) if load else Cell(DASH) for load in found]

    rows = [
        ("experts in a layer", cells(lambda load: str(load.load.shape[1]))),
        ("at work on a token", [Cell(str(m.num_experts_per_tok) if m and m.moe_layers else DASH) for m in models]),
        ("busiest expert, mean of layers", cells(lambda load: f"{1 + load.max_vio.mean():.2f}× its share")),
        ("busiest expert of all", cells(lambda load: f"{1 + load.max_vio.max():.2f}× its share")),
        ("experts without a token", cells(lambda load: f"{load.dead} of {load.load.size}")),
        ("measured", cells(lambda load: load.where)),
    ]
    return figure("Balance", run_tables(names, rows), "")
