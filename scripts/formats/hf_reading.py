"""A folder of one of six transformers classes as a ModelConfig and our model's tensors: the way back of scripts/formats/hf_folder.py.

Takes what transformers 4 and 5 write: safetensors, whole or in shards with an index; rope_theta and rope_scaling or rope_parameters; one
tensor per expert, or transformers 5's stacked gate_up_proj; any float dtype. The folder is a stranger's: sizes are bounded, names are
checked, nothing is run. What our model does not compute is refused, naming the key of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data.words import short, short_name
from model.config import ROPE_SCALING_KEYS, ModelConfig
from scripts.formats.hf_files import Tensors, read_json
from scripts.formats.hf_folder import CLASSES
from scripts.formats.hf_state import Foreign, translated
from train.config import build

# What a class takes for a key that its config.json lacks, where the classes differ or ours does (transformers 4.57 and 5).
DEFAULTS = {
    "llama": {"num_key_value_heads": None},
    "qwen3": {"head_dim": 128, "sliding_window": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2_moe": {"qkv_bias": True, "norm_topk_prob": False, "sliding_window": 4096},
    "qwen3_moe": {"norm_topk_prob": False, "sliding_window": 4096},
    "glm4_moe": {"rms_norm_eps": 1e-5, "norm_topk_prob": True, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1},
}  # fmt: skip


def read_folder(folder: Path) -> Foreign:
    """ValueError, naming file and key or tensor, for what is missing, damaged, or not computed by our model."""
    tree = read_json(folder / "config.json")
    where = short_name(folder / "config.json")
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ValueError(
            f"{where}: model_type: {short(kind)} is none of {', '.join(CLASSES)}, the classes that can be read"
        )
    tree = {**DEFAULTS[kind], **{key: value for key, value in tree.items() if value is not None}}
    _refuse_what_we_do_not_compute(tree, kind, where)
    config = build(ModelConfig, _model_keys(tree, kind, where), where)
    with Tensors(folder) as tensors:
        return translated(tree, kind, config, tensors)


def _refuse_what_we_do_not_compute(tree: Mapping, kind: str, where: str) -> None:
    layers, sliding = tree.get("layer_types"), tree.get("sliding_window")
    window = sliding if kind == "mixtral" or tree.get("use_sliding_window") else None
    reaches = isinstance(window, int) and isinstance(tree.get("max_position_embeddings"), int)
    problems = (
        ("auto_map", "auto_map" in tree, "the folder brings code of its own, which is never run"),
        (
            "quantization_config",
            "quantization_config" in tree,
            "the weights are quantised; use the folder they were made from",
        ),
        (
            "sliding_window",
            bool(window) and not (reaches and window >= tree["max_position_embeddings"]),
            "attention here has no window",
        ),
        (
            "layer_types",
            layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)),
            "attention here has no window",
        ),
        ("mlp_bias", bool(tree.get("mlp_bias")), "feed-forward networks here have no biases"),
        ("n_group", kind == "glm4_moe" and tree.get("n_group", 1) != 1, "experts here are not chosen by groups"),
    )
    for key, wrong, why in problems:
        if wrong:
            raise ValueError(f"{where}: {key}: {short(tree.get(key))}: {why}, so this model cannot be imported")


def _model_keys(tree: Mapping, kind: str, where: str) -> dict:
    """The keys of our ModelConfig, unchecked values."""
    act = tree.get("hidden_act", "silu")
    keys = {
        **{
            key: _needed(tree, key, where)
            for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        },
        "max_position_embeddings": _needed(tree, "max_position_embeddings", where),
        "intermediate_size": _needed(tree, "intermediate_size", where),
        "num_key_value_heads": tree["num_key_value_heads"]
        if kind == "llama"
        else _needed(tree, "num_key_value_heads", where),
        "head_dim": tree.get("head_dim"),
        "hidden_act": "silu" if act == "swish" else act,
        "rms_norm_eps": tree.get("rms_norm_eps", 1e-6),
        "initializer_range": tree.get("initializer_range", 0.02) or 0.02,
        "tie_word_embeddings": tree.get("tie_word_embeddings", False),
        "attention_bias": tree.get("qkv_bias" if kind == "qwen2_moe" else "attention_bias", False),
        "use_qk_norm": kind in ("qwen3", "qwen3_moe") or (kind == "glm4_moe" and tree.get("use_qk_norm", False)),
        "gated_ffn": True,
        "n_routed_experts": 0,
        "n_shared_experts": 0,
        "norm_topk_prob": False,
        "num_experts_per_tok": 1,
        **_rope_keys(tree, kind, where),
    }
    if kind not in ("llama", "qwen3"):
        keys |= _moe_keys(tree, kind, where)
    return keys


def _needed(tree: Mapping, key: str, where: str) -> object:
    if tree.get(key) is None:
        raise ValueError(f"{where}: {key} is missing; copy the folder anew")
    return tree[key]


def _moe_keys(tree: Mapping, kind: str, where: str) -> dict:
    experts = next(
        (key for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in tree), "num_experts"
    )
    per_token, layers = _needed(tree, "num_experts_per_tok", where), tree["num_hidden_layers"]
    width = _needed(tree, "intermediate_size" if kind == "mixtral" else "moe_intermediate_size", where)
    coefficient = tree.get("router_aux_loss_coef", 0.001 if kind != "glm4_moe" else 0.0)
    numbers = (per_token, layers, width, coefficient)
    whole = all(type(number) is int and abs(number) < 2**31 for number in numbers[:3])
    if not whole or type(coefficient) not in (int, float) or not abs(coefficient) < 2**31:
        raise ValueError(
            f"{where}: num_experts_per_tok, num_hidden_layers and the experts' width must be whole numbers, and "
            "router_aux_loss_coef a number; copy it anew"
        )
    keys = {
        "n_routed_experts": _needed(tree, experts, where),
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "norm_topk_prob": True if kind == "mixtral" else tree["norm_topk_prob"],
        "aux_loss_level": "batch" if coefficient else "none",
        "aux_loss_alpha": float(coefficient) * per_token,  # theirs is k times ours at balance
        "router_jitter_noise": tree.get("router_jitter_noise", 0.0) if kind == "mixtral" else 0.0,
    }
    if kind == "glm4_moe":
        return keys | {
            "scoring_func": "sigmoid",
            "first_k_dense_replace": tree["first_k_dense_replace"],
            "routed_scaling_factor": tree.get("routed_scaling_factor", 1.0),
            "n_shared_experts": tree.get("n_shared_experts", 1),
        }
    if kind in ("qwen2_moe", "qwen3_moe"):
        step, listed = tree.get("decoder_sparse_step", 1), tree.get("mlp_only_layers", [])
        if not isinstance(step, int) or not 1 <= step <= 1024 or not isinstance(listed, list) or not layers <= 1024:
            raise ValueError(
                f"{where}: decoder_sparse_step, mlp_only_layers or num_hidden_layers: out of range; copy it anew"
            )
        dense = [layer for layer in range(layers) if layer in listed or (layer + 1) % step]
        keys["mlp_only_layers"] = dense
    if kind == "qwen2_moe":
        shared = _needed(tree, "shared_expert_intermediate_size", where)
        if not isinstance(shared, int) or not isinstance(width, int) or not 0 < shared < 2**20 or not 0 < width:
            raise ValueError(
                f"{where}: shared_expert_intermediate_size: {short(shared)} is no width of a shared expert"
            )
        keys |= {"n_shared_experts": -(-shared // width), "shared_expert_gate": True}
    return keys


def _rope_keys(tree: Mapping, kind: str, where: str) -> dict:
    """rope_theta and rope_scaling, from where transformers 4 or 5 keeps them."""
    found = []
    if tree.get("rope_parameters") is not None:
        found.append(("rope_parameters", tree["rope_parameters"]))
    if tree.get("rope_scaling") is not None or not found:
        found.append(("rope_scaling", tree.get("rope_scaling") or {}))
    readings = []
    for key, rope in found:
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(
                f"{where}: {key}: {short(rope)}: positions of one kind for all layers are all that is known here"
            )
        readings.append(_rope_reading(rope, tree, key, where))
    if any(reading != readings[0] for reading in readings):
        raise ValueError(f"{where}: rope_parameters and rope_scaling: they contradict each other; remove the wrong one")
    return readings[0]


def _rope_reading(rope: dict, tree: Mapping, key: str, where: str) -> dict:
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", tree.get("rope_theta", 10000.0))
    part = rope.pop("partial_rotary_factor", tree.get("partial_rotary_factor", 1.0))
    if part != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor: {short(part)}: positions here turn whole heads (1.0)")
    legacy = rope.pop("type", "default")  # the name before rope_type
    kind = rope.pop("rope_type", legacy)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn" or rope.pop("truncate", True) is not True:
        raise ValueError(
            f"{where}: {key}: {short(kind)} positions cannot be computed here; only default and yarn (truncated) can"
        )
    for name in rope:
        if name not in ROPE_SCALING_KEYS:
            raise ValueError(f"{where}: {key}: {short(name)} is not known to YaRN here")
    rope.setdefault("original_max_position_embeddings", tree.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "yarn", **rope}}
