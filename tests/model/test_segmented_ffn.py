"""The experts' gradients by hand against autograd: of the activation alone, and of whole segments, padded or not.

float32 results agree to 1e-5 of their largest value; in bfloat16 (8 bits), where loop and grouped round at different places, to 2 %.
"""

import pytest
import torch
import torch.nn.functional as F

from model import segmented_ffn
from model.experts import Experts
from model.feed_forward import ACTIVATIONS, Activation
from model.segmented_ffn import SegmentedFFN

ACTS = list(ACTIVATIONS)
D, WIDTH = 16, 12
SIZES = {
    "spread": [5, 20, 1, 9],
    "idle first, middle and last": [0, 17, 0, 18, 0],
    "all to one": [0, 0, 35, 0],
    "one row": [0, 1, 0],
    "one expert": [33],
}


def make_experts(n: int, gated: bool, act: str = "silu", hidden: int = D, width: int = WIDTH) -> Experts:
    torch.manual_seed(0)
    return Experts(n, hidden, width, act, gated, "loop", hidden**-0.5, width**-0.5)


def by_loop(module: Experts, rows: torch.Tensor, weights: torch.Tensor, sizes: list[int], grad: torch.Tensor) -> dict:
    """The reference backend's result and autograd's gradients, under the given gradient of the result."""
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad()
    y = module.run_segments(rows, torch.tensor(sizes).cumsum(0).int(), weights)
    y.backward(grad)
    return {
        "output": y.detach(), "rows": rows.grad, "weights": weights.grad,
        "into": module.into_proj.grad.clone(), "down": module.down_proj.grad.clone(),
    }  # fmt: skip


def by_hand(module: Experts, rows: torch.Tensor, weights: torch.Tensor, sizes: list[int], grad: torch.Tensor) -> dict:
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    into, down = (p.detach().clone().requires_grad_() for p in (module.into_proj, module.down_proj))
    y = SegmentedFFN.apply(rows, weights, into, down, sizes, module.activation)
    y.backward(grad)
    return {"output": y.detach(), "rows": rows.grad, "weights": weights.grad, "into": into.grad, "down": down.grad}


def assert_agree(ours: dict, expected: dict, tolerance: float) -> None:
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        scale = float(value.abs().max())
        assert scale > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(
            ours[name], value, atol=tolerance * max(1.0, scale), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ACTS)
def test_the_activations_gradients_are_autograds(act, gated):
    activation = Activation(act, gated)
    hidden = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 1, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 5 if gated else 10, dtype=torch.float64)
    expected = activation(hidden, weights)
    of_hidden, of_weights = torch.autograd.grad(expected, (hidden, weights), grad)
    with torch.no_grad():
        result, backward = activation.with_backward(hidden, weights)
        ours = backward(grad)
    assert not result.requires_grad
    for a, b in zip((result, *ours), (expected.detach(), of_hidden, of_weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)
    formula = ACTIVATIONS[act](hidden[:, :5]) * hidden[:, 5:] if gated else ACTIVATIONS[act](hidden)
    torch.testing.assert_close(expected, formula * weights, msg="gate columns come first")
    torch.testing.assert_close(activation(hidden), formula, msg="no weights are weights of 1")


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_the_activation_weighs_in_float32(gated):
    """Under autocast too the router's weights are not rounded to bfloat16 before the product."""
    hidden, weights = torch.randn(40, 8).bfloat16(), torch.rand(40, 1)
    activation = Activation("relu", gated)
    plain = activation(hidden)
    assert plain.dtype == torch.bfloat16
    exact = (plain.double() * weights.double()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = activation(hidden, weights), activation.with_backward(hidden, weights)[0]
    for result in results:
        assert torch.equal(result, exact)
    assert not torch.equal((plain * weights.bfloat16()), exact), "rounded weights would show"


@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ACTS)
def test_gradients_are_those_of_the_loop_in_float32(act, gated, sizes, library):
    sizes = SIZES[sizes]
    module = make_experts(len(sizes), gated, act)
    M = sum(sizes)
    rows, weights, grad = torch.randn(M, D), torch.rand(M, 1), torch.randn(M, D)
    ours = by_hand(module, rows, weights, sizes, grad)
    assert_agree(ours, by_loop(module, rows, weights, sizes, grad), 1e-5)
    for name in ("into", "down"):
        for expert, size in enumerate(sizes):
            assert ours[name][expert].any() == (size > 0), f"{name} of expert {expert} with {size} rows"


@pytest.mark.parametrize(("hidden", "width"), [(13, 7), (1, 1), (24, 33)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_width_goes(hidden, width, gated, dtype, library):
    module = make_experts(3, gated, hidden=hidden, width=width)
    rows, weights, grad = torch.randn(40, hidden).to(dtype), torch.rand(40, 1), torch.randn(40, hidden).to(dtype)
    ours, expected = (f(module, rows, weights, [21, 0, 19], grad) for f in (by_hand, by_loop))
    assert_agree(ours, expected, 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ACTS)
def test_gradients_are_near_the_loops_in_bfloat16(act, gated):
    """bfloat16 rows, float32 matrices and weights of the router: each gradient comes in the dtype of what it is of."""
    sizes = SIZES["spread"]
    module = make_experts(len(sizes), gated, act)
    M = sum(sizes)
    rows, weights, grad = torch.randn(M, D).bfloat16(), torch.rand(M, 1), torch.randn(M, D).bfloat16()
    ours, expected = (f(module, rows, weights, sizes, grad) for f in (by_hand, by_loop))
    assert_agree(ours, expected, 0.02)
    assert [v.dtype for v in ours.values()] == [torch.bfloat16] * 2 + [torch.float32] * 3
    exact = by_loop(module, rows.float(), weights, sizes, grad.float())
    for name, value in exact.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            ours[name].float(), value, atol=0.03 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bfloat16_matrices_get_bfloat16_gradients():
    module = make_experts(2, True).bfloat16()
    rows, weights, grad = torch.randn(20, D).bfloat16(), torch.rand(20, 1), torch.randn(20, D).bfloat16()
    ours, expected = (f(module, rows, weights, [12, 8], grad) for f in (by_hand, by_loop))
    assert ours["into"].dtype == ours["down"].dtype == torch.bfloat16
    assert_agree(ours, expected, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("align", [4, 8, 64])
def test_padding_influences_nothing(align, act, gated, dtype, library):
    """Rows of weight 0 and huge numbers in them, forward and in the gradient, behind each segment that has rows."""
    sizes = [5, 0, 20, 1, 0]
    module = make_experts(len(sizes), gated, act)
    M = sum(sizes)
    rows, weights, grad = torch.randn(M, D).to(dtype), torch.rand(M, 1), torch.randn(M, D).to(dtype)
    padded = [-(-size // align) * align for size in sizes]
    starts = [sum(padded[:e]) for e in range(len(sizes))]
    real = torch.cat([start + torch.arange(size) for start, size in zip(starts, sizes, strict=True)])

    def spread(tensor: torch.Tensor, filling: float) -> torch.Tensor:
        wide = filling * torch.randn(sum(padded), tensor.shape[1]).to(tensor.dtype)
        wide[real] = tensor
        return wide

    ours = by_hand(module, spread(rows, 1e6), spread(weights, 0.0), padded, spread(grad, 1e6))
    expected = by_hand(module, rows, weights, sizes, grad)
    elsewhere = torch.ones(sum(padded), dtype=torch.bool)
    elsewhere[real] = False
    assert elsewhere.any()
    assert not ours["rows"][elsewhere].any() and not ours["output"][elsewhere].any(), "padding weighs 0"
    for name in ("output", "rows", "weights"):
        ours[name] = ours[name][real]
    assert_agree(ours, expected, 1e-5 if dtype == torch.float32 else 0.02)
    for name in ("into", "down"):
        assert not ours[name][[1, 4]].any(), f"{name}: an idle expert moved"


def test_the_gradient_of_the_weights_is_what_the_outputs_say():
    """<grad, down h>, with the outputs unweighted: the sum that the hand-written formula turns around."""
    sizes = SIZES["spread"]
    module = make_experts(len(sizes), True)
    rows, weights, grad = torch.randn(35, D), torch.rand(35, 1), torch.randn(35, D)
    ours = by_hand(module, rows, weights, sizes, grad)["weights"]
    with torch.no_grad():
        unweighted = module.run_segments(rows, torch.tensor(sizes).cumsum(0).int(), torch.ones(35, 1))
    torch.testing.assert_close(ours, (unweighted * grad).sum(1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_a_weight_of_zero_still_has_a_gradient():
    module = make_experts(1, True)
    rows, grad = torch.randn(20, D), torch.randn(20, D)
    ours = by_hand(module, rows, torch.zeros(20, 1), [20], grad)
    assert ours["weights"].abs().min() > 0 and not ours["rows"].any() and not ours["down"].any()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_only_rows_weights_and_hidden_are_kept(gated):
    """Not the activations nor the outputs: recomputed, or not needed."""
    sizes = [30, 0, 40]
    module, kept = make_experts(3, gated), {}
    rows, weights = torch.randn(70, D, requires_grad=True), torch.rand(70, 1, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        segmented_ffn.segmented_ffn(rows, weights, module.into_proj, module.down_proj, sizes, module.activation)
    matrices = sum(p.numel() for p in module.parameters())
    assert sum(t.numel() for t in kept.values()) == matrices + 70 * (D + 1 + (2 if gated else 1) * WIDTH)


def test_no_copy_of_the_matrices_outlives_its_expert():
    """bfloat16 rows, float32 matrices: what is kept for the backward pass are the parameters themselves."""
    module, kept = make_experts(3, True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        segmented_ffn.segmented_ffn(
            torch.randn(40, D).bfloat16(), torch.rand(40, 1), module.into_proj, module.down_proj, [20, 0, 20], module.activation
        )  # fmt: skip
    for parameter in module.parameters():
        of_its_shape = [
            t for t in kept if t.shape[-2:] in (parameter.shape[-2:], parameter.mT.shape[-2:]) and t.dim() == 3
        ]
        assert [t.data_ptr() for t in of_its_shape] == [parameter.data_ptr()]


def test_the_same_step_gives_the_same_bits(library):
    module = make_experts(3, True)
    for dtype in (torch.float32, torch.bfloat16):
        rows, weights, grad = torch.randn(60, D).to(dtype), torch.rand(60, 1), torch.randn(60, D).to(dtype)
        first, second = (by_hand(module, rows, weights, [24, 0, 36], grad) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name


def test_derivatives_hold_where_the_activations_bend():
    """relu at 0 has the derivative 0, and large arguments give no NaN."""
    hidden = torch.tensor([[0.0, -0.0, 90.0, -90.0, 1e4, -1e4]])
    for act, function in ACTIVATIONS.items():
        x = hidden.clone().requires_grad_()
        function(x).sum().backward()
        _, backward = Activation(act, gated=False).with_backward(hidden, torch.ones(1, 1))
        of_hidden, of_weights = backward(torch.ones_like(hidden))
        assert torch.equal(of_hidden, x.grad), act
        torch.testing.assert_close(of_weights[0, 0], F.relu(hidden).sum(), rtol=1e-3, atol=0.0)
