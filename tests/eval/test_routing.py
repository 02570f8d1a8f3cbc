"""Routing counts: every real token counts k times in each layer, padding never, and typical tokens are the favoured ones."""

from __future__ import annotations

import math

import pytest
import torch

from data.prepare import open_prepared
from eval.loss import held_out
from eval.routing import LEAST_TIMES, RoutingRecorder
from model.balance import router_entropy


def recorded(run, batch_size=None):
    with RoutingRecorder(run.model) as recorder:
        held_out(run, batch_size=batch_size, recorder=recorder)
    return recorder


@pytest.mark.parametrize("chat", [False, True])
def test_every_real_token_counts_k_times_in_each_layer(make_run, chat):
    run = make_run(chat=chat)
    prepared_tokens = 0

    rows = open_prepared(run.config.data, run.tokenizer).held_out("tales", run.config.context_length, chat)
    for batch in rows.batches(1):
        prepared_tokens += (
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        )
    if chat:
        assert any("attention_mask" in batch and not batch["attention_mask"].all() for batch in rows.batches(1)), (
            "no padding"
        )

    summary = recorded(run).summary(run.tokenizer)

    assert summary["layers"] == [1, 2]
    assert summary["tokens"] == prepared_tokens
    for counts, load, dead in zip(summary["tokens_per_expert"], summary["load"], summary["dead"], strict=True):
        assert sum(counts) == prepared_tokens * 2
        assert sum(load) == pytest.approx(1.0)
        assert dead == counts.count(0)


def test_counts_and_entropy_equal_plain_loops_and_no_batch_size_shows(make_run):
    run = make_run()
    counts, entropy, tokens = torch.zeros(2, 5, dtype=torch.int64), [0.0, 0.0], 0
    routings = []
    for _, moe in run.model.moe_layers():
        original = moe.gate.route

        def route(hidden, original=original):
            routing = original(hidden)
            routings.append(routing)
            return routing

        moe.gate.route = route

    rows = open_prepared(run.config.data, run.tokenizer).held_out("tales", run.config.context_length, False)
    with torch.inference_mode():
        for batch in rows.batches(1):
            routings.clear()
            run.model(batch["input_ids"])
            real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            tokens += real
            for layer, routing in enumerate(routings):
                for t in range(real):
                    for expert in routing.topk_idx[0, t].tolist():
                        counts[layer, expert] += 1
                    entropy[layer] += router_entropy(routing.scores)[0, t].item()

    for batch_size in (1, 7):
        summary = recorded(run, batch_size).summary()
        assert summary["tokens_per_expert"] == counts.tolist()
        assert summary["router_entropy"] == pytest.approx([e / tokens for e in entropy], rel=1e-5)
    assert max(summary["router_entropy"]) <= math.log(5)


def test_typical_tokens_are_those_the_router_favours(make_run):
    """A router made to send one token to expert 3 shows it as expert 3's first, with its lift."""
    run = make_run(num_hidden_layers=1, first_k_dense_replace=0, num_experts_per_tok=1, norm_topk_prob=False)
    ids = torch.cat([b["input_ids"].flatten() for b in _batches(run)])
    times = ids.bincount()
    favourite = int(times.argmax())
    gate = run.model.moe_layers()[0][1].gate
    seen = []

    def route(hidden):
        chosen = torch.where(seen[-1] == favourite, 3, seen[-1] % 3).unsqueeze(-1)
        scores = torch.nn.functional.one_hot(chosen.squeeze(-1), 5).float() * 0.96 + 0.01
        return type(gate).route(gate, hidden)._replace(topk_idx=chosen, scores=scores)

    gate.route = route
    with torch.inference_mode(), RoutingRecorder(run.model) as recorder:
        for batch in recorder.watch("tales", _batches(run)):
            seen.append(batch["input_ids"])
            run.model(**batch)
    (layer,) = recorder.typical_tokens(run.tokenizer)

    real = sum(
        int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in _batches(run)
    )
    count = sum(
        int(((b["input_ids"] == favourite) & b.get("attention_mask", torch.tensor(True))).sum()) for b in _batches(run)
    )
    assert count > LEAST_TIMES
    assert layer[3][0]["token"] == run.tokenizer.decode([favourite], skip_special_tokens=False)
    assert layer[3][0]["count"] == count
    assert layer[3][0]["lift"] == pytest.approx(real / count, abs=1e-3)  # P(3 | token) is 1, P(3) is the token's share
    assert len(layer[3]) == 1 and layer[4] == []


def test_the_recorder_leaves_the_model_as_it_was(make_run):
    run = make_run()
    recorded(run)
    for _, moe in run.model.moe_layers():
        assert "auxiliary_loss" not in vars(moe.gate)
        assert moe.gate.tokens_per_expert.sum() == 0, "evaluation tokens reached the training counts"


def test_a_dense_model_has_no_routing(make_run):
    run = make_run(n_routed_experts=0)
    assert recorded(run).summary(run.tokenizer) == {}


def _batches(run):

    prepared = open_prepared(run.config.data, run.tokenizer)
    return list(prepared.held_out("tales", run.config.context_length, False).batches(5))
