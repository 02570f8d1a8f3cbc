"""What a config describes, before anything is built or trained: sizes, operations, memory, and whether it will learn enough.

    python -m scripts.inspect_model configs/quickstart/pretrain.yaml [model.n_routed_experts=16 ...]

Everything is arithmetic on the config (`model/flops.py` for parameters and operations), so it takes no time and no GPU.
The memory of activations is an estimate: within a quarter of what autograd keeps on a CPU, where CUDA's way through experts and
attention was measured too (tests/scripts/test_inspect_model.py); CUDA's fused norms keep a little less, torch.compile still less.
"""

from __future__ import annotations

from typing import NamedTuple

from model.attention import QUERY_BLOCK
from model.config import ModelConfig
from model.flops import count_parameters, flops_per_token, total_count
from model.loss import CHUNK_ROWS
from train import cli
from train.config import RunConfig, load_config

GIB = 2**30
TOKENS_PER_PARAMETER = 20  # below this a MoE shows no gain over its dense twin (joint scaling law, arXiv 2502.05172)
BYTES = {"float32": 4, "bfloat16": 2}  # of what matrix products read and write
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
MOMENTS = {
    "adamw": "AdamW's two moments, 8 bytes each",
    "muon": "Muon's moment, 4 bytes (AdamW's: 8)",
}

FORMULA = """\
  Kept per token and layer for the backward pass, s bytes a number in products, 4 in norms, H' = heads * head_dim, K' the same of the keys:
    16 D  the two norms            + 8 (H' + K')  if QK-norm
    + s * (2 D + 2 H' + 2 K'       normed inputs, queries, keys, values, attention's output
           + a * width             dense FFN and shared experts; a = 4 gated, 2 plain
           + k * (D + b * F))      each chosen expert: its input and hidden units; b = 2 gated, 1 plain, on CUDA 5 and 3
    + s * heads * T                on a CPU in bfloat16, where attention is written out: its shares (about half of it in long contexts)
  A (B, T, T) mask of documents is kept once, and by such an attention in each layer.
  Activation checkpointing keeps 4 D per token and layer, and the above for one layer at a time. The loss keeps the gradient of
  the head and one chunk of logits. Not counted: the CUDA context (about 0.5 GiB), what the allocator wastes, and what Muon works in when
  the activations are gone: up to 5 s bytes for each parameter of the most frequent matrix shape."""


class Memory(NamedTuple):
    """Bytes of training on one device, by what holds them."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments, Muon's one
    copies: int  # the weights in autocast's dtype
    activations: int  # of one micro-batch
    loss: int


def layer_activation_bytes(config: RunConfig, layer: int, precision: str, device: str = "cpu") -> int:
    """Bytes that one layer keeps for the backward pass per token, by the formula above."""
    model, T = config.model, config.context_length
    D, s, on_cpu = model.hidden_size, BYTES[precision], device == "cpu"
    heads, key_values = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    per_unit = 4 if model.gated_ffn else 2
    kept = 16 * D + (8 * (heads + key_values) if model.use_qk_norm else 0)
    products = 2 * D + 2 * heads + 2 * key_values
    if model.is_moe_layer(layer):
        F = model.moe_intermediate_size
        # model/segmented_ffn.py keeps what the first product read and wrote; autograd around grouped_mm keeps, besides, the
        # activation, its product with the gate's other half, and that times the weights.
        hidden = (2 if on_cpu else 5) if model.gated_ffn else (1 if on_cpu else 3)
        products += model.num_experts_per_tok * (D + hidden * F) + per_unit * model.n_shared_experts * F
    else:
        products += per_unit * model.intermediate_size
    if on_cpu and precision == "bfloat16":  # attend_by_products
        masked = _has_mask(config)
        products += model.num_attention_heads * (T if masked else _mean_keys(T))
        kept += T if masked else 0  # its negation, bool
    return kept + s * products


def _has_mask(config: RunConfig) -> bool:
    return config.data.document_mask or config.data.format == "chat"


def _mean_keys(T: int) -> int:
    """Keys that a causal query is scored against, on average, a block of queries at a time: up to the end of its block."""
    return sum(min(QUERY_BLOCK, T - start) * min(start + QUERY_BLOCK, T) for start in range(0, T, QUERY_BLOCK)) // T


def optimizer_bytes(config: RunConfig) -> int:
    """Bytes of what the optimizer keeps: two float32 moments of each parameter, one of a matrix that Muon moves."""
    parts = count_parameters(config.model)
    moved = parts["attention"].matmul + sum(
        parts[name].total for name in ("dense FFN", "routed experts", "shared experts") if name in parts
    )
    return 8 * total_count(config.model).total - (4 * moved if config.train.optimizer == "muon" else 0)


def training_memory(config: RunConfig, precision: str, device: str = "cpu") -> Memory:
    """An estimate for one device (cpu or cuda): float32 weights, `precision` (float32 or bfloat16) in matrix products."""
    model, total = config.model, total_count(config.model).total
    tokens = config.train.micro_batch_size * config.context_length
    layers = [layer_activation_bytes(config, layer, precision, device) for layer in range(model.num_hidden_layers)]
    per_token = sum(layers)
    if config.train.activation_checkpointing:
        per_token = 4 * model.hidden_size * len(layers) + max(layers)
    if _has_mask(config):
        per_token += config.context_length  # the (B, T, T) bool mask
    # On a CPU an expert's matrices are cast when its turn comes (model/segmented_ffn.py), the others once a pass.
    routed = count_parameters(model)["routed experts"].total if model.moe_layers else 0
    cast = total - (routed if device == "cpu" else 0)
    head = model.vocab_size * model.hidden_size
    rows = min(CHUNK_ROWS[device], tokens)
    return Memory(
        weights=4 * total,
        gradients=4 * total,
        optimizer=optimizer_bytes(config),
        copies=2 * cast if precision == "bfloat16" else 0,
        activations=tokens * per_token,
        loss=4 * head
        + rows * model.vocab_size * (4 + BYTES[precision])
        + tokens * model.hidden_size * (8 + BYTES[precision]),
    )


def tokens_of_run(config: RunConfig) -> tuple[int | None, str]:
    """Tokens that the run trains on, and the sum that gave them; None where epochs cannot be counted yet."""
    train = config.train
    if train.steps is not None:
        return train.steps * train.tokens_per_step, f"{train.steps} steps x {train.tokens_per_step} tokens"
    from data.prepare import open_prepared  # these are heavier than all else here, and needed for epochs alone
    from data.tokenizer import Tokenizer
    from train.plan import make_plan

    try:
        prepared = open_prepared(config.data, Tokenizer.load(config.tokenizer.path))
    except ValueError as error:
        return None, f"{train.epochs:g} epochs; {error}"
    rows = prepared.train_rows(config.context_length, config.data.document_mask, config.seed).rows_per_epoch
    plan = make_plan(config, rows, ranks=1)
    tokens = plan.steps * plan.tokens_per_step
    return tokens, f"{plan.steps} steps x {plan.tokens_per_step} tokens ({train.epochs:g} epochs of {rows} rows)"


def describe(config: RunConfig) -> str:
    """The whole page."""
    blocks = [_parameters(config.model), _operations(config), _memory(config), _tokens(config)]
    return f"{config.name}\n\n" + "\n\n".join(blocks)


def _parameters(model: ModelConfig) -> str:
    lines = [f"{'parameters':<16}{'total':>14}{'active':>14}{'multiplied':>14}"]
    rows = {**count_parameters(model), "together": total_count(model)}
    lines += [f"{name:<16}" + "".join(f"{n:>14,}" for n in count) for name, count in rows.items()]
    together = rows["together"]
    lines.append(
        f"  {together.active / together.total:.0%} of the parameters are active for a token: all but the experts it does not choose;"
    )
    lines.append(
        "  multiplied: those a token meets in a matrix product (no look-up, no norm; a tied head counts here alone)"
    )
    return "\n".join(lines)


def _operations(config: RunConfig) -> str:
    model, T = config.model, config.context_length
    flops, products = flops_per_token(model, T), 6 * total_count(model).matmul
    return (
        f"operations per trained token: {flops / 1e9:.4f} GFLOP\n"
        f"  = 6 x multiplied parameters ({products / 1e9:.4f}) + 6 x layers x heads x head_dim x {T} tokens of context, causal "
        f"({(flops - products) / 1e9:.4f})"
    )


def _memory(config: RunConfig) -> str:
    precisions = list(BYTES) if config.train.precision == "auto" else [config.train.precision]
    devices = list(DEVICES) if config.train.device == "auto" else [config.train.device]
    estimates = {
        f"{DEVICES[device]} {precision}": training_memory(config, precision, device)
        for device in devices
        for precision in precisions
    }
    rows, T = config.train.micro_batch_size, config.context_length
    labels = {
        "weights": "weights, 4 bytes each",
        "gradients": "gradients, 4 bytes each",
        "optimizer": MOMENTS[config.train.optimizer],
        "copies": "copies for autocast, 2 bytes each",
        "activations": f"activations of {rows} rows x {T} tokens",
        "loss": "loss and head",
    }
    lines = [f"{'training memory of one device, GiB':<44}" + "".join(f"{column:>15}" for column in estimates)]
    for field, label in labels.items():
        numbers = "".join(f"{getattr(memory, field) / GIB:>15.3f}" for memory in estimates.values())
        lines.append(f"{label:<44}{numbers}")
    lines.append(f"{'together':<44}" + "".join(f"{sum(memory) / GIB:>15.3f}" for memory in estimates.values()))
    return "\n".join([*lines, FORMULA])


def _tokens(config: RunConfig) -> str:
    tokens, how = tokens_of_run(config)
    if tokens is None:
        return f"tokens of the run: unknown until its data are prepared ({how})"
    active = total_count(config.model).active
    text = f"tokens of the run: {tokens:,} = {how}: {tokens / active:.1f} per active parameter"
    if config.train.init_from is not None:
        return f"{text}\n  (fine-tuning from {config.train.init_from}: what counts is the pretraining's figure)"
    if tokens < TOKENS_PER_PARAMETER * active:
        text += (
            f"\nwarning: below {TOKENS_PER_PARAMETER} tokens per active parameter a MoE shows no gain over its dense twin; "
            f"train {TOKENS_PER_PARAMETER * active:,} tokens or make the model smaller"
        )
    return text


def main() -> None:
    parser = cli.parser(
        "Parameters, operations, memory and tokens per parameter of the run that a config describes.",
        "python -m scripts.inspect_model configs/quickstart/pretrain.yaml model.n_routed_experts=16",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys set over the file's")
    arguments = parser.parse_args()
    print(describe(load_config(arguments.config, arguments.overrides)))


if __name__ == "__main__":
    cli.run(main)
