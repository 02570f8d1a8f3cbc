"""The whole MoE layer: training path, moe_infer and both backends against one reference in plain Python loops."""

import math

import pytest
import torch

from model import experts, products, segmented_ffn
from model.experts import FEW_ASSIGNMENTS
from model.moe import MoEFeedForward

D = 16


@pytest.fixture(params=["loop", "grouped", "grouped_mm"])
def backend(request, monkeypatch) -> str:
    """`expert_backend`, as a CPU runs it; the last is `grouped` as a GPU does."""
    if request.param != "grouped_mm":
        return request.param
    monkeypatch.setattr(segmented_ffn, "DTYPES", ())
    monkeypatch.setattr(experts, "uses_onednn", lambda x: False)
    return "grouped"


@pytest.fixture
def make_moe(tiny_config, enlarge):
    def make(seed: int = 0, **changes) -> MoEFeedForward:
        shape = {
            "hidden_size": D,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "n_routed_experts": 5,
            "aux_loss_alpha": 0.1,
        }
        return enlarge(MoEFeedForward(tiny_config(**{**shape, **changes})), seed)

    return make


def reference_moe(moe: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The layer as a paper would write it, token by token and expert by expert, in float64 and differentiable:
    y = sum over the k best experts of weight_e * FFN_e(x), plus the shared FFN of x."""
    config = moe.config

    def ffn(token, into, down):
        if config.gated_ffn:
            gate, up = into[: len(into) // 2] @ token, into[len(into) // 2 :] @ token
            return down @ (gate * torch.sigmoid(gate) * up)
        up = into @ token
        return down @ (up * torch.sigmoid(up))

    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = moe.gate.weight @ token
        if config.scoring_func == "softmax":
            scores = logits.exp() / logits.exp().sum()
        else:
            scores = 1 / (1 + (-logits).exp())
        order = sorted(range(len(scores)), key=lambda e: float(scores[e].detach()), reverse=True)
        best = order[: config.num_experts_per_tok]
        total = sum(scores[e] for e in best) if config.norm_topk_prob else 1.0
        y = torch.zeros_like(token)
        for e in best:
            weight = scores[e] / total * config.routed_scaling_factor
            y = y + weight * ffn(token, moe.experts.into_proj[e], moe.experts.down_proj[e])
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            into = shared.up_proj.weight
            if config.gated_ffn:
                into = torch.cat((shared.gate_proj.weight, into))
            of_shared = ffn(token, into, shared.down_proj.weight)
            if moe.shared_expert_gate is not None:
                of_shared = of_shared / (1 + (-(moe.shared_expert_gate.weight[0] @ token)).exp())
            y = y + of_shared
        rows.append(y)
    return torch.stack(rows).view_as(x)


SETTINGS = {
    "default": {},
    "plain": {"gated_ffn": False},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "gated shared experts": {"n_shared_experts": 2, "shared_expert_gate": True},
    "k=1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "k=E": {"num_experts_per_tok": 5},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "many experts, most idle": {"n_routed_experts": 40},
    "sigmoid, scaled": {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
    "raw weights": {"norm_topk_prob": False},
    "odd widths": {"hidden_size": 14, "moe_intermediate_size": 7},
}
SHAPES = {"a batch": (2, 11), "one token": (1, 1), "one row each": (7, 1)}


def gradients(moe: MoEFeedForward, x: torch.Tensor, y: torch.Tensor, probe: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*moe.named_parameters(), strict=True)
    values = torch.autograd.grad((y * probe).sum(), (x, *parameters))
    return dict(zip(("x", *names), values, strict=True))


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_every_path_is_the_reference_forward_and_backward(make_moe, backend, setting, shape):
    moe = make_moe(expert_backend=backend, **SETTINGS[setting])
    x = torch.randn(*SHAPES[shape], moe.config.hidden_size, requires_grad=True)
    probe = torch.randn_like(x)
    wide = make_moe(expert_backend="loop", **SETTINGS[setting]).double()
    wide_x = x.detach().double().requires_grad_()
    expected = reference_moe(wide, wide_x)
    expected_gradients = gradients(wide, wide_x, expected, probe.double())

    for mode in ("train", "eval"):  # eval with gradients enabled: the differentiable path, no gradient is lost
        getattr(moe, mode)()
        y, _ = moe(x)
        torch.testing.assert_close(y.double(), expected, atol=3e-5, rtol=1e-5, msg=lambda m, mode=mode: f"{mode}: {m}")
        for name, value in gradients(moe, x, y, probe).items():
            scale = max(1.0, float(expected_gradients[name].abs().max()))
            torch.testing.assert_close(
                value.double(), expected_gradients[name], atol=3e-5 * scale, rtol=0,
                msg=lambda m, mode=mode, name=name: f"{mode}, gradient of {name}: {m}",
            )  # fmt: skip
    with torch.no_grad():
        y, aux_loss = moe(x)
    assert aux_loss == 0 and not y.requires_grad
    torch.testing.assert_close(y.double(), expected, atol=3e-5, rtol=1e-5, msg=lambda m: f"moe_infer: {m}")


@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_to_one_expert(make_moe, backend, expert):
    moe = make_moe(expert_backend=backend, num_experts_per_tok=1, norm_topk_prob=False)
    x = torch.randn(2, 20, D)
    x[..., 0] = 1.0
    moe.gate.weight.data[expert, 0] = 60.0
    assert (moe.gate.route(x).topk_idx == expert).all()
    expected = reference_moe(moe.double(), x.double()).float()
    moe.float()
    y, _ = moe(x)
    torch.testing.assert_close(y, expected, atol=3e-5, rtol=1e-5)
    y.square().sum().backward()
    idle = [e for e in range(5) if e != expert]
    assert (moe.experts.gate_up_proj.grad[idle] == 0).all() and moe.experts.gate_up_proj.grad[expert].any()
    with torch.no_grad():
        torch.testing.assert_close(moe.eval()(x)[0], expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("N", [1, FEW_ASSIGNMENTS // 2, FEW_ASSIGNMENTS // 2 + 1, 40])
def test_moe_infer_is_the_weighted_sum_on_both_sides_of_its_shortcut(make_moe, N, backend):
    moe = make_moe(expert_backend=backend).eval()
    x = torch.randn(N, D)
    topk_idx = torch.stack([torch.randperm(5)[:2] for _ in range(N)])
    topk_weight = torch.rand(N, 2)
    y = moe.moe_infer(x, topk_idx.flatten(), topk_weight.reshape(-1, 1))
    expected = moe.experts(x, topk_idx, topk_weight)
    assert y.shape == (N, D) and y.dtype == x.dtype
    assert not y.requires_grad and expected.requires_grad
    torch.testing.assert_close(y, expected.detach(), atol=1e-5, rtol=1e-5)


def test_moe_infer_of_no_tokens(make_moe):
    moe = make_moe().eval()
    y = moe.moe_infer(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1))
    assert y.shape == (0, D)


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_either_library_computes_the_same(make_moe, monkeypatch, setting, library):
    """Enough tokens that segments are padded for oneDNN, in training and in moe_infer; router's gradient among the rest."""
    if library == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "float32_library", lambda: library)
    moe, loop = (make_moe(expert_backend=b, **SETTINGS[setting]) for b in ("grouped", "loop"))
    loop.double()
    x = torch.randn(4, 30, moe.config.hidden_size, requires_grad=True)
    wide_x, probe = x.detach().double().requires_grad_(), torch.randn_like(x)
    assert (moe.experts.segment_alignment(x.flatten(0, 1), moe.config.num_experts_per_tok) > 1) == (
        library == "oneDNN" and setting != "many experts, most idle"
    )
    y, expected = moe(x)[0], loop(wide_x)[0]
    torch.testing.assert_close(y.double(), expected, atol=3e-5, rtol=1e-5)
    wanted = gradients(loop, wide_x, expected, probe.double())
    for name, value in gradients(moe, x, y, probe).items():
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(
            value.double(), wanted[name], atol=3e-5 * scale, rtol=0, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
    with torch.no_grad():
        torch.testing.assert_close(moe.eval()(x)[0].double(), expected.detach(), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("N", "few"), [(FEW_ASSIGNMENTS // 2, True), (FEW_ASSIGNMENTS // 2 + 1, False)])
def test_evaluation_takes_moe_infer_and_training_does_not(make_moe, monkeypatch, N, few):
    moe = make_moe()
    calls = []
    for owner, name in ((moe, "moe_infer"), (moe.experts, "run_few"), (moe.experts, "forward")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, f=function, n=name: calls.append(n) or f(*args))
    x = torch.randn(1, N, D)
    moe(x)
    moe.eval()
    moe(x)
    assert calls == ["forward", "forward"], "with gradients enabled evaluation keeps the differentiable path"
    calls.clear()
    with torch.inference_mode():
        moe(x)
    assert calls == (["moe_infer", "run_few"] if few else ["moe_infer"])


@pytest.mark.parametrize("setting", ["default", "plain", "k=1", "k=E", "odd widths"])
def test_bfloat16_autocast_is_near_float32(make_moe, backend, setting):
    """The router stays float32, so the choice is the same and only the products are rounded: within 3 % of the largest value."""
    moe = make_moe(expert_backend=backend, **SETTINGS[setting])
    x = torch.randn(2, 11, moe.config.hidden_size, requires_grad=True)
    probe = torch.randn_like(x)
    expected, _ = moe(x)
    expected_gradients = gradients(moe, x, expected, probe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = moe(x)
    assert y.dtype == torch.float32, "the dtype that came in"
    values = {"output": y, **gradients(moe, x, y, probe)}
    for name, wanted in {"output": expected, **expected_gradients}.items():
        scale = max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(values[name], wanted, atol=0.03 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inferred, _ = moe.eval()(x)
        few, _ = moe(x[:1, :2])
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(inferred, y.detach(), atol=0.01 * scale, rtol=0)
    torch.testing.assert_close(few, y[:1, :2].detach(), atol=0.01 * scale, rtol=0)


@pytest.mark.parametrize("level", ["none", "sequence", "batch", "global"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradcheck_of_the_whole_layer_in_float64(make_moe, scoring, level):
    """Output and auxiliary losses, by the input and every parameter; f is counted, so it has no gradient to check."""
    moe = make_moe(
        hidden_size=4, moe_intermediate_size=3, n_routed_experts=3, expert_backend="loop",
        scoring_func=scoring, aux_loss_level=level, router_z_loss_coef=0.1,
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True, True, True], [True, True, False]])
    names = [name for name, _ in moe.named_parameters()]

    def function(x, *parameters):
        moe.gate.reset_counts()
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x, real))

    assert torch.autograd.gradcheck(function, (x, *moe.parameters()))


def test_the_same_step_gives_the_same_bits(make_moe, backend):
    x = torch.randn(4, 32, D, requires_grad=True)
    probe = torch.randn_like(x)

    def once():
        moe = make_moe(expert_backend=backend, n_routed_experts=8, num_experts_per_tok=3)
        y, aux_loss = moe(x)
        return [y, aux_loss, *gradients(moe, x, y + aux_loss, probe).values()]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_every_parameter_gets_a_gradient(make_moe):
    moe = make_moe(n_routed_experts=40)
    y, _ = moe(torch.randn(1, 3, D))
    y.square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_router_learns_from_the_output(make_moe, norm_topk_prob):
    moe = make_moe(norm_topk_prob=norm_topk_prob, aux_loss_level="none")
    y, _ = moe(torch.randn(2, 11, D))
    y.square().sum().backward()
    assert moe.gate.weight.grad.norm() > 0.01


def test_jitter_reaches_router_and_routed_experts_but_not_the_shared(make_moe):
    moe = make_moe(router_jitter_noise=0.4)
    x = torch.randn(2, 11, D)
    torch.manual_seed(3)
    noise = torch.empty_like(x).uniform_(0.6, 1.4)
    torch.manual_seed(3)
    y, routing = moe.compute(x)
    plain = make_moe(n_shared_experts=1)
    plain.load_state_dict(moe.state_dict())
    shared = plain.shared_experts
    plain.shared_experts = None
    routed, expected_routing = plain.compute(x * noise)
    torch.testing.assert_close(y, routed + shared(x))
    torch.testing.assert_close(routing.logits, expected_routing.logits)
    moe.eval()
    torch.testing.assert_close(moe.compute(x)[0], plain.compute(x)[0] + shared(x), msg="evaluation has no noise")


@pytest.mark.parametrize("path", ["train", "eval"])
def test_the_shared_gate_multiplies_the_shared_output_and_nothing_else(make_moe, path):
    moe = make_moe(shared_expert_gate=True).train(path == "train")
    x = torch.randn(2, 11, D)
    with torch.set_grad_enabled(path == "train"):
        half_open, routing = moe.compute(x)
        shared, gate = moe.shared_experts(x), moe.shared_expert_gate(x).sigmoid()  # (2, 11, D), (2, 11, 1)
        moe.shared_expert_gate = None
        open_, same_routing = moe.compute(x)
        moe.shared_experts = None
        routed, _ = moe.compute(x)
    torch.testing.assert_close(half_open, routed + gate * shared)
    torch.testing.assert_close(open_, routed + shared)
    assert torch.equal(routing.topk_weight, same_routing.topk_weight)
    assert gate.min() < 0.1 and gate.max() > 0.9, "a gate that is nearly the same for every token shows little"


def test_the_shared_gate_learns_and_starts_half_open(make_moe, tiny_config):
    moe = make_moe(shared_expert_gate=True)
    moe(torch.randn(2, 11, D))[0].square().sum().backward()
    assert moe.shared_expert_gate.weight.grad.abs().max() > 0.01
    fresh = MoEFeedForward(tiny_config(shared_expert_gate=True))
    opened = fresh.shared_expert_gate(torch.randn(50, 32)).sigmoid()
    assert (opened - 0.5).abs().max() < 0.2
    assert make_moe().shared_expert_gate is None


def test_jitter_does_not_reach_the_shared_gate(make_moe):
    moe = make_moe(shared_expert_gate=True, router_jitter_noise=0.4)
    moe.experts.down_proj.data.zero_()
    x = torch.randn(2, 11, D)
    assert torch.equal(moe.compute(x)[0], moe.compute(x)[0]), "without routed experts nothing is noisy"


def test_the_mask_hides_padding_from_the_losses_alone(make_moe):
    moe = make_moe()
    x = torch.randn(2, 11, D)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, 6:] = False
    y, aux_loss = moe(x, real)
    unmasked, other_loss = moe(x)
    assert torch.equal(y, unmasked)
    assert not torch.equal(aux_loss, other_loss)


def test_compute_has_no_side_effect(make_moe):
    moe = make_moe(aux_loss_level="global")
    moe.compute(torch.randn(2, 11, D))
    assert not moe.gate.tokens_per_expert.any() and not moe.gate.global_window.any()
    moe(torch.randn(2, 11, D))
    assert moe.gate.tokens_per_expert.sum() == 2 * 11 * 2


def test_layers_initialise_themselves(tiny_config):
    config = tiny_config(
        hidden_size=64, moe_intermediate_size=128, n_routed_experts=16, initializer_range=0.05, num_hidden_layers=8
    )
    moe = MoEFeedForward(config)
    stds = {name: float(p.detach().std()) for name, p in moe.named_parameters()}
    small = 0.05 / math.sqrt(2 * 8)  # what is added to the residual stream, GPT-2's rule
    for name, std in stds.items():
        assert std == pytest.approx(small if "down_proj" in name else 0.05, rel=0.06), name
