"""Several runs on one page, a MoE beside its dense twin: which is better, at what cost, and what differs.

    python -m eval.report runs/moe runs/dense [...]        writes runs/compare-moe-dense.html

Like the report of one run it reads files only, runs nothing and escapes every text. Bits per byte on the same held-out text
can be compared whatever the tokenizer; losses per token, tokens and seconds only under conditions that the page names where
they do not hold. What a run started from is not counted: the curves show each run's own training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.charts import escape, legend, run_look, swatch
from eval.compare_tables import balance_table, cost_table, equal_cost_table, held_out_table, task_table
from eval.config_differences import config_differences
from eval.curves import (
    TOKENS,
    Curve,
    against_everything,
    chart,
    held_out_curve,
    training_curve,
)
from eval.expert_pictures import has_typical_tokens, load_figure, load_over_training, token_drawers
from eval.facts import (
    balance,
    best_source,
    describe_device,
    describe_model,
    model_config,
    routing_shape,
    wanted_steps,
)
from eval.history import Stage, finite, read_stage
from eval.page import (
    details,
    document,
    enumeration,
    figure,
    headline,
    is_number,
    pair,
    section,
)
from train.files import replace_file, without_home

MOST_RUNS = 24  # as many as there are colours and dashes to tell them apart
NAMES_IN_TITLE = 4
MOST_PROMPTS, LONGEST_SAMPLE = 6, 600  # characters
LONGEST_FILE_NAME = 80  # characters; above, the page is named by the number of runs


def write_comparison(run_dirs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Writes the page (beside the first run, as compare-NAME-NAME.html) and returns its path.

    ValueError where one is no run folder, where one is given twice, or where there are more than MOST_RUNS.
    """
    folders = [Path(run) for run in run_dirs]
    for i, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:i]):
            raise ValueError(f"{folder}: this run is given twice; give each once")
    if len(folders) > MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are more than the {MOST_RUNS} that one page can tell apart; give fewer")
    stages = [read_stage(folder) for folder in folders]
    target = out or default_path(folders)
    replace_file(target, render(stages))
    return target


def default_path(folders: Sequence[Path]) -> Path:
    """compare-NAME-NAME.html beside the first run."""
    name = "-".join(folder.resolve().name for folder in folders)
    if len(name) > LONGEST_FILE_NAME:
        name = f"{folders[0].resolve().name[:LONGEST_FILE_NAME]}-and-{len(folders) - 1}-more"
    parent = folders[0].resolve().parent if folders[0].name in ("", "..") else folders[0].parent
    return parent / f"compare-{name}.html"


def render(stages: Sequence[Stage]) -> str:
    """The page as text, runs in the order given."""
    names = labels(stages)
    source = common_source(stages)
    curves = [held_out_curve(name, stage, source, i) for i, (name, stage) in enumerate(zip(names, stages, strict=True))]
    training = [training_curve(name, stage, i) for i, (name, stage) in enumerate(zip(names, stages, strict=True))]
    body = [
        _headline(stages, names, source),
        section(
            "Which is better",
            "Measured on text that none of the models was trained on. The best of each row stands out; small figures are "
            "differences from the first run.",
            [held_out_table(stages, names), equal_cost_table(curves, names, source), task_table(stages, names)],
        ),
        section("What it cost", "", [cost_table(stages, names)]),
        section(
            f"How they learned: held-out {source}" if source else "",
            "Bits per byte on held-out text, lower is better. Which curve lies lower depends on what is counted: a mixture of "
            "experts is best judged against operations and time.",
            [against_everything(curves, "Bits per byte", ""), _other_sources(stages, names, source)],
        ),
        section(
            "How they learned: training loss",
            "Nats per token, smoothed. Losses of runs with different tokenizers cannot be compared.",
            [against_everything(training, "Training loss", "")],
        ),
        section(
            "What the experts do",
            "A router sends every token to a few experts of each layer. Balanced use means that none is idle.",
            [
                balance_table(stages, names),
                _loads(stages, names),
                _router_curves(stages, names),
                _drawers(stages, names),
            ],
        ),
        section("What they write", "The newest sample of each, for the prompts they share.", [_samples(stages, names)]),
        section("What differs", "", [config_differences(stages, names)]),
    ]
    command = f"python -m eval.report {' '.join(without_home(str(stage.folder)) for stage in stages)}"
    return document(f"{enumeration(names)} · MiniMoE comparison", "".join(body), command)


def labels(stages: Sequence[Stage]) -> list[str]:
    """A name for each run that no other has: its own, or the end of its path where two are equal."""
    names = [stage.name for stage in stages]
    parts = [stage.folder.resolve().parts for stage in stages]
    found = []
    for i, name in enumerate(names):
        same = [j for j, other in enumerate(names) if other == name]
        n = next((n for n in range(1, len(parts[i])) if sum(parts[j][-n:] == parts[i][-n:] for j in same) == 1), 0)
        place = without_home(str(Path(*parts[i][-n:])))
        found.append(name if len(same) == 1 else place if place.endswith(name) else f"{name} ({place})")
    return found


def common_source(stages: Sequence[Stage]) -> str:
    """The held-out source by which the runs are compared: one that most of them have, the first run's best_source if that is one."""
    times = Counter(name for stage in stages for name in _measured(stage))
    wanted, most = (best_source(stages[0]) or ("",))[0], max(times.values(), default=0)
    return wanted if most and times[wanted] == most else next((name for name, n in times.items() if n == most), "")


def _measured(stage: Stage) -> list[str]:
    """Names of sources with bits per byte, while training or after."""
    rows = [row.get("sources", {}) for row in stage.held_out] + [stage.sources()]
    return list(
        dict.fromkeys(name for row in reversed(rows) for name, f in row.items() if is_number(f.get("bits_per_byte")))
    )


def notices(stages: Sequence[Stage], names: Sequence[str]) -> list[str]:
    """What a reader must know before believing a difference."""
    found = []
    for stage, name in zip(stages, names, strict=True):
        wanted, measured_at = wanted_steps(stage), stage.evaluation.get("step")
        if wanted and stage.last_step < wanted:
            found.append(f"{name} is not finished: {stage.last_step:,} of {wanted:,} steps.")
        if is_number(measured_at) and measured_at < stage.last_step:
            found.append(
                f"{name} was evaluated at step {measured_at:,}, and has trained up to step {stage.last_step:,} since."
            )
    source = common_source(stages)
    if lacking := [
        name for name, stage in zip(names, stages, strict=True) if source and source not in _measured(stage)
    ]:
        found.append(f"Not measured on held-out {source}: {enumeration(lacking)}.")
    texts, counts = {}, {}
    for stage in stages:
        for source, figures in stage.sources().items():
            if is_number(figures.get("bytes")) and is_number(figures.get("tokens")):
                texts.setdefault(source, set()).add(figures["bytes"])
                counts.setdefault((source, figures["bytes"]), set()).add(figures["tokens"])
    for source, sizes in texts.items():
        if len(sizes) > 1:
            shown = enumeration([f"{size:,.0f}" for size in sorted(sizes)])
            found.append(
                f"Held-out {source} is not the same text for all of them ({shown} bytes): evaluate each with eval.evaluate, on "
                "the same data, before comparing."
            )
    if any(len(tokens) > 1 for tokens in counts.values()):
        found.append(
            "The same held-out text has different numbers of tokens: the tokenizers or context lengths differ, so losses and "
            "perplexities per token cannot be compared; bits per byte can."
        )
    devices = {describe_device(stage) for stage in stages} - {""}
    if len(devices) > 1:
        found.append(
            f"They were trained on different machines ({enumeration(sorted(devices))}): compare no times or speeds."
        )
    return found


# Parts of the page, from top to bottom. Each returns an empty text where no run has anything to show.


def _headline(stages: Sequence[Stage], names: Sequence[str], source: str) -> str:
    story = "Side by side" if len(stages) > NAMES_IN_TITLE else f"{len(stages)} runs side by side"
    best = {n: bits for n, s in zip(names, stages, strict=True) if (bits := _final_bits(s, source)) is not None}
    if len(best) > 1:
        first, second = sorted(best, key=best.__getitem__)[:2]
        story += f". On held-out {source}, {first} is best with {best[first]:.3f} bits per byte"
        story += f", {best[second] - best[first]:.3f} less than {second}"
    cards = []
    for i, (stage, name) in enumerate(zip(stages, names, strict=True)):
        colour, dash = run_look(i)
        text = describe_model(stage, model_config(stage))
        cards.append(f"<li>{swatch(colour, 1.0, dash)}<b>{escape(name)}</b><span>{escape(text)}</span></li>")
    title = enumeration(names) if len(names) <= NAMES_IN_TITLE else f"{len(names)} runs compared"
    top = headline("MiniMoE comparison", title, f"{story}.", notices(stages, names), [])
    return f'{top}<ul class="runs">{"".join(cards)}</ul>'


def _final_bits(stage: Stage, source: str) -> float | None:
    value = stage.sources().get(source, {}).get("bits_per_byte")
    return value if is_number(value) else None


def _other_sources(stages: Sequence[Stage], names: Sequence[str], source: str) -> str:
    others = [name for name in dict.fromkeys(n for stage in stages for n in _measured(stage)) if name != source]
    cards = []
    for other in others[:MOST_RUNS]:
        curves = [
            held_out_curve(name, stage, other, i) for i, (name, stage) in enumerate(zip(names, stages, strict=True))
        ]
        cards.append(figure(other, chart(curves, TOKENS, f"Bits per byte of {other} against tokens"), ""))
    content = "".join(pair(*cards[i : i + 2]) for i in range(0, len(cards), 2))
    return details("The other held-out texts", _key(names) + content) if content else ""


def _loads(stages: Sequence[Stage], names: Sequence[str]) -> str:
    found = [(name, load) for name, stage in zip(names, stages, strict=True) if (load := balance(stage))]
    cards = [load_figure(load, name, f"Load of every expert {load.where}.") for name, load in found]
    return "".join(pair(*cards[i : i + 2]) for i in range(0, len(cards), 2))


def _router_curves(stages: Sequence[Stage], names: Sequence[str]) -> str:
    uneven, decided = [], []
    for i, (name, stage) in enumerate(zip(names, stages, strict=True)):
        rows = [row for row in stage.train if row.get("routing")]
        rows = [row for row in rows if routing_shape(row["routing"]) == routing_shape(rows[-1]["routing"])]
        if rows:
            n_experts = len(rows[0]["routing"]["load"][0])
            uneven.append(Curve(name, stage, rows, [_mean(row["routing"].get("max_vio")) for row in rows], i))
            largest = math.log(max(2, n_experts))
            entropies = [_mean(row["routing"].get("router_entropy")) / largest for row in rows]
            decided.append(Curve(name, stage, rows, entropies, i))
    return _key(names, uneven) + pair(
        figure(
            "How uneven the load is",
            chart(uneven, TOKENS, "MaxVio against tokens") if uneven else "",
            "MaxVio, mean of the layers: how far the busiest expert lies above its fair share. 0 is perfect balance, 1 twice the "
            "share.",
        ),
        figure(
            "How decided the router is",
            chart(decided, TOKENS, "Router entropy against tokens") if decided else "",
            "Router entropy of a token, mean of the layers, as a fraction of the largest possible: 1 likes all experts equally, "
            "0 is certain.",
        ),
    )


def _mean(values: object) -> float:
    good = [v for v in finite(values) if math.isfinite(v)] if isinstance(values, list) else []
    return float(np.mean(good)) if good else math.nan


def _key(names: Sequence[str], curves: Sequence[Curve] | None = None) -> str:
    """Which colour is which run."""
    places = range(len(names)) if curves is None else [curve.place for curve in curves]
    return legend([(names[i], run_look(i)[0], 1.0, run_look(i)[1]) for i in places]) if len(places) > 1 else ""


def _drawers(stages: Sequence[Stage], names: Sequence[str]) -> str:
    parts = []
    for name, stage in zip(names, stages, strict=True):
        if content := load_over_training([stage]):
            parts.append(details(f"{name}: load while training", content))
        if has_typical_tokens(stage):
            intro = '<p class="intro">Times as often as an average token: 3.0× is a token that the expert gets three times as often.</p>'
            parts.append(details(f"{name}: the tokens that most favour each expert", intro + token_drawers(stage)))
    return "".join(parts)


def _samples(stages: Sequence[Stage], names: Sequence[str]) -> str:
    newest = [{row["prompt"]: row for row in stage.samples if row.get("prompt")} for stage in stages]
    shared = [
        prompt for prompt in dict.fromkeys(p for each in newest for p in each) if sum(prompt in e for e in newest) > 1
    ]
    cards = []
    for prompt in shared[:MOST_PROMPTS]:
        lines = []
        for i, (name, rows) in enumerate(zip(names, newest, strict=True)):
            if sample := rows.get(prompt):
                text = sample.get("text") or "…"
                text = text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} …"
                who = (
                    f"{swatch(run_look(i)[0], 1.0, run_look(i)[1])}{escape(name)}<small>step {sample['step']:,}</small>"
                )
                lines.append(f'<div class="sample"><b>{who}</b><p>{escape(text)}</p></div>')
        cards.append(figure("", f'<p class="asked">{escape(prompt)}</p>{"".join(lines)}', ""))
    return "".join(cards)
