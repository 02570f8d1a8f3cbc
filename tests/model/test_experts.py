"""The expert backends, the few-token path and padded segments, against loops written out and against each other.

Tolerances: float32 results of order 1 agree to 2e-5; under bfloat16 autocast (8 bits) values, inputs and weights are rounded
to 2^-9 relative at each of three places, so results agree to 3 % of their largest value, and the backends, which
round at the same places but for the gradients, to 2 %.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from model import experts as experts_module
from model import products, segmented_ffn
from model.experts import SHORT_SEGMENT, Experts, resolve_backend, weighted_sum

from .routings import ROUTINGS, E, Elsewhere, random_choice

D, WIDTH = 16, 24


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
                hidden = module.activation.act(gate @ token) * (up @ token)
            else:
                hidden = module.activation.act(module.up_proj[e] @ token)
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
def kernels(monkeypatch) -> list[str]:
    """Which kernels ran, in order: a backend that quietly fell back would prove nothing."""
    calls = []
    for owner, name in ((segmented_ffn, "segmented_ffn"), (experts_module.F, "grouped_mm")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, f=function, n=name, **kw: calls.append(n) or f(*args, **kw))
    return calls


@pytest.fixture(params=["loop", "segmented, oneDNN", "segmented, MKL", "grouped_mm"])
def way(request, monkeypatch) -> str:
    """A backend as a CPU runs it, by either library (with oneDNN segments are padded), and `grouped_mm` as a GPU does."""
    if request.param == "segmented, oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "float32_library", lambda: request.param.removeprefix("segmented, "))
    if request.param == "grouped_mm":
        monkeypatch.setattr(segmented_ffn, "DTYPES", ())
        monkeypatch.setattr(experts_module, "uses_onednn", lambda x: False)
    return request.param


def backend_of(way: str) -> str:
    return "loop" if way == "loop" else "grouped"


def kernels_of(way: str, takes: bool = True) -> list[str]:
    """What one forward pass runs; grouped_mm where it `takes` the widths."""
    if way == "grouped_mm":
        return ["grouped_mm"] * 2 * takes
    return [] if way == "loop" else ["segmented_ffn"]


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_backends_are_the_reference_forward_and_backward(way, gated, routing, kernels):
    topk_idx = ROUTINGS[routing]()
    N, k = topk_idx.shape
    x, topk_weight, probe = torch.randn(N, D), torch.rand(N, k), torch.randn(N, D)
    module = make_experts(backend_of(way), gated)
    ours = run(module, module, x, topk_idx, topk_weight, probe)
    assert kernels == kernels_of(way)
    wide = make_experts("loop", gated).double()
    expected = run(
        lambda *args: reference(wide, *args), wide, x.double(), topk_idx, topk_weight.double(), probe.double()
    )
    assert_agree(ours, expected, 2e-5)


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("where", [torch.Tensor, Elsewhere], ids=["on CPU", "elsewhere"])
def test_few_tokens_without_sorting_are_the_reference(where, gated, routing, kernels):
    """Weights where they lie, or the chosen ones gathered."""
    topk_idx = ROUTINGS[routing]()
    N, k = topk_idx.shape
    x, topk_weight = torch.randn(N, D), torch.rand(N, k)
    module = make_experts("auto", gated)
    with torch.no_grad():
        expected = reference(module, x, topk_idx, topk_weight)
        y = module.run_few(x.as_subclass(where), topk_idx, topk_weight)
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = module.run_few(x, topk_idx, topk_weight)
    assert not kernels
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(rounded.float(), expected, atol=0.03 * scale, rtol=0)


def test_few_tokens_on_a_cpu_read_float32_weights_as_they_lie(monkeypatch):
    """bfloat16 tokens among float32 weights: no copy of any expert's matrices, the tokens are cast instead."""
    module, x = make_experts("auto"), torch.randn(3, D).bfloat16()
    topk_idx, topk_weight = random_choice(3, 2), torch.rand(3, 2)
    read, function = [], experts_module.multiply
    monkeypatch.setattr(experts_module, "multiply", lambda a, w: read.append(w) or function(a, w))
    y = module.run_few(x, topk_idx, topk_weight)
    chosen = topk_idx.flatten().tolist()
    assert [w.data_ptr() for w in read] == [
        m[e].data_ptr() for m in (module.gate_up_proj, module.down_proj) for e in chosen
    ]
    torch.testing.assert_close(y, reference(module, x.float(), topk_idx, topk_weight), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "hidden_width_takes", [(14, 24, False), (16, 7, False), (13, 9, False), (12, 20, True)], ids=str
)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_widths_grouped_mm_cannot_take_run_all_the_same(way, hidden_width_takes, gated, kernels):
    """float32 needs multiples of 4 (16 bytes)."""
    hidden, width, takes = hidden_width_takes
    topk_idx = random_choice(23, 2)
    x, topk_weight, probe = torch.randn(23, hidden), torch.rand(23, 2), torch.randn(23, hidden)
    module, loop = (make_experts(backend, gated, hidden, width) for backend in (backend_of(way), "loop"))
    ours = run(module, module, x, topk_idx, topk_weight, probe)
    assert kernels == kernels_of(way, takes)
    assert_agree(ours, run(loop, loop, x, topk_idx, topk_weight, probe), 2e-5)
    assert_agree(ours, run(lambda *args: reference(loop, *args), loop, x, topk_idx, topk_weight, probe), 2e-5)


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize(
    "hidden_width_takes", [(16, 24, True), (12, 24, False), (16, 20, False), (13, 7, False)], ids=str
)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("way", ["segmented, MKL", "grouped_mm"], indirect=True)
def test_backends_agree_under_bfloat16_autocast(way, gated, hidden_width_takes, routing, kernels):
    """bfloat16 needs multiples of 8."""
    hidden, width, takes = hidden_width_takes
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
    assert kernels == kernels_of(way, takes)
    by_loop = run(autocast(loop), loop, x, topk_idx, topk_weight, probe)
    expected = run(lambda *args: reference(loop, *args), loop, x, topk_idx, topk_weight, probe)
    assert_agree(by_grouped, by_loop, 0.02)
    for result in (by_grouped, by_loop):
        assert_agree(result, expected, 0.03)


def test_float64_falls_to_the_loop_whatever_the_backend(way, kernels):
    module, loop = (make_experts(backend).double() for backend in ("grouped", "loop"))
    topk_idx = random_choice(23, 2)
    x, weights, probe = (torch.randn(23, n, dtype=torch.float64) for n in (D, 2, D))
    ours, expected = (run(m, m, x, topk_idx, weights, probe) for m in (module, loop))
    assert not kernels
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.parametrize("align", [4, 8, 64])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_padded_segments_change_nothing(way, gated, align, monkeypatch):
    topk_idx = random_choice(23, 2, 4)  # expert 4 is idle
    x, weights, probe = torch.randn(23, D), torch.rand(23, 2), torch.randn(23, D)
    module = make_experts(backend_of(way), gated)
    results = []
    for a in (1, align):
        monkeypatch.setattr(module, "segment_alignment", lambda x, k, a=a: a)
        results.append(run(module, module, x, topk_idx, weights, probe))
    assert_agree(results[1], results[0], 1e-5)
    assert not any(results[1][name][4].any() for name in results[1] if name.endswith("proj"))


def test_the_combination_of_few_is_float32_under_autocast():
    """Autocast would round the router's weights to bfloat16 inside a product."""
    y, weights = torch.randn(40, D).to(torch.bfloat16), torch.rand(20, 2)
    exact = (weights.double().unsqueeze(-1) * y.double().view(20, 2, D)).sum(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = weighted_sum(y, weights)
    torch.testing.assert_close(result, exact.to(torch.bfloat16), atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_the_routers_weights_are_not_rounded_under_autocast(backend):
    """What an expert's second product reads is its activation times the float32 weight, rounded once."""
    module = make_experts(backend)
    x, weight = torch.randn(40, D), torch.rand(40, 1)
    topk_idx = torch.zeros(40, 1, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        hidden = F.linear(x, module.gate_up_proj[0])
        activated = module.activation(hidden)
        exact = (activated.float() * weight).bfloat16()
        y = module(x, topk_idx, weight)
        expected = F.linear(exact, module.down_proj[0])
        twice = F.linear(activated * weight.bfloat16(), module.down_proj[0])
    assert torch.equal(y, expected) and not torch.equal(y, twice)


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
def test_the_same_step_gives_the_same_bits(way, dtype):
    topk_idx = random_choice(64, 3)
    x, weights, probe = torch.randn(64, D), torch.rand(64, 3), torch.randn(64, D)
    module = make_experts(backend_of(way))

    def once():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return run(module, module, x, topk_idx, weights, probe)

    first, second = once(), once()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between two equal runs"


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_expert_gets_a_gradient_zero_when_idle(way, gated):
    topk_idx = torch.tensor([[0, 3]]).expand(30, 2).contiguous()
    module = make_experts(backend_of(way), gated)
    module(torch.randn(30, D), topk_idx, torch.rand(30, 2)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        largest = parameter.grad.abs().amax((1, 2))
        assert (largest[[1, 2, 4]] == 0).all(), f"{name}: an idle expert moved"
        assert (largest[[0, 3]] > 0).all(), f"{name}: a busy expert did not"


def test_no_tokens_at_all(way):
    module = make_experts(backend_of(way))
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


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_segments_that_onednn_runs_have_few_lengths(library, monkeypatch):
    """oneDNN compiles a kernel for each new length; elsewhere, and for short segments, nothing is padded."""
    monkeypatch.setattr(products, "float32_library", lambda: library)
    module = make_experts("grouped")
    lengths = []
    for N in (1, 10, 19, 20, 21, 79, 80, 200, 1000, 3000, 100_000):
        mean = N * 2 // E
        aligns = {dtype: module.segment_alignment(torch.empty(N, 0, dtype=dtype), 2) for dtype in (torch.float32, torch.bfloat16, torch.float64)}  # fmt: skip
        align = aligns[torch.bfloat16]
        assert aligns[torch.float32] == (align if library == "oneDNN" else 1)
        assert (
            aligns[torch.float64]
            == module.segment_alignment(torch.empty(N, 0, dtype=torch.bfloat16, device="meta"), 2)
            == 1
        )
        assert align == 1 if mean < SHORT_SEGMENT else align in (8, 16, 32, 64), f"{align} for {N} tokens"
        assert align <= 8 or align * 16 <= mean, f"{N} tokens: half of {align} rows of padding a segment of {mean}"
        lengths.append(align)
    assert lengths == sorted(lengths) and {1, 8, 16, 64} <= set(lengths)


def test_compute_dtype_is_autocasts_or_the_weights():
    module, x = make_experts("auto"), torch.randn(2, D)
    assert module.compute_dtype(x.bfloat16()) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.compute_dtype(x) == torch.bfloat16
    assert module.double().compute_dtype(x) == torch.float64
