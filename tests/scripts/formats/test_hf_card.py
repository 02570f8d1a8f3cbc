"""The model card: what a hub reads of it, whose texts are in it, and that figures belong to the weights beside them."""

import ast
import json
import re

import pytest
import yaml

from scripts.export_hf import export
from scripts.formats.hf_card import check_license, escaped, model_card
from scripts.formats.hf_folder import choose_layout
from train.checkpoint import open_run

HOSTILE = "<script>alert(1)</script> | a **b** `c` [d](https://e.example) ![f](g) \u202eh\nnext # line ---"


@pytest.fixture
def card(random_run):
    """card(change=None, **options) -> the card's text; `change` may edit the run folder and the Run before."""

    def make(change=None, format="chat", license=None, **keys) -> str:
        run = open_run(random_run(format=format, **keys), device="cpu", precision="float32")
        if change:
            change(run)
        check_license(license)
        return model_card(run, choose_layout(run.model.config), "float32", license)

    return make


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_header_is_what_the_hub_reads(card):
    text = card(license="cc-by-4.0", use_qk_norm=True)
    assert text.startswith("---\n")
    assert header(text) == {
        "license": "cc-by-4.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "conversational", "qwen3_moe", "minimoe"],
    }


def test_a_dense_text_model_says_so(card):
    text = card(format="text", n_routed_experts=0)
    assert header(text)["tags"] == ["llama", "minimoe"] and header(text)["license"] == "unknown"
    assert "dense language model" in text and "not fine-tuned for chat" in text and "No licence was named" in text
    assert "routed experts" not in text and "apply_chat_template" not in text


@pytest.mark.parametrize("license", ["", "Apache 2.0", "mit\ntags: [x]", "../../x", "a" * 61, "$(id)"])
def test_a_licence_is_an_identifier(license):
    with pytest.raises(ValueError, match="--license"):
        check_license(license)


def evaluation(run, **changes) -> dict:
    figures = {"loss": 1.5, "perplexity": 4.48, "bits_per_byte": 0.8765, "tokens": 1234, "bytes": 4000}
    task = {"metric": "exact", "score": 0.75, "chance": 0.25, "standard_error": 0.0306, "trivial": 0.3, "n": 200}
    tree = {"heldout": {"books": figures}, "tasks": {"sums": task}, "checkpoint": run.checkpoint.name, **changes}
    (run.run_dir / "evaluation.json").write_text(json.dumps(tree), encoding="utf-8")
    return tree


def test_figures_of_these_weights_are_shown(card):
    text = card(evaluation)
    assert "| books | 0.8765 | 1.5 | 4.48 | 1,234 |" in text
    assert "| sums | exact | 0.750 | 0.031 | 0.250 | 0.300 | 200 |" in text


def test_figures_of_other_weights_are_not(card):
    text = card(lambda run: evaluation(run, checkpoint="step-00000009"))
    assert "0.8765" not in text and "Not measured for these weights" in text


@pytest.mark.parametrize("content", ["", "[]", "{", '{"heldout": 1, "checkpoint": "step-00000001"}', "[" * 100_000])
def test_a_damaged_evaluation_is_no_evaluation(card, content):
    text = card(lambda run: (run.run_dir / "evaluation.json").write_text(content))
    assert "## Held out" in text and "None" not in text


def test_texts_of_a_stranger_are_shown_and_do_nothing(card):
    def change(run):
        evaluation(run, heldout={HOSTILE: {"loss": 1.0}}, tasks={HOSTILE: {"score": 1.0}})
        run.config.data.sources = [source(HOSTILE, "jsonl", path=f"/x/{HOSTILE}"), source("hub", "hub", path=HOSTILE)]
        run.config.eval.prompts = ['```\n</code><script>"""', "x"]

    text = card(change)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script" not in text and "\u202e" not in text
    assert "https://e.example" not in outside, "a link of itself"
    assert all(
        line.count("|") - line.count("\\|") in (0, 3, 5, 6, 8) for line in outside.splitlines() if line[:1] == "|"
    ), "a cell broke out"
    assert not re.search(r"(?<!\\)(\*\*b|\[d\]|!\[f)", outside), "markup of a stranger"
    assert header(text).keys() == {"license", "library_name", "pipeline_tag", "tags"}
    assert '"content": "Hello!"' in text, "a prompt that is no plain text is not put into code"


def source(name, kind, **keys):
    from data.config import SourceConfig

    return SourceConfig(name=name, kind=kind, **keys)


def test_whose_machine_it_was_is_not_told(random_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/MARKER")
    run = open_run(random_run(), device="cpu", precision="float32")
    run.config.data.sources = [
        source("mine", "jsonl", path="/home/MARKER/secret/project/text.jsonl"),
        source("set", "hub", path="someone/some-set", subset="sample", weight=2.0),
    ]
    out = export(run, tmp_path / "out")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "| mine | jsonl | text.jsonl | 1 |" in text and "| set | hub | someone/some-set sample | 2 |" in text
    everything = "".join(path.read_text(errors="replace") for path in out.iterdir())
    assert not [word for word in ("MARKER", "secret", str(tmp_path)) if word in everything]


def test_a_prompt_of_the_config_is_the_example(card):
    def change(run):
        run.config.eval.prompts = ['Say "47 + 38"']

    code = re.search(r"```python\n(.*?)```", card(change), re.DOTALL)[1]
    ast.parse(code)
    assert '{"role": "user", "content": "Say \\"47 + 38\\""}' in code


def test_a_prompt_that_could_break_out_of_the_code_is_not_shown(random_run):
    run = open_run(random_run(), device="cpu", precision="float32")
    for prompt in ("", "```", "a\\", "\u202egnp", "two\nlines", "x" * 81):
        run.config.eval.prompts = [prompt]
        text = model_card(run, choose_layout(run.model.config), "float32", None)
        assert '"content": "Hello!"' in text, f"{prompt!r} is in the code"


def test_escaped_keeps_words_and_drops_meaning():
    assert escaped("a\n  b") == "a b"
    assert escaped("<b>&") == "&lt;b&gt;&amp;"
    assert escaped("x|y`z") == r"x\|y\`z"
    assert len(escaped("y" * 10_000)) < 300


def test_what_the_class_was_given_is_explained(card):
    assert "part of every routed expert" in card(use_qk_norm=True)


def test_the_stage_before_is_told(card, random_run):
    """A run that started from another shows that one's data too, while it is there."""
    before = random_run(name="before")
    (before / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 70, "tokens": 4321, "loss": 2.0, "train_seconds": 9.0}) + "\n"
    )

    def change(run):
        path = run.run_dir / "config.yaml"
        path.write_text(path.read_text().replace("init_from: null", f"init_from: {before}"))

    text = card(change)
    assert "Before: before (70 steps, 4,321 tokens)" in text
