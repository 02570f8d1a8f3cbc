"""What only a GPU can show. Skips itself without CUDA; on a GPU machine: MINIMOE_PYTHON=python3 bash scripts/test.sh tests/gpu --all

Not yet run on a GPU: no session so far was lent one.
"""

import pytest
import torch

from model import ModelConfig, MoEForCausalLM
from model.generate import generate
from train.config import TrainConfig
from train.guard import LateReading
from train.optim import build_optimizer, step_if

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "moe_intermediate_size": 64, "n_routed_experts": 8, "use_qk_norm": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32 would hide what is compared here."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def twins(**changes) -> tuple[MoEForCausalLM, MoEForCausalLM]:
    torch.manual_seed(0)
    on_cpu = MoEForCausalLM(ModelConfig(**{**SHAPE, **changes}))
    on_gpu = MoEForCausalLM(on_cpu.config)
    on_gpu.load_state_dict(on_cpu.state_dict())
    return on_cpu, on_gpu.cuda()


def batch(masked: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(1))
    extra = {"document_ids": (torch.arange(48) // 13).expand(4, 48).contiguous()} if masked else {}
    return {"input_ids": ids, "labels": ids, **extra}


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_are_the_cpus(backend, masked):
    on_cpu, on_gpu = twins(expert_backend=backend)
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        out = model(**{key: value.to(device) for key, value in batch(masked).items()}, return_logits=False)
        (out.loss + out.aux_loss).backward()
    for (name, ours), theirs in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(
            theirs.grad.cpu(), ours.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_masked_grouped_query_batch_does_not_store_all_scores():
    """16 rows of 1024 tokens, 16 heads: the scores alone would be 512 MiB in bfloat16."""
    _, model = twins(hidden_size=256, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024)
    ids = torch.randint(0, 512, (16, 1024), device="cuda")
    documents = (torch.arange(1024, device="cuda") // 300).expand(16, 1024)
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        model.eval()(ids, document_ids=documents, return_logits=False)
    assert torch.cuda.max_memory_allocated() < 400 * 2**20


def test_a_refused_step_changes_nothing_and_the_host_learns_of_it_a_step_later():
    _, model = twins()
    optimizer = build_optimizer(model, TrainConfig(steps=1))
    readings = LateReading()
    for refused in (False, True, False):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(**{key: value.cuda() for key, value in batch(False).items()}, return_logits=False).loss.backward()
        step_if(optimizer, torch.tensor(not refused, device="cuda"))
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same == refused
        previous = readings.push(torch.tensor([float(refused)], device="cuda"))
    assert previous == [1.0] and readings.pop() == [0.0]


def test_deterministic_training_gives_the_same_bits_twice():
    torch.use_deterministic_algorithms(True)
    results = []
    for _ in range(2):
        _, model = twins()
        optimizer = build_optimizer(model, TrainConfig(steps=1))
        for _ in range(3):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = model(**{key: value.cuda() for key, value in batch(False).items()}, return_logits=False)
            (out.loss + out.aux_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss():
    _, eager = twins(hidden_size=128, moe_intermediate_size=128)
    losses = []
    for compiled in (False, True):
        if compiled:
            for layer in eager.layers:
                layer.compile(dynamic=False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses.append(
                eager(**{key: value.cuda() for key, value in batch(False).items()}, return_logits=False).loss.item()
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_greedy_generation_is_the_cpus():
    on_cpu, on_gpu = twins()
    prompts = [[5, 6, 7, 8], [9, 10]]
    ours, theirs = (generate(m.eval(), prompts, max_new_tokens=12, temperature=0) for m in (on_cpu, on_gpu))
    assert ours == theirs


def test_a_training_step_does_not_wait_for_the_device():
    """No host synchronisation in forward, backward, clipping and optimizer: only logging may wait."""
    _, model = twins(hidden_size=128, moe_intermediate_size=128)
    optimizer = build_optimizer(model, TrainConfig(steps=1))
    inputs = {key: value.cuda() for key, value in batch(False).items()}

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(**inputs, return_logits=False)
        (out.loss + out.aux_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_if(optimizer, torch.isfinite(norm))
        optimizer.zero_grad()

    step()  # first uses of kernels and of the optimizer's state may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gated", [True, False])
def test_grouped_experts_in_bfloat16_are_the_loop_in_float32(gated):
    """Forward and every gradient; the kernel of grouped_mm is bfloat16's alone."""
    shape = {
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "gated_ffn": gated,
        "hidden_act": "silu" if gated else "gelu",
    }
    results = []
    for backend, precise in (("loop", True), ("grouped", False)):
        _, model = twins(**shape, expert_backend=backend)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=not precise):
            out = model(**{key: value.cuda() for key, value in batch(False).items()}, return_logits=False)
        out.loss.backward()
        results.append({"loss": out.loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, exact in results[0].items():
        error = (results[1][name] - exact).norm() / exact.norm()
        assert error < 0.03, f"{name}: relative error {error:.4f}"


@pytest.mark.slow
def test_the_decoder_layer_compiles_without_a_graph_break():
    _, model = twins(hidden_size=128, moe_intermediate_size=128)
    for layer in model.layers:
        layer.compile(dynamic=False, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(**{key: value.cuda() for key, value in batch(False).items()}, return_logits=False)
    (out.loss + out.aux_loss).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
