"""The report: one self-contained HTML file that shows what a run learned and what its experts do.

    python -m eval.report runs/quickstart-sft          writes runs/quickstart-sft/report.html
    python -m eval.report runs/moe runs/dense          compares them (eval/compare.py): writes runs/compare-moe-dense.html

It reads files only and builds no model, so it takes seconds and works while a run is still going, on a dense run, and
on a run that lacks parts: what is not there is left out. A fine-tuned run's report shows its pretraining too. Nothing is
loaded from a network: pictures are drawn by eval/charts.py, and all text of models, configs and data is escaped.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import yaml

from eval.charts import PALETTE, Line, escape, line_chart, smooth
from eval.compare import write_comparison
from eval.curves import FLOPS, against_everything, held_out_curve
from eval.expert_pictures import final_load, load_over_training, router_curves, typical_tokens
from eval.facts import (
    best_source,
    ceiling,
    describe_device,
    describe_model,
    error_text,
    flops_of_token,
    is_share,
    model_config,
    parameters,
    score_text,
    tasks,
    wanted_steps,
)
from eval.history import Stage, finite, read_lineage
from eval.page import (
    DASH,
    count,
    details,
    document,
    duration,
    enumeration,
    figure,
    group_row,
    headline,
    is_number,
    number,
    pair,
    percent,
    row,
    section,
    spread,
    table,
    words,
)
from train import cli
from train.files import replace_file, without_home

MOST_CURVES = 24  # sources in one picture
SAMPLES_OF_FIRST_PROMPT, SAMPLES_OF_OTHERS = 6, 2


def write_report(run_dir: str | Path, out: Path | None = None) -> Path:
    """Writes the report (to RUN/report.html) and returns its path. Raises ValueError where run_dir is no run folder."""
    target = out or Path(run_dir) / "report.html"
    replace_file(target, render(read_lineage(run_dir)))
    return target


def render(stages: list[Stage]) -> str:
    """The page as text; `stages` oldest first, the last one is the run reported on."""
    run = stages[-1]
    body = [
        _headline(stages),
        section(
            "How good it is",
            "Measured on text that the model was never trained on.",
            [_held_out_table(stages), _task_table(run)],
        ),
        section(
            "How it learned",
            "The loss says how surprised the model is by the next token: lower is better.",
            [*(_loss_charts(stage, stages) for stage in stages), *(_other_axes(stage, stages) for stage in stages)],
        ),
        section(
            "What the experts do",
            "In a mixture of experts a small router sends every token to a few of the experts of each layer. Balanced use "
            "means that none is idle; a decided router means that the experts differ.",
            [final_load(stages), load_over_training(stages), router_curves(stages), typical_tokens(stages)],
        ),
        section(
            "What it writes", "", [*(_samples(stage) for stage in stages if not stage.is_chat), _conversations(run)]
        ),
        section(
            "How it was made", "", [_times(stages), _machine(run), *(_config(stage) for stage in reversed(stages))]
        ),
    ]
    return document(
        f"{run.name} · MiniMoE report", "".join(body), f"python -m eval.report {without_home(str(run.folder))}"
    )


# Parts of the page, from top to bottom. Each returns an empty text where the run has nothing to show.


def _headline(stages: list[Stage]) -> str:
    run, first = stages[-1], stages[0]
    model, seconds = model_config(run), sum(stage.seconds for stage in stages)

    names = [source["name"] for source in first.section("data").get("sources") or [] if "name" in source]
    story = f"{describe_model(run, model)}, trained on {count(first.tokens_seen)} tokens"
    story += f" of {enumeration(names)}" * bool(names)
    if len(stages) > 1:
        story += f", then fine-tuned on {count(run.tokens_seen)} tokens of {'conversations' if run.is_chat else 'further text'}"
    device = describe_device(run)
    story += f", in {duration(seconds)}" * bool(seconds) + f" on {device}" * bool(device) + "."

    tiles = []
    text_stage = next((stage for stage in reversed(stages) if not stage.is_chat), None)
    if text_stage and (best := best_source(text_stage)):
        tiles.append((number(best[1], 2), f"bits per byte on held-out {best[0]} (raw text takes 8)"))
    shares = [(name, task) for name, task in tasks(run).items() if is_share(task) and is_number(task.get("chance"))]
    for name, task in sorted(shares, key=lambda item: _baseline(item[1])[1] - item[1]["score"])[:2]:
        word, value = _baseline(task)
        tiles.append(
            (percent(task["score"]), f"{words(name)}, {task.get('n', 0):,} questions ({word}: {percent(value)})")
        )
    total, active = parameters(model)
    if total:
        tiles.append(
            (count(total), f"parameters, {count(active)} active for each token" if active < total else "parameters")
        )
    if seconds:
        compute = [flops * stage.tokens_seen for stage in stages if (flops := flops_of_token(stage))]
        text = f"of training, {sum(stage.last_step for stage in stages):,} optimizer steps"
        text += f", {FLOPS.text(sum(compute))}" if len(compute) == len(stages) and sum(compute) > 0 else ""
        tiles.append((duration(seconds), text))
    wanted, notices = wanted_steps(run), []
    if wanted and run.last_step < wanted:
        notices.append(f"{run.last_step:,} of {wanted:,} steps are done: the report shows how far the run is.")
    return headline("MiniMoE training report", run.name, story, notices, tiles)


def _baseline(task: dict) -> tuple[str, float]:
    """What a score is measured by: the best trivial answer, or chance where none is known."""
    trivial = task.get("trivial")
    return ("trivial", trivial) if is_number(trivial) else ("chance", task["chance"])


def _held_out_table(stages: list[Stage]) -> str:
    head = ("source", "bits per byte", "perplexity", "loss", "tokens")
    body = []
    for stage in stages:
        sources = stage.sources()
        if sources and len(stages) > 1:
            answers = "after fine-tuning, on the answers of conversations"
            body.append(group_row(answers if stage.is_chat else f"{stage.name}, on text", len(head)))
        for name, figures in sources.items():
            bits, perplexity, loss = figures.get("bits_per_byte"), figures.get("perplexity"), figures.get("loss")
            tokens = count(figures.get("tokens"))
            body.append(row(name, number(bits, 3), number(perplexity, 2), number(loss, 3), tokens, strong=0))
    return figure(
        "Held-out text",
        table(head, body) if body else "",
        "Bits per byte: how many bits the model needs for one byte of text it has never seen. Raw text takes 8. It does not "
        "depend on the tokenizer, so models can be compared by it. Perplexity: among how many equally likely tokens the "
        "model hesitates, on average.",
    )


def _task_table(run: Stage) -> str:
    body = []
    for name, task in tasks(run).items():
        share, marks = is_share(task), ""
        if share:
            known = [kind for kind in ("chance", "trivial") if is_number(task.get(kind))]
            marks = "".join(f'<u class="{kind}" style="left:{_clip(task[kind])}%"></u>' for kind in known)
        bar = f'<div class="bar"><i style="width:{_clip(task["score"])}%"></i>{marks}</div>' if share else ""
        cells = (
            ("", "", words(name), task.get("metric")),
            ("number strong", "", score_text(task), error_text(task)),
            ("number aside", "chance", _share_text(task, "chance"), ""),
            ("number aside", "trivial answer", _share_text(task, "trivial"), task.get("trivial_name")),
            ("number aside", "questions", f"{task.get('n', 0):,}", ""),
        )
        parts = [
            f'<td class="{kind}" data-label="{label}">{escape(text)}{f"<small>{escape(more)}</small>" if more else ""}</td>'
            for kind, label, text, more in cells
        ]
        body.append(f'<tr>{parts[0]}<td class="meter">{bar}</td>{"".join(parts[1:])}</tr>')
    if not body:
        return ""
    key = (
        '<div class="key"><span><i></i>score</span><span><u class="chance"></u>chance</span>'
        '<span><u class="trivial"></u>best trivial answer</span></div>'
    )
    numbers = "".join(f'<th class="number">{text}</th>' for text in ("score", "chance", "trivial", "questions"))
    return figure(
        "Tasks",
        f'{key}<table class="tasks"><thead><tr><th>task</th><th></th>{numbers}</tr></thead><tbody>{"".join(body)}</tbody></table>',
        "Our own tasks ask questions kept out of training, the others are those of the lm-evaluation-harness. A bar that ends "
        "right of both marks is something the model learned: chance is what guessing gets, the trivial answer is the best that "
        "needs no understanding. ± is one standard error.",
    )


def _share_text(task: dict, kind: str) -> str:
    value = task.get(kind)
    return percent(value) if is_share(task) and is_number(value) else DASH


def _loss_charts(stage: Stage, stages: list[Stage]) -> str:
    what = f" of {stage.name}" if len(stages) > 1 else ""
    x_range = (0.0, float(stage.last_step))
    steps, losses = [r["step"] for r in stage.train], finite([r.get("loss") for r in stage.train])
    held_steps = [r["step"] for r in stage.held_out]
    lines = [Line("training", steps, losses, PALETTE[0], width=2.2)]
    if len(steps) > 20:
        lines = [Line("training, each step logged", steps, losses, PALETTE[0], width=1.2, opacity=0.32)]
        lines.append(Line("training, smoothed", steps, smooth(losses, max(5, len(steps) // 30)), PALETTE[0], width=2.2))
    lines.append(Line("held-out", held_steps, finite([r.get("loss") for r in stage.held_out]), PALETTE[1], dots=True))
    lines = [line for line in lines if any(map(math.isfinite, line.ys))]
    top, start = ceiling(losses)
    tokens = stage.section("train").get("tokens_per_step")
    loss = figure(
        f"Loss{what}",
        line_chart(lines, y_range=(None, top), x_range=x_range, label=f"Loss{what}, nats per token, by optimizer step"),
        "Training loss is measured on what is being learned, held-out loss on text kept aside: while both fall together, "
        "the model learns what holds beyond its own text."
        + (f" One step is {tokens:,} tokens." if isinstance(tokens, int) else "")
        + (f" The start, from {start:.1f}, lies above the picture." if start else ""),
    )

    names = list(dict.fromkeys(name for r in stage.held_out for name in r.get("sources", {})))
    bits = [
        Line(
            name,
            held_steps,
            finite([r.get("sources", {}).get(name, {}).get("bits_per_byte") for r in stage.held_out]),
            dots=True,
        )
        for name in names
    ]
    for i, line in enumerate(bits):
        line.colour = PALETTE[i % len(PALETTE)]
    top, _ = ceiling([y for line in bits for y in line.ys]) if len(held_steps) > 4 else (None, None)
    by_source = figure(
        f"Bits per byte{what}",
        line_chart(bits, y_range=(None, top), x_range=x_range, label=f"Bits per byte{what} by optimizer step"),
        "How well each held-out text is predicted, in bits for each byte of it: the same scale for every text and tokenizer."
        + (" Here only the answers count." if stage.is_chat else ""),
    )
    return pair(loss, by_source)


def _other_axes(stage: Stage, stages: list[Stage]) -> str:
    """The held-out curves once more, in a drawer, by what they cost."""
    names = list(dict.fromkeys(name for row in stage.held_out for name in row.get("sources", {})))
    curves = [held_out_curve(name, stage, name, place) for place, name in enumerate(names[:MOST_CURVES])]
    content = against_everything(curves, "Bits per byte", "")
    what = f" of {stage.name}" if len(stages) > 1 else ""
    return details(f"Bits per byte{what} against tokens, compute and time", content) if content else ""


def _samples(stage: Stage) -> str:
    cards = []
    prompts = list(dict.fromkeys(r.get("prompt") or "" for r in stage.samples))
    for n, prompt in enumerate(prompts):
        rows = [r for r in stage.samples if (r.get("prompt") or "") == prompt]
        lines = [
            f'<div class="sample"><b>step {r["step"]:,}</b><p><span class="prompt">{escape(prompt)}</span>'
            f"{escape(r.get('text') or '')}</p></div>"
            for r in spread(rows, SAMPLES_OF_OTHERS if n else SAMPLES_OF_FIRST_PROMPT)
        ]
        cards.append(figure("", "".join(lines), ""))
    if not cards:
        return ""
    others = f"{len(cards) - 1} more {'prompt' if len(cards) == 2 else 'prompts'}"
    return (
        '<p class="intro">The same prompt (grey) continued at several moments of training.</p>'
        + cards[0]
        + (details(others, "".join(cards[1:])) if len(cards) > 1 else "")
    )


def _conversations(run: Stage) -> str:
    newest = {r.get("prompt") or "": r for r in run.samples} if run.is_chat else {}
    chats, more = [_chat(prompt, r.get("text") or "", "") for prompt, r in newest.items()], []
    for name, task in tasks(run).items():
        for n, example in enumerate(task.get("examples") or []):
            score, wanted = example.get("score") or 0, example.get("wanted", "")
            verdict = "right" if score == 1 else f"{percent(score) if score else 'not'} right, wanted: {wanted}"
            chat = _chat(example.get("question", ""), example.get("answer", ""), f"{words(name)}: {verdict}")
            (more if n else chats).append(chat)
    caption = "Answers of the model. Those with a remark are each task's first held-out question, not picked by hand."
    return figure("Conversations", "".join(chats), caption) + (details("More answers", "".join(more)) if more else "")


def _chat(question: object, answer: object, verdict: str) -> str:
    remark = f'<div class="verdict">{escape(verdict)}</div>' if verdict else ""
    return (
        f'<div class="chat"><div class="bubble user">{escape(question)}</div>'
        f'<div class="bubble model">{escape(answer) or "…"}</div>{remark}</div>'
    )


def _times(stages: list[Stage]) -> str:
    """What each stage took: as the quickstart measured it, otherwise training and evaluation as the folders know them."""
    work = []
    for stage, kind in zip(stages, ("pretrain", "sft") if len(stages) == 2 else [s.name for s in stages], strict=True):
        rates = [r["tokens_per_second"] for r in stage.train if is_number(r.get("tokens_per_second"))]
        speed = f", {count(float(np.median(rates)))} tokens/s" if rates else ""
        work.append((kind, stage, f"{stage.last_step:,} steps, {count(stage.tokens_seen)} tokens{speed}"))
    if measured := stages[-1].stages:
        done = {kind: text for kind, _, text in work}
        rows = [(name, seconds, done.get(name, "")) for name, seconds in measured.items()]
        rows.append(("together", sum(measured.values()), ""))
    else:
        rows = [(f"training {stage.name}", stage.seconds, text) for _, stage, text in work if stage.seconds]
        rows += [
            (f"evaluation of {s.name}", s.evaluation["seconds"], "") for s in stages if s.evaluation.get("seconds")
        ]
    body = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{duration(seconds)}</td><td class="note">{escape(text)}</td></tr>'
        for name, seconds, text in rows
    )
    return figure("Time of each stage", f'<table class="times"><tbody>{body}</tbody></table>' if body else "", "")


def _machine(run: Stage) -> str:
    facts = {"started": run.run.get("started"), **(run.run.get("machine") or {})}
    body = "".join(
        f"<tr><td>{escape(words(key))}</td><td>{escape(_plain(value))}</td></tr>"
        for key, value in facts.items()
        if value is not None
    )
    return figure("Machine", f'<table class="facts"><tbody>{body}</tbody></table>' if body else "", "")


def _config(stage: Stage) -> str:
    text = without_home(stage.config_text)
    return details(f"config.yaml of {stage.name}", f"<pre>{escape(text)}</pre>") if text else ""


# What the parts are made of.


def _plain(value: object) -> str:
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _clip(fraction: float) -> str:
    return f"{100 * min(1.0, max(0.0, fraction)):.2f}"


def main() -> int:
    parser = cli.parser(
        "Writes what a run learned and what its experts do as one HTML file; of several runs, a page that compares them.",
        "python -m eval.report runs/quickstart-sft              writes runs/quickstart-sft/report.html\n"
        "  python -m eval.report runs/moe runs/dense              writes runs/compare-moe-dense.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write the page")
    parser.add_argument(
        "--wandb", action="store_true", help="keep the page in each run's wandb run too, as an artifact"
    )
    options = parser.parse_args()
    if options.out is not None and (options.out.is_dir() or options.out.suffix.lower() not in (".html", ".htm")):
        raise ValueError(f"--out: {options.out} is no name of a page; give a file that ends with .html")
    if len(options.runs) == 1:
        page = write_report(options.runs[0], options.out)
    else:
        page = write_comparison(options.runs, options.out)
    print(page)
    if options.wandb:
        from train.trackers import publish

        for run in options.runs:
            print(publish(run, [page]))
    return 0


if __name__ == "__main__":
    cli.run(main)
