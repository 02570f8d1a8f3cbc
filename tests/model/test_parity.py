"""Promise 3, before any export: the same weights in transformers' own classes give the same logits and loss."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model import MoEForCausalLM
from model.loss import IGNORE

THEIR = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attention_dropout": 0.0, "head_dim": 8,
    "attn_implementation": "eager",
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def their_model(ours: MoEForCausalLM):
    config = ours.config
    options = THEIR | {
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"} | (config.rope_scaling or {}),
    }
    if config.n_routed_experts:
        theirs = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **options, num_experts=config.n_routed_experts, num_experts_per_tok=config.num_experts_per_tok,
                moe_intermediate_size=config.moe_intermediate_size, norm_topk_prob=config.norm_topk_prob,
                mlp_only_layers=[i for i in range(3) if not config.is_moe_layer(i)],
            )
        )  # fmt: skip
    elif config.use_qk_norm:
        theirs = Qwen3ForCausalLM(Qwen3Config(**options))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**options))
    weights = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights)  # strict: every weight of theirs is one of ours and the other way round
    return theirs.eval()


QWEN3_MOE = {"n_shared_experts": 0, "use_qk_norm": True}
PARITY = {
    "Qwen3Moe": QWEN3_MOE,
    "Qwen3Moe, raw weights": QWEN3_MOE | {"norm_topk_prob": False},
    "Qwen3Moe, top-1": QWEN3_MOE | {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "Qwen3Moe, dense layers, separate head": QWEN3_MOE | {
        "first_k_dense_replace": 1, "mlp_only_layers": [2], "tie_word_embeddings": False,
    },
    "Qwen3Moe, many experts, YaRN": QWEN3_MOE | {
        "n_routed_experts": 16, "num_experts_per_tok": 4, "rope_scaling": YARN, "rope_theta": 1e6,
    },
    "Qwen3Moe, biases, wide heads": QWEN3_MOE | {"attention_bias": True, "head_dim": 16},
    "Qwen3": {"n_routed_experts": 0, "use_qk_norm": True},
    "Llama": {"n_routed_experts": 0},
    "Llama, biases, separate head": {"n_routed_experts": 0, "attention_bias": True, "tie_word_embeddings": False},
    "Llama, YaRN": {"n_routed_experts": 0, "rope_scaling": YARN},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("name", list(PARITY))
def test_logits_and_loss_are_those_of_transformers(tiny_model, random_ids, name, backend):
    ours = tiny_model(num_hidden_layers=3, rms_norm_eps=1e-5, expert_backend=backend, **PARITY[name]).eval()
    with torch.no_grad():  # transformers' own initial spread of logits, about 1: an absolute tolerance means something
        ours.norm.weight.mul_(1 / ours(random_ids(4, 40)).logits.std())
    theirs = their_model(ours)
    ids, labels = random_ids(4, 40), random_ids(4, 40, seed=1)
    labels[:, 30:] = IGNORE
    real = torch.ones(4, 40, dtype=torch.bool)
    real[1, :9] = real[2, :20] = False
    labels[1, :10] = labels[2, :21] = IGNORE  # the first real token too: what says it is padding
    with torch.no_grad():
        for mask in (None, real):
            out = ours(ids, labels, attention_mask=mask)
            expected = theirs(input_ids=ids, labels=labels, attention_mask=None if mask is None else mask.long())
            seen = real if mask is not None else torch.ones_like(real)
            difference = (out.logits - expected.logits)[seen].abs().max().item()
            assert 0.5 < expected.logits.std() < 2
            assert difference <= 2e-5, f"{name}: logits differ by {difference:.1e}"
            torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=0)
    with torch.enable_grad():
        by_training_path = ours.train()(ids).logits.detach()
        assert (by_training_path - theirs(input_ids=ids).logits.detach()).abs().max().item() <= 2e-5
