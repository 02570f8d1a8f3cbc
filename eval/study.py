"""The results of a study: from its records to numbers, tables, a page and two pictures. Reads files only, needs no torch device.

    python -m eval.study runs/ablations/experts        writes results.json, results.md, report.html, clock.svg, tokens.svg there

`python -m scripts.ablate` calls it at its end; this command does it again, say after the folder came from a GPU machine or while
the study is still running: what is missing is named. The cells' run folders must lie where study.json says, beside the study.

- eval/study_records.py reads, eval/study_numbers.py compares (eval/intervals.py: means and intervals), eval/study_curves.py averages;
- eval/study_tables.py, eval/study_page.py and eval/svg.py show.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from eval.intervals import Mean
from eval.study_numbers import COMPUTE, TIME, TOKENS, Difference, Use, differences, final, use_of
from eval.study_page import render
from eval.study_records import Study, Variant, problems, read_study
from eval.study_tables import markdown, provenance, verdicts
from eval.svg import picture
from train import cli
from train.files import replace_file
from train.metrics import without_nan


@dataclass(frozen=True)
class Results:
    """What a study shows so far; `markdown` is the text of results.md."""

    study: Study
    differences: list[Difference]  # at equal tokens, then time, then operations
    markdown: str
    files: list[Path]  # what was written


def write_results(folder: str | Path) -> Results:
    """Reads the study and writes its results beside it; a picture of which nothing is known yet is not written, and an older one
    removed. ValueError where the folder holds no study."""
    folder = Path(folder)
    study = read_study(folder)
    found = [each for at in (TOKENS, TIME, COMPUTE) for each in differences(study, at)]
    text = markdown(study)
    contents = {
        "results.json": as_json(study, found),
        "results.md": text,
        "report.html": render(study),
        "clock.svg": picture(study, TIME),
        "tokens.svg": picture(study, TOKENS),
    }
    written = []
    for name, content in contents.items():
        if content:
            replace_file(folder / name, content)
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    return Results(study, found, text, written)


def as_json(study: Study, found: list[Difference]) -> str:
    """Everything in the tables as numbers: bits per byte, nats per token, seconds, operations; null where there is none."""
    tree = {
        "study": study.name,
        "question": study.question,
        "config": study.config,
        "scale": study.scale,
        "seeds": study.seeds,
        "compare_with": [reference.name for reference in study.references],
        "judged_by": study.source or None,
        "provenance": provenance(study),
        "problems": problems(study),
        "variants": [_variant(variant) for variant in study.variants],
        "differences": [
            {**dataclasses.asdict(each), "bits": _mean(each.bits), "nats": _mean(each.nats), "verdict": each.verdict}
            for each in found
        ],
        "verdicts": verdicts(study),
    }
    return json.dumps(without_nan(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _variant(variant: Variant) -> dict:
    plain = (
        "name",
        "of",
        "longer",
        "unequal",
        "settings",
        "total",
        "active",
        "active_without_router",
        "flops_per_token",
    )
    more = ("tokens", "steps", "ratio", "ratio_range", "step_seconds", "seconds", "compute", "tokens_per_active")
    use: Use | None = use_of(variant)
    return {
        **{key: getattr(variant, key) for key in (*plain, *more)},
        "bits_per_byte": _mean(final(variant)),
        "nats_per_token": _mean(final(variant, "nats")),
        "experts": dataclasses.asdict(use) if use else None,
        "cells": [
            {key: getattr(cell, key) for key in ("seed", "link", "state", "commit", "bits", "nats", "seconds")}
            for cell in variant.cells
        ],
    }


def _mean(value: Mean | None) -> dict | None:
    if value is None:
        return None
    return {"mean": value.mean, "sd": value.sd, "half_width_95": value.half, "values": list(value.values)}


def main() -> int:
    parser = cli.parser(
        "Writes a study's tables, page and pictures from its records.", "python -m eval.study runs/ablations/experts"
    )
    parser.add_argument("folder", metavar="STUDY", type=Path, help="a folder that python -m scripts.ablate wrote")
    results = write_results(parser.parse_args().folder)
    print(results.markdown)
    print("\n".join(map(str, results.files)))
    return 0


if __name__ == "__main__":
    cli.run(main)
