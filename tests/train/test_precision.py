"""Precision follows from the device alone and reaches the matrix products."""

import pytest
import torch

from train.precision import autocast_for, compute_dtype, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_bf16, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_on_a_cpu_follows_its_instructions(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize("has_bf16, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_on_cuda_wants_real_bfloat16(monkeypatch, has_bf16, expected):
    def supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_an_explicit_choice_stands():
    assert [resolve_precision(p, CPU) for p in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_matrix_products_run_in_the_chosen_dtype_and_weights_stay_float32(precision, dtype):
    layer = torch.nn.Linear(8, 8)
    autocast = autocast_for(precision, CPU)
    for _ in range(2):  # the factory gives a new context each time
        with autocast():
            assert layer(torch.ones(2, 8)).dtype == dtype == compute_dtype(precision)
    assert layer.weight.dtype == torch.float32
