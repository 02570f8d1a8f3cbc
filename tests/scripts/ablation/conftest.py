"""Studies of the tiny run of tests/train: a base config, a YAML of variants, and the command in a process of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train import strict_yaml

from ...reliability import conftest as reliability
from ...train import conftest as tiny

workplace = tiny.workplace
signals_can_be_heard, nothing_runs_on = reliability.signals_can_be_heard, reliability.nothing_runs_on

DENSE = {"name": "dense", "set": {"model.n_routed_experts": 0}}
LONGER = {"name": "dense-longer", "of": "dense", "longer": 1.5}
EXPERTS = {"name": "experts", "set": {"model.n_routed_experts": 4}}
STUDY = {"question": "Do experts help?", "base": "base.yaml", "seeds": [1, 2], "compare_with": ["dense"]}


@pytest.fixture
def place(workplace, tmp_path) -> Path:
    """A folder with base.yaml: the tiny run, 12 steps, its active parameters equal with experts and without; its runs lie here."""
    base = {
        "base": str(workplace / "pretrain.yaml"),
        "runs_dir": str(tmp_path / "runs"),
        "model": {"intermediate_size": 96},  # two routed experts and a shared one
        "train": {"steps": 12, "checkpoint_every": 6},
        "eval": {"every": 6},
    }
    (tmp_path / "base.yaml").write_text(strict_yaml.dump(base), encoding="utf-8")
    return tmp_path


@pytest.fixture
def write(place) -> Callable[..., Path]:
    """write(name="study", **keys) -> the YAML of a study in `place`."""

    def make(name: str = "study", **keys: object) -> Path:
        path = place / f"{name}.yaml"
        study = {**STUDY, "variants": [DENSE, LONGER, EXPERTS], **keys}
        path.write_text(strict_yaml.dump(study), encoding="utf-8")
        return path

    return make


def record_of(place: Path, name: str = "study") -> dict:
    return json.loads((place / "runs/ablations" / name / "study.json").read_text(encoding="utf-8"))


def states(place: Path, name: str = "study") -> dict[tuple[str, int], str]:
    """{(variant, seed): state} of study.json."""
    return {
        (variant["name"], cell["seed"]): cell["state"]
        for variant in record_of(place, name)["variants"]
        for cell in variant["cells"]
    }
