"""What the log says about how a run computes: chosen from the processor, so the reader must be told."""

import pytest
import torch

from train import describe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("able", "word"), [(True, "has"), (False, "lacks")])
def test_bfloat16_names_the_processors_ability(monkeypatch, able, word):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    assert describe._arithmetic("bfloat16", CPU) == f"bfloat16 (the processor {word} the instructions for it)"


def test_float32_names_the_library_of_its_products(monkeypatch):
    monkeypatch.setattr(describe, "float32_library", lambda: "oneDNN")
    assert describe._arithmetic("float32", CPU) == "float32 (products by oneDNN)"
    assert describe._arithmetic("bfloat16", CUDA) == "bfloat16"


def test_the_attention_kernel_is_named():
    assert describe._attention_kernel(False, "bfloat16", CPU) == "attention written out, causal"
    assert describe._attention_kernel(True, "float32", CPU) == "scaled_dot_product_attention, document mask"
    assert describe._attention_kernel(False, "bfloat16", CUDA) == "scaled_dot_product_attention, causal"
