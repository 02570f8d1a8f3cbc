"""Known-answer tasks on the exercises' held-out items, each beside chance and the best trivial answer.

    results = run_tasks(run)          # {"sums": {"score": 0.93, "chance": 0.005, "trivial": 0.01, "n": 200, ...}, ...}

Answers are generated greedily, in batches, from the chat prompt (so under `moe_infer`), and every score is in [0, 1].
`continue` is multiple choice by likelihood: a verse can go on well in many ways, but four given rests can be compared.
Trivial answers are computed from the same items: the most frequent answer, and copying from the question.
"""

from __future__ import annotations

import collections
import difflib
import math
import random
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data.chat import encode_conversation, encode_prompt
from data.exercises import TASKS, held_out_exchanges
from data.verse_exercises import ASKED_BOOKS, word_f1
from model.generate import generate

if typing.TYPE_CHECKING:
    from train.checkpoint import Run

BATCH_SIZE = 50  # prompts, or choices, of one forward pass
N_CHOICES = 4
N_EXAMPLES = 3  # answers kept in the result, to look at


@dataclass(frozen=True)
class Item:
    """One question, its answer, and where it is a choice, the others."""

    messages: list[dict[str, str]]  # the question: ends with the user's turn
    answer: str
    choices: list[str] | None = None  # the answer among others; None: an answer is generated


@dataclass(frozen=True)
class Task:
    """A kind of question with a known answer, and what its score is to be compared with."""

    name: str
    metric: str  # what the score means
    items: list[Item]
    chance: float  # expected score of an answer drawn at random
    trivial: tuple[str, float]  # the best answer that needs no understanding: what it does, its score
    score: Callable[[str, str], float]  # (given answer, wanted answer) -> 0 to 1


def tasks(limit: int | None = None) -> dict[str, Task]:
    """Every task, with its first `limit` items."""
    _check_limit(limit)
    return {name: _task(name, limit) for name in TASKS}


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} must be at least 1 item per task")


def run_tasks(run: Run, names: Iterable[str] | None = None, limit: int | None = None) -> dict[str, dict]:
    """Asks `run`'s model the items of the named tasks (None: all) and scores its answers.

    Returns per task score, chance, trivial, n, and trivial_name, metric, standard_error, examples; for generated answers also
    `ended`, the fraction that ended by themselves, and `too_long`, questions that do not fit the context (they score 0).
    Raises ValueError for an unknown task.
    """
    chosen = list(TASKS) if names is None else list(names)
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
            raise ValueError(f"tasks: {name!r} is no task; {remedy}")
    _check_limit(limit)
    return {name: _run_task(run, _task(name, limit)) for name in chosen}


def _run_task(run: Run, task: Task) -> dict:
    extra: dict = {}
    if task.items[0].choices is not None:
        answers = _choose(run, task.items)
    else:
        answers, extra = _answer(run, task.items)
    scores = [task.score(answer, item.answer) for answer, item in zip(answers, task.items)]
    n = len(scores)
    mean = sum(scores) / n
    variance = sum((s - mean) ** 2 for s in scores) / max(n - 1, 1)
    examples = [
        {"question": item.messages[-1]["content"], "answer": answer, "wanted": item.answer, "score": score}
        for item, answer, score in list(zip(task.items, answers, scores))[:N_EXAMPLES]
    ]
    return {
        "score": mean,
        "chance": task.chance,
        "trivial": task.trivial[1],
        "n": n,
        "trivial_name": task.trivial[0],
        "metric": task.metric,
        "standard_error": math.sqrt(variance / n),
        **extra,
        "examples": examples,
    }


def _answer(run: Run, items: list[Item]) -> tuple[list[str], dict]:
    """Greedy answers, each at most half as long again as the longest wanted one."""
    tokenizer = run.tokenizer
    prompts = [encode_prompt(tokenizer, item.messages) for item in items]
    longest = max(len(tokenizer.encode(item.answer)) for item in items)
    max_new_tokens = longest * 3 // 2 + 4
    room = run.model.config.max_position_embeddings - max_new_tokens
    fitting = sorted((i for i in range(len(items)) if len(prompts[i]) <= room), key=lambda i: (len(prompts[i]), i))
    answers = [""] * len(items)
    ended = 0
    with torch.inference_mode(), run.autocast():
        for start in range(0, len(fitting), BATCH_SIZE):
            rows = fitting[start : start + BATCH_SIZE]
            outputs = generate(
                run.model,
                [prompts[i] for i in rows],
                max_new_tokens=max_new_tokens,
                stop_ids=(tokenizer.im_end_id, tokenizer.eos_id),
                temperature=0.0,
            )
            for i, ids in zip(rows, outputs):
                answers[i] = tokenizer.decode(ids).strip()
                ended += len(ids) < max_new_tokens
    return answers, {"ended": ended / len(items), "too_long": len(items) - len(fitting)}


def _choose(run: Run, items: list[Item]) -> list[str]:
    """Of each item's choices the likeliest per byte (a sum would favour the short, a mean per token the common words)."""
    candidates = [(i, choice) for i, item in enumerate(items) for choice in item.choices]
    encoded = [
        encode_conversation(run.tokenizer, [*items[i].messages, {"role": "assistant", "content": choice}])
        for i, choice in candidates
    ]
    nats = _nats(run, encoded)
    best: dict[int, tuple[float, str]] = {}
    for (i, choice), loss in zip(candidates, nats):
        best[i] = min(best.get(i, (math.inf, "")), (loss / len(choice.encode()), choice))
    return [best[i][1] for i in range(len(items))]


def _nats(run: Run, encoded: list[tuple[list[int], list[int]]]) -> list[float]:
    """Negative log-likelihood, in nats, of each conversation's learned tokens; too long ones give infinity."""
    limit = run.model.config.max_position_embeddings
    order = sorted((i for i in range(len(encoded)) if len(encoded[i][0]) <= limit), key=lambda i: len(encoded[i][0]))
    nats = [math.inf] * len(encoded)
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        T = max(len(encoded[i][0]) for i in rows)
        ids = torch.full((len(rows), T), run.tokenizer.pad_id)
        learned = torch.zeros(len(rows), T, dtype=torch.bool)
        real = torch.zeros(len(rows), T, dtype=torch.bool)
        for row, i in enumerate(rows):
            tokens, mask = encoded[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            learned[row, : len(tokens)] = torch.tensor(mask, dtype=torch.bool)
            real[row, : len(tokens)] = True
        ids, learned, real = (x.to(run.device) for x in (ids, learned, real))
        with torch.inference_mode(), run.autocast():
            logits = run.model(ids, attention_mask=real).logits[:, :-1]  # (B, T-1, V)
        each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        for i, loss in zip(rows, (each * learned[:, 1:]).double().sum(1).tolist()):
            nats[i] = loss
    return nats


# ---- scoring ----------------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _last_number(given: str, wanted: str) -> float:
    return float(_numbers(given)[-1:] == _numbers(wanted)[-1:])


def _same_text(given: str, wanted: str) -> float:
    """Case, punctuation and spaces aside."""
    return float(re.findall(r"\w+", given.lower()) == re.findall(r"\w+", wanted.lower()))


def _same_letters(given: str, wanted: str) -> float:
    return float(re.sub(r"\W", "", given.lower()) == re.sub(r"\W", "", wanted.lower()))


# ---- the tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    metric: str
    score: Callable[[str, str], float]
    chance: float | None = None  # None: the score of another item's answer
    copies: dict[str, Callable[[str], str]] | None = None  # what a trivial answer does -> question to answer


def _nth_number(n: int) -> Callable[[str], str]:
    return lambda question: _numbers(question)[n]


def _after_colon(question: str) -> str:
    return question.split(": ", 1)[-1]


_KINDS = {
    "sums": _Kind(
        "exact: the last number of the answer",
        _last_number,
        1 / 199,
        {"copying the first number": _nth_number(0), "copying the second number": _nth_number(1)},
    ),
    "compare": _Kind(
        "exact: the last number of the answer",
        _last_number,
        1 / 2,
        {"copying the first number": _nth_number(0), "copying the second number": _nth_number(1)},
    ),
    "backwards": _Kind(
        "exact: all letters",
        _same_letters,
        None,
        {"copying the input": lambda question: "".join(re.findall(r"\b[a-z]\b", question))},
    ),
    "modern": _Kind("F1 of the words", word_f1, None, {"copying the input": _after_colon}),
    "testament": _Kind("exact", _same_text, 1 / 2),
    "book": _Kind("exact", _same_text, 1 / len(ASKED_BOOKS)),
    "continue": _Kind("choice by likelihood", _same_text, 1 / N_CHOICES),
}
assert _KINDS.keys() == TASKS.keys()


def _task(name: str, limit: int | None) -> Task:
    kind = _KINDS[name]
    exchanges = held_out_exchanges(name)
    choices = _rests_of_like_length([e.answer for e in exchanges]) if name == "continue" else [None] * len(exchanges)
    items = [
        Item([{"role": "user", "content": e.question}], e.answer, choice) for e, choice in zip(exchanges, choices)
    ][:limit]
    answers = [item.answer for item in items]
    chance = kind.chance
    if chance is None:  # each item answered with its neighbour's answer
        chance = _mean(kind.score(other, answer) for other, answer in zip(answers[1:] + answers[:1], answers))
    return Task(name, kind.metric, items, chance, _best_trivial(kind, items), kind.score)


def _best_trivial(kind: _Kind, items: list[Item]) -> tuple[str, float]:
    wanted = [item.answer for item in items]
    ways: dict[str, list[str]] = {}
    if items[0].choices is None:
        majority = collections.Counter(wanted).most_common(1)[0][0]
        ways[f"always the most frequent answer ({majority})" if len(majority) < 25 else "always the same answer"] = [
            majority
        ] * len(items)
        for way, copy in (kind.copies or {}).items():
            ways[way] = [copy(item.messages[-1]["content"]) for item in items]
    else:
        ways["the longest choice"] = [max(item.choices, key=len) for item in items]
        ways["the shortest choice"] = [min(item.choices, key=len) for item in items]
        ways["the choice sharing most words with the question"] = [
            max(item.choices, key=lambda choice, item=item: word_f1(choice, item.messages[-1]["content"]))
            for item in items
        ]
    scores = {way: _mean(kind.score(a, w) for a, w in zip(answers, wanted)) for way, answers in ways.items()}
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def _rests_of_like_length(rests: list[str]) -> list[list[str]]:
    """For each rest three others of the list, near in length; the true one at a random place, also by length.

    Every rest is another's wrong choice about as often as it is right, so a likely sounding rest alone wins nothing.
    """
    rng = random.Random("choices")
    by_length = sorted(range(len(rests)), key=lambda i: (len(rests[i]), i))
    chosen: list[list[str]] = [[] for _ in rests]
    for place, i in enumerate(by_length):
        start = max(0, min(place - rng.randrange(N_CHOICES), len(rests) - N_CHOICES))
        chosen[i] = [rests[j] for j in by_length[start : start + N_CHOICES]]
        assert rests[i] in chosen[i], (place, start)
        rng.shuffle(chosen[i])
    return chosen


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
