"""A study is read whole and checked before anything is trained: each mistake in one sentence with file and name."""

import copy
import dataclasses
import re
import shlex

import pytest

from eval import study_records
from model.flops import total_count
from scripts.ablation import record
from scripts.ablation.study import digest, plan_table, read_study
from train import strict_yaml
from train.config import RunConfig, load_config

from .conftest import DENSE, EXPERTS, LONGER


def test_every_cell_is_built_seeds_first(write, place):
    study = read_study(write())
    assert [(cell.seed, cell.variant) for cell in study.cells] == [
        (seed, name) for seed in (1, 2) for name in ("dense", "dense-longer", "experts")
    ]
    for cell in study.cells:
        config = cell.config
        assert config.seed == cell.seed and config.name.endswith(f"-{digest(config)}")
        assert config.run_dir.parent == place / "runs/ablations/cells"
        assert bool(config.model.n_routed_experts) == (cell.variant == "experts")
        assert config.train.steps == (18 if cell.variant == "dense-longer" else 12)
    assert len({cell.config.name for cell in study.cells}) == 6
    assert study.folder == place / "runs/ablations/study"
    assert not study.folder.parent.exists(), "reading wrote something"


def test_a_base_may_name_the_folder_of_cells_itself(write, place):
    nested = read_study(write(), [f"runs_dir={place}/elsewhere/cells"])
    assert nested.folder == place / "elsewhere/study"
    assert {cell.config.run_dir.parent for cell in nested.cells} == {place / "elsewhere/cells"}
    assert [c.digest for c in nested.cells] == [c.digest for c in read_study(write()).cells]


def test_of_two_folders_of_one_cell_the_one_that_got_further_counts(write, place):
    """Two studies that begin at the same time may both make it, each by its own name."""
    cell = read_study(write()).cells[0]
    folders = {step: f"{name}-{cell.digest}" for step, name in ((6, "a"), (12, "m"), (None, "z"))}
    for step, name in folders.items():
        path = place / "runs/ablations/cells" / name
        (path / f"checkpoints/step-{step:08d}" if step else path).mkdir(parents=True)
    assert read_study(write()).cells[0].config.name == folders[12]


def test_set_goes_over_the_command_line_and_of_goes_first(write):
    variants = [
        {**DENSE, "set": {**DENSE["set"], "train.learning_rate": 1e-4}},
        {"name": "copy", "of": "dense", "set": {"train.beta1": 0.8}},
        {"name": "copy-of-copy", "of": "copy", "set": {"train.beta1": 0.7, "model.mlp_only_layers": [0]}},
    ]
    study = read_study(write(variants=variants), ["train.learning_rate=0.5", "train.beta2=0.9"])
    trained = {name: (c.train.learning_rate, c.train.beta1, c.train.beta2) for name, c in study.configs.items()}
    assert trained == {"dense": (1e-4, 0.9, 0.9), "copy": (1e-4, 0.8, 0.9), "copy-of-copy": (1e-4, 0.7, 0.9)}
    assert study.configs["copy-of-copy"].model.mlp_only_layers == [0]
    assert study.configs["dense"].model.mlp_only_layers == []


@pytest.mark.parametrize(
    "override",
    ["name=other", "runs_dir=there", "data.cache_dir=there", "tensorboard=true", "wandb.mode=offline", "train.log_every=7",
     "train.checkpoint_every=7", "train.keep_checkpoints=7", "train.keep_every=7", "train.async_checkpoint=false",
     "train.stall_timeout=7"],
)  # fmt: skip
def test_where_and_how_often_is_no_part_of_the_digest(place, override):
    assert digest(load_config(place / "base.yaml", [override])) == digest(load_config(place / "base.yaml"))


@pytest.mark.parametrize(
    "override",
    ["seed=8", "train.learning_rate=0.5", "train.threads=2", "train.precision=bfloat16", "model.n_routed_experts=8",
     "model.intermediate_size=64", "data.context_length=16", "data.held_out_fraction=0.2", "tokenizer.path=other",
     "eval.max_tokens=10", "data.sources=[{name: topics, kind: jsonl, path: other}]"],
)  # fmt: skip
def test_what_changes_the_result_changes_the_digest(place, override):
    assert digest(load_config(place / "base.yaml", [override])) != digest(load_config(place / "base.yaml"))


def test_a_key_that_is_added_later_renames_no_cell(place):
    """A new key whose default changes nothing: of the config, of a section and of a source."""
    config = load_config(place / "base.yaml")
    grown = copy.copy(config)

    def grow(value: object, default: object) -> object:
        fields = [(f.name, f.type, f) for f in dataclasses.fields(value)]
        added = ("brand_new", object, dataclasses.field(default_factory=lambda: default))
        cls = dataclasses.make_dataclass("Grown", [(n, t, _as_default(f)) for n, t, f in fields] + [added])
        return cls(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})

    grown.model = grow(config.model, False)
    grown.data = copy.copy(config.data)
    grown.data.sources = [grow(source, None) for source in config.data.sources]
    assert digest(grow(grown, 0.0)) == digest(config)
    section = dataclasses.make_dataclass("Section", [("key", int, dataclasses.field(default=1))])
    assert digest(grow(config, section())) == digest(config), "a whole new section"
    grown.model.brand_new = True
    assert digest(grown) != digest(config)


def _as_default(f: dataclasses.Field) -> dataclasses.Field:
    if f.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=f.default_factory)
    return dataclasses.field(default=f.default)


def test_all_defaults_have_a_digest():
    assert re.fullmatch("[0-9a-f]{8}", digest(RunConfig()))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [-1]}, "seed"),
        ({"seeds": ["one"]}, r"seeds\[0\]"),
        ({"variants": []}, "variants"),
        ({"variants": [DENSE, {**DENSE, "name": "Dense"}]}, "different names"),
        ({"variants": [{**DENSE, "name": "../dense"}]}, "part of a folder"),
        ({"variants": [{**DENSE, "name": "d" * 41}]}, "part of a folder"),
        ({"variants": [{**DENSE, "sets": {}}]}, "unknown key 'variants"),
        ({"variants": [DENSE, {**EXPERTS, "of": "nobody"}]}, "'experts': of: 'nobody'"),
        ({"variants": [{**LONGER}, DENSE]}, "'dense-longer': of: 'dense' is none of the variants before it"),
        ({"variants": [DENSE, {**LONGER, "of": None}]}, "longer: 1.5 takes `of`"),
        ({"variants": [DENSE, LONGER, {**LONGER, "name": "longest", "of": "dense-longer"}]}, "'longest': of: 'dense-longer'"),
        ({"compare_with": ["nobody"]}, "compare_with"),
        ({"compare_with": []}, "compare_with"),
        ({"compare_with": ["dense-longer"]}, "compare_with"),
        ({"tolerance": -1}, "tolerance"),
        ({"base": "missing.yaml"}, "missing.yaml"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"model.experts": 4}}]}, "variant 'experts': .*unknown key 'model.experts'"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"model.n_routed_experts": "4"}}]}, "'experts': .*must be a whole number"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"seed": 4}}]}, "'experts': set: 'seed'"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"a=b": 4}}]}, "'experts': set: 'a=b'"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"wandb": {"mode": "offline"}}}]}, "would replace the whole section.*wandb.mode"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"train": {}}}]}, "would replace the whole section.*train.KEY"),
        ({"name": "cells"}, "cells.yaml: 'cells' is the name of the runs' own folder"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"train.tokens_per_step": 100}}]}, "'experts': .*use 96"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"train.steps": None, "train.epochs": 1.0}}]}, "give train.steps"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"eval.best_source": "none"}}]}, "eval.best_source"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"eval.max_tokens": 10}}]}, "'dense' and 'experts' differ in eval"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"data.held_out_fraction": 0.2}}]}, "differ in data"),
        ({"variants": [DENSE, {**EXPERTS, "set": {"train.steps": 13}}]}, "3,072 and 3,328 tokens"),
        ({"variants": [DENSE, {**LONGER, "longer": 1.0}]}, r"longer: 1.0 must be more than 1"),
        ({"variants": [DENSE, {**LONGER, "longer": True}]}, "longer: True must be a number"),
        ({"variants": [DENSE, {**LONGER, "set": {"model.use_qk_norm": True}}]}, "longer: 1.5 takes `of`.* no keys of its own"),
        ({"variants": [DENSE, {**DENSE, "name": "again"}]}, "'dense' and 'again' are the same run"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(write, place, keys, words):
    with pytest.raises(ValueError, match=words) as raised:
        read_study(write(**keys))
    text = str(raised.value)
    assert ("study.yaml" in text or "missing.yaml" in text or "cells.yaml" in text) and "\n" not in text
    assert not (place / "runs").exists()


def test_equal_active_parameters_are_checked(write):
    wide = {"name": "wide", "set": {"model.moe_intermediate_size": 64}}
    with pytest.raises(ValueError, match="'dense' and 'wide' have 37,024 and 55,712 active parameters") as raised:
        read_study(write(variants=[DENSE, EXPERTS, wide]))
    configs = read_study(write(variants=[DENSE, EXPERTS])).configs
    assert f"{total_count(configs['dense'].model).active:,}" in str(raised.value)
    narrow = {"name": "narrow", "set": {"model.moe_intermediate_size": 16}}
    with pytest.raises(ValueError, match="'dense' and 'narrow' have"):
        read_study(write(variants=[DENSE, EXPERTS, narrow]))
    said = read_study(write(variants=[DENSE, EXPERTS, {**wide, "unequal": "what width is worth"}]))
    assert "what width is worth" in plan_table(said)
    read_study(write(variants=[DENSE, EXPERTS, wide], tolerance=0.9))


def test_another_scale_and_a_trial_have_folders_of_their_own(write, place):
    (place / "other.yaml").write_text(strict_yaml.dump({"base": "base.yaml", "train": {"learning_rate": 0.5}}))
    plain, other = read_study(write()), read_study(write(), base=place / "other.yaml")
    assert (other.name, other.scale) == ("study-other", "other")
    trial = read_study(write(), ["train.steps=6"])
    assert trial.name.startswith("study-") and trial.name != other.name
    assert read_study(write(), ["train.log_every=3"]).name == plain.name
    digests = [{cell.digest for cell in study.cells} for study in (plain, other, trial)]
    assert not digests[0] & digests[1] and not digests[1] & digests[2]
    for override in ("name=x", "seed=3"):
        with pytest.raises(ValueError, match="every cell has its own"):
            read_study(write(), [override])


def test_the_command_that_the_results_name_is_this_study(write, place):
    (place / "other.yaml").write_text(strict_yaml.dump({"base": "base.yaml", "train": {"learning_rate": 0.5}}))
    for overrides, base in (([], None), (["train.steps=6", "eval.prompts=['a b']"], place / "other.yaml")):
        study = read_study(write(), overrides, base)
        record.write_record(study)
        config, *words = shlex.split(study_records.read_study(study.folder).command)[3:]
        said = (words[: words.index("--base")], words[words.index("--base") + 1]) if base else (words, None)
        again = read_study(config, *said)
        assert again.folder == study.folder and [c.digest for c in again.cells] == [c.digest for c in study.cells]


def test_the_sizes_are_those_of_the_model(write):
    study = read_study(write())
    size, model = study.sizes["experts"], study.configs["experts"].model
    assert (size.total, size.active, size.matmul) == total_count(model)
    assert size.active - size.active_without_router == 2 * 4 * 32  # layers, experts, hidden
    assert size.tokens == 12 * 256 and study.sizes["dense-longer"].tokens == 18 * 256
    assert study.sizes["dense"].active == study.sizes["dense"].active_without_router
    table = plan_table(study, {"dense": 2, "dense-longer": 0, "experts": 1})
    assert f"{size.active:,}" in table and "1/2" in table
    assert "fewer than 20 tokens per active parameter: dense, dense-longer, experts" in table
