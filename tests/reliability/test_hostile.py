"""Checkpoints, configs and tokenizers from a stranger: refused in one sentence or harmless, and never a way in (strangers.py)."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from data.chat import CHAT_TEMPLATE, encode_conversation
from data.tokenizer import Tokenizer

from .attempts import FORBIDDEN, assert_refused
from .strangers import CHAT, CHECKPOINT, EVALUATE, OPENERS, REPORT, RESUME, RUN, reseal, tried

# ---- safetensors ------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def rewritten(content: bytes, change: Callable[[dict], object]) -> bytes:
    """A safetensors file with another header over the same data."""
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n])
    return safetensors(change(header) or header, content[8 + n :])


def first(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


def with_first(**values) -> Callable[[bytes], bytes]:
    return lambda content: rewritten(content, lambda header: first(header).update(values))


def overlapping(header: dict) -> None:
    spans = [value for name, value in header.items() if name != "__metadata__"]
    spans[1]["data_offsets"] = spans[0]["data_offsets"]


def named_twice(content: bytes) -> bytes:
    n = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + n].rstrip()
    header = json.loads(text)
    name = next(name for name in header if name != "__metadata__")
    twice = text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    return safetensors(twice, content[8 + n :])


LIES = {
    "empty": lambda content: b"",
    "a header of 2**60 bytes": lambda content: struct.pack("<Q", 2**60) + content[8:],
    "a header longer than the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "a header that is no JSON": lambda content: safetensors(b"\xff" * 100, content),
    "a header nested 100,000 deep": lambda content: safetensors(b"[" * 100_000, content),
    "offsets outside the file": with_first(data_offsets=[0, 2**40]),
    "offsets the wrong way round": with_first(data_offsets=[64, 0]),
    "negative offsets": with_first(data_offsets=[-64, 0]),
    "overlapping tensors": lambda content: rewritten(content, overlapping),
    "a shape of 2**40": with_first(shape=[2**40]),
    "a shape whose product is 2**64": with_first(shape=[2**32, 2**32]),
    "another number type of the same size": with_first(dtype="I32"),
    "an unknown number type": with_first(dtype="F99"),
    "a name given twice": named_twice,
    "a foreign tensor": lambda content: rewritten(
        content, lambda header: header | {"../../evil": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "a missing tensor": lambda content: safetensors({}),
}


def cases(names: Iterable[str], everyday: set[str], others: Iterable[str]) -> list:
    """(case, command): each case with chat, and a few with the other commands, which read a checkpoint in the same way."""
    pairs = [(name, "chat") for name in names] + [(name, command) for command in others for name in sorted(everyday)]
    return [
        pytest.param(*pair, marks=() if pair[1] == "chat" and pair[0] in everyday else pytest.mark.slow)
        for pair in pairs
    ]


FLAGRANT = {"a header of 2**60 bytes", "a shape whose product is 2**64", "overlapping tensors", "a missing tensor"}


@pytest.mark.parametrize(("lie", "command"), cases(LIES, FLAGRANT, ("evaluate", "fine-tune", "resume")))
def test_a_lying_weights_file_is_refused(place, lie, command):
    path = place / CHECKPOINT / "model.safetensors"
    path.write_bytes(LIES[lie](path.read_bytes()))
    reseal(path.parent)
    outcome = tried(place, OPENERS[command])
    if lie != "a name given twice" or outcome.code != 0:  # the second of two equal entries is as good as the first
        assert_refused(outcome, "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("lie", sorted(FLAGRANT | {"offsets outside the file", "a name given twice"}))
def test_a_lying_optimizer_file_is_refused(place, lie):
    path = place / CHECKPOINT / "optimizer.safetensors"
    path.write_bytes(LIES[lie](path.read_bytes()))
    reseal(path.parent)
    outcome = tried(place, RESUME)
    if outcome.code != 0 or lie not in (
        "a name given twice",
        "a missing tensor",
    ):  # none at all: as saved before the first step
        assert_refused(outcome, "optimizer.safetensors")


def test_a_weights_file_a_hundred_times_too_large_is_refused(place):
    path = place / CHECKPOINT / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(100 * path.stat().st_size)  # sparse: it takes no room
    reseal(path.parent)
    assert_refused(tried(place, CHAT), "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_no_numbers_are_no_traceback(place, value):
    import torch
    from safetensors.torch import load_file, save_file

    path = place / CHECKPOINT / "model.safetensors"
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(path).items()}, path)
    reseal(path.parent)
    for command in (CHAT, EVALUATE):
        outcome = tried(place, command)
        assert outcome.code in (0, 2) and "Traceback" not in outcome.err, outcome.err[-1500:]


# ---- state.json, config.yaml ------------------------------------------------------------------------------------------

STATES = {
    "no JSON": lambda state: "{",
    "no mapping": lambda state: "[]",
    "nested 100,000 deep": lambda state: "[" * 100_000,
    "text for the step": lambda state: state | {"step": "4"},
    "a step of 10**30": lambda state: state | {"step": 10**30},
    "a negative step": lambda state: state | {"step": -1},
    "true for the step": lambda state: state | {"step": True},
    "a step that is not the folder's": lambda state: state | {"step": 3},
    "an unknown key": lambda state: state | {"__class__": "os.system"},
    "progress as a list": lambda state: state | {"progress": [1, 2]},
    "an infinite progress": lambda state: state | {"progress": state["progress"] | {"train_seconds": 1e999}},
    "a progress of 10**30 tokens": lambda state: state | {"progress": state["progress"] | {"tokens": 10**30}},
    "another step in progress": lambda state: state | {"progress": state["progress"] | {"step": 10**9}},
    "a guard of text": lambda state: state | {"guard": "fine"},
    "data as a list": lambda state: state | {"data": [["topics", "x"]]},
}


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_a_state_that_is_none_is_refused(place, state):
    path = place / CHECKPOINT / "state.json"
    value = STATES[state](json.loads(path.read_text()))
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    reseal(path.parent)
    assert_refused(tried(place, RESUME), "state.json")
    if state in ("nested 100,000 deep", "a step of 10**30"):
        outcome = tried(place, CHAT)  # needs no more than the step
        assert outcome.code in (0, 2) and "Traceback" not in outcome.err, outcome.err


def config_text(**changes: object) -> Callable[[dict], str]:
    """A config with `section__key` values replaced."""

    def change(tree: dict) -> str:
        for key, value in changes.items():
            *sections, leaf = key.split("__")
            node = tree
            for section in sections:
                node = node[section]
            node[leaf] = value
        return yaml.safe_dump(tree)

    return change


def appended(text: str) -> Callable[[dict], str]:
    return lambda tree: yaml.safe_dump(tree) + text


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
CONFIGS = {
    "a tag that calls": lambda tree: yaml.safe_dump(tree).replace(
        "seed: 7", 'seed: !!python/object/apply:os.system ["touch ../pwned"]'
    ),
    "a tag that names": lambda tree: yaml.safe_dump(tree).replace("seed: 7", "seed: !!python/name:os.system"),
    "a million aliases": appended(BOMB),
    "100,000 brackets": appended("evil: " + "[" * 100_000),
    "a name that leads out": config_text(name="../../evil"),
    "an absolute name": config_text(name="/tmp/evil"),
    "a base that is a folder": appended("base: /\n"),
    "a base with secrets": appended("base: /etc/passwd\n"),
    "a source with a name that leads out": config_text(
        data__sources=[{"name": "../../evil", "kind": "jsonl", "path": "text.jsonl"}]
    ),
    "10**12 layers": config_text(model__num_hidden_layers=10**12),
    "a width of 10**9": config_text(
        model__hidden_size=10**9, model__num_attention_heads=1, model__num_key_value_heads=1
    ),
    "10**9 experts": config_text(model__n_routed_experts=10**9),
    "a vocabulary of 10**12": config_text(model__vocab_size=10**12),
    "10**12 positions": config_text(model__max_position_embeddings=10**12),
    "a width of 10**30": config_text(model__hidden_size=10**30),
}


@pytest.mark.parametrize(
    ("config", "command"),
    cases(
        CONFIGS,
        {"a tag that calls", "a million aliases", "10**12 layers", "a width of 10**9"},
        ("evaluate", "fine-tune"),
    ),
)
def test_a_checkpoint_with_a_hostile_config(place, config, command):
    """Refused, or as if nothing were: what a config names but this command does not use harms nobody."""
    path = place / CHECKPOINT / "config.yaml"
    path.write_text(CONFIGS[config](yaml.safe_load(path.read_text())))
    reseal(path.parent)
    outcome = tried(place, OPENERS[command])
    if outcome.code != 0:
        assert_refused(outcome)
    elif config not in ("a source with a name that leads out", "10**12 positions"):
        pytest.fail(f"accepted: {outcome.out[-500:]}")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_hostile_config_to_train(place, config):
    (place / "evil.yaml").write_text(CONFIGS[config](yaml.safe_load((place / "pretrain.yaml").read_text())))
    commands = [("train.pretrain", "evil.yaml", "train.steps=1")]
    if "name" in config or "10**12" in config:
        commands += [("scripts.prepare_data", "evil.yaml"), ("scripts.inspect_model", "evil.yaml")]
    for command in commands:
        outcome = tried(place, command)
        assert outcome.code != FORBIDDEN, outcome.err
        if outcome.code != 0:
            assert_refused(outcome)


# ---- tokenizer ---------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "a loop": "{% for i in range(10**12) %}{% for j in range(10**12) %}x{% endfor %}{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ../pwned') }}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_strangers_chat_template_is_never_rendered(place, template):
    """The answers are the same as with ours: conversations are encoded by data/chat.py, whatever the folder says."""
    before = tried(place, CHAT)
    path = place / RUN / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATES[template]}))
    reseal(path.parent)
    after = tried(place, CHAT)
    assert (after.code, after.out) == (0, before.out), after.err
    assert tried(place, EVALUATE).code == 0


def test_our_chat_template_renders_in_the_sandbox_to_what_the_encoder_writes(place):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tokenizer = Tokenizer.load(place / RUN / "tokenizer")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    conversations = (
        [("user", "2 + 2?"), ("assistant", "4")],
        [
            ("system", "Be brief."),
            ("user", "{{ 7 * 7 }} {% for %}"),
            ("assistant", "no"),
            ("user", "a\n\nb"),
            ("assistant", "“é”"),
        ],
    )
    for turns in conversations:
        messages = [{"role": role, "content": content} for role, content in turns]
        ids, _ = encode_conversation(tokenizer, messages)
        rendered = template.render(messages=messages, add_generation_prompt=False, bos_token="<|bos|>")
        assert tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_the_template_in_the_folder_is_ours(place):
    assert json.loads((place / RUN / "tokenizer/tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "{}", '{"model": {"type": "BPE", "vocab": {"a": 1099511627776}, "merges": []}}', "\x00" * 100],
)
def test_a_tokenizer_that_is_none_is_refused(place, content):
    path = place / RUN / "tokenizer/tokenizer.json"
    path.write_text(content)
    reseal(path.parent)
    assert_refused(tried(place, CHAT), "tokenizer")


# ---- links and names ---------------------------------------------------------------------------------------------------

WRITTEN_BY_TRAINING = ("metrics.jsonl", "log.txt", "samples.jsonl", "config.yaml", "run.json", ".lock", ".config.yaml.partial",
                       ".run.json.partial", "checkpoints/latest", "checkpoints/.latest.partial", "tokenizer/tokenizer.json",
                       "tokenizer/tokenizer_config.json")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "run.json" else pytest.mark.slow) for name in WRITTEN_BY_TRAINING],
)
def test_training_does_not_write_through_a_link(place, name):
    """Refused, or the link itself is replaced; `place` sees to it that what it named is as before."""
    path = place / RUN / name
    path.unlink(missing_ok=True)
    path.symlink_to(place.parent / "victim.txt")
    outcome = tried(place, RESUME)
    assert outcome.code in (0, 2) and "Traceback" not in outcome.err, f"{outcome.code} {outcome.err}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["checkpoints", "tokenizer", "checkpoints/.partial-step-00000006", "checkpoints/step-00000006"]
)
def test_training_does_not_write_into_a_linked_folder(place, name):
    elsewhere = place.parent / "victim.txt"
    path = place / RUN / name
    if path.exists():
        shutil.copytree(path, place / "copy")
        shutil.rmtree(path)
        path.symlink_to(place / "copy")
    else:
        path.symlink_to(elsewhere)
    before = sorted((p, p.stat().st_mtime_ns) for p in (place / "copy").rglob("*"))
    outcome = tried(place, RESUME)
    assert outcome.code in (0, 2) and "Traceback" not in outcome.err, f"{outcome.code} {outcome.err}"
    assert sorted((p, p.stat().st_mtime_ns) for p in (place / "copy").rglob("*")) == before


@pytest.mark.parametrize(("command", "name"), [(EVALUATE, "evaluation.json"), (REPORT, "report.html")])
def test_results_replace_a_link_and_leave_what_it_names(place, command, name):
    path = place / RUN / name
    path.unlink(missing_ok=True)
    path.symlink_to(place.parent / "victim.txt")
    outcome = tried(place, command)
    assert outcome.code == 0, outcome.err
    assert path.is_file() and not path.is_symlink() and path.stat().st_size > 1000
    assert not list(path.parent.glob("*.partial")) + list(path.parent.glob(".*.partial"))


def test_standard_output_is_written_to_not_replaced(place):
    outcome = tried(place, (*EVALUATE, "--json", "/dev/stdout"))
    assert outcome.code == 0 and '"heldout"' in outcome.out, outcome.err
    assert Path("/dev/stdout").is_symlink()
