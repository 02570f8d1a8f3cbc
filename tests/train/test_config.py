"""The YAML loader guesses nothing: every surprise is a ValueError that names file, key, value and remedy."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.config import EvalConfig, RunConfig, TrainConfig, from_dict, load_config, to_dict, to_yaml


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def load(folder):
    """load(yaml_text, *overrides) -> RunConfig"""

    def load(text: str | bytes, *overrides: str) -> RunConfig:
        path = folder / "run.yaml"
        path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
        return load_config(path, overrides)

    return load


@pytest.fixture(scope="module")
def error(load):
    """error(yaml_text, *overrides) -> the one sentence that the mistake gets"""

    def error(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(ValueError) as caught:
            load(text, *overrides)
        sentence = str(caught.value)
        assert "\n" not in sentence and sentence.strip(), repr(sentence)
        return sentence

    return error


# What a file may hold


@pytest.mark.parametrize(
    "text, value", [("3e-4", 3e-4), ("1E3", 1000.0), ("2", 2.0), (".5", 0.5), ("1_000.5", 1000.5), ("+1.", 1.0)]
)
def test_numbers_are_numbers_as_people_write_them(load, text, value):
    loaded = load(f"train: {{steps: 1, learning_rate: {text}}}").train.learning_rate
    assert loaded == value and isinstance(loaded, float)


@pytest.mark.parametrize("text, value", [("012", 12), ("1_000", 1000), ("+5", 5), ("0", 0)])
def test_whole_numbers_are_decimal(load, text, value):
    assert load(f"seed: {text}").seed == value


def test_on_off_yes_and_no_are_words(load, error):
    assert load("train: {steps: 1, compile: on}").train.compile == "on"
    assert load("train: {steps: 1, compile: off}").train.compile == "off"
    assert load("eval: {prompts: [no, yes, on, y]}").eval.prompts == ["no", "yes", "on", "y"]
    for word in ("no", "off", "yes", "1"):
        assert "must be true or false" in error(f"data: {{document_mask: {word}}}")
    assert load("data: {document_mask: true}").data.document_mask is True


def test_defaults_are_the_dataclasses_and_null_is_none(load):
    assert load("name: run") == RunConfig()
    assert load("eval: {max_tokens: null}") == load("eval: {max_tokens: ~}") == RunConfig()


def test_every_default_lies_within_its_own_bounds():
    whole = to_dict(RunConfig())
    assert from_dict(whole, "defaults") == RunConfig()


# What it may not


@pytest.mark.parametrize(
    "text, words",
    [
        ("trian: {}", ["unknown key 'trian'", "did you mean 'train'?"]),
        ("train: {steps: 1, learning_rat: 1}", ["unknown key 'train.learning_rat'", "did you mean 'learning_rate'?"]),
        ("model: {num_experts: 4}", ["unknown key 'model.num_experts'", "did you mean 'n_routed_experts'?"]),
        ("data: {sources: [{name: a, kind: text, pth: x}]}", ["unknown key 'data.sources[0].pth'", "did you mean 'path'?"]),
        ("wandb: {zzzz: 1}", ["unknown key 'wandb.zzzz'", "valid keys: mode, project, group"]),
        ("train:\n  <<: {steps: 1}", ["unknown key 'train.<<'"]),
        ("seed: 1\nseed: 2", ["line 2", "key 'seed' is given twice"]),
        ("train:\n  steps: 1\n  seed: 1\n  steps: 2", ["line 4", "key 'steps' is given twice"]),
        ("1: 2", ["key 1 is not text"]),
        ("seed: 1.0", ["seed: 1.0 must be a whole number"]),
        ("seed: true", ["seed: True must be a whole number"]),
        ("seed: '1'", ["seed: '1' must be a whole number"]),
        ("name: 7", ["name: 7 must be text"]),
        ("train: {steps: 1, learning_rate: true}", ["train.learning_rate: True must be a number"]),
        ("train: {steps: 1, learning_rate: fast}", ["train.learning_rate: 'fast' must be a number"]),
        ("train: {steps: 1, learning_rate: .nan}", ["train.learning_rate: nan must be a finite number"]),
        ("train: {steps: 1, learning_rate: 1e999}", ["train.learning_rate: inf must be a finite number"]),
        ("train: {steps: 1, learning_rate: 1" + 400 * "0" + "}", ["train.learning_rate: inf must be a finite number"]),
        ("train: 5", ["train: 5 must be a section"]),
        ("train: null", ["train: None must be a section"]),
        ("data: {sources: {}}", ["data.sources: {} must be a list"]),
        ("eval: {prompts: [1]}", ["eval.prompts[0]: 1 must be text"]),
        ("model: {rope_scaling: yarn}", ["model.rope_scaling: 'yarn' must be a section"]),
        ("seed: -1", ["seed: -1 must be at least 0"]),
        ("seed: 1" + 30 * "0", ["must be at most 4294967295"]),
        ("train: {steps: 0}", ["train.steps: 0 must be at least 1"]),
        ("train: {steps: 1, learning_rate: 0}", ["train.learning_rate: 0.0 must be more than 0"]),
        ("train: {steps: 1, beta2: 1}", ["train.beta2: 1.0 must be at most 0.99999"]),
        ("train: {steps: 1, schedule: cosinus}", ["train.schedule: 'cosinus' is none of cosine, linear, wsd, constant"]),
        ("train: {steps: 1, epochs: 1}", ["either train.steps or train.epochs"]),
        ("train: {learning_rate: 1}", ["either train.steps or train.epochs"]),
        ("name: ../up", ["name: '../up' becomes a folder"]),
        ("name: ''", ["name: '' becomes a folder"]),
        ("data: {context_length: 600}", ["data.context_length: 600 is more than model.max_position_embeddings: 512"]),
        ("model: {num_attention_heads: 7}", ["num_attention_heads: 7 does not divide hidden_size: 512"]),
        ("model: {num_key_value_heads: 3}", ["num_key_value_heads: 3 does not divide num_attention_heads: 8"]),
        ("model: {num_experts_per_tok: 5}", ["num_experts_per_tok: 5 is more than n_routed_experts: 4"]),
        ("data: {sources: [{name: a, kind: jsnl, path: x}]}", ["data.sources[0].kind: 'jsnl' is none of embedded, hub, jsonl"]),
        ("data: {sources: [{name: a, kind: text, path: x}, {name: a, kind: text, path: y}]}", ["the name 'a' is used twice"]),
        ("", ["a config is a mapping of keys to values, not NoneType"]),
        ("- a", ["a config is a mapping of keys to values, not list"]),
        ("a: [", ["not readable as YAML"]),
        ("a: 1\n b: 2", ["line 2", "not readable as YAML"]),
        ("seed: 1\n---\nseed: 2", ["not readable as YAML"]),
        (b"name: caf\xe9", ["not UTF-8 text"]),
        ("seed: !!python/object/apply:os.getpid []", ["not readable as YAML"]),
        ("train: {steps: !!bool x}", ["not readable as YAML"]),
        ("train: {steps: !!timestamp x}", ["not readable as YAML"]),
        ("train: {steps: !!int ''}", ["not readable as YAML"]),
        ("train: &a {steps: *a}", ["not readable as YAML"]),
        ("[" * 3000, ["not readable as YAML"]),
        ("base: 5", ["base: 5 must be the path of one YAML file"]),
        ("base: missing.yaml", ["missing.yaml: cannot read this config file", "give the path of a YAML file"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file(error, folder, text, words):
    sentence = error(text)
    assert sentence.startswith(str(folder)), sentence
    for word in words:
        assert word in sentence


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / ("a" * 300)):
        with pytest.raises(ValueError, match="cannot read this config file") as caught:
            load_config(path)
        assert str(path) in str(caught.value)


# Parents and overrides


def test_a_childs_keys_replace_its_parents_one_by_one_and_lists_whole(folder, load):
    (folder / "sub").mkdir()
    (folder / "grand.yaml").write_text(
        "seed: 1\nname: grand\ntrain: {steps: 5, learning_rate: 1.0}\neval: {prompts: [a, b]}"
    )
    (folder / "sub/parent.yaml").write_text(
        "base: ../grand.yaml\nname: parent\ntrain: {learning_rate: 2.0}\nmodel: {dropout: 0.5}"
    )
    config = load("base: sub/parent.yaml\neval: {prompts: [c]}\ntrain: {grad_clip: 0.0}")
    assert (config.seed, config.name, config.model.dropout, config.eval.prompts) == (1, "parent", 0.5, ["c"])
    assert (config.train.steps, config.train.learning_rate, config.train.grad_clip) == (5, 2.0, 0.0)


def test_a_circle_of_parents_is_named(folder):
    (folder / "a.yaml").write_text("base: b.yaml")
    (folder / "b.yaml").write_text("base: ./a.yaml")
    (folder / "self.yaml").write_text("base: self.yaml")
    for name in ("a", "self"):
        with pytest.raises(ValueError, match=f"{name}.yaml: `base` leads back to this file; remove the circle"):
            load_config(folder / f"{name}.yaml")


def test_overrides_reach_every_kind_of_value(load):
    config = load(
        "train: {steps: 5}", "train.steps=7", "train.learning_rate=3e-4", "name=other", "eval.prompts=[a, 'b=c']",
        "model.rope_scaling={rope_type: yarn, factor: 2.0, original_max_position_embeddings: 64}", "train.init_from=", "seed=1", "seed=2",
        "data.sources=[{name: a, kind: text, path: x}]", "eval.max_tokens=null", "wandb.group=on",
    )  # fmt: skip
    assert (config.train.steps, config.train.learning_rate, config.name, config.seed) == (7, 3e-4, "other", 2)
    assert config.eval.prompts == ["a", "b=c"] and config.model.rope_scaling["factor"] == 2.0
    assert config.train.init_from is None and config.eval.max_tokens is None and config.wandb.group == "on"
    assert config.data.sources[0].path == "x"
    assert load("train: {steps: 5}", "train.steps=null", "train.epochs=2").train.epochs == 2.0


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.steps", "an override is written key=value, such as train.steps=100"),
        ("=5", "an override is written key=value"),
        ("train.stps=5", "unknown key 'train.stps'; did you mean 'steps'?"),
        ("train.steps.more=5", "steps is not a section"),
        ("train=5", "train: 5 must be a section"),
        ("train.steps=many", "train.steps: 'many' must be a whole number"),
        ("train.steps=[1", "override 'train.steps=[1', line 1: not readable as YAML"),
        ("data.sources.name=a", "sources is not a section"),
        ("eval.prompts={a: 1, a: 2}", "key 'a' is given twice"),
    ],
)
def test_a_mistaken_override_is_named(error, override, words):
    assert words in error("train: {steps: 5}\ndata: {sources: []}", override)


# Saved and read again

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12) | st.sampled_from(
    [
        "3e-4",
        "1e5",
        "012",
        "no",
        "on",
        "null",
        "~",
        "1_0",
        ".inf",
        "- a",
        "a: b",
        "'",
        "#",
        " x ",
        "0x1F",
        "1:30",
        "2001-01-01",
        "<<",
        "=",
    ]
)


@given(
    project=TEXTS,
    group=st.none() | TEXTS,
    prompts=st.lists(TEXTS, max_size=3),
    rate=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_config_is_read_back_equal(load, project, group, prompts, rate, seed):
    config = RunConfig(seed=seed, train=TrainConfig(steps=3, learning_rate=rate), eval=EvalConfig(prompts=prompts))
    config.wandb.project, config.wandb.group = project, group
    assert load(to_yaml(config)) == config


def test_the_dictionary_of_a_config_gives_the_config_back():
    config = from_dict(
        {"train": {"epochs": 2}, "data": {"sources": [{"name": "a", "kind": "text", "path": "x"}]}}, "test"
    )
    assert from_dict(to_dict(config), "test") == config


# Nothing but a ValueError, ever

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(2**64), math.nan, "auto"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


def leaves(cls: type, prefix: str = "") -> list[str]:
    """The dotted names of all keys."""
    names = []
    for field, value in to_dict(cls()).items():
        names += [f"{prefix}{field}"] + ([f"{prefix}{field}.{key}" for key in value] if isinstance(value, dict) else [])
    return names


@given(st.dictionaries(st.sampled_from(leaves(RunConfig)), VALUES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_value_under_any_key_loads_or_is_a_value_error(values):
    tree: dict = {}
    for name, value in sorted(values.items()):
        section, _, key = name.partition(".")
        if key:
            tree[section] = {**(tree[section] if isinstance(tree.get(section), dict) else {}), key: value}
        else:
            tree[section] = value
    try:
        config = from_dict(tree, "fuzz.yaml")
    except ValueError as error:
        assert str(error).startswith("fuzz.yaml: "), error
    else:
        assert dataclasses.is_dataclass(config)


PIECES = st.sampled_from(
    ["train", "steps", "seed", "base", ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!int ", "!!bool ", "!!float ", "!!set ",
     "!!omap ", "!!binary ", "!!timestamp ", "!x ", "<<", "|\n ", ">\n ", "'", '"', "%TAG ! x\n", "---\n", "...\n", "? ", "#", "\t", "1e5", "0", ".nan", "~"]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join) | st.binary(max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_loads_or_is_a_value_error(load, text):
    try:
        load(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        assert "run.yaml" in str(error) or os.sep in str(error), error


@given(
    st.text(max_size=12)
    | st.builds("{}={}".format, st.sampled_from(leaves(RunConfig)), st.lists(PIECES, max_size=6).map("".join))
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_override_is_taken_or_is_a_value_error(load, override):
    try:
        load("train: {steps: 5}", override)
    except ValueError as error:
        assert str(error).strip()


def test_the_strictness_is_our_own_and_not_pyyamls():
    """If PyYAML ever reads these as we do, the loader above can become shorter."""
    assert yaml.safe_load("[3e-4, no, 012]") == ["3e-4", False, 10]
