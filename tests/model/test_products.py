"""model/products.py: both libraries give torch's results and gradients, and who multiplies depends on the processor alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import products
from model.products import (
    FEW_ROWS,
    Linear,
    multiply,
    product,
    product_into,
    uses_onednn,
    without_autocast,
)

ONEDNN = "mkldnn::_linear_pointwise"
CPUINFO = Path("/proc/cpuinfo")
N, K, M = 2 * FEW_ROWS + 3, 13, 21


class Operations(TorchDispatchMode):
    """The names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    @property
    def onednn(self) -> int:
        return self.names.count(ONEDNN)


def transposed(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(columns, rows, dtype=dtype).t()


def plain(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=dtype)


def inside(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows + 2, columns + 3, dtype=dtype)[1:-1, 2:-1]


KINDS = {"plain": plain, "transposed": transposed, "part of a larger one": inside}


@pytest.mark.parametrize("b", list(KINDS))
@pytest.mark.parametrize("a", list(KINDS))
@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS, N])
def test_products_are_torchs(rows, a, b, library):
    left, right = KINDS[a](rows, K), KINDS[b](K, M)
    expected = (left.double() @ right.double()).float()
    out = torch.full((rows, M), torch.nan)
    with Operations() as ran:
        by_multiply, by_product = multiply(left, right.t()), product(left, right)
        product_into(out, left, right)
    for result in (by_multiply, by_product, out):
        assert result.is_contiguous() and result.dtype == torch.float32
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert ran.onednn == (3 if library == "oneDNN" and rows >= FEW_ROWS else 0)


def test_product_into_writes_in_place_into_part_of_a_tensor(library):
    whole = torch.zeros(N + 10, M)
    left, right = plain(N, K), plain(K, M)
    product_into(whole[4 : N + 4], left, right)
    torch.testing.assert_close(whole[4 : N + 4], left @ right, atol=1e-5, rtol=1e-5)
    assert not whole[:4].any() and not whole[N + 4 :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_to_torch(dtype, library):
    left, right = plain(N, K, dtype), plain(K, M, dtype)
    out = torch.empty(N, M, dtype=dtype)
    with Operations() as ran:
        result = product(left, right)
        product_into(out, left, right)
    assert torch.equal(result, F.linear(left, right.t())) and ran.onednn == 0
    torch.testing.assert_close(out, result)


SHAPES = {
    "2-D": (N, K),
    "3-D": (3, N, K),
    "4-D": (2, 3, N, K),
    "few rows": (FEW_ROWS - 1, K),
    "one": (1, 1, K),
    "none": (0, K),
}


def pair(bias: bool) -> tuple[Linear, nn.Linear]:
    ours, theirs = Linear(K, M, bias=bias), nn.Linear(K, M, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_linear_layer_is_torchs_forward_and_backward(shape, bias, library):
    ours, theirs = pair(bias)
    x = torch.randn(SHAPES[shape])
    probe = torch.randn(*SHAPES[shape][:-1], M)
    few = x.numel() < FEW_ROWS * K
    results = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        with Operations() as ran:
            y = layer(given)
            (y * probe).sum().backward()
        results.append([y, given.grad, *(p.grad for p in layer.parameters())])
        expected = 0 if library == "MKL" or few or layer is theirs else 3 if M >= FEW_ROWS else 2
        assert ran.onednn == expected, "one product forward, two backward"
    for name, a, b in zip(("output", "of x", "of weight", "of bias"), *results):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        y = ours(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, theirs(x).detach(), atol=1e-5, rtol=1e-5)


def test_a_linear_layer_takes_views(library):
    ours, theirs = pair(True)
    for x in (torch.randn(K, N).t(), torch.randn(5, K, 7).transpose(1, 2), torch.randn(40, 2 * K)[:, K:]):
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_nobody_wants_is_not_computed(frozen, library):
    layer, _ = pair(False)
    x = torch.randn(N, K, requires_grad=frozen != "x")
    layer.weight.requires_grad_(frozen != "weight")
    with Operations() as ran:
        layer(x).square().sum().backward()
    assert ran.onednn == (2 if library == "oneDNN" else 0)
    given, wanted = (x, layer.weight) if frozen == "x" else (layer.weight, x)
    assert given.grad is None
    y = (x @ layer.weight.t()).detach()
    expected = 2 * y.t() @ x if frozen == "x" else 2 * y @ layer.weight
    torch.testing.assert_close(wanted.grad, expected.detach(), atol=1e-4, rtol=1e-5)


def test_float64_and_autocast_go_to_torch(library):
    layer, _ = pair(True)
    x = torch.randn(N, K)
    with Operations() as ran, torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and ran.onednn == 0
    assert torch.equal(y, F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))
    layer = layer.double()
    with Operations() as ran:
        y = layer(x.double())
    assert torch.equal(y, F.linear(x.double(), layer.weight, layer.bias)) and ran.onednn == 0
    assert torch.autograd.gradcheck(layer, torch.randn(FEW_ROWS, K, dtype=torch.float64, requires_grad=True))


def test_compiled_products_are_torchs(library):
    """Tracing has no rule for oneDNN's operator: one graph without it, the numbers the same."""
    torch._dynamo.reset()
    layer, _ = pair(True)
    x, graphs = torch.randn(3, N, K), []
    y = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph)(x)
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1 and "linear" in graphs[0] and "_linear_pointwise" not in graphs[0]
    torch._dynamo.reset()


def test_a_linear_layer_is_saved_like_torchs():
    ours, theirs = pair(True)
    assert isinstance(ours, nn.Linear) and ours.state_dict().keys() == theirs.state_dict().keys()


# Who multiplies.


def on_processor(monkeypatch, vendor: str | None, capability: str, onednn: bool = True) -> None:
    """From here on it is another one; vendor None: a system without /proc/cpuinfo."""
    is_file, read_text = Path.is_file, Path.read_text
    text = f"processor : 0\nvendor_id : {vendor}\n"
    monkeypatch.setattr(Path, "is_file", lambda self: vendor is not None if self == CPUINFO else is_file(self))
    monkeypatch.setattr(
        Path, "read_text", lambda self, *args, **kw: text if self == CPUINFO else read_text(self, *args, **kw)
    )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)


def fresh_module():
    """model/products.py as a new process has it, that has asked for nothing yet."""
    spec = importlib.util.spec_from_file_location("fresh_products", products.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("vendor", "capability", "onednn", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, "oneDNN"),
        ("AuthenticAMD", "AVX512", False, "MKL"),
        ("AuthenticAMD", "AVX2", True, "MKL"),
        ("GenuineIntel", "AVX512", True, "MKL"),
        ("ARM", "DEFAULT", True, "MKL"),
        (None, "AVX512", True, "MKL"),
    ],
)
def test_the_library_is_a_function_of_the_processor(monkeypatch, vendor, capability, onednn, expected):
    on_processor(monkeypatch, vendor, capability, onednn)
    assert fresh_module().float32_library() == expected


def test_the_library_is_asked_for_once(monkeypatch):
    """A choice that could change in a run would change its bits."""
    module = fresh_module()
    on_processor(monkeypatch, "AuthenticAMD", "AVX512")
    assert module.float32_library() == "oneDNN"
    on_processor(monkeypatch, "GenuineIntel", "AVX512")
    assert fresh_module().float32_library() == "MKL" and module.float32_library() == "oneDNN"


def test_onednn_is_used_for_bfloat16_and_where_chosen_for_float32(monkeypatch):
    for chosen in ("oneDNN", "MKL"):
        monkeypatch.setattr(products, "float32_library", lambda chosen=chosen: chosen)
        uses = {
            dtype: uses_onednn(torch.empty(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)
        }
        assert uses == {torch.float32: chosen == "oneDNN", torch.bfloat16: True, torch.float64: False}
        assert not uses_onednn(torch.empty(1, device="meta")), "only on a CPU"


def test_without_autocast_is_off_inside_and_as_before_behind():
    cpu, x = torch.device("cpu"), torch.randn(3, 3)
    with without_autocast(cpu):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(cpu):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_second_derivatives_are_refused_rather_than_wrong(monkeypatch):
    monkeypatch.setattr(products, "_float32_library", "oneDNN")
    x, weight = torch.randn(32, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    (first,) = torch.autograd.grad(products.linear(x, weight).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
