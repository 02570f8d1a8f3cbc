"""Chunked cross-entropy against torch's own: value, both gradients, and that the whole logits never exist."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import loss as loss_module
from model import products
from model.loss import IGNORE, chunked_cross_entropy

D, V, CHUNK = 8, 19, 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_ROWS, "cpu", CHUNK)


def problem(N: int, dtype=torch.float32, ignored: float = 0.3):
    hidden = (2 * torch.randn(N, D, dtype=dtype)).requires_grad_()
    head = torch.randn(V, D, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[torch.rand(N) < ignored] = IGNORE
    return hidden, head, targets


def both(hidden, head, targets, scale=1.0):
    """Value and gradients by hidden and head, ours and torch's; `scale` is what the training loop multiplies by."""
    ours = chunked_cross_entropy(hidden, head, targets)
    theirs = F.cross_entropy(hidden @ head.t(), targets, ignore_index=IGNORE, reduction="sum")
    return [(value.detach(), *torch.autograd.grad(value * scale, (hidden, head))) for value in (ours, theirs)]


@pytest.mark.parametrize("N", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_value_and_gradients_are_torchs_at_every_chunk_border(N, ignored):
    ours, theirs = both(*problem(N, torch.float64, ignored), scale=0.37)
    for name, a, b in zip(("value", "gradient of hidden", "gradient of head"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck():
    hidden, head, targets = problem(CHUNK + 3, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets), (hidden, head))


def test_float32_is_near():
    ours, theirs = both(*problem(50))
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_either_library_multiplies_the_same(library, monkeypatch):
    """Chunks of enough rows for oneDNN, and a last one of too few."""
    if library == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "float32_library", lambda: library)
    for a, b in zip(*both(*problem(2 * CHUNK + 3)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_large_logits_stay_finite():
    hidden, head, targets = problem(20)
    ours, theirs = both((hidden * 200).detach().requires_grad_(), head, targets)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("N", [0, 5, 2 * CHUNK])
def test_without_targets_value_and_gradients_are_zero(N):
    hidden, head, _ = problem(N)
    value = chunked_cross_entropy(hidden, head, torch.full((N,), IGNORE))
    value.backward()
    assert value == 0
    assert not hidden.grad.any() and not head.grad.any()


def test_ignored_rows_give_no_gradient():
    hidden, head, targets = problem(40)
    chunked_cross_entropy(hidden, head, targets).backward()
    moved = hidden.grad.abs().sum(1) > 0
    assert torch.equal(moved, targets != IGNORE)


def test_under_autocast_products_are_bfloat16_and_the_rest_float32():
    hidden, head, targets = problem(3 * CHUNK + 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = chunked_cross_entropy(hidden, head, targets)
        logits = F.linear(hidden, head)
    expected = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(v, (hidden, head)) for v in (value, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.02 * float(b.abs().max()), rtol=0)


def test_without_gradients_the_value_is_the_same():
    hidden, head, targets = problem(50)
    with torch.no_grad():
        value = chunked_cross_entropy(hidden, head, targets)
    assert not value.requires_grad
    assert value == chunked_cross_entropy(hidden, head, targets).detach()


class LargestTensor(TorchDispatchMode):
    """The most elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_the_whole_logits_never_exist():
    hidden, head, targets = problem(20 * CHUNK)
    with LargestTensor() as seen:
        chunked_cross_entropy(hidden, head, targets).backward()
    assert seen.largest <= max(CHUNK * V, hidden.numel(), head.numel())
    with LargestTensor() as seen:
        F.cross_entropy(hidden @ head.t(), targets)
    assert seen.largest >= 20 * CHUNK * V, "the measure sees what it should"
