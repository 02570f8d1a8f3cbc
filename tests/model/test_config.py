"""ModelConfig: what is derived, what is off by default, and the sentence a mistake gets."""

import pytest

from model import ModelConfig

MISTAKES = [
    ({"num_attention_heads": 5}, "num_attention_heads: 5"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads: 3"),
    ({"head_dim": 7}, "head_dim: 7"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok: 5"),
    ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok: 1"),
    ({"n_shared_experts": 0, "shared_expert_gate": True}, "shared_expert_gate: true"),
    ({"mlp_only_layers": [8]}, "mlp_only_layers: layer 8"),
    ({"mlp_only_layers": [-1]}, "mlp_only_layers: layer -1"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: rope_type 'linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}}, "factor: 0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings: None"),
    ({"rope_scaling": {"rope_type": "yarn", "facter": 2.0}}, "unknown key 'facter'"),
    ({"scoring_func": "sofmax"}, "scoring_func: 'sofmax'"),
    ({"aux_loss_level": "seq"}, "aux_loss_level: 'seq'"),
    ({"hidden_act": "swish"}, "hidden_act: 'swish'"),
    ({"expert_backend": "fast"}, "expert_backend: 'fast'"),
    ({"num_attention_heads": 0}, "num_attention_heads: 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
    ({"dropout": 1.0}, "dropout: 1.0"),
    ({"rope_theta": 0.0}, "rope_theta: 0.0"),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor: 0.0"),
    ({"aux_loss_alpha": -0.1}, "aux_loss_alpha: -0.1"),
]


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES, ids=[sentence for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence_that_names_key_and_value(changes, sentence):
    with pytest.raises(ValueError) as error:
        ModelConfig(**changes)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_one_expert_may_have_weight_one():
    ModelConfig(n_routed_experts=1, num_experts_per_tok=1, norm_topk_prob=True)
    ModelConfig(n_routed_experts=4, num_experts_per_tok=1, norm_topk_prob=False)


@pytest.mark.parametrize(("hidden", "expected"), [(512, 1408), (384, 1024), (8, 64), (96, 256), (97, 320)])
def test_null_width_is_8_thirds_rounded_up_to_64(hidden, expected):
    config = ModelConfig(hidden_size=hidden, num_attention_heads=1, head_dim=16)
    assert config.intermediate_size == expected
    assert 64 > expected - 8 * hidden / 3 >= 0
    assert config.moe_intermediate_size == expected


def test_null_values_follow_the_others():
    config = ModelConfig(hidden_size=48, num_attention_heads=6, intermediate_size=40)
    assert (config.moe_intermediate_size, config.num_key_value_heads, config.head_dim) == (40, 6, 8)


def test_leading_and_listed_layers_are_dense():
    config = ModelConfig(num_hidden_layers=6, first_k_dense_replace=2, mlp_only_layers=[4])
    assert config.moe_layers == [2, 3, 5]
    assert [config.is_moe_layer(i) for i in range(6)] == [False, False, True, True, False, True]
    assert ModelConfig(n_routed_experts=0).moe_layers == []


def test_every_optional_effect_is_off_by_default():
    config = ModelConfig()
    off = (config.dropout, config.router_jitter_noise, config.router_z_loss_coef, config.router_bias_update_rate)
    assert off == (0, 0, 0, 0)
    assert (config.routed_scaling_factor, config.scoring_func, config.rope_scaling) == (1.0, "softmax", None)


def test_a_dense_model_may_keep_the_keys_of_its_moe():
    """So that a dense twin is one changed key."""
    config = ModelConfig(n_routed_experts=0, n_shared_experts=0, shared_expert_gate=True, num_experts_per_tok=1)
    assert config.moe_layers == []


def test_two_configurations_share_no_list():
    first, second = ModelConfig(), ModelConfig()
    first.mlp_only_layers.append(0)
    assert second.mlp_only_layers == []
