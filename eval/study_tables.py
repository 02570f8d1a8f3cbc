"""A study's tables, as Markdown for docs/results.md and as HTML for its page: the same texts in both.

`results.md` holds all that such a page of dated experiments needs: command, machine, commit, seeds, figures and a plain verdict each.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.charts import escape, swatch
from eval.curves import FLOPS
from eval.facts import describe_device
from eval.intervals import Mean, mean_of, paired
from eval.page import DASH, count, duration, enumeration, figure, is_number
from eval.study_numbers import COMPUTE, TIME, TOKENS, Difference, cost_text, difference, differences, final, use_of
from eval.study_records import Study, Variant, problems
from train.files import without_home

HEADINGS = {TOKENS: "equal tokens", TIME: "equal wall clock", COMPUTE: "equal training operations"}
MOST_SOURCES = 4  # whose figures a table has room for
ONE_IN_TWENTY = (
    "± is the 95 % interval of the mean difference, paired by seed (Student's t). Of twenty such intervals without any real "
    "difference, one leaves out zero by chance."
)


@dataclass(frozen=True)
class Table:
    """Texts in rows, the first column a variant's name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(study: Study) -> list[Table]:
    """All tables that have a row: sizes, quality at equal tokens, wall clock and operations, balance."""
    found = [sizes(study), at_equal_tokens(study)]
    for reference in study.references:
        found += [at_equal_time(study, reference), at_equal_compute(study, reference)]
    return [table for table in (*found, other_sources(study), balance(study)) if table.rows]


def sizes(study: Study) -> Table:
    """What each variant holds and costs; equal active parameters were checked before the first run."""
    rows = [
        [
            variant.name,
            _number(variant.active),
            _number(variant.active_without_router),
            _number(variant.total),
            FLOPS.text(variant.flops_per_token) if variant.flops_per_token else DASH,
            count(variant.tokens),
            _number(variant.tokens_per_active, 1),
            f"{len(variant.done)} of {len(variant.cells)}",
        ]
        for variant in study.variants
    ]
    head = ["variant", "active parameters", "without router", "all parameters", "operations per token", "tokens"]
    return Table("Size and budget", [*head, "tokens per active parameter", "seeds done"], rows)


def at_equal_tokens(study: Study) -> Table:
    """Final held-out figures, and the differences to each reference."""
    head = ["variant", "bits per byte", "± sd", "nats per token"]
    for reference in study.references:
        head += [f"against {reference.name}, bits per byte", f"against {reference.name}, nats per token", "verdict"]
    rows = []
    for variant in study.full_length if any(v.done for v in study.full_length) else ():
        bits, nats = final(variant), final(variant, "nats")
        cells = [_number(bits and bits.mean, 4), _number(bits and bits.sd, 4), _number(nats and nats.mean, 4)]
        for reference in study.references:
            if variant is reference:
                cells += [DASH, DASH, "the reference"]
                continue
            found = difference(study, variant, reference, TOKENS)
            cells += [signed(found.bits), signed(found.nats), found.word]
        seeds = ", ".join(f"{value:.4f}" for value in bits.values) if bits else DASH
        rows.append([variant.name, *cells, seeds])
    head.append("bits per byte of each seed")
    return Table(f"At equal tokens, on {_text(study)}", head, rows, ONE_IN_TWENTY)


def at_equal_time(study: Study, reference: Variant) -> Table:
    """Against what the reference reaches in the same time, by the interleaved clock; without rows where nothing was timed, or
    where a further reference has no figure for anybody's time: one length of training seldom covers another's."""
    first = study.references[0].name
    rows, covered = [], reference.name == first
    for variant in study.variants if any(v.seconds for v in study.variants) else ():
        found = difference(study, variant, reference, TIME)
        own = [seconds for cell in variant.done if (seconds := cell.seconds)]
        cells = [_number(variant.step_seconds and 1000 * variant.step_seconds, 1), _ratio(variant)]
        cells += [_duration(variant.seconds), _duration(sum(own) / len(own) if own else None)]
        if variant is reference or (variant.longer and variant.of == reference.name):
            cells += [_number(_mean(final(variant)), 4), DASH, "the reference"]
        else:
            cells += [_number(found.reference_bits, 4), signed(found.bits), found.word]
            covered |= found.bits is not None
        rows.append([variant.name, *cells])
    head = ["variant", "step, ms", f"× {first}", "training by the clock", "by the runs' own count"]
    return Table(
        f"At equal wall clock, against {reference.name}",
        [*head, f"{reference.name} in that time, bits per byte", "difference", "verdict"],
        rows if covered else [],
        _clock_note(study)
        + " The reference's value at a variant's time lies between the final values of its runs of different "
        "lengths, each with its whole schedule, on a line over the logarithm of the time (which flatters the others: half-way between "
        "lengths a factor of two apart by about a fortieth of the step between them). ± is the seeds' doubt; the clock's own, in "
        "brackets, comes on top.",
    )


def at_equal_compute(study: Study, reference: Variant) -> Table:
    """As at equal time, with operations (model/flops.py); only where the reference was trained for several lengths."""
    rows = []
    for variant in study.full_length if len(study.lengths_of(reference)) > 1 else ():
        if variant is not reference:
            found = difference(study, variant, reference, COMPUTE)
            cost = cost_text(found.cost, COMPUTE) if found.cost else DASH
            rows.append([variant.name, cost, _number(found.reference_bits, 4), signed(found.bits), found.word])
    head = ["variant", "operations", f"{reference.name} with as many, bits per byte", "difference", "verdict"]
    note = "Operations of the model, forward and backward; the optimizer's own are left out, and Muon has far more than AdamW."
    return Table(f"At equal training operations, against {reference.name}", head, rows, note)


def other_sources(study: Study) -> Table:
    """Bits per byte of the held-out sources by which is not judged, and the differences to the main reference: do they agree?"""
    stages = [cell.stage for variant in study.full_length for cell in variant.done if cell.stage]
    names = list(dict.fromkeys(name for stage in stages for name in stage.sources() if name != study.source))[
        :MOST_SOURCES
    ]
    names = names if len(names) > 1 or study.source else []  # one source alone is all there is
    main = study.references[0] if study.references else None
    rows = []
    for variant in study.full_length if names else ():
        cells = []
        for name in names:
            ours = variant.of_source(name)
            cells.append(_number(_mean(mean_of(list(ours.values()))), 4))
            if main:
                cells.append(DASH if variant is main else signed(paired(ours, main.of_source(name))))
        rows.append([variant.name, *cells])
    head = ["variant"]
    for name in names:
        head += [f"{name}, bits per byte", *([f"{name}, against {main.name}"] if main else [])]
    return Table("On the other held-out texts, at equal tokens", head, rows)


def balance(study: Study) -> Table:
    """How the experts are used, beside the quality."""
    rows = []
    for variant in study.variants:
        if use := use_of(variant):
            rows.append(
                [
                    variant.name,
                    _number(_mean(final(variant)), 4),
                    _number(use.max_vio, 3),
                    _number(use.worst_max_vio, 3),
                    _number(use.step_max_vio, 3),
                    _number(use.load_entropy, 4),
                    f"{use.dead:.3g} of {use.routed}",
                    _number(use.router_entropy, 3),
                ]
            )
    head = ["variant", "bits per byte", "MaxVio", "worst layer", "of a training step", "load entropy", "dead experts"]
    return Table(
        "Use of the experts",
        [*head, "router entropy"],
        rows,
        "On held-out text, mean of layers and seeds. MaxVio: how far the busiest expert lies above its fair share (0 is balance). "
        "Entropies as fractions of the largest: a load of 1 is even, a router of 0 has decided for every token.",
    )


def verdicts(study: Study) -> list[str]:
    """A sentence for every comparison that there is, in the order of the variants; of two references, from one side alone."""
    found, said = [], set()
    for reference in study.references:
        for at in (TOKENS, TIME, COMPUTE):
            for each in differences(study, at):
                if each.reference != reference.name or each.bits is None or (each.reference, each.variant, at) in said:
                    continue
                said.add((each.variant, each.reference, at))
                found.append(sentence(each))
    return found


def sentence(found: Difference) -> str:
    """A comparison in words."""
    cost = f" ({cost_text(found.cost, found.at)})" if found.cost else ""
    start = f"{found.variant} at {HEADINGS[found.at]}{cost}: "
    bits, nats = found.bits, found.nats
    if bits is None:
        return f"{start}{found.verdict}."
    seeds = "1 seed" if bits.n == 1 else f"{bits.n} seeds"
    figures = f"{signed(bits)} bits per byte" + (f", {signed(nats)} nats per token" if nats else "")
    if bits.half is None:
        return f"{start}one run differs from {found.reference} by {figures}; one seed shows nothing."
    if not bits.is_shown:
        return f"{start}no difference from {found.reference} shown ({figures}; {seeds})."
    return f"{start}{found.word} than {found.reference}: {figures} ({seeds})."


def provenance(study: Study) -> str:
    """Where the figures come from, as one sentence a reader can repeat."""
    cells = [cell for variant in study.variants for cell in variant.done]
    commits = sorted({cell.commit for cell in cells} - {""}) or [study.commit or "unknown"]
    devices = sorted({describe_device(cell.stage) for cell in cells if cell.stage} - {""})
    machine = enumeration(devices) or str(study.machine.get("device") or "an unknown machine")
    threads = study.machine.get("threads_per_process")
    machine += f" ({threads} thread{'s' * (threads != 1)} a run)" if isinstance(threads, int) else ""
    seeds = ", ".join(map(str, study.seeds)) or DASH
    dirty = " (with changes that were not committed)" if study.dirty else ""
    return (
        f"Scale {study.scale or 'unknown'}, seeds {seeds}, {machine}, commit {enumeration(commits)}{dirty}; judged by all of the held-out "
        f"text of {study.source or 'all sources'}."
    )


def markdown(study: Study) -> str:
    """results.md: what is pasted into docs/results.md."""
    day = datetime.date.today().isoformat()
    title = f"## {day} {_md(study.question or study.name)}" + (f" ({_md(study.scale)})" if study.scale else "")
    command = f"`{_code(without_home(study.command))}`: " if study.command else ""
    parts = [title, command + _md(provenance(study))]
    if found := problems(study):
        parts.append("\n".join(f"- {_md(text)}" for text in found))
    for table in tables(study):
        rule = "| --- " + "| ---: " * (len(table.head) - 1) + "|"
        lines = [f"| {' | '.join(map(_md, row))} |" for row in (table.head, *table.rows)]
        parts += [f"**{_md(table.title)}**", "\n".join((lines[0], rule, *lines[1:]))]
        parts += [_md(table.note)] if table.note else []
    if found := verdicts(study):
        parts.append("\n".join(f"- {_md(text)}" for text in found))
    return "\n\n".join(parts) + "\n"


def html_table(found: Table, looks: dict[str, tuple[str, str]]) -> str:
    """A card with the table, each variant with its line's colour."""
    words = [table_column.startswith(("verdict", "bits per byte of each")) for table_column in found.head]
    head = "".join(
        f'<th class="{"" if i == 0 else "words" if words[i] else "number wrap"}">{escape(text)}</th>'
        for i, text in enumerate(found.head)
    )
    body = []
    for name, *cells in found.rows:
        colour, dash = looks.get(name, ("#8b939c", ""))
        first = f'<td class="variant">{swatch(colour, 1.0, dash)}{escape(name)}</td>'
        rest = "".join(
            f'<td class="{"words" if words[i] else "number"}{" strong" if text == "better" else ""}">{escape(text)}</td>'
            for i, text in enumerate(cells, 1)
        )
        body.append(f"<tr>{first}{rest}</tr>")
    content = f'<div class="scroll"><table class="study"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    return figure(found.title, content if body else "", found.note)


def signed(value: Mean | None) -> str:
    """−0.0412 ± 0.0061; without an interval the mean alone."""
    if value is None:
        return DASH
    text = f"{value.mean:+.4f}".replace("-", "−")
    return text if value.half is None else f"{text} ± {value.half:.4f}"


def _clock_note(study: Study) -> str:
    clock = study.clock
    rounds, steps = clock.get("rounds"), clock.get("steps_a_round")
    threads = clock.get("threads")
    how = f"{rounds} rounds of {steps} steps, " if rounds and steps else ""
    device = (clock.get("machine") or {}).get("device")
    where = f" on {device}" * bool(device) + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    return f"Step times: {how}the variants in turns in one process{where}; × is the median of the rounds' ratios, in brackets their middle half."


def _text(study: Study) -> str:
    return f"held-out {study.source}" if study.source else "all held-out text"


def _mean(value: Mean | None) -> float | None:
    return value.mean if value else None


def _number(value: object, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}" if is_number(value) else DASH


def _ratio(variant: Variant) -> str:
    if variant.ratio is None or variant.ratio_range is None:
        return DASH
    low, high = (f"{end:.2f}" for end in variant.ratio_range)
    return f"{variant.ratio:.3f}" + (f" ({low}–{high})" if high != low else "")


def _duration(seconds: float | None) -> str:
    return duration(seconds) if seconds and math.isfinite(seconds) else DASH


def _code(text: str) -> str:
    """Any text within single backticks."""
    return " ".join(text.replace("`", "'").split())


def _md(text: object) -> str:
    """Any text as one line of Markdown that shows it."""
    line = " ".join(str(text).split())
    for character in "\\`|<>[]*":
        line = line.replace(character, f"\\{character}")
    return line
