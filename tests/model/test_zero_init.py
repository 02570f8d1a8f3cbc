"""`zero_init_output`: every layer starts as the identity, all other weights are what they are without it, and it learns."""

import math

import pytest
import torch

from model import ModelConfig, MoEForCausalLM
from model.moe import MoEFeedForward
from train import checkpoint
from train.config import RunConfig, TrainConfig
from train.optim import build_optimizer, step_if

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "moe_intermediate_size": 16,
    "intermediate_size": 48, "first_k_dense_replace": 1, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = {
    "gated, shared": {"shared_expert_gate": True, "use_qk_norm": True},
    "plain, none shared": {"gated_ffn": False, "n_shared_experts": 0},
    "dense": {"n_routed_experts": 0},
}


def make(kind: str, zero: bool) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(ModelConfig(**SHAPE, **KINDS[kind], zero_init_output=zero))


def writes_into_the_stream(name: str) -> bool:
    return name.removesuffix(".weight").endswith(("o_proj", "down_proj"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_writes_into_the_stream_is_zero_and_nothing_else_differs(kind):
    zero, plain = make(kind, True).state_dict(), make(kind, False).state_dict()
    assert zero.keys() == plain.keys()
    for name, tensor in zero.items():
        if writes_into_the_stream(name):
            assert not tensor.any() and plain[name].std() > 0, name
        else:
            assert torch.equal(tensor, plain[name]), f"{name}: another initial weight than without the key"
    last = "down_proj" if kind == "dense" else "experts.down_proj"
    assert any(name.removesuffix(".weight").endswith(last) for name in zero)


def test_a_moe_layer_by_itself_starts_at_zero():
    config = ModelConfig(**SHAPE, zero_init_output=True)
    y, _ = MoEFeedForward(config)(torch.randn(2, 5, 32))
    assert not y.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_at_first_every_layer_is_the_identity(kind, training):
    model = make(kind, True).train(training)
    ids = torch.randint(0, 40, (2, 12))
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(torch.equal(inputs[0], output[0])))
    with torch.set_grad_enabled(training):
        logits = model(ids).logits
    assert seen == [True] * 3
    expected = model.norm(model.embed_tokens(ids)) @ model.lm_head.weight.T
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_everything_after_a_few_steps_and_the_loss_falls(kind, optimizer):
    model = make(kind, True)
    stepper = build_optimizer(model, TrainConfig(steps=1, learning_rate=0.01, optimizer=optimizer))
    ids = torch.randint(0, 40, (4, 32))
    losses = []
    for step in range(40):
        out = model(ids, labels=ids, return_logits=False)
        out.loss.backward()  # without the balance loss, which reaches the routers by itself
        if step == 0:
            reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            inside = {name for name in reached if name.startswith("layers.") and not name.endswith("o_proj.bias")}
            assert inside and all(map(writes_into_the_stream, inside)), "behind a zero there is no gradient yet"
        if step == 3:
            # A bias of the keys adds the same to all scores of a query, which the softmax takes away again.
            silent = [n for n, p in model.named_parameters() if not p.grad.any() and not n.endswith("k_proj.bias")]
            assert not silent, f"no gradient reaches {silent}"
        step_if(stepper, torch.tensor(True))
        stepper.zero_grad()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(math.log(40), rel=0.05) and losses[-1] < 0.5 * losses[0], losses[::10]


def test_a_run_may_be_fine_tuned_with_or_without_it(tmp_path):
    model = make("dense", True)
    config = RunConfig(model=model.config, train=TrainConfig(steps=1))
    folder = checkpoint.save(tmp_path / "run", 1, model, build_optimizer(model, config.train), {}, config)
    checkpoint.check_same_shape(make("dense", False).config, folder)
