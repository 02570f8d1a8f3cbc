"""transformers 4.57 and 5 beside us: folders we wrote open there and give the same; folders they wrote open here.

Two processes, one per version, look at all folders. Slow: importing transformers and torch takes longer than all the rest.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.chat import CHAT_TEMPLATE, encode_prompt
from model.generate import generate
from scripts.export_hf import HARD_TEXTS, export
from scripts.formats.hf_folder import choose_layout
from scripts.import_hf import import_folder
from tests.random_runs import make_random_run
from train.checkpoint import open_run

from ...configs import CONFIGS, ROOT
from .hf_cases import (
    SMALL,
    TRANSFORMERS_4,
    VARIANTS,
    in_transformers,
    key_of,
    scaled_down,
)

pytestmark = pytest.mark.slow

NEW_TOKENS = 50
ROWS = [[(37 * i + 11) % 512 for i in range(60)], [1, 7, 300, 20], [(29 * i) % 509 for i in range(128)]]
TEXTS = [*HARD_TEXTS, "no special <|pad|> here", "a <|im_end|> b<|eos|>c <|im_start|>user\n"]
MESSAGES = [
    [{"role": "user", "content": "  What is 2 + 2? "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi \U0001f600"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And\n\nnow?"},
    ],
]

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
THEIRS = {  # what transformers makes and we read
    "llama": ("Llama", {"attention_bias": True}, {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
    "qwen3": ("Qwen3", {"head_dim": 12}, {"save": {"max_shard_size": "20KB"}}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"dtype": "float16"}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "norm_topk_prob": True},
        {},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**MOE, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [1]},
        {"save": {"max_shard_size": "20KB"}},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {**MOE, "n_routed_experts": 4, "partial_rotary_factor": 1.0, "use_qk_norm": True, "head_dim": 8, "routed_scaling_factor": 1.5, "attention_bias": True},
        {},
    ),
}  # fmt: skip
STACKED = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe")  # transformers 5 can save them as they are in memory


def cases() -> dict[str, dict]:
    """Model keys of every shipped config and every variant that a class represents."""
    found = {str(path.relative_to(ROOT / "configs")): scaled_down(path) for path in CONFIGS}
    return {**found, **{name: keys for name, (_, keys) in VARIANTS.items()}}


CASES = cases()


@pytest.fixture(scope="module")
def ours(tmp_path_factory, small_tokenizer) -> dict[str, dict]:
    """{case: {"run", "out", "logits", "greedy"}}; equal models share one. A refused case has "refused" alone."""
    folder, made = tmp_path_factory.mktemp("ours"), {}
    for i, keys in enumerate(CASES.values()):
        key = key_of(keys)
        if key not in made:
            run = open_run(
                make_random_run(folder / "runs", f"case-{i}", small_tokenizer, **keys),
                device="cpu",
                precision="float32",
            )
            try:
                out = export(run, folder / f"case-{i}")
            except ValueError as error:
                made[key] = {"refused": str(error)}
                continue
            with torch.no_grad():
                logits = [run.model(torch.tensor([row])).logits[0] for row in ROWS]
            greedy = generate(run.model, [ROWS[0]], max_new_tokens=NEW_TOKENS, temperature=0)
            made[key] = {"run": run, "out": out, "logits": logits, "greedy": greedy}
    return {name: made[key_of(keys)] for name, keys in CASES.items()}


@pytest.fixture(scope="module")
def chat_card(tmp_path_factory, trained) -> dict[str, Path]:
    """Exports of the two trained runs."""
    folder = tmp_path_factory.mktemp("cards")
    return {
        name: export(open_run(run, device="cpu", precision="float32"), folder / name)
        for name, run in (("text", trained.text), ("chat", trained.chat))
    }


def code_of(out: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


@pytest.fixture(scope="module", params=[5, 4], ids=["transformers 5", "transformers 4"])
def theirs(request, tmp_path_factory, ours, chat_card) -> tuple[int, Path]:
    """(version, folder) with what that transformers says of our exports, and the folders it made itself."""
    version = request.param
    if version == 4 and not (TRANSFORMERS_4 / "transformers").is_dir():
        pytest.skip("no transformers 4 in .venv/transformers4; bash scripts/test.sh --all puts it there")
    folder = tmp_path_factory.mktemp(f"transformers-{version}")
    outs = {case["out"] for case in ours.values() if "out" in case}
    jobs = [
        {"folder": str(out), "ids": ROWS, "texts": TEXTS, "messages": MESSAGES, "out": str(folder / f"{out.name}.look")}
        for out in sorted(outs)
    ]
    for name, (kind, config, options) in THEIRS.items():
        sizes = {key: value for key, value in SMALL.items() if key not in ("head_dim", "moe_intermediate_size")}
        made = {"class": kind, "config": {**sizes, **config}, **options}
        jobs.append({"make": made, "ids": ROWS, "out": str(folder / f"{name}.made")})
        if version == 5 and name in STACKED:
            stacked = {**made, "save": {"save_original_format": False}}
            jobs.append({"make": stacked, "ids": ROWS, "out": str(folder / f"{name}-stacked.made")})
    jobs += [
        {"code": code_of(out), "folder": str(out), "out": str(folder / f"card_{name}.code")}
        for name, out in chat_card.items()
    ]
    in_transformers(version, jobs, folder)
    return version, folder


def result(theirs: tuple[int, Path], out: Path) -> tuple[dict, dict]:
    """(out.json, logits) of one export."""
    version, folder = theirs
    error = folder / f"{out.name}.error"
    assert not error.exists(), error.read_text()
    found = json.loads((folder / f"{out.name}.json").read_text(encoding="utf-8"))
    assert found["version"].startswith(f"{version}.")
    return found, load_file(folder / f"{out.name}.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits_and_the_same_continuation(theirs, ours, name):
    case = ours[name]
    if "refused" in case:
        assert "plain_moe" in name and case["refused"].startswith("model.gated_ffn"), case["refused"]
        return
    found, logits = result(theirs, case["out"])
    assert found["class"] == choose_layout(case["run"].model.config).architecture
    assert not any(found["loading"].values()), f"tensors missing, left over or of another shape: {found['loading']}"
    worst = max(float((logits[str(i)] - mine).abs().max()) for i, mine in enumerate(case["logits"]))
    assert worst < 2e-5, f"logits differ by {worst:.1e} at a spread of 1"
    assert found["greedy"] == case["greedy"]


def test_the_same_ids_and_the_same_template(theirs, ours):
    """One export stands for all: they share the tokenizer's files."""
    case = next(case for case in ours.values() if "out" in case)
    run, (found, _) = case["run"], result(theirs, case["out"])
    tokenizer = run.tokenizer
    plain = len(TEXTS) - 2  # texts without special tokens' names
    assert found["ids"][:plain] == [tokenizer.encode(text) for text in TEXTS[:plain]]
    assert found["plain_ids"] == found["ids"], "nothing is put around a text"
    assert found["back"][:plain] == TEXTS[:plain], "every text comes back"
    assert tokenizer.im_end_id in found["ids"][-1] and tokenizer.im_start_id in found["ids"][-1], (
        "names of special tokens are ids there"
    )
    assert found["names"] == ["attention_mask", "input_ids"], "what a decoder's generate takes"
    assert found["special"] == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert found["template_ids"] == [encode_prompt(tokenizer, messages) for messages in MESSAGES]
    assert found["template"][0] == "<|bos|><|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert CHAT_TEMPLATE.startswith("{{ bos_token }}")
    assert found["generation"]["eos_token_id"] == [tokenizer.im_end_id, tokenizer.eos_id], (
        "a chat model's turn ends its answer"
    )


@pytest.mark.parametrize("name", [*THEIRS, *(f"{name}-stacked" for name in STACKED)])
def test_what_transformers_saved_can_be_imported(theirs, ours, tmp_path, name):
    version, folder = theirs
    if name.endswith("-stacked") and version == 4:
        pytest.skip("transformers 4 has no stacked experts")
    error, saved = folder / f"{name}.error", folder / f"{name}.made"
    assert not error.exists(), error.read_text()
    if "shard" in str(THEIRS[name.removesuffix("-stacked")][2]) and "-stacked" not in name:
        assert len(list(saved.glob("model-*.safetensors"))) > 1, "meant to be in shards"
    keys = set().union(*(load_file(path) for path in saved.glob("*.safetensors")))
    assert any(key.endswith("experts.gate_up_proj") for key in keys) == name.endswith("-stacked")
    ours_tokenizer = next(case for case in ours.values() if "out" in case)["run"].tokenizer
    ours_tokenizer.save(saved)
    import_folder(saved, tmp_path / "runs/back", is_chat=True)
    run = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    expected = load_file(folder / f"{name}.safetensors")
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            logits = run.model(torch.tensor([row])).logits[0]
            spread = float(expected[str(i)].std())
            assert 0.2 < spread < 6, "a comparison that means something"
            difference = float((logits - expected[str(i)]).abs().max())
            assert difference < 2e-5 * max(spread, 1), f"row {i}: {difference:.1e} at a spread of {spread:.1f}"
    export(run, tmp_path / "again")  # checks itself


def test_the_cards_own_lines_run(theirs, chat_card):
    version, folder = theirs
    for name in chat_card:
        error = folder / f"card_{name}.error"
        assert not error.exists(), error.read_text()
        printed = (folder / f"card_{name}.txt").read_text(encoding="utf-8")
        assert len(printed.strip()) > 3, f"{name}: printed {printed!r}"
        assert "<|" not in printed
    assert (folder / "card_text.txt").read_text(encoding="utf-8").startswith("The class")


def test_a_trained_model_answers_as_here(theirs, chat_card, trained):
    """The card's question (the first of the config's prompts), answered by our own generation."""
    _, folder = theirs
    run = open_run(trained.chat, device="cpu", precision="float32")
    prompt = encode_prompt(run.tokenizer, [{"role": "user", "content": "2 + 3 = ?"}])
    stops = (run.tokenizer.im_end_id, run.tokenizer.eos_id)
    room = run.model.config.max_position_embeddings - len(prompt)
    (answer,) = generate(run.model, [prompt], max_new_tokens=min(64, room), stop_ids=stops, temperature=0)
    assert (folder / "card_chat.txt").read_text(encoding="utf-8").rstrip("\n") == run.tokenizer.decode(answer)


def test_every_shipped_config_is_among_the_cases():
    assert {str(path.relative_to(ROOT / "configs")) for path in CONFIGS} <= CASES.keys()
