"""scripts/inspect_model.py: the memory estimate against what autograd keeps, and the page it prints."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import MoEForCausalLM, attention, experts, segmented_ffn
from model.flops import total_count
from scripts import inspect_model
from train.config import load_config

CONFIG = """
name: small
model: {vocab_size: 512, hidden_size: 128, num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2,
        max_position_embeddings: 128, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 64}
data: {sources: [{name: a, kind: text, path: nowhere.txt}]}
train: {steps: 100, tokens_per_step: 512, micro_batch_size: 4}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def kept_for_backward(config, precision: str) -> int:
    """Bytes of the tensors that one forward pass keeps, parameters and their copies in autocast's dtype left out."""
    model = MoEForCausalLM(config.model)
    model.activation_checkpointing = config.train.activation_checkpointing
    rows, T = config.train.micro_batch_size, config.context_length
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.t().shape) for p in model.parameters() if p.dim() == 2
    }
    shapes |= {tuple(p.transpose(1, 2).shape) for p in model.parameters() if p.dim() == 3}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, config.model.vocab_size, (rows, T))
    documents = (torch.arange(T) // 10).expand(rows, T) if config.data.document_mask else None
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(ids, labels=ids, document_ids=documents, return_logits=False)
    return sum(size for size, _ in kept.values())


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch) -> str:
    """With `cuda`, what a GPU runs through experts and attention, on this CPU: autograd around grouped_mm, no padding of
    segments, and attention's own kernel."""
    if request.param == "cuda":
        monkeypatch.setattr(segmented_ffn, "DTYPES", ())
        monkeypatch.setattr(experts, "uses_onednn", lambda x: False)

        def fused(q, k, v, mask, dropout):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=True)

        monkeypatch.setattr(attention, "attend_by_products", fused)
    return request.param


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.use_qk_norm=true"],
        ["model.n_routed_experts=0"],
        ["model.gated_ffn=false"],
        ["model.num_experts_per_tok=4", "model.n_shared_experts=2"],
        ["model.num_experts_per_tok=6", "model.n_shared_experts=0", "model.moe_intermediate_size=256"],
        ["model.first_k_dense_replace=2"],
        ["data.document_mask=true"],
        ["model.num_attention_heads=16", "model.max_position_embeddings=512"],
    ],
    ids=lambda changes: ",".join(change.split(".")[1] for change in changes) or "plain",
)
def test_activations_are_within_a_quarter_of_what_autograd_keeps(config_file, changes, precision, device):
    config = load_config(config_file, changes)
    estimate = inspect_model.training_memory(config, precision, device).activations
    measured = kept_for_backward(config, precision)
    assert estimate == pytest.approx(measured, rel=0.25), f"estimate {estimate:,} bytes, autograd keeps {measured:,}"


@pytest.mark.parametrize("masked", [False, True])
def test_shares_of_attention_written_out_are_those_of_its_blocks(config_file, masked, monkeypatch):
    """A causal block of queries scores the keys up to its own end, a masked one all: exactly, heads times queries times keys."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 48)
    monkeypatch.setattr(inspect_model, "QUERY_BLOCK", 48)
    H, T = 4, 128
    kept = []
    q, k, v = (torch.randn(1, heads, T, 8, requires_grad=True) for heads in (H, 2, 2))
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril() if masked else None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention.attend_by_products(q, k, v, mask, 0.0)
    shares = {t.data_ptr(): t.numel() for t in kept if t.dim() == 3 and 8 not in t.shape}  # keys and values have an 8
    assert sum(shares.values()) == H * T * (T if masked else inspect_model._mean_keys(T))


def test_a_gpu_is_estimated_to_keep_more_of_experts_and_less_of_attention(config_file):
    config = load_config(config_file, ["model.max_position_embeddings=2048"])
    by_device = {d: inspect_model.training_memory(config, "bfloat16", d).activations for d in ("cpu", "cuda")}
    assert by_device["cpu"] > by_device["cuda"], "the shares of 2,048 keys outweigh all else"
    by_device = {d: inspect_model.training_memory(config, "float32", d).activations for d in ("cpu", "cuda")}
    assert by_device["cpu"] < by_device["cuda"]


def test_checkpointing_is_estimated_to_keep_far_less(config_file):
    plain = inspect_model.training_memory(load_config(config_file, ["model.num_hidden_layers=12"]), "float32")
    config = load_config(config_file, ["model.num_hidden_layers=12", "train.activation_checkpointing=true"])
    recomputed = inspect_model.training_memory(config, "float32")
    assert recomputed.activations < plain.activations / 4
    assert recomputed._replace(activations=0) == plain._replace(activations=0)


def test_weights_gradients_and_moments_are_sixteen_bytes_a_parameter(config_file):
    config = load_config(config_file)
    memory = inspect_model.training_memory(config, "float32")
    assert memory.weights + memory.gradients + memory.optimizer == 16 * total_count(config.model).total


def run(arguments: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["inspect_model", *arguments])
    inspect_model.main()
    return capsys.readouterr().out


def test_the_page_names_every_number_and_warns_of_too_few_tokens(config_file, monkeypatch, capsys):
    page = run([str(config_file)], monkeypatch, capsys)
    count = total_count(load_config(config_file).model)
    for number in (f"{count.total:,}", f"{count.active:,}", "51,200 = 100 steps x 512 tokens"):
        assert number in page
    assert "warning: below 20 tokens per active parameter" in page


def test_no_warning_from_twenty_tokens_on_nor_in_fine_tuning(config_file, monkeypatch, capsys):
    steps = -(-20 * total_count(load_config(config_file).model).active // 512)
    assert "warning" not in run([str(config_file), f"train.steps={steps}"], monkeypatch, capsys)
    assert "warning" in run([str(config_file), f"train.steps={steps - 1}"], monkeypatch, capsys)
    assert "warning" not in run([str(config_file), "train.init_from=runs/other"], monkeypatch, capsys)


def test_epochs_of_unprepared_data_are_said_to_be_unknown(config_file, monkeypatch, capsys):
    overrides = ["train.steps=null", "train.epochs=2", "tokenizer.path=nowhere"]
    assert "unknown until its data are prepared" in run([str(config_file), *overrides], monkeypatch, capsys)


def test_epochs_of_prepared_data_are_counted_as_the_loop_counts_them(config_file, tmp_path):
    from data.prepare import open_prepared, prepare
    from data.tokenizer import Tokenizer

    text = "\n".join(f"line {i} of a small text" for i in range(400))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.train([text], 270)
    tokenizer.save(tmp_path / "tokenizer")
    overrides = [
        "train.steps=null",
        "train.epochs=2.5",
        "model.vocab_size=270",
        "data.context_length=32",
        "data.held_out_fraction=0",
    ]
    overrides += [
        f"tokenizer.path={tmp_path}/tokenizer",
        f"data.cache_dir={tmp_path}/cache",
        "train.tokens_per_step=256",
    ]
    config = load_config(config_file, overrides)
    config.data.sources[0].path = str(tmp_path / "text.txt")
    prepare(config.data, tokenizer, progress=False)
    rows = open_prepared(config.data, tokenizer).train_rows(32, False, 0).rows_per_epoch
    tokens, how = inspect_model.tokens_of_run(config)
    assert 2.5 * rows * 32 <= tokens < 2.5 * rows * 32 + 256, "a whole number of steps, the last one full"
    assert f"2.5 epochs of {rows} rows" in how


def test_a_set_precision_and_device_are_the_only_ones_shown(config_file, monkeypatch, capsys):
    page = run([str(config_file), "train.precision=float32"], monkeypatch, capsys)
    assert "CPU float32" in page and "CUDA float32" in page
    assert "CPU bfloat16" not in page and "CUDA bfloat16" not in page
    page = run([str(config_file), "train.precision=float32", "train.device=cpu"], monkeypatch, capsys)
    assert "CPU float32" in page and "CUDA float32" not in page
