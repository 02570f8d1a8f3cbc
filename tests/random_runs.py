"""Runs of any shape with random weights, for the fixture `random_run` and for fixtures that outlive a test."""

from __future__ import annotations

from pathlib import Path

import torch

SMALL = {  # what a test's own model keys change
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "intermediate_size": 64, "moe_intermediate_size": 32,
}  # fmt: skip


@torch.no_grad()
def make_random_run(runs: Path, name: str, tokenizer, format: str = "chat", seed: int = 0, **model_keys) -> Path:
    """The folder runs/name of a run with one checkpoint, at step 1.

    The weights make every part matter: logits and router logits have a spread of about 1, so that a tolerance means
    something; a selection bias overrules scores; no norm is all ones, no bias zero.
    """
    from model import MoEForCausalLM
    from train import checkpoint
    from train.config import from_dict, to_yaml

    tree = {"name": name, "runs_dir": str(runs), "model": {**SMALL, **model_keys}, "data": {"format": format}}
    config = from_dict(tree, name)
    torch.manual_seed(seed)
    model = MoEForCausalLM(config.model).eval()
    for tensor in model.state_dict().values():
        noise = torch.randn_like(tensor)
        if tensor.dim() == 1:
            tensor.add_(0.1 * noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    spread = model(torch.arange(64).view(1, 64) % config.model.vocab_size).logits.std()
    model.norm.weight.mul_(1 / spread)
    tokenizer.save(config.run_dir / "tokenizer")
    checkpoint.save(config.run_dir, 1, model, torch.optim.AdamW(model.parameters()), {}, config)
    (config.run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return config.run_dir
