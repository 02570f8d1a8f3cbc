"""Sorting tokens by expert and back: the permutation, and its three uses with their gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.permutation import (
    Combine,
    Permute,
    SortWeights,
    rows_of_tokens,
    sort_by_expert,
    sorted_weights,
    sum_by_token,
)

from . import routings
from .routings import E, Elsewhere, random_choice

NO_TOKEN = {"no token": lambda: torch.zeros(0, 2, dtype=torch.int64)}
ROUTINGS = routings.ROUTINGS | NO_TOKEN


@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_sorting_is_stable_padded_and_undone_by_its_inverse(routing, align):
    flat = ROUTINGS[routing]().flatten()
    M = len(flat)
    order, inverse, ends = sort_by_expert(flat, E, align)
    expected, expected_ends = [], []
    for expert in range(E):
        segment = [a for a in range(M) if flat[a] == expert]
        expected += segment + [M] * (-len(segment) % align)
        expected_ends.append(len(expected))
    assert order.tolist() == expected
    assert ends.tolist() == expected_ends
    assert torch.equal(order[inverse], torch.arange(M))
    assert ends.dtype == torch.int32, "what grouped_mm takes"


@pytest.mark.parametrize("align", [1, 4])
def test_permute_combine_and_weights_have_the_gradients_of_what_they_compute(align):
    topk_idx = random_choice(7, 3)
    permutation = sort_by_expert(topk_idx.flatten(), E, align)
    order, inverse, ends = permutation
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(int(ends[-1]), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    real = (order < 21).unsqueeze(1)
    assert torch.equal(Permute.apply(x, permutation, 3)[real[:, 0]], x[order[real[:, 0]] // 3])
    by_loop = torch.stack([sum(y[inverse[n * 3 + j]] for j in range(3)) for n in range(7)])
    torch.testing.assert_close(Combine.apply(y, permutation, 3), by_loop)
    in_order = torch.stack([weights.flatten()[a] if a < 21 else torch.zeros((), dtype=torch.float64) for a in order])
    assert torch.equal(SortWeights.apply(weights, permutation), in_order.unsqueeze(1)), "padding weighs 0"
    # What padding computes is read by nobody: its weight is 0, and that is what makes its gradients 0, in and out.
    assert torch.autograd.gradcheck(lambda x: Permute.apply(x, permutation, 3) * real, (x,))
    assert torch.autograd.gradcheck(lambda w: SortWeights.apply(w, permutation), (weights,))
    assert torch.autograd.gradcheck(
        lambda x, w: Combine.apply(
            Permute.apply(x, permutation, 3) * SortWeights.apply(w, permutation), permutation, 3
        ),
        (x, weights),
    )
    assert torch.autograd.gradcheck(lambda y: Combine.apply(y * real, permutation, 3), (y,))


def test_padding_repeats_the_last_token_and_combine_gives_it_that_tokens_gradient():
    """Both are harmless because padding weighs 0: finite numbers, multiplied by it."""
    topk_idx = torch.tensor([[0], [2], [2]])
    permutation = sort_by_expert(topk_idx.flatten(), 3, 4)
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert rows_of_tokens(x, permutation.order, 1).flatten().tolist() == [1, 3, 3, 3, 2, 3, 3, 3]
    assert sorted_weights(10 * x, permutation.order).flatten().tolist() == [10, 0, 0, 0, 20, 30, 0, 0]
    y = torch.zeros(8, 1, requires_grad=True)
    (Combine.apply(y, permutation, 1) * x).sum().backward()
    assert y.grad.flatten().tolist() == [1, 3, 3, 3, 2, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", [torch.Tensor, Elsewhere], ids=["on CPU", "elsewhere"])
def test_a_sum_by_token_is_rounded_once(dtype, where):
    """To the nearest number of the dtype; a tie may go either way: torch's embedding_bag rounds bfloat16 ties away from 0.

    The first sum, 1 and three times 2^-8 (half the last place of 1), would in bfloat16 stay at 1 at each addition.
    """
    y = torch.randn(80, 6, dtype=torch.float64).to(dtype)
    y[:4, 0] = torch.tensor([1.0, 2**-8, 2**-8, 2**-8]).to(dtype)
    inverse = torch.cat((torch.arange(4), 4 + torch.randperm(76)))
    exact = y.double()[inverse].view(20, 4, 6).sum(1)
    ours = sum_by_token(y.as_subclass(where), inverse, 4)
    assert ours.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal((ours.double() - exact).abs(), (exact.to(dtype).double() - exact).abs())
        assert ours[0, 0] > 1
    else:
        torch.testing.assert_close(ours, exact.to(dtype))


def test_a_float32_weight_stays_float32_under_autocast():
    permutation = sort_by_expert(random_choice(9, 2).flatten(), E)
    weights = torch.rand(9, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = SortWeights.apply(weights, permutation)
    assert torch.equal(ours.flatten()[permutation.inverse], weights.flatten())


class Scatters(TorchDispatchMode):
    """Names of operations that scatter floats: on a GPU they add in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.all: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        floats = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
        self.all.append(name)
        if floats and any(
            word in name for word in ("scatter", "index_add", "index_put", "index_copy", "put_", "_backward")
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("where", [torch.Tensor, Elsewhere], ids=["on CPU", "elsewhere"])
def test_no_float_is_scattered(align, where):
    permutation = sort_by_expert(random_choice(9, 2).flatten(), E, align)
    grad = torch.ones(9, 3).as_subclass(where)
    x, weights = torch.randn(9, 3, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    with Scatters() as watched:
        y = Permute.apply(x, permutation, 2) * SortWeights.apply(weights, permutation)
        Combine.apply(y, permutation, 2).backward(grad)
    assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
    assert not watched.seen
    with Scatters() as watched:
        x[torch.tensor([0, 0])].sum().backward()
    assert watched.seen, f"the measure sees what it should: {watched.all}"


def test_without_padding_the_host_is_never_asked():
    """On the meta device a length that depends on values is an error."""
    with torch.device("meta"):
        permutation = sort_by_expert(torch.zeros(18, dtype=torch.int64), E)
        x, weights = torch.randn(9, 3, requires_grad=True), torch.rand(9, 2, requires_grad=True)
        y = Permute.apply(x, permutation, 2) * SortWeights.apply(weights, permutation)
        Combine.apply(y, permutation, 2).sum().backward()
        assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
        with pytest.raises((RuntimeError, NotImplementedError)):
            sort_by_expert(torch.zeros(18, dtype=torch.int64), E, align=4)
