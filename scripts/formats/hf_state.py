"""The tensors of a transformers folder as our model's: what a class was given because it insists on it is taken away again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data.words import short_name
from model.config import ModelConfig
from scripts.formats.hf_files import Tensors
from scripts.formats.hf_folder import CLASSES, EXPERT_NAMES, HALF_GATE

BIAS_RATE = 1e-3  # of a selection bias that goes on learning here (arXiv 2408.15664)


@dataclass
class Foreign:
    """A model from elsewhere, as ours."""

    config: ModelConfig
    state: dict[str, Tensor]  # float32, our names, the head left out where it is the embedding
    architecture: str
    notes: list[str] = field(default_factory=list)  # what a person should know


def translated(tree: Mapping, kind: str, config: ModelConfig, tensors: Tensors) -> Foreign:
    """Takes every tensor of a folder whose config.json (`tree`, of class `kind`) says `config`. ValueError, naming the tensor, for
    one that is missing, left over or of another shape."""
    V, D = config.vocab_size, config.hidden_size
    tensors.drop(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # older folders keep these tables
    foreign = Foreign(config, {}, CLASSES[kind])
    state = foreign.state
    state["embed_tokens.weight"] = tensors.take("model.embed_tokens.weight", V, D)
    state["norm.weight"] = tensors.take("model.norm.weight", D)
    if config.tie_word_embeddings:
        tensors.drop(r"lm_head\.weight")
    else:
        state["lm_head.weight"] = tensors.take("lm_head.weight", V, D)
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            state[ours + name] = tensors.take(theirs + name, D)
        _take_attention(config, kind, tensors, theirs + "self_attn.", state, ours + "self_attn.")
        if config.is_moe_layer(layer):
            _take_experts(config, kind, tree, tensors, theirs, state, ours + "mlp.")
        else:
            _take_network(tensors, theirs + "mlp.", state, ours + "mlp.", D, config.intermediate_size)
    if kind == "glm4_moe" and (extra := tensors.drop(rf"model\.layers\.({_above(tree, config)})\..*")):
        foreign.notes.append(f"{extra} tensors of layers for multi-token prediction are left out, as transformers does")
    if tensors.place:
        raise ValueError(
            f"{short_name(tensors.folder)}: the tensor {short_name(min(tensors.place))} belongs to nothing that {CLASSES[kind]} has; "
            "this is a model of another kind"
        )
    _tidy(foreign, kind)
    return foreign


def _above(tree: Mapping, config: ModelConfig) -> str:
    """A pattern for the indices of layers behind the last one, as many as config.json says."""
    count = tree.get("num_nextn_predict_layers", 0)
    count = count if isinstance(count, int) and 0 < count <= 64 else 0
    return "|".join(str(config.num_hidden_layers + i) for i in range(count)) or "none"


def _take_attention(config: ModelConfig, kind: str, tensors: Tensors, theirs: str, state: dict, ours: str) -> None:
    D, d = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    for name, rows, columns in (
        ("q_proj", queries, D),
        ("k_proj", keys, D),
        ("v_proj", keys, D),
        ("o_proj", D, queries),
    ):
        state[f"{ours}{name}.weight"] = tensors.take(f"{theirs}{name}.weight", rows, columns)
        if config.attention_bias:
            has_none = name == "o_proj" and kind in ("qwen2_moe", "glm4_moe")
            state[f"{ours}{name}.bias"] = torch.zeros(rows) if has_none else tensors.take(f"{theirs}{name}.bias", rows)
    if config.use_qk_norm:
        for name in ("q_norm.weight", "k_norm.weight"):
            state[ours + name] = tensors.take(theirs + name, d)


def _take_network(tensors: Tensors, theirs: str, state: dict, ours: str, D: int, width: int) -> None:
    for name in ("gate_proj", "up_proj"):
        state[f"{ours}{name}.weight"] = tensors.take(f"{theirs}{name}.weight", width, D)
    state[f"{ours}down_proj.weight"] = tensors.take(f"{theirs}down_proj.weight", D, width)


def _take_experts(
    config: ModelConfig, kind: str, tree: Mapping, tensors: Tensors, theirs: str, state: dict, ours: str
) -> None:
    E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    if theirs + "mlp.experts.gate_up_proj" in tensors:  # transformers 5, as it is in memory
        state[ours + "gate.weight"] = tensors.take(theirs + "mlp.gate.weight", E, D)
        state[ours + "experts.gate_up_proj"] = tensors.take(theirs + "mlp.experts.gate_up_proj", E, 2 * F, D)
        state[ours + "experts.down_proj"] = tensors.take(theirs + "mlp.experts.down_proj", E, D, F)
    else:
        names = [theirs + name for name in EXPERT_NAMES.get(kind, EXPERT_NAMES["other"])]
        router = "block_sparse_moe.gate.weight" if kind == "mixtral" else "mlp.gate.weight"
        state[ours + "gate.weight"] = tensors.take(theirs + router, E, D)
        gate_up, down = [], []
        for expert in range(E):
            gate, up = (tensors.take(name.format(expert), F, D) for name in names[:2])
            gate_up.append(torch.cat((gate, up)))
            down.append(tensors.take(names[2].format(expert), D, F))
        state[ours + "experts.gate_up_proj"], state[ours + "experts.down_proj"] = (
            torch.stack(gate_up),
            torch.stack(down),
        )
    if kind == "glm4_moe":
        state[ours + "gate.expert_bias"] = tensors.take(theirs + "mlp.gate.e_score_correction_bias", E)
        if config.n_shared_experts:
            _take_network(
                tensors, theirs + "mlp.shared_experts.", state, ours + "shared_experts.", D, config.n_shared_experts * F
            )
    if kind == "qwen2_moe":
        width, padded = tree["shared_expert_intermediate_size"], config.n_shared_experts * F
        _take_network(tensors, theirs + "mlp.shared_expert.", state, ours + "shared_experts.", D, width)
        for name, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):  # to a multiple of F, with zeros
            tensor = state[f"{ours}shared_experts.{name}.weight"]
            size = list(tensor.shape)
            size[dimension] = padded - width
            state[f"{ours}shared_experts.{name}.weight"] = torch.cat((tensor, torch.zeros(size)), dimension)
        state[ours + "shared_expert_gate.weight"] = tensors.take(theirs + "mlp.shared_expert_gate.weight", 1, D)


def _tidy(foreign: Foreign, kind: str) -> None:
    """Undoes what a class was given because it insists on parts that this model does not use, and says what is special."""
    config, state = foreign.config, foreign.state

    def all_of(ending: str, test) -> bool:
        found = [tensor for name, tensor in state.items() if name.endswith(ending)]
        return bool(found) and all(test(tensor) for tensor in found)

    def drop(*endings: str) -> None:
        for name in [name for name in state if name.endswith(endings)]:
            del state[name]

    def is_zero(tensor: Tensor) -> bool:
        return not tensor.any()

    shared = ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight", "shared_experts.down_proj.weight")
    if all_of("shared_experts.down_proj.weight", is_zero):
        drop(*shared, "shared_expert_gate.weight")
        config = replace(config, n_shared_experts=0, shared_expert_gate=False)
    elif all_of("shared_expert_gate.weight", lambda gate: bool((gate.abs() <= HALF_GATE).all())):
        for name in [name for name in state if name.endswith("shared_experts.down_proj.weight")]:
            state[name] = state[name] / 2  # the gate was 1/2
        drop("shared_expert_gate.weight")
        config = replace(config, shared_expert_gate=False)
    if kind in ("qwen2_moe", "glm4_moe") and config.attention_bias:
        if all_of("_proj.bias", is_zero):
            drop("_proj.bias")
            config = replace(config, attention_bias=False)
        else:
            foreign.notes.append(
                f"attention_bias: {CLASSES[kind]} has biases on q, k and v alone; o_proj gets one of zeros here, and once it is trained, "
                "that class can no longer hold the model"
            )
    if kind in ("mixtral", "qwen3_moe") and config.norm_topk_prob and config.n_routed_experts > 1:
        config = _unfolded(config, state)
    if all_of("gate.expert_bias", is_zero):
        drop("gate.expert_bias")
    elif kind == "glm4_moe" and config.moe_layers:
        config = replace(config, router_bias_update_rate=BIAS_RATE)
        foreign.notes.append(f"router_bias_update_rate: {BIAS_RATE:g}, so that the selection bias goes on learning")
    foreign.config = config


def _unfolded(config: ModelConfig, state: dict[str, Tensor]) -> ModelConfig:
    """Shared experts that an export put into every routed one are found again: their hidden units, the last ones, are the same
    in all experts of a layer. The config is unchanged where there are none."""
    W, places = config.moe_intermediate_size, [f"layers.{layer}.mlp." for layer in config.moe_layers]
    same = W
    for place in places:
        gate_up, down = state[place + "experts.gate_up_proj"].unflatten(1, (2, W)), state[place + "experts.down_proj"]
        alike = (gate_up == gate_up[:1]).all(3).all(1).all(0) & (down == down[:1]).all(1).all(0)  # (W,)
        differing = (~alike).nonzero()
        same = min(same, W - 1 - int(differing.max()) if len(differing) else W)
    if not 0 < same < W or same % (W - same):
        return config
    F = W - same
    for place in places:
        gate, up = state[place + "experts.gate_up_proj"].chunk(2, dim=1)
        down = state[place + "experts.down_proj"]
        state[place + "experts.gate_up_proj"] = torch.cat((gate[:, :F], up[:, :F]), 1)
        state[place + "experts.down_proj"] = down[:, :, :F].contiguous()
        state[place + "shared_experts.gate_proj.weight"] = gate[0, F:].contiguous()
        state[place + "shared_experts.up_proj.weight"] = up[0, F:].contiguous()
        state[place + "shared_experts.down_proj.weight"] = down[0, :, F:].contiguous()
    return replace(config, moe_intermediate_size=F, n_shared_experts=same // F)
