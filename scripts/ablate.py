"""Answers a question by training: a base config, its variants and several seeds; every cell an ordinary run.

    python -m scripts.ablate configs/ablations/experts.yaml --plan          the variants' sizes, and what is done
    python -m scripts.ablate configs/ablations/experts.yaml                 trains what is missing; the same command goes on
    python -m scripts.ablate configs/ablations/experts.yaml train.steps=200 a trial, with results of its own
    python -m scripts.ablate configs/ablations/experts.yaml --base configs/ablations/scales/gpu-10m.yaml

The results lie in runs/ablations/NAME (study.json, results.json, results.md, report.html and pictures), the runs in
runs/ablations/cells, where studies share what they have in common. Exit code 0: all is done; 1: a cell failed; 128 + n: stopped
by signal n, after saving.
"""

from __future__ import annotations

import argparse

from data.words import harmless
from scripts.ablation.study import Cell, Study, plan_table, read_study
from train import cli


def select(study: Study, seeds: list[int] | None, variants: list[str] | None) -> list[Cell]:
    """The cells of these seeds and variants; None: all. ValueError for one that the study does not have."""
    for name, given, known in (
        ("seeds", seeds, study.file.seeds),
        ("variants", variants, [variant.name for variant in study.file.variants]),
    ):
        wrong = [each for each in given or [] if each not in known]
        if wrong:
            raise ValueError(f"--{name}: {wrong[0]!r} is none of {', '.join(map(str, known))}; add it to {study.path}")
    return [
        cell for cell in study.cells if (not seeds or cell.seed in seeds) and (not variants or cell.variant in variants)
    ]


def run(study: Study, cells: list[Cell], options: argparse.Namespace) -> int:
    """Trains and evaluates what is missing, times the steps, writes the results. Returns the exit code."""
    from scripts.ablation import cells as running  # torch and its friends load after the study is known to be right
    from scripts.ablation import clock, record

    def say(text: str) -> None:
        print(text, flush=True)

    pending = [cell for cell in cells if not record.is_done(cell)]
    main = study.configs[study.file.compare_with[0]]
    record.check_same_settings(study)
    record.check_same_data(study, running.prepare_text(main) if pending else None)
    places = running.slots(main, options.at_once)
    say(f"\n{len(cells) - len(pending)} of {len(cells)} cells are done; {len(places)} at once; {study.folder}")
    outcome = running.Runner(study, places, say).run(pending)
    if outcome.signal:
        say("the same command goes on")
        return 128 + outcome.signal
    record.check_same_data(study, None)  # the text may have changed under the runs
    if options.clock is not False and (names := clock.missing(study, again=options.clock is True)):
        record.write_record(study, failed=outcome.failed, clock=clock.measure(study, names, say), began=True)
    if any(record.is_done(cell) for cell in study.cells):
        from eval.study import write_results

        write_results(study.folder)
        say(f"\n{(study.folder / 'results.md').read_text(encoding='utf-8')}\n{study.folder / 'report.html'}")
    for cell in outcome.failed:
        say(f"failed: {cell.variant}, seed {cell.seed}; the same command tries again")
    return 1 if outcome.failed else 0


def _done(study: Study) -> dict[str, int]:
    from scripts.ablation import record

    return {name: sum(record.is_done(c) for c in study.cells if c.variant == name) for name in study.configs}


def main() -> int:
    parser = cli.parser(
        "Trains the variants of a study and compares them.",
        "python -m scripts.ablate configs/ablations/experts.yaml --plan",
    )
    parser.add_argument("study", metavar="STUDY.yaml", help="question, base config, variants, seeds")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replaces a value of the base config")
    parser.add_argument("--base", metavar="FILE", help="another base config: another scale, with results of its own")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="runs at once (default: one a GPU, or as many as the cores take)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="only these seeds for now")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants for now")
    parser.add_argument("--plan", action="store_true", help="show sizes and what is done, and start nothing")
    parser.add_argument(
        "--clock",
        action=argparse.BooleanOptionalAction,
        help="time the steps again, or not at all (default: where a variant has no time yet)",
    )
    options = parser.parse_intermixed_args()
    if options.at_once is not None and options.at_once < 1:
        raise ValueError(f"--at-once: {options.at_once} must be at least 1")
    study = read_study(options.study, options.overrides, options.base)
    cells = select(study, options.seeds, options.variants)
    print(f"{harmless(study.file.question)}\n\n{plan_table(study, _done(study))}", flush=True)
    return 0 if options.plan else run(study, cells, options)


if __name__ == "__main__":
    cli.run(main)
