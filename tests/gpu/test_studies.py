"""A study on a GPU: its cells train there, are evaluated and timed there. Skips itself without CUDA.

Not yet run on a GPU: no session so far was lent one.
"""

import json
import math

import pytest
import torch

from ..reliability.conftest import ends, start, workplace  # noqa: F401  (a fixture)
from ..scripts.ablation.conftest import place, record_of, states, write  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_study_trains_and_times_its_variants_on_the_gpu(write, place, optimizer):  # noqa: F811
    overrides = "train.device=cuda", f"train.optimizer={optimizer}", "train.compile=off"
    [(code, out, err)] = ends(
        [start("scripts.ablate", write(seeds=[1]), *overrides, "--at-once", "2", CUDA_VISIBLE_DEVICES="0")]
    )
    assert code == 0, out[-2000:] + err[-4000:]
    [name] = [path.name for path in (place / "runs/ablations").iterdir() if path.name.startswith("study")]
    assert set(states(place, name).values()) == {"done"}
    clock = record_of(place, name)["clock"]
    assert torch.cuda.get_device_name() in clock["machine"]["device"]
    assert all(seconds > 0 for rounds in clock["seconds"].values() for seconds in rounds[0])
    results = json.loads((place / "runs/ablations" / name / "results.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(variant["bits_per_byte"]["mean"]) for variant in results["variants"])
