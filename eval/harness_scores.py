"""Scores of lm-evaluation-harness's tasks, in the shape of evaluation.json: from lm_eval's results to score, error, chance, examples."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable

N_EXAMPLES = 3  # answers kept in the result, to look at
LONGEST_EXAMPLE = 500  # characters
BY_CHOICE = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # those of which choices say what guessing gets


def measured_of(raw: dict, name: str) -> dict[tuple[str, str], dict]:
    """(metric, filter) -> score and, where lm_eval has one, standard_error; in the task's own order, and finite ones alone."""
    row, found = raw["results"].get(name) or {}, {}
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = row.get(f"{metric}_stderr,{filter_name}")
        found[metric, filter_name] = {"score": float(value)} | (
            {"standard_error": float(error)} if _is_number(error) else {}
        )
    return found


def _score(
    raw: dict, name: str, measured: dict[tuple[str, str], dict], order: Iterable[str] = ()
) -> tuple[dict, str, str]:
    """What every task and group has: the main metric (bits per byte before perplexities, else the first), and all of them."""
    order = ["bits_per_byte", *order]
    measured = dict(
        sorted(measured.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order))
    )
    metric, filter_name = next(iter(measured))
    better = (raw["higher_is_better"].get(name) or {}).get(metric)
    result = {
        **measured[metric, filter_name],
        "metric": _label(metric, filter_name),
        "n": int(raw["results"][name].get("sample_len") or 0),
        "fewshot": raw["n-shot"].get(name),
        "higher_is_better": better is not False,
        "metrics": {_label(*key): figures for key, figures in measured.items()},
    }
    return result, metric, filter_name


def task_score(raw: dict, name: str, task: typing.Any) -> dict:
    """A task's score, metric, n and metrics, and where they are known standard_error, chance, trivial and examples. ValueError where it has no number."""
    measured = measured_of(raw, name)
    if not measured:
        raise ValueError(f"--tasks: {name} gave no number; leave it out")
    listed = [item.get("metric") for item in getattr(task.config, "metric_list", None) or []]
    result, metric, filter_name = _score(raw, name, measured, listed)
    samples = [sample for sample in raw["samples"][name] if sample["filter"] == filter_name]
    stated = getattr(task.config, "metadata", None)
    stated = stated if isinstance(stated, dict) else {}
    result |= {key: float(stated[key]) for key in ("chance", "trivial") if _is_number(stated.get(key))}
    if isinstance(stated.get("trivial_name"), str):
        result["trivial_name"] = stated["trivial_name"]
    if metric in BY_CHOICE and task.OUTPUT_TYPE == "multiple_choice":
        result["chance"] = _mean(_guess(task, sample) for sample in samples)
    examples = [_example(task, sample, metric) for sample in samples[:N_EXAMPLES]]
    if metric == "bits_per_byte" and "standard_error" not in result:
        result |= error_of_rate([sample[metric] for sample in samples])
    return result | ({"examples": examples} if all(examples) and examples else {})


def group_score(raw: dict, name: str, measured: dict[tuple[str, str], dict], parts: list[dict]) -> dict:
    """A group's, of what lm_eval measured of it; chance is the mean over the questions of its parts."""
    result, _, _ = _score(raw, name, measured)
    result["n"] = result["n"] or sum(part["n"] for part in parts)
    if all("chance" in part for part in parts):
        result["chance"] = sum(part["chance"] * part["n"] for part in parts) / max(sum(part["n"] for part in parts), 1)
    return result


def _guess(task: typing.Any, sample: dict) -> float:
    """What guessing scores on this question: right choices / choices."""
    choices, target = task.doc_to_choice(sample["doc"]), sample["target"]
    return (len(set(target)) if isinstance(target, list) and not task.multiple_input else 1) / len(choices)


def error_of_rate(pairs: list[tuple[float, int]]) -> dict[str, float]:
    """Standard error of -sum(nats) / sum(bytes) in bits, over texts: that of a ratio of sums (Cochran 1977, section 2.11)."""
    n, nats, size = len(pairs), sum(a for a, _ in pairs), sum(b for _, b in pairs)
    if n < 2 or not size:
        return {}
    spread = sum((a - nats / size * b) ** 2 for a, b in pairs) * n / (n - 1)
    return {"standard_error": math.sqrt(spread) / size / math.log(2)}


def _example(task: typing.Any, sample: dict, metric: str) -> dict | None:
    """Question, answer, what was wanted and the score, for a person to look at; None where there is nothing to see."""
    score, answer, wanted = sample.get(metric), None, sample["target"]
    context = sample["arguments"][0][0]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        nats = [response[0] for response in sample["filtered_resps"]][: len(choices)]
        length = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}.get(metric, lambda text: 1)
        answer = choices[max(range(len(nats)), key=lambda i: nats[i] / max(length(choices[i]), 1))]
        wanted = choices[wanted] if isinstance(wanted, int) and 0 <= wanted < len(choices) else wanted
    elif task.OUTPUT_TYPE == "generate_until":
        answer = sample["resps"][0][0]
    if answer is None or not _is_number(score):
        return None
    question = context.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
    texts = {"question": question[-LONGEST_EXAMPLE:], "answer": str(answer).strip(), "wanted": str(wanted)}
    return {key: text[:LONGEST_EXAMPLE] for key, text in texts.items()} | {"score": float(score)}


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def _is_number(value: object) -> bool:
    """Finite, so that it is a number in JSON too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
