"""Held-out figures: equal to plain loops over the definition in DESIGN.md section 2, and blind to the batch's shape."""

from __future__ import annotations

import math

import pytest
import torch

from data.chat import encode_conversation
from data.sources import is_held_out, iterate
from eval.loss import held_out


def held_out_documents(run):
    data = run.config.data
    found = [d for d in iterate(data.sources[0], data.format) if is_held_out(d, data.sources[0], data)]
    assert 10 < len(found) < 80, f"{len(found)} of 120 documents are held out: the fixture's split is no test"
    return found


@torch.inference_mode()
def nats_of(run, ids: list[int], is_target: list[bool]) -> float:
    """Cross-entropy of the marked tokens, token by token, from the logits of one unpadded row."""
    log_probabilities = run.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(-log_probabilities[t - 1, ids[t]].item() for t in range(1, len(ids)) if is_target[t])


def test_text_figures_equal_plain_loops(make_run):
    run = make_run()
    stream, n_bytes = [], 0
    for document in held_out_documents(run):
        stream += [run.tokenizer.bos_id, *run.tokenizer.encode(document.text), run.tokenizer.eos_id]
        n_bytes += len(document.text.encode("utf-8"))
    nats, targets = 0.0, 0
    T = run.config.context_length
    for start in range(0, len(stream) - 1, T - 1):
        row = stream[start : start + T]
        is_target = [token != run.tokenizer.bos_id for token in row]
        nats += nats_of(run, row, is_target)
        targets += sum(is_target[1:])

    figures = held_out(run)["tales"]

    assert figures["tokens"] == targets
    assert figures["bytes"] == n_bytes
    assert figures["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_chat_figures_count_the_assistants_words_alone(make_run):
    run = make_run(chat=True)
    nats, targets, n_bytes = 0.0, 0, 0
    for document in held_out_documents(run):
        ids, mask = encode_conversation(run.tokenizer, document.messages)
        if len(ids) > run.config.context_length:
            continue
        nats += nats_of(run, ids, [bool(m) for m in mask])
        targets += sum(mask)
        n_bytes += sum(
            len(turn["content"].encode("utf-8")) for turn in document.messages if turn["role"] == "assistant"
        )
    assert targets > 100

    figures = held_out(run)["tales"]

    assert figures["tokens"] == targets
    assert figures["bytes"] == n_bytes
    assert figures["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_batch_size_does_not_show(make_run, chat):
    run = make_run(chat=chat)
    by_size = [held_out(run, batch_size=size)["tales"] for size in (1, 3, 64)]
    for figures in by_size[1:]:
        assert figures["tokens"] == by_size[0]["tokens"]
        assert figures["bits_per_byte"] == pytest.approx(by_size[0]["bits_per_byte"], rel=1e-6)


def test_held_out_is_deterministic_and_takes_moe_infer(make_run, monkeypatch):
    run = make_run()
    taken = []
    moe = run.model.moe_layers()[0][1]
    original = moe.moe_infer
    monkeypatch.setattr(moe, "moe_infer", lambda *arguments: taken.append(1) or original(*arguments))
    assert held_out(run) == held_out(run)
    assert taken, "the held-out loss did not run through moe_infer"
