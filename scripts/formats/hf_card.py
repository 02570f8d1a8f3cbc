"""The model card of an exported folder (README.md): what it is, where it comes from, how good it is, how it is used.

Everything is read from the run folder. Names and texts in it may be a stranger's: they are escaped, cut, and the home folder in a path
becomes ~. What is not known is said to be unknown. The first block of Python runs as it stands inside the folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from data.config import SourceConfig
from eval import history
from model.config import ModelConfig
from model.flops import count_parameters, total_count
from scripts.formats.hf_folder import Layout
from train.checkpoint import Run
from train.metrics import without_home
from train.optim import NAMES

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,59}")  # the hub's identifiers
LONGEST = 200  # characters of a text that is shown

ABOUT_SHARED = {
    "halved": "Its ungated shared experts stand behind Qwen2-MoE's gate, which is made constant (1/2), with their output doubled: the same sums.",
    "folded": "Its shared experts are part of every routed expert: the same sums, because a token's weights sum to 1, at k times their cost.",
    "zeros": "The class asks for a shared expert, which this model has not: it is all zeros.",
}

CHAT_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

messages = [{{"role": "user", "content": {example}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
TEXT_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

prompt = tokenizer(tokenizer.bos_token + {example}, return_tensors="pt")  # every document began with this token
text = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(text[0], skip_special_tokens=True))
"""


def check_license(license: str | None) -> None:
    """ValueError unless it looks like an identifier of the hub."""
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(f"--license: {license[:60]!r} is no identifier; give one such as apache-2.0, mit or cc-by-4.0")


def model_card(run: Run, layout: Layout, dtype: str, license: str | None) -> str:
    """Markdown with a YAML header, as the hub reads it."""
    config = run.model.config
    is_moe, is_chat = bool(config.moe_layers), run.config.data.format == "chat"
    header = {
        "license": license or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["moe"] if is_moe else []), *(["conversational"] if is_chat else []), layout.model_type, "minimoe"],
    }
    count = total_count(config)
    size = f"{count.total / 1e6:,.1f}M parameters" + (
        f", {count.active / 1e6:,.1f}M of them active for a token" if is_moe else ""
    )
    kind = "A Mixture-of-Experts language model" if is_moe else "A dense language model"
    parts = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        f"# {escaped(run.config.name)}",
        f"{kind} ({size}), trained with MiniMoE"
        + (" and fine-tuned on conversations." if is_chat else "; it continues text and was not fine-tuned for chat."),
        "" if license else "No licence was named when this folder was written (`--license`): ask whoever trained it.",
        "## Use\n\n```python\n" + (CHAT_USE if is_chat else TEXT_USE).format(example=_example(run, is_chat)) + "```",
        "Opens with transformers 4.57 and 5, without remote code."
        + (" A turn ends with `<|im_end|>`; the template is ChatML." if is_chat else ""),
        "## Model\n\n" + _table(("", ""), _model_rows(config, layout, dtype)),
        ABOUT_SHARED.get(layout.shared, ""),
        "## Training",
        *_stages(run),
        "## Held out\n\n" + _held_out(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _example(run: Run, is_chat: bool) -> str:
    """A prompt as a Python string: the first of the config's own where it is short and plain."""
    own = run.config.eval.prompts[0] if run.config.eval.prompts else ""
    plain = own.isprintable() and 0 < len(own) <= 80 and not {*own} & {*"`\\"}
    return json.dumps(own if plain else "Hello!" if is_chat else "The", ensure_ascii=False)


def escaped(text: object) -> str:
    """Any text as Markdown that shows it: one line, nothing of it is markup, a long one is cut, the home folder is ~."""
    line = " ".join(without_home(str(text)).split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    line = (
        re.sub(r"([\\`*_{}\[\]()#+!|~$@])", r"\\\1", line)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )
    return line.replace("://", ":&#47;&#47;")  # no link of itself


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _model_rows(config: ModelConfig, layout: Layout, dtype: str) -> list[tuple[str, str]]:
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key and value, of {config.head_dim}"
    rows = [
        ("transformers class", f"`{layout.architecture}`"),
        ("weights", dtype),
        (
            "parameters",
            ", ".join(f"{part} {count.total:,}" for part, count in count_parameters(config).items() if count.total),
        ),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", str(config.hidden_size)),
        ("heads", heads + (", QK-norm" if config.use_qk_norm else "")),
        ("context", f"{config.max_position_embeddings:,} tokens" + (" (YaRN)" if config.rope_scaling else "")),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]
    if not config.moe_layers:
        return [*rows, ("feed-forward", f"{config.intermediate_size} hidden units, {config.hidden_act}")]
    weights = "normalised" if config.norm_topk_prob else "as they are"
    experts = f"{config.num_experts_per_tok} of {config.n_routed_experts} for a token, {config.moe_intermediate_size} hidden units each"
    rows += [("routed experts", experts), ("router", f"{config.scoring_func} scores, weights {weights}")]
    if config.n_shared_experts:
        rows.append(("shared experts", f"{config.n_shared_experts}" + (", gated" if config.shared_expert_gate else "")))
    dense = config.num_hidden_layers - len(config.moe_layers)
    return [*rows, ("dense layers", str(dense))] if dense else rows


def _stages(run: Run) -> list[str]:
    """Data and training of the run, and before it of the run it started from, where that is still there."""
    parts = []
    for stage in _lineage(run.run_dir)[:-1]:
        name, steps, tokens = escaped(stage.name), stage.last_step, stage.tokens_seen
        sources = [escaped(source.get("name", "?")) for source in stage.section("data").get("sources") or []]
        told = f"{steps:,} steps, {tokens:,} tokens" if steps else "its length is not known"
        parts.append(f"Before: {name} ({told}) on {', '.join(sources[:20]) or 'sources that are not known'}.")
    config, stage = run.config, _lineage(run.run_dir)[-1:]
    train, data = config.train, config.data
    facts = f"{run.step:,} steps of {train.tokens_per_step:,} tokens, rows of {config.context_length:,} tokens"
    if run.step:
        facts += f"; {NAMES[train.optimizer]}, learning rate {train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}"
    if stage and stage[0].seconds:
        machine = stage[0].run.get("machine") or {}
        facts += (
            f"; {stage[0].seconds / 60:,.0f} minutes on {escaped(machine.get('device', 'a machine that is not named'))}"
        )
    parts.append(f"This one: {facts}.")
    if not data.sources:
        return [*parts, "Its config names no data."]
    rows = [(escaped(s.name), s.kind, _place(s), f"{s.weight:g}") for s in data.sources[:50]]
    return [*parts, _table(("source", "kind", "what", "weight"), rows)]


def _lineage(run_dir: Path) -> list[history.Stage]:
    try:
        return history.read_lineage(run_dir)
    except (ValueError, OSError):  # a checkpoint without its run, or files that are no run's
        return []


def _place(source: SourceConfig) -> str:
    """Where its text is from: a corpus' or a repository's name; of a file only the name, which folder it lay in is nobody's business."""
    if source.kind == "embedded":
        return escaped(source.corpus)
    if source.kind == "hub":
        return " ".join(escaped(part) for part in (source.path, source.subset, source.data_files) if part)
    return escaped(Path(source.path or "?").name)


def _held_out(run: Run) -> str:
    """The evaluation's figures, if they were measured on the very checkpoint that is exported."""
    evaluation = _evaluation(run)
    if evaluation is None:
        return "Not measured for these weights (`python -m eval.evaluate RUN` measures a run, before it is exported)."
    parts = []
    heldout = evaluation.get("heldout") or {}
    rows = [
        (escaped(name), *(f"{f[key]:.4g}" if key in f else "?" for key in ("bits_per_byte", "loss", "perplexity")), f"{f.get('tokens', 0):,.0f}")
        for name, f in list(heldout.items())[:50]
    ]  # fmt: skip
    if rows:
        parts.append(_table(("source", "bits per byte", "nats per token", "perplexity", "tokens"), rows))
    tasks = [
        (
            escaped(name),
            escaped(t.get("metric", "")),
            f"{t['score']:.3f}",
            *(f"{t[key]:.3f}" if key in t else "" for key in ("standard_error", "chance", "trivial")),
            t.get("n", ""),
        )
        for name, t in list((evaluation.get("tasks") or {}).items())[:50]
        if "score" in t
    ]
    if tasks:
        head = ("task", "what is scored", "score", "standard error", "chance", "best trivial answer", "questions")
        parts.append(_table(head, tasks))
    return "\n\n".join(parts) or "The evaluation of these weights had no held-out text."


def _evaluation(run: Run) -> dict | None:
    path = run.run_dir / "evaluation.json"
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > history.TEXT_LIMIT:
            return None
        tree = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or tree.get("checkpoint") != run.checkpoint.name:
        return None
    return history.fitting(tree, history.EVALUATION)
