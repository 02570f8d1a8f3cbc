"""scripts.first_step on a real run: what the benchmark says about start-up and data."""

import pytest
import torch

from scripts import first_step

from .conftest import run


@pytest.mark.slow
def test_start_up_and_data_share_are_measured(workplace):
    config = workplace / "pretrain.yaml"
    run("scripts.prepare_data", config)
    figures = first_step.measure(config, 2, torch.device("cpu"))
    assert (
        0
        < figures["seconds_to_first_step_low"]
        <= figures["seconds_to_first_step"]
        <= figures["seconds_to_first_step_high"]
    )
    assert 0 < figures["data_share"] < 1 and figures["seconds_reading_rows"] < figures["seconds_learning"]
    assert str(config) in first_step.text(figures)
    assert not (workplace / "runs" / "first-step").exists(), "the measurement leaves no run behind"


def test_a_run_that_fails_is_an_error_with_its_own_words(workplace):
    with pytest.raises(ValueError, match="takes 'text'"):
        first_step.seconds_to_first_step(workplace / "sft.yaml", 1, torch.device("cpu"))
