"""Continuous batching: company changes nothing, whoever joins or leaves, and what is reported is what happened."""

import math
import random

import pytest
import torch

from model import batching
from model.batching import Batch, Row, Sampling
from model.generate import NOT_A_NUMBER, stream

from .test_generate import FixedHead

MODELS = {
    "default": {"num_hidden_layers": 3},
    "dense": {"n_routed_experts": 0},
    "sigmoid, QK-norm, a dense layer first": {
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "first_k_dense_replace": 1,
    },
    "many experts": {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 0},
}


EVERYDAY = ("default", "sigmoid, QK-norm, a dense layer first")


@pytest.fixture(params=[name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def model(request, tiny_model):
    return tiny_model(tie_word_embeddings=False, **MODELS[request.param]).eval()


def some_rows(n: int, seed: int) -> list[Row]:
    """Prompts and options of every kind, greedy ones among them."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        prompt = [draw.randrange(61) for _ in range(draw.choice((1, 2, 5, 17, 40)))]
        options = {
            "temperature": draw.choice((0.0, 0.7, 1.5)),
            "top_k": draw.choice((0, 7)),
            "top_p": draw.choice((1.0, 0.8)),
        }
        options["repetition_penalty"] = draw.choice((1.0, 1.3))
        rows.append(Row(prompt, Sampling(draw.choice((1, 8, 30)), seed=i, experts=i % 2 == 0, **options)))
    return rows


def alone(model, row: Row) -> list[int]:
    o = row.sampling
    return list(
        stream(
            model, row.prompt, max_new_tokens=o.max_new_tokens, stop_ids=o.stop_ids, temperature=o.temperature, top_k=o.top_k,
            top_p=o.top_p, repetition_penalty=o.repetition_penalty, seed=o.seed,
        )
    )  # fmt: skip


def run(batch: Batch, rows: list[Row], seed: int = 0, at_once: int = 5) -> dict[Row, list[batching.Event]]:
    """Lets rows join at odd moments, at most `at_once` together, and steps until all have ended."""
    draw, waiting, events = random.Random(seed), list(rows), {row: [] for row in rows}
    while waiting or batch.rows:
        happened = []
        if waiting and len(batch.rows) < at_once and (not batch.rows or draw.random() < 0.5):
            happened += batch.join(waiting.pop(0))
        happened += batch.step()
        for event in happened:
            events[event.row].append(event)
    return events


def tokens(events: list[batching.Event]) -> list[int]:
    return [event.token.id for event in events if event.token is not None]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_row_says_in_company_what_it_says_alone(model, seed):
    rows = some_rows(14, seed)
    events = run(Batch(model), rows, seed)
    for row in rows:
        assert tokens(events[row]) == alone(model, row), f"{row.sampling} on a prompt of {len(row.prompt)}"
        assert [event.finish for event in events[row] if event.finish] == ["length"], "and ends once, last of all"
        assert events[row][-1].finish
    assert len({tuple(tokens(events[row])) for row in rows}) > 7, "rows that all say the same would prove little"


def test_a_row_that_is_taken_out_changes_nobody_else(model):
    rows = some_rows(6, 1)
    rows = [Row(row.prompt[:10], Sampling(30, temperature=1.0, seed=i)) for i, row in enumerate(rows)]
    batch, said = Batch(model), {row: [] for row in rows}
    events = [event for row in rows for event in batch.join(row)]
    for step in range(40):
        events += batch.step()
        if step in (3, 4, 9):
            batch.leave(rows[step % 5])  # the fourth, the last but one, which has moved by then, and that one again
    for event in events:
        said[event.row] += tokens([event])
    for i, row in enumerate(rows):
        if i in (3, 4):
            assert 0 < len(said[row]) < 30 and said[row] == alone(model, row)[: len(said[row])]
        else:
            assert said[row] == alone(model, row)


def test_experts_are_those_that_read_each_token(model):
    rows = [row for row in some_rows(12, 3) if row.sampling.experts]
    moe_layers = [layer for layer, _ in model.moe_layers()]
    for row, events in run(Batch(model), rows, at_once=4).items():
        told = [event.token.experts for event in events if event.token is not None]
        if not moe_layers:
            assert set(map(str, told)) == {"None"}
            continue
        with torch.no_grad():
            _, routings = model._hidden_states(torch.tensor([[*row.prompt, *tokens(events)]]), None, None, None, None)
        read = torch.stack([routing.topk_idx[0, len(row.prompt) :] for _, routing in routings], dim=1)
        assert told == read.tolist(), "one list a token, one entry a layer, best first"


def test_logprobs_are_the_models_own(model):
    row = Row([5, 3, 60], Sampling(10, temperature=1.5, top_k=5, repetition_penalty=1.3, seed=1, logprobs=3))
    events = run(Batch(model), [row, *some_rows(3, 2)])[row]
    said = tokens(events)
    with torch.no_grad():
        expected = model(torch.tensor([[*row.prompt, *said]])).logits[0, 2:-1].log_softmax(-1)
    for event, token, logprobs in zip(events[:10], said, expected, strict=True):
        assert event.token.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        best = logprobs.topk(3)
        assert [best_id for best_id, _ in event.token.likeliest] == best.indices.tolist()
        assert [p for _, p in event.token.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_stop_token_ends_its_row_and_is_left_out(model):
    free = alone(model, Row([7, 7, 2], Sampling(20, temperature=1.5)))
    stop = free[6]
    for experts in (False, True):
        row = Row([7, 7, 2], Sampling(20, temperature=1.5, stop_ids={stop}, experts=experts))
        events = run(Batch(model), [row, *some_rows(4, 5)])[row]
        assert tokens(events) == free[: free.index(stop)] and events[-1].finish == "stop"


def test_the_context_is_the_end(tiny_model):
    model = tiny_model(max_position_embeddings=16).eval()
    for experts in (False, True):
        rows = [Row([1] * n, Sampling(100, seed=n, experts=experts)) for n in (10, 3, 15)]
        events = run(Batch(model), rows)
        assert [len(tokens(events[row])) for row in rows] == [6, 13, 1], (
            "no more, though the last token is read for its experts"
        )
        assert all(events[row][-1].finish == "length" for row in rows)


def test_the_cache_grows_and_goes_back(tiny_model, monkeypatch):
    monkeypatch.setattr(batching, "FIRST_POSITIONS", 4)
    model = tiny_model().eval()
    batch, rows = Batch(model), some_rows(9, 7)
    first = batch.cache.layers[0].numel()
    events = run(batch, rows, at_once=6)
    assert all(tokens(events[row]) == alone(model, row) for row in rows)
    assert batch.cache.layers[0].numel() == first, "after the last row the memory is given back"
    for _ in range(6):
        batch.join(Row([1] * 40, Sampling(64)))
    assert 6 * 64 == batch.cache.layers[0][:6, 0, :, 0].numel(), "the context bounds it"
    assert sum(layer.nbytes for layer in batch.cache.layers) == batching.cache_bytes(model, 6), "8 slots"


def test_a_bfloat16_model_is_batched(tiny_model):
    """Half the memory; rounded so coarsely that company may change a word, but not that words come."""
    model = tiny_model(dtype=torch.bfloat16).eval()
    rows = some_rows(6, 4)
    events = run(Batch(model), rows)
    assert [len(tokens(events[row])) for row in rows] == [len(alone(model, row)) for row in rows]


def test_penalties_follow_what_was_said(tiny_model):
    model = tiny_model(num_hidden_layers=1).eval()
    model.lm_head = FixedHead(torch.tensor([3.0, 2.5, 1.0] + [-100.0] * 58))

    def say(**penalties) -> list[int]:
        row = Row([0, 0, 0], Sampling(6, temperature=0, **penalties))
        return tokens(run(Batch(model), [row])[row])

    assert say() == [0] * 6
    assert say(presence_penalty=1.0) == [0, 1, 0, 0, 0, 0], (
        "3, then 2.5 against 2, then 2 against 1.5 and stays: taken once"
    )
    assert say(frequency_penalty=0.8) == [0, 1, 0, 1, 0, 2], (
        "3 2.5 2.2 1.7 1.4 | 1: taken each time; the prompt does not count"
    )
    assert say(presence_penalty=-1.0) == [0] * 6


def test_a_row_that_breaks_ends_alone(tiny_model):
    model = tiny_model(tie_word_embeddings=False).eval()
    healthy = [Row([5, 3, 60], Sampling(12, seed=1)), Row([1, 2], Sampling(12, seed=2))]
    expected = [alone(model, row) for row in healthy]
    used = {token for row, said in zip(healthy, expected) for token in (*row.prompt, *said)}
    broken = next(token for token in range(61) if token not in used)
    with torch.no_grad():
        model.embed_tokens.weight[broken] = math.nan
    batch = Batch(model)
    events = batch.join(Row([broken] * 30, Sampling(5)))
    assert [(event.finish, event.error) for event in events] == [("error", NOT_A_NUMBER)] and batch.rows == []

    batch, said = Batch(model), {row: [] for row in healthy}
    happened = batch.join(healthy[0]) + batch.step()
    happened += batch.join(Row([broken] * 30, Sampling(5)))  # leaves its NaN behind, where the next one will lie
    happened += batch.join(healthy[1])
    while batch.rows:
        happened += batch.step()
    for event in happened:
        if event.row in said:
            said[event.row] += tokens([event])
    assert list(said.values()) == expected


@pytest.mark.parametrize(
    "prompt, options, named",
    [
        ([], {}, "prompt: 0 tokens"),
        ([1] * 64, {}, "prompt: 64 tokens"),
        ([1], {"temperature": -1.0}, "temperature: -1"),
        ([1], {"top_p": 0.0}, "top_p: 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_no_trace(tiny_model, prompt, options, named):
    batch = Batch(tiny_model().eval())
    with pytest.raises(ValueError, match=named):
        batch.join(Row(prompt, Sampling(5, **options)))
    assert batch.rows == [] and batch.cache.lengths == [] and batch.step() == []
