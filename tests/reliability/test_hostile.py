"""Run folders, checkpoints, configs and tokenizers from a stranger: refused in one sentence or harmless, and never a way in.

Every command runs in a child whose audit hook reports a write outside the test's folder, a started process or an unpickled
object (attempts.py). Files are made hostile and their checksums made right again: a stranger can do both.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.chat import CHAT_TEMPLATE, encode_conversation
from data.integrity import SUMS, write_checksums
from data.tokenizer import Tokenizer
from eval.report import write_report

from .attempts import FORBIDDEN, assert_refused, attempt

RUN = Path("runs/pre")
CHECKPOINT = RUN / "checkpoints/step-00000004"
CHAT = ("scripts.chat", RUN, "--prompt", "The class", "--max-tokens", 4, "--seed", 1)
EVALUATE = ("eval.evaluate", RUN)
REPORT = ("eval.report", RUN)
RESUME = ("train.pretrain", "pretrain.yaml", "train.steps=5", "eval.prompts=[]")
FINE_TUNE = ("train.sft", "sft.yaml")
OPENERS = {"chat": CHAT, "evaluate": EVALUATE, "fine-tune": FINE_TUNE, "resume": RESUME}
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture(scope="session")
def innocent(workplace, tmp_path_factory) -> Path:
    """A folder with configs, data, tokenizer and a trained run, every path relative to it."""
    folder = tmp_path_factory.mktemp("innocent")
    for name in ("text.jsonl", "chat.jsonl", "tokenizer"):
        (shutil.copytree if (workplace / name).is_dir() else shutil.copy)(workplace / name, folder / name)
    pretrain = yaml.safe_load((workplace / "pretrain.yaml").read_text())
    pretrain["runs_dir"] = "runs"
    pretrain["tokenizer"]["path"] = "tokenizer"
    pretrain["data"] |= {"cache_dir": "cache", "sources": [{"name": "topics", "kind": "jsonl", "path": "text.jsonl"}]}
    pretrain["train"] |= {"steps": 4, "checkpoint_every": 2}
    pretrain["eval"] |= {"every": 0, "max_tokens": 200}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
    sft = yaml.safe_load((workplace / "sft.yaml").read_text())
    sft["data"]["sources"] = [{"name": "sums", "kind": "jsonl", "path": "chat.jsonl"}]
    sft["train"] |= {"init_from": str(RUN), "steps": 1}
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    for command in (("train.pretrain", "pretrain.yaml"), EVALUATE, ("scripts.prepare_data", "sft.yaml")):
        outcome = attempt(*command, allowed=folder, cwd=folder)
        assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def place(innocent, tmp_path) -> Path:
    """A copy of it to spoil; beside it, victim.txt, which nothing may touch."""
    (tmp_path / "victim.txt").write_text("precious")
    yield Path(shutil.copytree(innocent, tmp_path / "place"))
    assert (tmp_path / "victim.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "victim.txt"]


def tried(place: Path, command: tuple):
    return attempt(*command, allowed=place, cwd=place)


def reseal(folder: Path) -> None:
    """Makes the checksums of a folder right again."""
    if (folder / SUMS).is_file():
        names = [line.split("  ", 1)[1] for line in (folder / SUMS).read_text().splitlines()]
        write_checksums(folder, names)


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


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json", "stages.json"]
)
def test_a_report_shows_nothing_that_a_link_leads_to(place, name):
    """A stranger's run folder with a link to a secret of ours, of which we then publish the report."""
    path = place / RUN / name
    path.unlink(missing_ok=True)
    path.symlink_to(place.parent / "victim.txt")
    assert_refused(tried(place, REPORT), name, "link")


def test_a_report_refuses_what_is_far_too_large(place):
    with open(place / RUN / "evaluation.json", "r+b") as file:
        file.truncate(2**40)
    assert_refused(tried(place, REPORT), "evaluation.json", "at most")


# ---- rows and records ---------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}


def spoil(value: object) -> object:
    """The same structure with a script in every name and text of it."""
    if isinstance(value, dict):
        return {key: spoil(item) for key, item in value.items()} | {SCRIPT: SCRIPT}
    if isinstance(value, list):
        return [spoil(item) for item in value]
    return SCRIPT if isinstance(value, str) else value


def test_a_report_runs_no_text_of_the_run(place):
    run_dir = place / RUN
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        kinds = [row.get("kind") for row in rows]
        rows = [spoil(row) | ({"kind": kind} if kind else {}) for row, kind in zip(rows, kinds, strict=True)]
        for row in rows:
            if "sources" in row:
                row["sources"] = {SCRIPT: {"loss": 2.0, "bits_per_byte": 1.0}}
        (run_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("run.json", "evaluation.json"):
        record = spoil(json.loads((run_dir / name).read_text()))
        (run_dir / name).write_text(json.dumps(record))
    task = {"score": 0.5, "chance": 0.1, "trivial": 0.2, "n": 3, "metric": SCRIPT, "trivial_name": SCRIPT}
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["tasks"] = {
        SCRIPT: task | {"examples": [{"question": SCRIPT, "answer": SCRIPT, "wanted": SCRIPT, "score": 0}]}
    }
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    (run_dir / "stages.json").write_text(json.dumps({SCRIPT: 3}))
    (run_dir / "config.yaml").write_text(
        (run_dir / "config.yaml").read_text().replace("name: pre", f"name: {json.dumps(SCRIPT)}")
    )
    assert tried(place, REPORT).code == 0
    page = (run_dir / "report.html").read_text()
    assert page.count("alert(1)") > 10, "the texts are in the report"
    tags = Tags(page)
    assert "script" not in tags.names and not any(name.startswith("on") for name in tags.attributes)


VALUES = st.one_of(
    st.sampled_from([None, True, 10**400, -1, 0, 2**63, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "1", SCRIPT, [], {}, [[]], [None], [0], [[0.5, None]], [[1], [1, 2]], [["a"]], [[-1.0, 2.0]], [{}], {"a": {"b": []}}]),
    st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
)  # fmt: skip
RECORDS = ("metrics.jsonl", "samples.jsonl", "run.json", "evaluation.json", "stages.json")


@pytest.mark.parametrize("examples", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_report_survives_any_value_anywhere(innocent, tmp_path_factory, examples):
    """One to three values of a real run's records replaced by anything."""
    originals = {name: (innocent / RUN / name).read_text() for name in ("config.yaml", *RECORDS[:-1])}
    originals["stages.json"] = '{"setup": 3, "pretrain": 60}'
    task = {
        "score": 0.5,
        "chance": 0.1,
        "trivial": 0.2,
        "n": 3,
        "metric": "exact",
        "trivial_name": "a copy",
        "standard_error": 0.1,
    }
    task["examples"] = [{"question": "2 + 2?", "answer": "4", "wanted": "4", "score": 1}]
    originals["evaluation.json"] = json.dumps(json.loads(originals["evaluation.json"]) | {"tasks": {"sums": task}})
    folder = tmp_path_factory.mktemp("spoilt")

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def try_one(data):
        texts = dict(originals)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(RECORDS))
            records = [json.loads(line) for line in (texts[name].splitlines() if name.endswith("l") else [texts[name]])]
            node = data.draw(st.sampled_from(records))
            while True:  # down to some place, each level as likely as the next
                keys = sorted(node) if isinstance(node, dict) else range(len(node))
                deep = [key for key in keys if isinstance(node[key], dict | list)]
                last = data.draw(st.sampled_from(deep if deep and data.draw(st.booleans()) else keys))
                if not isinstance(node[last], dict | list) or not node[last] or data.draw(st.booleans()):
                    break
                node = node[last]
            node[last] = data.draw(VALUES)
            texts[name] = "".join(json.dumps(record) + "\n" for record in records)
        for name, text in texts.items():
            (folder / name).write_text(text)
        assert write_report(folder).read_text().endswith("</html>\n")

    try_one()


ODD_VALUES = {
    "step": (-1, 10**400, 1e15, None, "4", True),
    "loss": (1e308, -1e308, 10**400, "x", [1.0]),
    "train_seconds": (1e308, -5, "x"),
    "tokens_per_second": (float("inf"), 10**300, [1]),
    "routing": (
        5, [], {"layers": [0]}, {"load": [[1.0]]}, {"layers": [0], "load": 3}, {"layers": [0], "load": [[]]}, {"layers": [0], "load": [[0.5, None]]},
        {"layers": [0, 1], "load": [[0.5, 0.5], [1.0]]}, {"layers": [0, 1], "load": [[0.5, 0.5]]}, {"layers": [SCRIPT], "load": [[0.5, 0.5]]},
        {"layers": [0], "load": [["a", "b"]]}, {"layers": [0], "load": [[-1.0, 2.0]]}, {"layers": [0], "load": [[1e308, 1e308]]},
        {"layers": [0], "load": [[0.5, 0.5]], "max_vio": [None], "router_entropy": "x"}, {"layers": [10**400], "load": [[0.5, 0.5]]},
    ),
}  # fmt: skip


def test_a_report_survives_odd_rows(place):
    """Values in the last row of training, and in all rows, that are of no size or shape that a picture can have."""
    rows = [json.loads(line) for line in (place / RUN / "metrics.jsonl").read_text().splitlines()]
    last = max(i for i, row in enumerate(rows) if row["kind"] == "train")
    for key, values in ODD_VALUES.items():
        for value in values:
            for spoilt in (
                [*rows[:last], rows[last] | {key: value}, *rows[last + 1 :]],
                [row | {key: value} for row in rows],
            ):
                (place / RUN / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoilt))
                try:
                    page = write_report(place / RUN).read_text()
                except Exception as error:
                    raise AssertionError(f"{key}: {value!r:.60}: {error!r}") from error
                assert page.endswith("</html>\n") and SCRIPT not in page


ANCESTORS = (
    "a\0b", "x" * 5000, 5, ["runs/pre"], "/", "/dev", "..", ".", "runs/pre", "../innocent", "/etc/passwd", "~", 1e300, None, {"a": 1},
)  # fmt: skip


@pytest.mark.parametrize("init_from", ANCESTORS, ids=range(len(ANCESTORS)))
def test_a_report_survives_any_ancestor(place, init_from, monkeypatch):
    monkeypatch.chdir(place)
    path = place / RUN / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["train"]["init_from"] = init_from
    path.write_text(yaml.safe_dump(tree))
    assert write_report(RUN).read_text().endswith("</html>\n")


ODD_ROWS = (
    '{"kind": "held_out"}', '{"kind": "held_out", "step": "4"}', '{"kind": ["held_out"], "step": 4}', "5", "[]", "null",
    '{"step": 4}', "[" * 50_000, '{"kind": "train", "step": 1e999}', '{"kind": "held_out", "step": 10000000000}',
)  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [REPORT, *(pytest.param(c, marks=pytest.mark.slow) for c in (RESUME, ("train.pretrain", "pretrain.yaml")))],
    ids=["report", "resume", "finished"],
)
def test_rows_of_wrong_types_stop_nobody(place, command):
    with open(place / RUN / "metrics.jsonl", "a") as file:
        file.writelines(row + "\n" for row in ODD_ROWS)
    outcome = tried(place, command)
    assert outcome.code == 0, outcome.err


RUN_RECORDS = (
    "5",
    '"x"',
    "[]",
    '{"sessions": 5}',
    '{"sessions": [5], "machine": 3}',
    "[" * 50_000,
    '{"sessions": [{"seconds": "x"}]}',
)


@pytest.mark.slow
@pytest.mark.parametrize("record", RUN_RECORDS, ids=range(len(RUN_RECORDS)))
def test_a_run_record_of_wrong_types(place, record):
    (place / RUN / "run.json").write_text(record)
    assert tried(place, REPORT).code == 0
    outcome = tried(place, RESUME)
    if outcome.code != 0:
        assert_refused(outcome, "run.json")
