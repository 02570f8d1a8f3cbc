"""Run folders made from formulas, and pages read as a browser would: for tests of what shows a run."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import yaml

LAYERS, EXPERTS = [1, 2, 3, 4], 8


def make_run(
    folder: Path, *, chat=False, experts=EXPERTS, steps=600, log_every=5, init_from=None, evaluated=True, layers=None
) -> Path:
    """A run folder like train/ and eval/ write it, from formulas instead of training."""
    layers = LAYERS if layers is None else layers
    noise = random.Random(steps + chat)
    folder.mkdir(parents=True)
    sources = ["exercises", "say-it-modern"] if chat else ["bbe", "web", "kjv"]
    config = {
        "name": folder.name,
        "seed": 0,
        "model": {
            "hidden_size": 192,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "n_routed_experts": experts,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "vocab_size": 4096,
            "max_position_embeddings": 256,
        },
        "data": {
            "format": "chat" if chat else "text",
            "sources": [{"name": name, "kind": "embedded", "corpus": name} for name in sources],
        },
        "train": {"steps": steps, "tokens_per_step": 8192, "init_from": init_from, "learning_rate": 0.003},
        "eval": {"every": 50, "best_source": None if chat else "bbe"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    low, high = (1.2, 3.0) if chat else (2.35, 8.2)
    rows = []
    for step in range(log_every, steps + 1, log_every):
        done = step / steps
        loss = low + (high - low) * math.exp(-14 * done) + 0.8 * math.exp(-3 * done) + noise.gauss(0, 0.05)
        row = {
            "kind": "train",
            "step": step,
            "tokens": step * 8192,
            "train_seconds": step * 0.42,
            "loss": loss,
            "balance_loss": 1.02,
            "aux_loss": 0.0102,
            "z_loss": 0.0,
            "learning_rate": 0.003 * (1 - done),
            "grad_norm": 0.5,
            "tokens_per_second": 19000 + noise.gauss(0, 300),
            "mfu": None,
            "memory_gib": 1.4,
            "skipped_steps": 0,
        }
        if experts:
            load = []
            for layer in layers:
                tilt = [
                    1
                    + 1.6 * math.exp(-8 * done) * math.sin(2.1 * e + layer)
                    + noise.gauss(0, 0.08)
                    + 0.25 * math.sin(5 * e * layer)
                    for e in range(experts)
                ]
                tilt = [max(0.0, t) for t in tilt]
                load.append([t / sum(tilt) for t in tilt])
            row["routing"] = {
                "layers": layers,
                "load": load,
                "max_vio": [max(x) * experts - 1 for x in load],
                "load_entropy": [0.97 for _ in layers],
                "router_entropy": [
                    math.log(experts) * (0.35 + 0.12 * i + 0.5 * math.exp(-6 * done)) + noise.gauss(0, 0.01)
                    for i in range(len(layers))
                ],
                "dead": [sum(v == 0 for v in x) for x in load],
            }
        rows.append(row)
        if step % (10 * log_every) == 0 or step == steps > log_every:
            held = {
                name: {
                    "loss": loss + 0.1 * i,
                    "perplexity": math.exp(loss + 0.1 * i),
                    "bits_per_byte": (loss + 0.1) / 2 + 0.12 * i,
                    "tokens": 40000,
                    "bytes": 150000,
                }
                for i, name in enumerate(sources)
            }
            rows.append(
                {
                    "kind": "held_out",
                    "step": step,
                    "tokens": step * 8192,
                    "train_seconds": step * 0.42,
                    "sources": held,
                    "loss": loss + 0.08,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        "the the of and , and",
        "And the son of the king said , I will go up",
        "And he said to them, Let us go to the house of the Lord, and give him praise.",
    ]
    prompts = (
        [
            "What is 17 + 25?",
            "Spell the word bread backwards.",
            "Which book is this verse from? <b>In the beginning</b>",
        ]
        if chat
        else ["In the beginning", "And Ruth said"]
    )
    samples = [
        {"step": step, "prompt": prompt, "text": "42" if chat else " " + texts[min(2, i)]}
        for i, step in enumerate(range(min(100, steps), steps + 1, min(100, steps)))
        for prompt in prompts
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    run = {
        "machine": {
            "device": "a laptop CPU",
            "cores": 2,
            "processes": 1,
            "threads_per_process": 2,
            "torch": "2.13.0",
            "python": "3.11.7",
            "system": "Linux",
        },
        "started": "2026-11-22T00:10:00",
        "sessions": [{"started": "2026-11-22T00:10:00", "seconds": steps * 0.43, "from_step": 0, "to_step": steps}],
    }
    (folder / "run.json").write_text(json.dumps(run))
    if chat:
        (folder / "stages.json").write_text(
            json.dumps({"setup": 41, "tokenizer": 3, "prepare-pretrain": 6, "pretrain": 262, "sft": 90})
        )
    if evaluated:
        held = next((row["sources"] for row in reversed(rows) if "sources" in row), {})
        words = [
            " the",
            " king",
            ",",
            " said",
            "\n",
            " Lord",
            "ing",
            " of",
            "1",
            "ed",
            " he",
            " house",
            ".",
            " and",
            " Ruth",
        ]
        evaluation = {"heldout": held, "tasks": {}, "routing": {}, "seconds": 21.4, "step": steps}
        if experts:
            evaluation["routing"] = {
                "layers": layers,
                "experts": experts,
                "load": rows[-1].get("routing", rows[-2].get("routing"))["load"],
                "typical_tokens": [
                    [
                        [{"token": noise.choice(words), "lift": experts / 2 - j * 0.3, "count": 50} for j in range(8)]
                        for _ in range(experts)
                    ]
                    for _ in layers
                ],
            }
        if chat:
            example = {"question": "What is 8 + 31?", "answer": "39", "wanted": "39", "score": 1.0}
            wrong = {
                "question": "Say in modern English: Thou shalt not steal.",
                "answer": "You shall not take.",
                "wanted": "You shall not steal.",
                "score": 0.75,
            }
            evaluation["tasks"] = {
                "small_sums": {
                    "score": 0.93,
                    "chance": 0.005,
                    "trivial": 0.012,
                    "trivial_name": "always the most frequent answer (105)",
                    "metric": "exact: the last number of the answer",
                    "n": 500,
                    "standard_error": 0.011,
                    "examples": [example],
                },
                "book_of_verse": {
                    "score": 0.41,
                    "chance": 0.0152,
                    "trivial": 0.08,
                    "trivial_name": "majority",
                    "n": 400,
                },
                "modern_english": {
                    "score": 0.22,
                    "chance": 0.0,
                    "trivial": 0.18,
                    "trivial_name": "copying the input",
                    "metric": "F1 of the words",
                    "n": 300,
                    "examples": [wrong],
                },
                "reverse_word": {"score": 0.04, "chance": 0.0, "trivial": 0.051, "n": 300},
            }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks nesting, and collects texts, tag names and everything a browser would load."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.tags, self.loads, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data") or name.startswith("on")
        ]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing, open: {self.stack}"

    def handle_data(self, data):
        self.texts.append(data)
