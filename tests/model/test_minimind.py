"""configs/families/minimind.yaml beside MiniMind's own code, where there is a checkout of it (skipped otherwise):

    git clone https://github.com/jingyaogong/minimind && git -C minimind checkout 83e52f6
    MINIMIND_CHECKOUT=minimind python -m pytest tests/model/test_minimind.py

83e52f6 is the last commit of MiniMind-2. No line of it is part of this project.
"""

import os
from pathlib import Path

import pytest
import torch

from model import MoEForCausalLM
from scripts.peers import minimind_module

from .families import our_model, random_ids, shrunk

CHECKOUT = os.environ.get("MINIMIND_CHECKOUT")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MINIMIND_CHECKOUT names no checkout of MiniMind-2")


def minimind(ours: MoEForCausalLM) -> torch.nn.Module:
    module = minimind_module(Path(CHECKOUT))
    config = ours.config
    same = (
        "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
        "rope_theta", "max_position_embeddings", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
        "scoring_func", "norm_topk_prob", "aux_loss_alpha",
    )  # fmt: skip
    theirs = module.MiniMindForCausalLM(
        module.MiniMindConfig(
            **{key: getattr(config, key) for key in same}, use_moe=True, dropout=0.0,
            intermediate_size=config.moe_intermediate_size, seq_aux=config.aux_loss_level == "sequence",
        )
    )  # fmt: skip
    weights = {}
    for name, weight in ours.state_dict().items():
        for their, part in their_names(name, weight):
            weights[their] = part
    theirs.load_state_dict(weights)
    return theirs


def their_names(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A tensor of ours as MiniMind's: one network an expert, gate and up apart."""
    their = name if name.startswith("lm_head") else f"model.{name.replace('shared_experts.', 'shared_experts.0.')}"
    if ".mlp.experts." not in name:
        return [(their, tensor)]
    folder, _, projection = their.rpartition(".")
    names = []
    for e, expert in enumerate(tensor):
        parts = (
            zip(("gate_proj", "up_proj"), expert.chunk(2)) if projection == "gate_up_proj" else [(projection, expert)]
        )
        names += [(f"{folder}.{e}.{kind}.weight", part) for kind, part in parts]
    return names


@pytest.mark.parametrize("level", ["sequence", "batch"])
def test_logits_losses_and_gradients_are_minimind_s_own(level):
    ours = our_model(shrunk("minimind", aux_loss_level=level))
    theirs, layers = minimind(ours), ours.config.num_hidden_layers
    with torch.no_grad():
        assert (ours(random_ids()).logits - theirs.eval()(random_ids()).logits).abs().max() <= 2e-5
    out = ours.train()(random_ids(), random_ids(seed=1))
    expected = theirs.train()(random_ids(), labels=random_ids(seed=1))
    assert (out.logits - expected.logits).detach().abs().max() <= 2e-5
    torch.testing.assert_close(out.aux_loss * layers, expected.aux_loss, atol=0, rtol=1e-5)  # it adds layers up
    (out.loss + layers * out.aux_loss).backward()
    (expected.loss + expected.aux_loss).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters(remove_duplicate=False)}
    for name, parameter in ours.named_parameters():
        for their, gradient in their_names(name, parameter.grad):
            reference = gradients[their]
            assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max(), name
