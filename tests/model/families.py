"""What tests/model/test_families.py compares: our model from a family's own YAML, the reference, and the differences.

Every comparison returns numbers, the largest differences, so that one test can ask for small ones and another, after
breaking something, for large ones.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from model import ModelConfig, MoEForCausalLM
from model.loss import IGNORE
from train.config import load_config

from .conftest import _enlarge

FOLDER = Path(__file__).resolve().parents[2] / "configs/families"
FAMILIES = sorted(
    path.stem for path in FOLDER.glob("*.yaml") if path.stem != "common" and not path.stem.endswith("_dense")
)
V = 61
B, T = 4, 24


# ------------------------------------------------------------------------------------------------ our side


def shrunk(family: str, **changes) -> ModelConfig:
    """The model of configs/families/FAMILY.yaml, smaller: every key that decides the routing is the shipped one."""
    config = load_config(FOLDER / f"{family}.yaml").model
    width = 8
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "moe_intermediate_size": width,
        "intermediate_size": width * config.intermediate_size // config.moe_intermediate_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return dataclasses.replace(config, **{**sizes, **changes})


def one_moe_layer(family: str) -> dict:
    """The number of layers at which this family has exactly one with experts."""
    layers = 1
    while len(shrunk(family, num_hidden_layers=layers, mlp_only_layers=[]).moe_layers) < 1:
        layers += 1
    return {"num_hidden_layers": layers, "mlp_only_layers": []}


def random_ids(rows: int = B, tokens: int = T, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def some_padding() -> Tensor:
    """(B, T) bool, False: two rows padded on the left, as a batch of prompts is."""
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, :9] = real[2, :17] = False
    return real


@torch.no_grad()
def our_model(config: ModelConfig, seed: int = 0) -> MoEForCausalLM:
    """In evaluation mode, with weights that make every part matter: router logits and logits have a spread of about 1 to
    2, selection biases one that overrules scores."""
    model = _enlarge(MoEForCausalLM(config), seed).eval()
    for gate in model.gates():
        gate.weight.mul_(0.3)
        if gate.expert_bias is not None:
            gate.expert_bias.copy_(
                0.05 * torch.randn(gate.expert_bias.shape, generator=torch.Generator().manual_seed(7))
            )
    model.norm.weight.mul_(1 / model(random_ids()).logits.std())
    return model


# ------------------------------------------------------------------------------------------------ references


class PlainExpertsByHand(nn.Module):
    """A plain MoE layer as a textbook has it, token by token: softmax over the chosen logits, two matrices and GELU."""

    class Gate(nn.Module):
        def __init__(self, n_experts: int, k: int, D: int) -> None:
            super().__init__()
            self.weight, self.k = nn.Parameter(torch.empty(n_experts, D)), k

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = torch.stack([self.weight @ token for token in tokens])
            chosen = [sorted(range(len(row)), key=lambda e: -float(row[e].detach()))[: self.k] for row in logits]
            weights = []
            for row, experts in zip(logits, chosen, strict=True):
                exponentials = [row[e].exp() for e in experts]
                weights.append(torch.stack([each / sum(exponentials) for each in exponentials]))
            return logits, torch.stack(weights), torch.tensor(chosen)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = self.Gate(E, config.num_experts_per_tok, D)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.experts.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.gate(tokens)
        rows = []
        for token, weight, experts in zip(tokens, weights, chosen.tolist(), strict=True):
            y = torch.zeros_like(token)
            for w, e in zip(weight, experts, strict=True):
                y = y + w * (self.experts.down_proj[e] @ gelu_by_hand(self.experts.up_proj[e] @ token))
            rows.append(y)
        return torch.stack(rows).view_as(x)


class PlainNetworkByHand(nn.Module):
    """down(gelu(up x)), the dense network that plain experts are the experts of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_by_hand(x @ self.up_proj.weight.t()) @ self.down_proj.weight.t()


def gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def _options(config: ModelConfig) -> dict:
    """What every transformers class calls the same."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim, "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings, "attention_dropout": 0.0, "attn_implementation": "eager",
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default", "partial_rotary_factor": 1.0},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False,
    }  # fmt: skip


def _routed(config: ModelConfig) -> dict:
    return {
        "num_experts_per_tok": config.num_experts_per_tok, "moe_intermediate_size": config.moe_intermediate_size,
        "router_aux_loss_coef": config.aux_loss_alpha / config.num_experts_per_tok,  # their loss is k times ours
    }  # fmt: skip


def _dense_layers(config: ModelConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if not config.is_moe_layer(layer)]


def mixtral(config: ModelConfig) -> nn.Module:
    options = _options(config) | _routed(config) | {"intermediate_size": config.moe_intermediate_size}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **options, num_local_experts=config.n_routed_experts, router_jitter_noise=config.router_jitter_noise,
            sliding_window=None,
        )
    )  # fmt: skip


def qwen3_moe(config: ModelConfig) -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **_options(config), **_routed(config), num_experts=config.n_routed_experts,
            norm_topk_prob=config.norm_topk_prob, mlp_only_layers=_dense_layers(config),
        )
    )  # fmt: skip


def qwen2_moe(config: ModelConfig) -> nn.Module:
    """Also what has ungated shared experts: a gate of zeros is sigmoid(0) = 1/2, undone by a doubled down_proj."""
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_options(config), **_routed(config), num_experts=config.n_routed_experts,
            norm_topk_prob=config.norm_topk_prob, mlp_only_layers=_dense_layers(config), qkv_bias=False,
            shared_expert_intermediate_size=config.n_shared_experts * config.moe_intermediate_size,
        )
    )  # fmt: skip


def glm4_moe(config: ModelConfig) -> nn.Module:
    options = _routed(config)
    options.pop("router_aux_loss_coef")
    return transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(
            **_options(config), **options, partial_rotary_factor=1.0, n_routed_experts=config.n_routed_experts,
            n_shared_experts=config.n_shared_experts, n_group=1, topk_group=1, norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor, first_k_dense_replace=config.first_k_dense_replace,
            use_qk_norm=config.use_qk_norm, num_mtp_layers=0,
        )
    )  # fmt: skip


def plain_moe(config: ModelConfig) -> nn.Module:
    """Llama's attention, norms and residual stream around layers written out by hand."""
    hull = dense(dataclasses.replace(config, gated_ffn=True, n_routed_experts=0))
    for layer, decoder_layer in enumerate(hull.model.layers):
        decoder_layer.mlp = PlainExpertsByHand(config) if config.is_moe_layer(layer) else PlainNetworkByHand(config)
    return hull


def dense(config: ModelConfig) -> nn.Module:
    if not config.gated_ffn:
        return plain_moe(config)
    if config.use_qk_norm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_options(config)))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_options(config)))


REFERENCES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "deepseek_moe": qwen2_moe,
    "deepseek_v3": glm4_moe,
    "minimind": qwen2_moe,
    "plain_moe": plain_moe,
}


def their_names(ours: MoEForCausalLM, theirs: nn.Module) -> dict[str, tuple[str, float]]:
    """Our tensor -> theirs, and what theirs is multiplied by: (2 for the shared down_proj behind Qwen2-MoE's gate of 1/2)."""
    gate_is_half = isinstance(theirs, transformers.Qwen2MoeForCausalLM) and not ours.config.shared_expert_gate
    names = {}
    for name in ours.state_dict():
        their = name if name.startswith("lm_head") else f"model.{name}"
        factor = 2.0 if gate_is_half and name.endswith("shared_experts.down_proj.weight") else 1.0
        if isinstance(theirs, transformers.Qwen2MoeForCausalLM):
            their = their.replace("shared_experts", "shared_expert")
        names[name] = (their.replace("gate.expert_bias", "gate.e_score_correction_bias"), factor)
    return names


@torch.no_grad()
def reference_of(ours: MoEForCausalLM, family: str) -> nn.Module:
    """The family's reference (a dense one for a dense model) with our weights, every one of them and no other."""
    config = ours.config
    theirs = (REFERENCES[family] if config.n_routed_experts else dense)(config)
    weights = {}
    for name, (their, factor) in their_names(ours, theirs).items():
        weights[their] = factor * ours.state_dict()[name]
    if isinstance(theirs, transformers.Qwen2MoeForCausalLM) and not config.shared_expert_gate:
        for layer in config.moe_layers:
            weights[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
    theirs.load_state_dict(weights)  # strict
    theirs.of = dataclasses.replace(config)  # a copy: what is broken in ours must not change what is expected
    return theirs.eval()


def deepseek_block(ours: MoEForCausalLM) -> nn.Module:
    """transformers' own DeepSeek MoE layer, V2's for softmax and V3's for sigmoid, with the weights of our last layer."""
    config = ours.config
    options = {
        "hidden_size": config.hidden_size, "moe_intermediate_size": config.moe_intermediate_size, "hidden_act": "silu",
        "n_routed_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok,
        "n_shared_experts": config.n_shared_experts, "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
    }  # fmt: skip
    if config.scoring_func == "softmax":
        block = DeepseekV2Moe(transformers.DeepseekV2Config(**options, topk_method="greedy"))
    else:
        block = DeepseekV3MoE(transformers.DeepseekV3Config(**options, n_group=1, topk_group=1))
    state = ours.layers[-1].mlp.state_dict()
    block.load_state_dict({k.replace("expert_bias", "e_score_correction_bias"): v for k, v in state.items()})
    return block.eval()


class Routed:
    """What a reference's routers said: logits (N, E), weights (N, k) and expert ids (N, k) of each layer in turn."""

    def __init__(self, theirs: nn.Module) -> None:
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []
        self.hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: self.layers.append(output))
            for name, module in theirs.named_modules()
            if name.endswith("mlp.gate")
        ]

    def __enter__(self) -> Routed:
        return self

    def __exit__(self, *_error) -> None:
        for hook in self.hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------ balance, written out


def sequence_loss(scores: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """DeepSeek-V2 eq. 23-25, row by row, and their mean; DeepSeek-V3 eq. 17-20 for scores made to sum to 1.
    scores (B, T, E), chosen (B, T, k), real (B, T)."""
    rows = [_f_times_p(scores[b], chosen[b].tolist(), real[b].tolist()) for b in range(len(scores)) if real[b].any()]
    return sum(rows) / len(rows)


def batch_loss(scores: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """The same over all rows as if they were one: MiniMind's `seq_aux: false`, Switch eq. 4-6 for k choices."""
    return _f_times_p(scores.flatten(0, 1), chosen.flatten(0, 1).tolist(), real.flatten().tolist())


def _f_times_p(scores: Tensor, chosen: list[list[int]], real: list[bool]) -> Tensor:
    E, k = scores.shape[-1], len(chosen[0])
    tokens = [t for t in range(len(scores)) if real[t]]
    total = torch.zeros(())
    for e in range(E):
        f = E / (k * len(tokens)) * sum(1 for t in tokens if e in chosen[t])
        P = sum(scores[t, e] for t in tokens) / len(tokens)
        total = total + f * P
    return total


def their_balance(theirs: nn.Module, routed: Routed, real: Tensor) -> Tensor:
    """The balance loss of a reference that has just run, in our normalisation, averaged over layers.

    transformers' own function, divided by k, where it has one for the level; else the paper's formula, written out, on the
    logits and the choices of the reference's routers.
    """
    config, losses = theirs.of, []
    own_function = getattr(sys.modules[type(theirs).__module__], "load_balancing_loss_func", load_balancing_loss_func)
    for logits, _, chosen in routed.layers:
        if config.aux_loss_level in ("batch", "global") and config.scoring_func == "softmax":
            k = config.num_experts_per_tok
            losses.append(own_function((logits,), config.n_routed_experts, k, real.long()) / k)
            continue
        scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
        scores = scores / sum(scores[:, e] for e in range(scores.shape[1])).unsqueeze(1)
        formula = sequence_loss if config.aux_loss_level == "sequence" else batch_loss
        losses.append(formula(scores.view(*real.shape, -1), chosen.view(*real.shape, -1), real))
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------------ the comparisons


def spread_of_logits(theirs: nn.Module) -> float:
    with torch.no_grad():
        return float(theirs(input_ids=random_ids()).logits.std())


def logits_difference(
    ours: MoEForCausalLM, theirs: nn.Module, path: str = "train", real: Tensor | None = None
) -> float:
    """Largest difference of logits. path: `train` (differentiable), `eval` (moe_infer) or `few` (its shortcut for a handful of
    tokens). Where real (B, T) is False, there is padding, whose logits mean nothing."""
    ids = random_ids(1, 2) if path == "few" else random_ids()
    with torch.set_grad_enabled(path == "train"):
        ours.train(path == "train")
        logits = ours(ids, attention_mask=real).logits.detach()
        ours.eval()
        expected = theirs(input_ids=ids, attention_mask=None if real is None else real.long()).logits.detach()
    difference = (logits - expected).abs()
    return float((difference if real is None else difference[real]).max())


def routing_difference(ours: MoEForCausalLM, theirs: nn.Module) -> tuple[int, float]:
    """Tokens, over all layers, that go to other experts, and the largest difference of an expert's weight."""
    with torch.no_grad(), Routed(theirs) as routed:
        theirs(input_ids=random_ids())
        _, routings = ours._hidden_states(random_ids(), None, None, None, None)
    mine = [routing for _, routing in routings]
    assert len(mine) == len(routed.layers), f"{len(mine)} MoE layers here, {len(routed.layers)} there"
    others, worst = 0, 0.0
    for routing, (_, weights, chosen) in zip(mine, routed.layers, strict=True):
        own = routing.topk_idx.flatten(0, 1)
        others += int((own.sort(-1).values != chosen.sort(-1).values).any(-1).sum())
        empty = torch.zeros(len(own), routing.scores.shape[-1])
        dense_own = empty.scatter(1, own, routing.topk_weight.flatten(0, 1))
        worst = max(worst, float((dense_own - empty.scatter(1, chosen, weights.float())).abs().max()))
    return others, worst


def balance_difference(ours: MoEForCausalLM, theirs: nn.Module, real: Tensor | None = None) -> float:
    """Relative difference of the balance losses, unweighted."""
    with torch.no_grad(), Routed(theirs) as routed:
        theirs(input_ids=random_ids(), attention_mask=None if real is None else real.long())
        ours.reset_counts()
        mine = ours.train()(random_ids(), attention_mask=real).aux_loss / ours.config.aux_loss_alpha
        ours.eval()
        mask = torch.ones(B, T, dtype=torch.bool) if real is None else real
        expected = their_balance(theirs, routed, mask)
    return float((mine - expected).abs() / expected)


def gradient_difference(ours: MoEForCausalLM, theirs: nn.Module, aux_weight: float = 0.0) -> dict[str, float]:
    """By kind of parameter, the largest difference of gradients relative to the largest gradient of that tensor; of the
    cross-entropy plus `aux_weight` times the balance loss (ours is weighted by its own alpha, which is divided out)."""
    labels = random_ids(seed=1)
    labels[:, 18:] = IGNORE
    ours.zero_grad()
    theirs.zero_grad()
    ours.reset_counts()
    out = ours.train()(random_ids(), labels)
    (out.loss + aux_weight * out.aux_loss / max(ours.config.aux_loss_alpha, 1e-30)).backward()
    ours.eval()
    with Routed(theirs) as routed:
        loss = theirs(input_ids=random_ids(), labels=labels).loss
        if aux_weight:
            loss = loss + aux_weight * their_balance(theirs, routed, torch.ones(B, T, dtype=torch.bool))
        loss.backward()
    their_parameters = dict(theirs.named_parameters())
    names, worst = their_names(ours, theirs), {}
    for name, parameter in ours.named_parameters():
        their, factor = names[name]
        expected = factor * their_parameters[their].grad
        difference = float((parameter.grad - expected).abs().max() / expected.abs().max())
        kind = kind_of(name)
        worst[kind] = max(worst.get(kind, 0.0), difference)
    return worst


def kind_of(name: str) -> str:
    kinds = {
        "mlp.gate.": "router",
        "mlp.experts.": "experts",
        "shared_expert_gate": "shared gate",
        "shared_experts": "shared",
    }
    return next((kind for part, kind in kinds.items() if part in name), "the rest")
