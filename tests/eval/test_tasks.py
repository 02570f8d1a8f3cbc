"""The tasks' arithmetic, checked with answers that are known, and the model's part checked against one row at a time."""

import math
import types

import pytest
import torch

from data.chat import encode_conversation, encode_prompt
from eval import tasks as module
from eval.tasks import run_tasks, tasks


@pytest.fixture(scope="module")
def known():
    return tasks()


@pytest.fixture
def run(make_run):
    return make_run(chat=True, max_position_embeddings=640)


def answering(run, known, answer):
    """A stand-in for `generate` that answers each prompt with the ids of `answer(item)`, cut as generate would."""
    by_prompt = {
        tuple(encode_prompt(run.tokenizer, item.messages)): item for task in known.values() for item in task.items
    }

    def generate(model, prompts, *, max_new_tokens, stop_ids, temperature):
        assert temperature == 0 and run.tokenizer.im_end_id in stop_ids
        return [run.tokenizer.encode(answer(by_prompt[tuple(prompt)]))[:max_new_tokens] for prompt in prompts]

    return generate


def test_every_task_has_items_a_question_and_an_honest_comparison(known):
    for name, task in known.items():
        assert task.name == name and 100 <= len(task.items) <= 300
        assert all(item.messages[-1]["role"] == "user" and item.answer for item in task.items)
        assert 0 <= task.chance < 1 and 0 <= task.trivial[1] < 1 and task.trivial[0]
        assert all(task.score(item.answer, item.answer) == 1.0 for item in task.items), (
            f"{name}: right scores less than 1"
        )
        assert all(task.score("", item.answer) == 0.0 for item in task.items), f"{name}: silence scores"


def test_chance_and_trivial_scores_say_what_they_claim(known):
    assert known["compare"].chance == known["testament"].chance == 1 / 2
    assert known["book"].chance == known["book"].trivial[1] == 1 / 8, "the eight books are not equally many"
    assert known["testament"].trivial[1] == 1 / 2
    assert known["continue"].chance == 1 / 4
    assert known["sums"].trivial[1] < 0.05
    # Copying an old verse already shares most words with the modern one: a score below this is worth nothing.
    name, score = known["modern"].trivial
    item = known["modern"].items[0]
    assert name == "copying the input" and score > 0.5 > known["modern"].chance
    assert module.word_f1(module._after_colon(item.messages[0]["content"]), item.answer) < 1


@pytest.mark.parametrize(
    "name, given, wanted, score",
    [
        ("sums", "7+8=15, 4+3+1=8, so 85.", "7+8=15, 4+3+1=8, so 85.", 1),
        ("sums", "85", "7+8=15, 4+3+1=8, so 85.", 1),
        ("sums", "7+8=15, 4+3+1=8, so 8.", "7+8=15, 4+3+1=8, so 85.", 0),
        ("sums", "85, or 86", "7+8=15, 4+3+1=8, so 85.", 0),
        ("compare", "47 is larger.", "47 is larger.", 1),
        ("compare", "38 is larger.", "47 is larger.", 0),
        ("backwards", "e n o t s", "e n o t s", 1),
        ("backwards", "enots.", "e n o t s", 1),
        ("backwards", "e n o t", "e n o t s", 0),
        ("book", "genesis", "Genesis.", 1),
        ("book", "Genesis and Exodus.", "Genesis.", 0),
        ("testament", "The New Testament.", "The Old Testament.", 0),
    ],
)
def test_scoring(known, name, given, wanted, score):
    assert known[name].score(given, wanted) == score


def test_right_answers_score_one_whatever_order_they_are_asked_in(run, known, monkeypatch):
    monkeypatch.setattr(module, "generate", answering(run, known, lambda item: item.answer))
    results = run_tasks(run, ["sums", "backwards", "modern"])
    for name, result in results.items():
        assert result["score"] == 1.0 and result["standard_error"] == 0.0, (name, result["examples"])
        assert result["n"] == 200 and result["ended"] == 1.0 and result["too_long"] == 0
        assert result["trivial"] == known[name].trivial[1]


def test_answers_that_do_not_end_are_counted(run, known, monkeypatch):
    monkeypatch.setattr(module, "generate", answering(run, known, lambda item: item.answer + " and so on" * 40))
    assert run_tasks(run, ["sums"], limit=20)["sums"]["ended"] == 0.0


def test_questions_that_do_not_fit_the_context_are_wrong_and_counted(make_run):
    result = run_tasks(make_run(chat=True, max_position_embeddings=96), ["modern"], limit=10)["modern"]
    assert result["too_long"] == 10 and result["score"] == 0.0 and result["ended"] == 0.0


def test_an_untrained_model_scores_near_chance_and_twice_the_same(run):
    first = run_tasks(run, ["testament", "continue"], limit=40)
    assert first == run_tasks(run, ["testament", "continue"], limit=40)
    assert first["testament"]["score"] < 0.2, "an untrained model knows the words of the answer"
    assert abs(first["continue"]["score"] - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40)
    assert first["continue"]["n"] == 40 and len(first["continue"]["examples"]) == 3


def test_batched_likelihoods_are_those_of_single_rows(run, known):
    items = known["continue"].items[:5]
    encoded = [
        encode_conversation(run.tokenizer, [*item.messages, {"role": "assistant", "content": choice}])
        for item in items
        for choice in item.choices
    ]
    batched = module._nats(run, encoded)
    for (ids, mask), nats in zip(encoded, batched):
        with torch.inference_mode():
            log_p = run.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
        assert nats == pytest.approx(expected, rel=1e-5)


def test_the_likeliest_choice_is_chosen(run, known, monkeypatch):
    items = known["continue"].items
    flat = [(item, choice) for item in items for choice in item.choices]
    monkeypatch.setattr(module, "_nats", lambda run, encoded: [float(c != i.answer) for i, c in flat])
    assert run_tasks(run, ["continue"])["continue"]["score"] == 1.0


def test_choices_are_four_different_rests_of_like_length_in_no_telling_order(known):
    items = known["continue"].items
    for item in items:
        assert len(set(item.choices)) == len(item.choices) == 4 and item.answer in item.choices
    places = [item.choices.index(item.answer) for item in items]
    assert all(places.count(place) > len(items) / 8 for place in range(4)), "the right choice has a favourite place"
    by_length = [sorted(item.choices, key=len).index(item.answer) for item in items]
    assert max(by_length.count(place) for place in range(4)) < 0.4 * len(items), "length gives the answer away"


def test_an_unknown_task_and_a_limit_of_none_are_explained():
    nothing = types.SimpleNamespace()
    with pytest.raises(ValueError, match="'sum' is no task; did you mean 'sums'"):
        run_tasks(nothing, ["sum"])
    with pytest.raises(ValueError, match="limit: 0 must be at least 1"):
        run_tasks(nothing, ["sums"], limit=0)
