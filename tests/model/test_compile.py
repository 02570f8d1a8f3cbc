"""torch.compile as the training loop uses it, layer by layer, and what it needs on a GPU: no graph break, no host sync.

The GPU's way through a layer is emulated here (`as_on_a_gpu`); tests/gpu/ has the real one.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from model import attention, experts, permutation, products, segmented_ffn
from model import moe as moe_module
from model.attention import attention_mask_for

KINDS = {
    "MoE": {},
    "raw sigmoid weights": {"norm_topk_prob": False, "scoring_func": "sigmoid"},
    "plain": {"gated_ffn": False},
    "dense": {"n_routed_experts": 0},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """The way that a GPU takes through a layer, on this CPU: grouped_mm on segments as long as they are, torch's products,
    attention's own kernel, sums by a gather."""
    monkeypatch.setattr(segmented_ffn, "DTYPES", ())
    for module in (products, experts):
        monkeypatch.setattr(module, "uses_onednn", lambda x: False)

    def fused(q, k, v, mask, dropout):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=True
        )

    monkeypatch.setattr(attention, "attend_by_products", fused)
    for module in (permutation, moe_module):
        monkeypatch.setattr(
            module, "sum_by_token", lambda y, inverse, k: y.index_select(0, inverse).view(-1, k, y.shape[-1]).sum(1)
        )


@pytest.fixture
def fresh_dynamo():
    """No graph of an earlier test, and none left behind."""
    products.float32_library()  # the training log asks before anything is compiled; it reads a file
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_and_inputs(tiny_model, kind: str, masked: bool, **changes) -> tuple:
    """A layer with QK-norm, and what the model hands to it: x, cos, sin, mask, cache."""
    model = tiny_model(use_qk_norm=True, **KINDS[kind], **changes)
    cos, sin = (table.view(1, 24, 1, -1) for table in model.rotary(torch.arange(24)))
    documents = (torch.arange(24) // 7).expand(3, 24) if masked else None
    mask = attention_mask_for(24, cos.device, None, documents, None)
    return model.layers[0], (torch.randn(3, 24, 32), cos, sin, mask, None)


def forward_and_backward(layer, function, x, *others, autocast: bool = True) -> dict[str, torch.Tensor]:
    """Output, routing, all gradients; by default under bfloat16 autocast."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, routing = function(x, *others)
    probe = torch.linspace(-1, 1, y.numel()).view_as(y)
    loss = (y * probe).sum() if routing is None else (y * probe).sum() + routing.scores.square().sum()
    loss.backward()
    routed = {} if routing is None else {"chosen": routing.topk_idx, "weights": routing.topk_weight.detach()}
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"output": y.detach(), "x": x.grad, **routed, **gradients}


def assert_near(compiled: dict, eager: dict, tolerance: float = 0.03) -> None:
    """Within 3 % of the norm: bfloat16 is rounded elsewhere once norms are taken apart."""
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        difference, size = float((compiled[name] - value).double().norm()), float(value.double().norm())
        assert difference <= tolerance * size, f"{name}: off by {difference / size:.4f} of its norm"


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_gpus_layer_compiles_into_one_graph(tiny_model, as_on_a_gpu, fresh_dynamo, kind, masked):
    """Forward and backward, and the numbers stay. `aot_eager` traces all that inductor would, and needs no C++ compiler."""
    layer, inputs = layer_and_inputs(tiny_model, kind, masked)
    eager = forward_and_backward(layer, layer, *inputs)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=counting, dynamic=False)
    assert_near(forward_and_backward(layer, compiled, *inputs), eager)
    again = forward_and_backward(layer, compiled, 2 * inputs[0], *inputs[1:])
    assert len(graphs) == 1, "other numbers, which route otherwise, compile nothing anew"
    assert_near(again, forward_and_backward(layer, layer, 2 * inputs[0], *inputs[1:]))
    if layer.is_moe:
        assert not torch.equal(again["chosen"], eager["chosen"])
        assert "grouped_mm" in str(graphs[0].code), "the kernel that a GPU runs"


def test_a_cpus_layer_is_no_single_graph(tiny_model, fresh_dynamo):
    """The check above can fail: padding of segments asks for their length."""
    layer, inputs = layer_and_inputs(tiny_model, "MoE", False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, RuntimeError)):
        forward_and_backward(layer, compiled, *inputs)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["MoE", "dense"])
def test_what_a_cpu_compiles_is_one_graph_too(tiny_model, fresh_dynamo, monkeypatch, kind, precision):
    """Nothing is emulated: the parts that `compile_layers` names, by whichever library multiplies."""
    layer, inputs = layer_and_inputs(tiny_model, kind, True)
    autocast = precision == torch.bfloat16
    eager = forward_and_backward(layer, layer, *inputs, autocast=autocast)
    part = layer.self_attn if layer.is_moe else layer
    part.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    assert_near(forward_and_backward(layer, layer, *inputs, autocast=autocast), eager, 0.03 if autocast else 1e-4)


def test_a_whole_moe_layer_compiles_on_a_cpu_with_graph_breaks(tiny_model, fresh_dynamo):
    """Nobody asks for it (`compile_layers`), but its numbers are right."""
    layer, inputs = layer_and_inputs(tiny_model, "MoE", True)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    for step in (1, 2):
        scaled = [step * inputs[0], *inputs[1:]]
        assert_near(forward_and_backward(layer, compiled, *scaled), forward_and_backward(layer, layer, *scaled))


@pytest.mark.parametrize("dense_layers", [0, 1, 2])
def test_what_changes_its_shapes_is_not_compiled(tiny_model, monkeypatch, dense_layers):
    """On a CPU of MoE layers the attention alone, elsewhere every layer, and never for shapes that may change."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    model = tiny_model(first_k_dense_replace=dense_layers)
    for device in ("cpu", "meta"):
        model.to(device).compile_layers()
        expected = [layer.self_attn if device == "cpu" and layer.is_moe else layer for layer in model.layers]
        assert [module for module, _ in compiled] == expected
        assert all(options == {"dynamic": False} for _, options in compiled)
        compiled.clear()


# What would make a GPU wait for the host.


class HostWaits(TorchDispatchMode):
    """Names of operations whose result the host must know: values, and lengths that depend on values."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "bincount",
        "repeat_interleave.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if name in self.NAMES or name.startswith("unique"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_gpus_layer_never_waits_for_the_host(tiny_model, as_on_a_gpu, kind, masked):
    layer, inputs = layer_and_inputs(tiny_model, kind, masked)
    with HostWaits() as waits:
        forward_and_backward(layer, layer, *inputs)
    assert waits.seen == []
    layer.eval()
    with HostWaits() as waits, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(*inputs)
    assert waits.seen == [], "moe_infer"


def test_a_cpus_layer_asks_for_lengths(tiny_model):
    """The measure sees what it should."""
    layer, inputs = layer_and_inputs(tiny_model, "MoE", False)
    with HostWaits() as waits:
        forward_and_backward(layer, layer, *inputs)
    assert "_local_scalar_dense" in waits.seen


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_off_the_cpu_a_layer_needs_no_values_at_all(tiny_model, monkeypatch, kind, masked):
    """Tensors of the meta device have shapes and no values. Nothing is emulated here: on no device but the CPU does the
    layer take the CPU's ways, and what asks for a value or a length raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # there is no autocast for meta
    layer, inputs = layer_and_inputs(tiny_model, kind, masked)
    layer = layer.to("meta", torch.bfloat16)
    x, *others = (tensor if tensor is None else tensor.to("meta") for tensor in inputs)
    x = x.bfloat16().requires_grad_()
    y, _ = layer(x, *others)
    assert y.shape == x.shape and y.device.type == "meta"
    y.sum().backward()
    assert x.grad.shape == x.shape and all(p.grad.shape == p.shape for p in layer.parameters())
    layer.eval()
    with torch.no_grad():
        assert layer(x, *others)[0].shape == x.shape, "moe_infer"
        few = layer(x[:1, :3], *(t[:, :3] for t in others[:2]), None, None)[0]
        assert few.shape == (1, 3, 32), "a few tokens"
    if layer.is_moe:
        layer.mlp.experts.backend = "loop"
        with pytest.raises((RuntimeError, NotImplementedError)):
            layer(x, *others)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tiny_model, random_ids):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on CPU")
    ids, labels = random_ids(2, 16), random_ids(2, 16, seed=1)
    plain, compiled = (tiny_model() for _ in range(2))
    compiled.compile_layers()
    results = []
    for model in (plain, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids, labels, return_logits=False)
        (out.loss + out.aux_loss).backward()
        results.append((out, model))
    assert float(results[0][0].loss.detach()) == pytest.approx(float(results[1][0].loss.detach()), rel=0.01)
    assert torch.equal(plain.routing_counts()[0].sum(1), compiled.routing_counts()[0].sum(1))
    for (name, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.1 * a.grad.norm() + 1e-3, name
