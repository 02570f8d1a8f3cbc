"""What the tests of GGUF files share: models of every shape that llama.cpp can compute, runs exported, tokenizers of others."""

from pathlib import Path

import tokenizers
import torch

from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts.export_gguf import export
from scripts.formats.gguf_check import HARD_STRINGS, TEXTS
from scripts.formats.gguf_tokenizer import SPLITTERS
from tests.configs import CONFIGS as RUN_CONFIGS
from train.checkpoint import open_run

CONFIGS = [path for path in RUN_CONFIGS if path.stem not in ("common", "sft", "tokenizer")]
UNGATED = {"families/plain_moe", "families/plain_moe_dense"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHAPES = {  # name -> architecture, model keys
    "softmax": ("glm4moe", {}),
    "no shared expert, QK-norm": ("glm4moe", {"n_shared_experts": 0, "use_qk_norm": True, "num_experts_per_tok": 3}),
    "two shared, as they are": ("glm4moe", {"n_shared_experts": 2, "norm_topk_prob": False, "first_k_dense_replace": 2}),
    "sigmoid, bias, scale": (
        "glm4moe",
        {
            "scoring_func": "sigmoid", "router_bias_update_rate": 0.001, "routed_scaling_factor": 2.5, "use_qk_norm": True,
            "mlp_only_layers": [0], "tie_word_embeddings": False, "rms_norm_eps": 1e-3,
        },
    ),
    "softmax with bias": ("glm4moe", {"router_bias_update_rate": 0.001, "head_dim": 16, "rope_theta": 500.0}),
    "one expert of one": (
        "glm4moe",
        {"n_routed_experts": 1, "num_experts_per_tok": 1, "routed_scaling_factor": 0.5, "moe_intermediate_size": 20},
    ),
    "dense among experts": ("glm4moe", {"mlp_only_layers": [1], "intermediate_size": 72, "n_shared_experts": 0}),
    "gated shared": ("qwen2moe", {"shared_expert_gate": True, "norm_topk_prob": False, "n_shared_experts": 2}),
    "gated shared, untied": (
        "qwen2moe",
        {"shared_expert_gate": True, "norm_topk_prob": False, "tie_word_embeddings": False},
    ),
    "dense": ("llama", {"n_routed_experts": 0, "attention_bias": True, "head_dim": 12}),
    "dense by its layers": ("llama", {"first_k_dense_replace": 3, "tie_word_embeddings": False}),
    "dense, QK-norm": ("qwen3", {"n_routed_experts": 0, "use_qk_norm": True, "head_dim": 16}),
    "YaRN": ("glm4moe", {"rope_scaling": YARN}),
    "YaRN, own factor of attention": ("llama", {"n_routed_experts": 0, "rope_scaling": {**YARN, "attention_factor": 1.4}}),
}  # fmt: skip
LOGITS_TOLERANCE = 2e-5


def export_of(folder: Path, out: Path, wanted: str = "f32"):
    run = open_run(folder, device="cpu", precision="float32")
    export(run, out, wanted)
    return run


def texts_as_ids(run) -> list[list[int]]:
    ids = [[run.tokenizer.bos_id, *run.tokenizer.encode(text)] for text in (*TEXTS, *HARD_STRINGS)]
    return [row[: run.config.model.max_position_embeddings] for row in ids]


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def others_tokenizer(splitter: str, **model) -> Tokenizer:
    """A small tokenizer that splits text as another project's do."""
    from tokenizers import pre_tokenizers as parts

    byte_level = {"add_prefix_space": False}
    kinds = {
        "gpt-2": lambda: parts.ByteLevel(**byte_level),
        "smollm": lambda: parts.Sequence([parts.Digits(individual_digits=True), parts.ByteLevel(**byte_level)]),
        "llama-bpe": lambda: parts.Sequence(
            [
                parts.Split(tokenizers.Regex(SPLITTERS["llama-bpe"][0]), "isolated"),
                parts.ByteLevel(**byte_level, use_regex=False),
            ]
        ),
        "unknown": lambda: parts.Sequence([parts.Split(" ", "isolated"), parts.ByteLevel(**byte_level)]),
    }
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    raw.pre_tokenizer = kinds[splitter]()
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL_TOKENS],
        show_progress=False,
        initial_alphabet=parts.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([*HARD_STRINGS, *TEXTS, "1234567 12345 and the 12th: 2024-01-31 WE'LL we'll"] * 3, trainer)
    raw.add_tokens(["WORD"])
    return Tokenizer(raw.to_str().encode(), "test")


def with_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    tokenizer.save(folder / "tokenizer")
    return folder
