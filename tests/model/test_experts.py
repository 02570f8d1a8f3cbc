"""The two expert backends, the few-token path and the permutation, against loops written out and against each other.

Tolerances: float32 results of order 1 agree to 2e-5; under bfloat16 autocast (8 bits) values, inputs and weights are rounded
to 2^-9 relative at each of three places, so results agree to 3 % of their largest value, and the backends, which
round at the same places, to 1 %.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from model import experts as experts_module
from model.experts import Combine, Experts, Permute, resolve_backend, sort_by_expert, weighted_sum

E, D, WIDTH = 5, 16, 24


def random_choice(N: int, k: int, n_experts: int = E) -> torch.Tensor:
    return torch.stack([torch.randperm(n_experts)[:k] for _ in range(N)])


ROUTINGS = {
    "spread": lambda: random_choice(23, 2),
    "one token": lambda: random_choice(1, 2),
    "two tokens, most experts idle": lambda: random_choice(2, 1),
    "all to one expert, k=1": lambda: torch.full((11, 1), 3),
    "all to two experts": lambda: torch.tensor([[4, 1]]).expand(11, 2).contiguous(),
    "first and last idle": lambda: 1 + random_choice(13, 2, E - 2),
    "k=1": lambda: random_choice(23, 1),
    "k=E": lambda: random_choice(9, E),
}


def make_experts(
    backend: str, gated: bool = True, hidden: int = D, width: int = WIDTH, act: str = "silu", seed: int = 0
) -> Experts:
    torch.manual_seed(seed)
    return Experts(E, hidden, width, act, gated, backend, hidden**-0.5, width**-0.5)


def reference(module: Experts, x: torch.Tensor, topk_idx: torch.Tensor, topk_weight: torch.Tensor) -> torch.Tensor:
    """sum over a token's choices of weight * down(act(gate x) * up x), token by token; differentiable, any dtype."""
    rows = []
    for token, chosen, weights in zip(x, topk_idx.tolist(), topk_weight, strict=True):
        y = torch.zeros_like(token)
        for place, e in enumerate(chosen):
            if module.gated:
                gate, up = (
                    module.gate_up_proj[e][: module.down_proj.shape[-1]],
                    module.gate_up_proj[e][module.down_proj.shape[-1] :],
                )
                hidden = module.act(gate @ token) * (up @ token)
            else:
                hidden = module.act(module.up_proj[e] @ token)
            y = y + weights[place] * (module.down_proj[e] @ hidden)
        rows.append(y)
    return torch.stack(rows)


def run(function, module, x, topk_idx, topk_weight, probe) -> dict[str, torch.Tensor]:
    """The output, and the gradients of (output * probe).sum()."""
    x, topk_weight = x.clone().requires_grad_(), topk_weight.clone().requires_grad_()
    module.zero_grad()
    y = function(x, topk_idx, topk_weight)
    (y * probe).sum().backward()
    grads = {f"gradient of {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"output": y.detach(), "gradient of x": x.grad, "gradient of the weights": topk_weight.grad, **grads}


def assert_agree(ours: dict, expected: dict, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(
            ours[name].double(),
            expected[name].double(),
            atol=tolerance * scale,
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture
def grouped_calls(monkeypatch) -> list:
    """Shapes grouped_mm was called with: a backend that quietly fell back would prove nothing."""
    calls, kernel = [], F.grouped_mm

    def spy(a, b, **options):
        calls.append((tuple(a.shape), tuple(b.shape)))
        return kernel(a, b, **options)

    monkeypatch.setattr(experts_module.F, "grouped_mm", spy)
    return calls


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_backends_are_the_reference_forward_and_backward(backend, gated, routing, grouped_calls):
    topk_idx = ROUTINGS[routing]()
    N, k = topk_idx.shape
    x, topk_weight, probe = torch.randn(N, D), torch.rand(N, k), torch.randn(N, D)
    module = make_experts(backend, gated)
    ours = run(module, module, x, topk_idx, topk_weight, probe)
    assert len(grouped_calls) == (2 if backend == "grouped" else 0)
    wide = make_experts("loop", gated).double()
    expected = run(
        lambda *args: reference(wide, *args), wide, x.double(), topk_idx, topk_weight.double(), probe.double()
    )
    assert_agree(ours, expected, 2e-5)
    few = run(module.run_few, module, x, topk_idx, topk_weight, probe)
    assert_agree(few, expected, 2e-5)


@pytest.mark.parametrize(
    ("hidden", "width", "takes"), [(14, 24, False), (16, 7, False), (13, 9, False), (12, 20, True)]
)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_widths_grouped_mm_cannot_take_run_all_the_same(hidden, width, takes, gated, grouped_calls):
    """float32 needs multiples of 4 (16 bytes)."""
    topk_idx = random_choice(23, 2)
    x, topk_weight, probe = torch.randn(23, hidden), torch.rand(23, 2), torch.randn(23, hidden)
    grouped, loop = (make_experts(backend, gated, hidden, width) for backend in ("grouped", "loop"))
    ours = run(grouped, grouped, x, topk_idx, topk_weight, probe)
    assert bool(grouped_calls) == takes
    assert_agree(ours, run(loop, loop, x, topk_idx, topk_weight, probe), 2e-5)
    assert_agree(ours, run(lambda *args: reference(loop, *args), loop, x, topk_idx, topk_weight, probe), 2e-5)


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize(("hidden", "width", "takes"), [(16, 24, True), (12, 24, False), (16, 20, False)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_backends_agree_under_bfloat16_autocast(gated, hidden, width, takes, routing, grouped_calls):
    """bfloat16 needs multiples of 8."""
    topk_idx = ROUTINGS[routing]()
    N, k = topk_idx.shape
    x, topk_weight, probe = torch.randn(N, hidden), torch.rand(N, k), torch.randn(N, hidden)

    def autocast(module):
        def call(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = module(*args)
            assert y.dtype == torch.bfloat16
            return y

        return call

    grouped, loop = (make_experts(backend, gated, hidden, width) for backend in ("grouped", "loop"))
    by_grouped = run(autocast(grouped), grouped, x, topk_idx, topk_weight, probe)
    assert bool(grouped_calls) == takes
    by_loop = run(autocast(loop), loop, x, topk_idx, topk_weight, probe)
    by_few = run(autocast(loop.run_few), loop, x, topk_idx, topk_weight, probe)
    expected = run(lambda *args: reference(loop, *args), loop, x, topk_idx, topk_weight, probe)
    assert_agree(by_grouped, by_loop, 0.01)
    for result in (by_grouped, by_loop, by_few):
        assert_agree(result, expected, 0.03)


def test_the_combination_is_float32_under_autocast():
    """Autocast would round the router's weights to bfloat16 inside the product."""
    y, weights = torch.randn(40, D).to(torch.bfloat16), torch.rand(20, 2)
    exact = (weights.double().unsqueeze(-1) * y.double().view(20, 2, D)).sum(1)
    order = torch.arange(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = weighted_sum(y, weights), Combine.apply(y, weights, order, order)
    for result in results:
        torch.testing.assert_close(result, exact.to(torch.bfloat16), atol=0, rtol=0)


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
def test_permute_and_combine_have_the_gradients_of_what_they_compute(align):
    topk_idx = random_choice(7, 3)
    order, inverse, ends = sort_by_expert(topk_idx.flatten(), E, align)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(int(ends[-1]), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    real = order < 21
    assert torch.equal(Permute.apply(x, order, inverse, 3)[real], x[order[real] // 3])
    by_loop = torch.stack([sum(weights[n, j] * y[inverse[n * 3 + j]] for j in range(3)) for n in range(7)])
    torch.testing.assert_close(Combine.apply(y, weights, order, inverse), by_loop)
    # What padding computes is read by nobody, so its gradient is 0, which is what Combine's backward gives.
    assert torch.autograd.gradcheck(lambda x: Permute.apply(x, order, inverse, 3) * real.unsqueeze(1), (x,))
    assert torch.autograd.gradcheck(lambda y, w: Combine.apply(y, w, order, inverse), (y, weights))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradcheck_of_the_experts_in_float64(gated):
    module = make_experts("loop", gated, hidden=4, width=3).double()
    topk_idx = random_choice(5, 2)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weights, *parameters):
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, topk_idx, weights))

    assert torch.autograd.gradcheck(function, (x, weights, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_the_same_step_gives_the_same_bits(backend, dtype):
    topk_idx = random_choice(64, 3)
    x, weights, probe = torch.randn(64, D), torch.rand(64, 3), torch.randn(64, D)
    module = make_experts(backend)

    def once():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return run(module, module, x, topk_idx, weights, probe)

    first, second = once(), once()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between two equal runs"


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_expert_gets_a_gradient_zero_when_idle(backend, gated):
    topk_idx = torch.tensor([[0, 3]]).expand(9, 2).contiguous()
    module = make_experts(backend, gated)
    module(torch.randn(9, D), topk_idx, torch.rand(9, 2)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        largest = parameter.grad.abs().amax((1, 2))
        assert (largest[[1, 2, 4]] == 0).all(), f"{name}: an idle expert moved"
        assert (largest[[0, 3]] > 0).all(), f"{name}: a busy expert did not"


def test_no_tokens_at_all():
    for backend in ("loop", "grouped"):
        module = make_experts(backend)
        y = module(torch.zeros(0, D), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
        assert y.shape == (0, D)
        y.sum().backward()
        assert not module.down_proj.grad.any()


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_gate_rows_come_first(act):
    """Expert e with its matrices pulled apart is the FeedForward of the same weights."""
    module = make_experts("loop", act=act)
    x = torch.randn(6, D)
    formula = {
        "silu": F.silu,
        "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
        "relu": lambda h: h.clamp(min=0),
    }
    for e in range(E):
        gate, up = module.gate_up_proj[e].split(WIDTH)
        expected = (formula[act](x @ gate.t()) * (x @ up.t())) @ module.down_proj[e].t()
        y = module(x, torch.full((6, 1), e), torch.ones(6, 1))
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_auto_is_resolved_from_device_and_dtype():
    cpu = torch.device("cpu")
    assert [resolve_backend("auto", cpu, d) for d in (torch.float32, torch.bfloat16, torch.float64)] == [
        "grouped",
        "grouped",
        "loop",
    ]
    assert [resolve_backend(b, cpu, torch.float32) for b in ("loop", "grouped")] == ["loop", "grouped"]
    module = make_experts("grouped").double()
    topk_idx, weights, x = random_choice(9, 2), torch.rand(9, 2).double(), torch.randn(9, D).double()
    torch.testing.assert_close(
        module(x, topk_idx, weights), reference(module, x, topk_idx, weights), msg="grouped falls back for float64"
    )


def test_bfloat16_segments_on_cpu_have_few_lengths():
    """oneDNN compiles a kernel for each new length; elsewhere nothing is padded."""
    module = make_experts("grouped")
    for N in (1, 10, 200, 1000, 100_000):
        x = torch.empty(N, 0, dtype=torch.bfloat16)
        align = module.segment_alignment(x, 2)
        assert align in (8, 16, 32, 64) and (align == 8 or align * 8 <= N * 2 / E), f"{align} for {N} tokens"
        assert module.segment_alignment(x.float(), 2) == 1
        assert module.segment_alignment(x.to("meta"), 2) == 1
