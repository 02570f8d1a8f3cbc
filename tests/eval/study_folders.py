"""Study folders made from formulas: study.json and its cells, as scripts.ablate and training leave them."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from eval.study import write_results
from eval.study_numbers import difference
from eval.study_records import read_study

from .run_folders import Page

TOKENS_PER_STEP, BYTES_PER_TOKEN = 8192, 3.5
LAYERS = [1, 2, 3]
MACHINE = {"device": "AMD EPYC", "cores": 2, "processes": 1, "threads_per_process": 1, "torch": "2.13.0"}


@dataclass
class Made:
    """A variant to make: what it ends with, by seed, and what a step takes."""

    name: str
    bits: dict[int, float]  # final bits per byte of each seed that is done
    experts: int = 0
    steps: int = 400
    step_seconds: float | None = 0.5  # None: not in the clock
    longer: bool = False
    of: str | None = None
    more: dict = field(default_factory=dict)  # keys of study.json's entry


def make_study(
    root: Path,
    variants: list[Made],
    *,
    seeds=(1, 2, 3),
    compare_with=("dense",),
    clock=True,
    source: str | None = "python",
    name="experts-cpu",
    pace=lambda round: 1.0,
) -> Path:
    """runs/ablations/NAME below root, with the cells beside it; `pace` makes the machine slower in some rounds."""
    folder = root / "ablations" / name
    folder.mkdir(parents=True)
    entries = []
    for variant in variants:
        cells = []
        for seed in seeds:
            link = f"../cells/{variant.name}-cpu-seed{seed}-{abs(hash((variant.name, seed))) % 10**8:08d}"
            done = seed in variant.bits
            cells.append(
                {
                    "seed": seed,
                    "folder": link,
                    "state": "done" if done else "to do",
                    "commit": "abc1234" if done else None,
                }
            )
            if done:
                make_cell(folder / link, variant, seed, source)
        entries.append(
            {
                "name": variant.name,
                "of": variant.of,
                "longer": variant.longer,
                "set": {"model.n_routed_experts": variant.experts, "train.steps": variant.steps},
                "total": 1_000_000 + 300_000 * variant.experts,
                "active": 1_000_000 + 100 * variant.experts,
                "matmul": 900_000,
                "active_without_router": 1_000_000,
                "flops_per_token": 6_000_000 + 600 * variant.experts,
                "tokens": variant.steps * TOKENS_PER_STEP,
                "cells": cells,
                **variant.more,
            }
        )
    rounds = {v.name: [[v.step_seconds * pace(r) for r in range(15)]] for v in variants if v.step_seconds}
    study = {
        "study": name,
        "question": "Does a mixture of experts beat its dense twin?",
        "config": "configs/ablations/experts.yaml",
        "scale": "cpu-1m",
        "seeds": list(seeds),
        "compare_with": list(compare_with),
        "tolerance": 0.03,
        "commit": "abc1234",
        "dirty": False,
        "machine": MACHINE,
        "variants": entries,
        "clock": {
            "rounds": 15,
            "steps_a_round": 2,
            "threads": 1,
            "machine": MACHINE,
            "commit": "abc1234",
            "seconds": rounds,
            "tokens_per_step": {v.name: TOKENS_PER_STEP for v in variants},
        }
        if clock
        else None,
    }
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def make_cell(folder: Path, variant: Made, seed: int, source: str | None = "python") -> Path:
    """A finished run whose evaluation has the variant's bits per byte on `python`, and twice as many on a second source."""
    folder.mkdir(parents=True)
    noise, end, E = random.Random(f"{variant.name}{seed}"), variant.bits[seed], variant.experts
    config = {
        "name": folder.name,
        "seed": seed,
        "model": {"hidden_size": 128, "num_hidden_layers": 4, "n_routed_experts": E},
        "data": {
            "context_length": 256,
            "sources": [{"name": "python", "kind": "text"}, {"name": "other", "kind": "text"}],
        },
        "train": {"steps": variant.steps, "tokens_per_step": TOKENS_PER_STEP},
        "eval": {"best_source": source},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for step in range(10, variant.steps + 1, 10):
        done = step / variant.steps
        common = {"step": step, "tokens": step * TOKENS_PER_STEP, "train_seconds": 0.7 * step}
        row = {"kind": "train", **common, "loss": 2.0, "skipped_steps": 0}
        if E:
            load = [
                [(1 + 0.4 * math.exp(-4 * done) * math.sin(e * layer + seed)) / E for e in range(E)] for layer in LAYERS
            ]
            load = [[share / sum(each) for share in each] for each in load]
            entropy = [math.log(E) * (0.4 + 0.4 * math.exp(-5 * done)) for _ in LAYERS]
            row["routing"] = {
                "layers": LAYERS,
                "load": load,
                "max_vio": [max(x) * E - 1 for x in load],
                "router_entropy": entropy,
            }
        rows.append(row)
        if step % (variant.steps // 20) == 0:
            bits = (
                end + 3.0 * (step**-0.5 - variant.steps**-0.5) + 0.25 * (1 - done) + noise.gauss(0, 0.003) * (1 - done)
            )
            rows.append({"kind": "held_out", **common, "sources": figures(bits), "loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"machine": MACHINE}))
    routing = {**rows[-2]["routing"], "experts": E} if E else {}
    evaluation = {"heldout": figures(end), "tasks": {}, "routing": routing, "seconds": 3.0, "step": variant.steps}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def figures(bits: float) -> dict:
    """Held-out figures as training and evaluation write them, of two sources; the second is half as large and twice as hard."""
    found = {}
    for name, each, tokens in (("python", bits, 100_000), ("other", 2 * bits, 50_000)):
        loss = each * math.log(2) * BYTES_PER_TOKEN
        n_bytes = int(tokens * BYTES_PER_TOKEN)
        found[name] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": each,
            "tokens": tokens,
            "bytes": n_bytes,
        }
    return found


def example(root: Path) -> Path:
    """The study of the README: a dense model of three lengths, and mixtures of 4 to 32 experts."""
    jitter = random.Random(4)

    def three(bits: float, wobble: float = 0.002) -> dict[int, float]:
        return {seed: bits + 0.003 * (seed - 2) + jitter.gauss(0, wobble) for seed in (1, 2, 3)}

    return make_study(
        root,
        [
            Made("dense", three(1.000)),
            Made("dense-longer", three(0.952), steps=800, longer=True, of="dense"),
            Made("experts-4", three(0.985), experts=4, step_seconds=0.56),
            Made("experts-8", three(0.963), experts=8, step_seconds=0.60),
            Made("experts-16", three(0.951), experts=16, step_seconds=0.66),
            Made("experts-32", three(0.941), experts=32, step_seconds=0.9),
        ],
    )


def change(path: Path, edit) -> None:
    """Rewrites a JSON file: `edit` changes its tree in place."""
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def cell_folder(study: Path, variant: str, seed: int) -> Path:
    return next((study.parent / "cells").glob(f"{variant}-cpu-seed{seed}-*"))


def written(folder: Path) -> tuple[dict, str, Page, str]:
    """(results.json, results.md, the page, its text), checked: valid JSON, nothing loaded but links to runs, no NaN."""
    write_results(folder)
    results = json.loads(
        (folder / "results.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON")
    )
    text, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "results.md"))
    for shown in (text, markdown):
        assert not re.search(r"\b([nN]a[nN]|inf|None)\b", shown), "a NaN or a None is shown"
    page = Page(text)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(load.startswith("./..") for load in page.loads), page.loads
    return results, markdown, page, text


def of(folder: Path, variant: str, at: str, reference: str = "dense"):
    study = read_study(folder)
    return difference(study, study.variant(variant), study.variant(reference), at)


def curve(seconds: float, seed: int) -> float:
    """What a dense model reaches in the tests' world: a straight line over log(time), and something of each seed's own."""
    return 1.0 - 0.1 * math.log2(seconds / 200) + {1: 0.0, 2: 0.2, 3: -0.1}[seed]


def dense_of_lengths(steps: tuple[int, ...]) -> list[Made]:
    """Dense runs of 0.5 s a step; 400 steps are the main ones."""
    made = [Made("dense", {s: curve(200, s) for s in (1, 2, 3)})]
    for n in steps:
        bits = {s: curve(n * 0.5, s) for s in (1, 2, 3)}
        made.append(Made(f"dense-{n}", bits, steps=n, longer=True, of="dense", step_seconds=None))
    return made
