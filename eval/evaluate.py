"""How good a run is: held-out loss per source, load of every expert, and the tasks with a known answer.

    python -m eval.evaluate runs/quickstart-sft [--tasks all] [--json FILE]

Deterministic: the same checkpoint on the same machine gives the same numbers, whatever the batch size (to float tolerance).
The model is in eval mode and without gradients, so every MoE layer takes its `moe_infer` path. The result of the
newest checkpoint is kept as RUN/evaluation.json, which the report reads; of an older one it is printed, and written to --json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from data.exercises import TASKS
from eval.loss import held_out
from eval.routing import RoutingRecorder
from eval.tasks import run_tasks
from train import cli
from train.checkpoint import Run, open_run
from train.files import replace_file
from train.memory import keep_freed_memory

SPARKS = "▁▂▃▄▅▆▇█"  # an expert's load, from none to twice its fair share


def evaluate(run: Run, *, task_names: list[str], limit: int | None = None, batch_size: int | None = None) -> dict:
    """`heldout`, `tasks` and `routing` as DESIGN.md section 2 names them, and beside them what they were measured on."""
    start = time.perf_counter()
    with torch.inference_mode():
        with RoutingRecorder(run.model) as recorder:
            heldout = held_out(run, batch_size=batch_size, recorder=recorder)
        scores = run_tasks(run, names=task_names, limit=limit) if task_names else {}
    return {
        "heldout": heldout,
        "tasks": scores,
        "routing": recorder.summary(run.tokenizer),
        "run": run.config.name,
        "step": run.step,
        "checkpoint": run.checkpoint.name,
        "context_length": run.config.context_length,
        "device": str(run.device),
        "precision": run.precision,
        "task_limit": limit,
        "seconds": round(time.perf_counter() - start, 2),
    }


def choose_tasks(text: str | None, is_chat: bool) -> list[str]:
    """Names from `--tasks`: all, none, or a comma-separated list; None means all for a chat model, none for others.

    Raises ValueError on a name that is no task.
    """
    if text is None or text in ("all", "none"):
        return list(TASKS) if text == "all" or (text is None and is_chat) else []
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks: {name!r} is no task; there are {', '.join(TASKS)}, and the words all and none")
    return names


def write_json(result: dict, path: Path) -> None:
    """Whole or not at all; the folder is made if it is missing. A pipe or a terminal is written to, not replaced."""
    if path == Path("/dev/stdout"):  # where a file may stand behind it, which must not be opened a second time
        print(as_text(result), end="")
    elif path.exists() and not path.is_file():
        path.write_text(as_text(result), encoding="utf-8", errors="replace")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, as_text(result))


def as_text(result: dict) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def tables(result: dict) -> str:
    """The result as text; an expert's load is a bar from none to twice its fair share."""
    parts = []
    if result["heldout"]:
        rows = [
            [
                name,
                f"{f['bits_per_byte']:.4f}",
                f"{f['loss']:.4f}",
                f"{f['perplexity']:.2f}",
                f"{f['tokens']:,}",
                f"{f['bytes']:,}",
            ]
            for name, f in result["heldout"].items()
        ]
        parts.append(_table(["held-out source", "bits/byte", "loss", "perplexity", "tokens", "bytes"], rows))
    else:
        parts.append(
            "no source has held-out text (data.held_out_fraction), so there is no held-out loss and no expert load"
        )
    if routing := result["routing"]:
        rows = [
            [
                f"layer {layer}",
                f"{routing['max_vio'][i]:.2f}",
                f"{routing['load_entropy'][i]:.3f}",
                f"{routing['router_entropy'][i]:.3f}",
                str(routing["dead"][i]),
                "".join(SPARKS[min(7, int(4 * share * routing["experts"]))] for share in routing["load"][i]),
            ]
            for i, layer in enumerate(routing["layers"])
        ]
        parts.append(
            _table(
                ["expert load", "MaxVio", "load entropy", "router entropy (nats)", "dead", "experts"],
                rows,
                words=(0, 5),
            )
        )
    if result["tasks"]:
        rows = [
            [
                name,
                f"{100 * t['score']:.1f} %",
                f"{100 * t['chance']:.1f} %",
                f"{100 * t['trivial']:.1f} %",
                f"{t['n']:,}",
                t.get("trivial_name", ""),
            ]
            for name, t in result["tasks"].items()
        ]
        parts.append(
            _table(["task", "right", "chance", "trivial", "questions", "best trivial answer"], rows, words=(0, 5))
        )
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]], words: tuple[int, ...] = (0,)) -> str:
    """Columns in `words` stand left, numbers right."""
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(len(head))]
    texts = [
        "  ".join(
            text.ljust(w) if c in words else text.rjust(w) for c, (text, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def main() -> int:
    parser = cli.parser(
        "Held-out loss per source, expert load per layer, and known-answer tasks of a trained run.",
        "python -m eval.evaluate runs/quickstart-sft --json result.json",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (its newest checkpoint), or one checkpoint in it")
    parser.add_argument(
        "--tasks", metavar="NAMES", help="all, none, or names with commas between (default: all for a chat model)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result here too")
    parser.add_argument("--limit", metavar="N", type=int, help="ask at most N questions of each task")
    parser.add_argument(
        "--batch-size", metavar="ROWS", type=int, help="rows of a forward pass (default: eval.batch_size of the config)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where it is fast"
    )
    options = parser.parse_args()
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} must be at least 1")

    keep_freed_memory()
    run = open_run(options.run, device=options.device, precision=options.precision)
    names = choose_tasks(options.tasks, run.config.data.format == "chat")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the evaluation
    print(f"{run.config.name}, step {run.step:,} ({run.checkpoint.name}), on {run.device} in {run.precision}\n")
    result = evaluate(run, task_names=names, limit=options.limit, batch_size=options.batch_size)
    print(tables(result))
    written = [options.json] if options.json else []
    if options.json:
        write_json(result, options.json)
    if (Path(options.run) / "checkpoints").is_dir():
        written.append(run.run_dir / "evaluation.json")
        replace_file(written[-1], as_text(result))
    print(f"\n{result['seconds']:.0f} s" + (f"; written to {' and '.join(map(str, written))}" if written else ""))
    return 0


if __name__ == "__main__":
    cli.run(main)
