"""How good a run is: held-out loss per source, load of every expert, and tasks: ours with a known answer, and lm_eval's.

    python -m eval.evaluate runs/quickstart-sft [--tasks all] [--json FILE]
    python -m eval.evaluate runs/quickstart-sft --tasks sums,minimoe_continue,arc_easy --limit 100

Deterministic: the same checkpoint on the same machine gives the same numbers, whatever the batch size (to float tolerance).
The model is in eval mode and without gradients, so every MoE layer takes its `moe_infer` path. The result of the
newest checkpoint is kept as RUN/evaluation.json, which the report reads; of an older one it is printed, and written to --json.
"""

from __future__ import annotations

import difflib
import json
import sys
import time
from pathlib import Path

import torch

from data.exercises import TASKS
from eval import harness
from eval.loss import held_out
from eval.routing import RoutingRecorder
from eval.tasks import run_tasks
from train import cli
from train.checkpoint import Run, open_run
from train.files import replace_file
from train.memory import keep_freed_memory

SPARKS = "▁▂▃▄▅▆▇█"  # an expert's load, from none to twice its fair share


def evaluate(
    run: Run,
    *,
    task_names: list[str],
    limit: int | None = None,
    batch_size: int | None = None,
    others: harness.Loaded | None = None,
    chat_template: bool | None = None,
    add_bos: bool = False,
) -> dict:
    """`heldout`, `tasks` and `routing` as DESIGN.md section 2 names them, and beside them what they were measured on.

    `others` are tasks of lm-evaluation-harness; chat_template and add_bos are for these alone (eval/harness.py).
    """
    start = time.perf_counter()
    with torch.inference_mode():
        with RoutingRecorder(run.model) as recorder:
            # A run that was imported has no data here, and can be asked tasks all the same.
            heldout = held_out(run, batch_size=batch_size, recorder=recorder) if run.config.data.sources else {}
        scores = run_tasks(run, names=task_names, limit=limit) if task_names else {}
        notes: list[str] = []
        if others is not None:
            more, notes = harness.run_harness(
                run, others, limit=limit, batch_size=batch_size, chat_template=chat_template, add_bos=add_bos
            )
            scores |= more
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
        **({"task_notes": notes} if notes else {}),
        "seconds": round(time.perf_counter() - start, 2),
    }


def choose_tasks(text: str | None, is_chat: bool, own_folder: bool = False) -> tuple[list[str], list[str]]:
    """(ours, lm-evaluation-harness's) of `--tasks`: all, none, or a comma-separated list; None means all of ours for a chat model,
    none for others. Raises ValueError on a slip in one of ours, unless a folder of tasks may have that very name."""
    if text is None or text in ("all", "none"):
        return list(TASKS) if text == "all" or (text is None and is_chat) else [], []
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    others = [name for name in names if name not in TASKS]
    for name in others if not own_folder else ():
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.75)
        if near and near[0][0] == name[0]:  # xsum is lm_eval's, and no slip in sums
            raise ValueError(
                f"--tasks: {name!r} is no task; did you mean {near[0]!r}? Ours are {', '.join(TASKS)}, and the words all and none; "
                "others are lm-evaluation-harness's"
            )
    return [name for name in names if name in TASKS], others


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
            "the run has no source with held-out text (data.held_out_fraction), so there is no held-out loss and no expert load"
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
        head = ["task", "score", "±", "chance", "trivial", "questions", "measured by", "best trivial answer"]
        rows = [row for name, task in result["tasks"].items() for row in _task_rows(name, task)]
        used = [c for c in range(len(head)) if any(row[c] for row in rows)]
        rows = [[row[c] for c in used] for row in [head, *rows]]
        parts.append(_table(rows[0], rows[1:], words=tuple(i for i, c in enumerate(used) if c in (0, 6, 7))))
    parts += [f"note: {note}" for note in result.get("task_notes", [])]
    return "\n\n".join(parts)


def _task_rows(name: str, task: dict) -> list[list[str]]:
    """A task's row, and one for each further metric. Shares are in per cent; perplexities and the like are not."""
    rows = []
    for label, figures in (task.get("metrics") or {task["metric"]: task}).items():
        main = label == task["metric"]
        is_share = "chance" in task or label.split()[0] in harness.SHARES
        values = [
            figures["score"],
            figures.get("standard_error"),
            *((task.get(k) if main else None) for k in ("chance", "trivial")),
        ]
        texts = ["" if v is None else f"{100 * v:.1f} %" if is_share else f"{v:.4f}" for v in values]
        shots = f", {task['fewshot']}-shot" if main and task.get("fewshot") else ""
        count = f"{task['n']:,}" if main else ""
        row = [name if main else "", *texts, count, label + shots, task.get("trivial_name", "") if main else ""]
        rows.insert(0 if main else len(rows), row)
    return rows


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
        "Held-out loss per source, expert load per layer, and tasks of a trained run.",
        "python -m eval.evaluate runs/quickstart-sft --json result.json\n"
        "  python -m eval.evaluate runs/quickstart-sft --tasks sums,compare\n"
        "  python -m eval.evaluate runs/quickstart-sft --tasks minimoe_sums,minimoe_continue     (by lm-evaluation-harness, offline)\n"
        "  python -m eval.evaluate runs/quickstart-pretrain --tasks arc_easy,piqa,hellaswag --limit 200     (their data: the Hub)\n"
        "  python -m eval.evaluate runs/quickstart-pretrain --include-path my_tasks --tasks my_quiz --fewshot 3",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (its newest checkpoint), or one checkpoint in it")
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help=f"all, none, or names with commas between: ours ({', '.join(TASKS)}) or lm-evaluation-harness's "
        "(default: all of ours for a chat model)",
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
    group = parser.add_argument_group(
        "tasks of lm-evaluation-harness",
        "pip install -r requirements-extra.txt; scores are those of lm_eval on the export",
    )
    group.add_argument(
        "--include-path",
        metavar="DIR",
        type=Path,
        help="a folder of your own task YAML (pattern: python -m eval.harness_tasks OUT)",
    )
    group.add_argument("--fewshot", metavar="N", type=int, help="show N solved examples before each question")
    group.add_argument(
        "--chat-template", default="auto", choices=("auto", "yes", "no"), help="ask in chat form (auto: a chat model)"
    )
    group.add_argument(
        "--add-bos",
        action="store_true",
        help="begin each text with BOS, as training documents do (lm_eval: add_bos_token=True)",
    )
    options = parser.parse_args()
    for name, least in (("limit", 1), ("batch_size", 1), ("fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value} must be at least {least}")

    keep_freed_memory()
    run = open_run(options.run, device=options.device, precision=options.precision)
    names, others = choose_tasks(
        options.tasks, run.config.data.format == "chat", own_folder=options.include_path is not None
    )
    for name in ("include_path", "fewshot", "chat_template", "add_bos"):
        if getattr(options, name) != parser.get_default(name) and not others:
            raise ValueError(
                f"--{name.replace('_', '-')}: is for tasks of lm-evaluation-harness, and --tasks names none; "
                "ours have namesakes there: minimoe_sums, ..."
            )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the evaluation
    loaded = harness.load_tasks(others, fewshot=options.fewshot, include_path=options.include_path) if others else None
    print(f"{run.config.name}, step {run.step:,} ({run.checkpoint.name}), on {run.device} in {run.precision}\n")
    sys.stdout.flush()
    result = evaluate(
        run,
        task_names=names,
        limit=options.limit,
        batch_size=options.batch_size,
        others=loaded,
        chat_template={"auto": None, "yes": True, "no": False}[options.chat_template],
        add_bos=options.add_bos,
    )
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
