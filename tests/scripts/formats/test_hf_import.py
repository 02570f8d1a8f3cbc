"""A folder of transformers becomes a run: round trips, tokenizers that lack tokens, what is refused, and hostile folders.

Folders made by transformers itself are imported in test_hf_transformers.py; here they are our own exports, changed by hand.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.chat import encode_prompt
from data.tokenizer import Tokenizer
from scripts import import_hf
from scripts.export_hf import export
from scripts.formats.hf_folder import CLASSES
from scripts.import_hf import import_folder
from tests.random_runs import make_random_run
from train import cli
from train.checkpoint import check_intact, find_checkpoint, open_run, read_training_state

from ...configs import ROOT
from .hf_cases import YARN
from .test_hf_export import SIX

QUICK = ("llama", "qwen3_moe", "glm4_moe")  # of the six classes, every day
IDS = torch.tensor([[(37 * i + 11) % 512 for i in range(100)]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer) -> dict:
    """Runs and exports made so far, by their keys: making one takes longer than copying it."""
    return {"where": tmp_path_factory.mktemp("folders"), "tokenizer": small_tokenizer}


@pytest.fixture
def exported(folders, tmp_path):
    """exported(**model_keys) -> (the run, its export, a copy to be changed)."""

    def make(**keys):
        name = f"case-{hashlib.sha256(repr(keys).encode()).hexdigest()[:8]}"
        if name not in folders:
            path = make_random_run(folders["where"] / "runs", name, folders["tokenizer"], **keys)
            folders[name] = path, export(open_run(path, device="cpu", precision="float32"), folders["where"] / name)
        path, out = folders[name]
        return open_run(path, device="cpu", precision="float32"), shutil.copytree(out, tmp_path / "folder")

    return make


@torch.no_grad()
def logits_of(run) -> torch.Tensor:
    return run.model(IDS).logits


def change_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None removes one."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CLASSES]
)
def test_export_and_import_give_the_same_model(exported, tmp_path, kind):
    run, out = exported(**SIX[kind])
    config, notes = import_folder(out, tmp_path / "runs/back", is_chat=True)
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    exact = kind not in ("mixtral", "qwen3_moe")  # where the scaling factor went into the weights
    difference = float((logits_of(back) - logits_of(run)).abs().max())
    assert difference == 0 if exact else difference < 2e-5, f"{difference:.1e}"
    assert back.tokenizer.fingerprint == run.tokenizer.fingerprint
    assert (back.config, back.step, back.config.data.format) == (config, 0, "chat")
    assert run.model.config.router_bias_update_rate == 0 or back.model.config.router_bias_update_rate > 0
    checkpoint = find_checkpoint(tmp_path / "runs/back")
    check_intact(checkpoint)
    assert read_training_state(checkpoint).progress.step == 0
    assert not (tmp_path / "runs/back/checkpoints/best").exists()
    assert (tmp_path / "runs/back/log.txt").read_text().count("\n") == len(notes)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["back"]
    export(back, tmp_path / "again")  # and out again: it checks itself


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "same"),
    [
        ({}, ("n_shared_experts", "shared_expert_gate", "attention_bias")),  # behind a gate of 1/2, zero biases
        (
            {"n_shared_experts": 0, "mlp_only_layers": [0, 2]},
            ("n_shared_experts", "mlp_only_layers", "shared_expert_gate"),
        ),
        (
            {"n_shared_experts": 0, "scoring_func": "sigmoid"},
            ("n_shared_experts", "scoring_func", "router_bias_update_rate"),
        ),
        (
            {"use_qk_norm": True, "n_shared_experts": 2},
            ("n_shared_experts", "moe_intermediate_size", "shared_expert_gate"),
        ),
        ({"head_dim": 12}, ("n_shared_experts", "moe_intermediate_size")),  # folded into Mixtral's experts
        (
            {"rope_scaling": YARN, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
            ("rope_scaling", "rope_theta", "rms_norm_eps"),
        ),
    ],
)
def test_what_a_class_was_given_because_it_insists_is_taken_away_again(exported, tmp_path, keys, same):
    run, out = exported(**keys)
    import_folder(out, tmp_path / "runs/back", is_chat=False)
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    assert {key: getattr(back.model.config, key) for key in same} == {
        key: getattr(run.model.config, key) for key in same
    }
    assert torch.equal(logits_of(back), logits_of(run))


def test_biases_on_q_k_and_v_alone_are_taken_and_told(exported, tmp_path):
    run, out = exported(norm_topk_prob=False)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] += 0.5
    save_file(tensors, out / "model.safetensors")
    _, notes = import_folder(out, tmp_path / "runs/back", is_chat=False)
    assert any(note.startswith("attention_bias: Qwen2MoeForCausalLM has biases on q, k and v alone") for note in notes)
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    run.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.full((32,), 0.5))
    assert torch.allclose(logits_of(back), logits_of(run), atol=1e-5)
    export(back, tmp_path / "again")
    back.model.layers[0].self_attn.o_proj.bias.data[3] = 0.1
    with pytest.raises(ValueError, match=r"model\.attention_bias"):
        export(back, tmp_path / "never")


def test_a_shared_expert_of_odd_width_is_padded(exported, tmp_path):
    run, out = exported(shared_expert_gate=True, norm_topk_prob=False)
    tensors = load_file(out / "model.safetensors")
    for name in list(tensors):
        if ".shared_expert." in name:
            tensors[name] = (tensors[name][:, :20] if "down" in name else tensors[name][:20]).contiguous()
    save_file(tensors, out / "model.safetensors")
    change_json(out / "config.json", shared_expert_intermediate_size=20)
    import_folder(out, tmp_path / "runs/back", is_chat=False)
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    with torch.no_grad():
        for _, moe in run.model.moe_layers():
            moe.shared_experts.down_proj.weight[:, 20:] = 0
    assert torch.allclose(logits_of(back), logits_of(run), atol=1e-5)


# ------------------------------------------------------------------------------------------------ tokenizers


def change_tokenizer(out: Path, special: bool = True, **renamed: str) -> None:
    """Special tokens under other names (im_end="<|other|>"), or no longer special."""
    (out / "SHA256SUMS").unlink()
    tree = json.loads((out / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        other = renamed.get(token["content"].strip("<|>"))
        if other is not None:
            tree["model"]["vocab"].pop(token["content"], None)
            tree["model"]["vocab"][other] = token["id"]
            token.update(content=other, special=special)
    (out / "tokenizer.json").write_text(json.dumps(tree))


def test_missing_chat_tokens_are_added_with_the_mean_embedding(exported, tmp_path):
    run, out = exported(tie_word_embeddings=False)
    change_tokenizer(out, im_start="<|other_1|>", im_end="<|other_2|>")
    _, notes = import_folder(out, tmp_path / "runs/back", is_chat=True)
    told = "special tokens added: <|im_start|> (512), <|im_end|> (513), vocab_size 512 -> 514; their embeddings are the mean"
    assert any(note.startswith(told) for note in notes), notes
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    assert (back.tokenizer.im_start_id, back.tokenizer.im_end_id, back.model.config.vocab_size) == (512, 513, 514)
    assert torch.allclose(logits_of(back)[..., :512], logits_of(run), atol=1e-6)
    for new, old in (
        (back.model.embed_tokens, run.model.embed_tokens),
        (back.model.lm_head, run.model.lm_head),
    ):
        assert torch.equal(new.weight[:512], old.weight)
        assert torch.allclose(new.weight[512:], old.weight.mean(0).expand(2, -1), atol=1e-7)
    prompt = encode_prompt(back.tokenizer, [{"role": "user", "content": "Hi <|im_end|>"}])
    assert prompt.count(513) == 1, "the name in a text stays text"
    assert torch.isfinite(back.model(torch.tensor([prompt])).logits).all()


def test_spare_rows_are_used_before_the_embedding_grows(exported, tmp_path):
    run, out = exported(vocab_size=520)
    change_tokenizer(out, im_start="<|other_1|>", im_end="<|other_2|>")
    _, notes = import_folder(out, tmp_path / "runs/back", is_chat=True)
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    assert back.model.config.vocab_size == 520 and not any("->" in note for note in notes)
    assert (back.tokenizer.im_start_id, back.tokenizer.im_end_id) == (512, 513)
    mean = run.model.embed_tokens.weight.mean(0)
    assert torch.allclose(back.model.embed_tokens.weight[512:514], mean.expand(2, -1), atol=1e-7)
    assert torch.equal(back.model.embed_tokens.weight[514:], run.model.embed_tokens.weight[514:])


def test_a_token_that_is_there_but_not_special_becomes_special(exported, tmp_path):
    run, out = exported()
    change_tokenizer(out, special=False, im_end="<|im_end|>")
    _, notes = import_folder(out, tmp_path / "runs/back", is_chat=True)
    assert "plain tokens made special: <|im_end|> (4); their embeddings stay as they were learned" in notes
    back = open_run(tmp_path / "runs/back", device="cpu", precision="float32")
    assert back.tokenizer.im_end_id == run.tokenizer.im_end_id and back.model.config.vocab_size == 512
    assert torch.equal(logits_of(back), logits_of(run)), "an embedding that was learned is lost"
    assert Tokenizer.load(tmp_path / "runs/back/tokenizer").encode("<|im_end|>") != [back.tokenizer.im_end_id]


def test_a_document_needs_a_start_that_is_not_its_end(exported, tmp_path):
    """GPT-2 and its like have <|endoftext|> for both, and no chat tokens."""
    _, out = exported()
    change_tokenizer(out, eos="<|endoftext|>", bos="<|a|>", pad="<|b|>", im_start="<|c|>", im_end="<|d|>")
    change_json(out / "tokenizer_config.json", eos_token="<|endoftext|>")
    _, notes = import_folder(out, tmp_path / "runs/back", is_chat=True)
    tokenizer = open_run(tmp_path / "runs/back", device="cpu").tokenizer
    assert any("<|bos|> (512), <|im_start|> (513), <|im_end|> (514)" in note for note in notes), notes
    assert (tokenizer.bos_id, tokenizer.im_end_id) == (512, 514)
    assert "a text ends with '<|im_end|>' here; this model may have learned '<|endoftext|>'" in notes


def test_ids_with_gaps_are_refused_where_tokens_must_be_added(exported, tmp_path):
    _, out = exported()
    tree = json.loads((out / "tokenizer.json").read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<|im_")]
    for name in ("<|im_start|>", "<|im_end|>"):
        del tree["model"]["vocab"][name]
    (out / "tokenizer.json").write_text(json.dumps(tree))
    refused(out, tmp_path / "made", "gaps|an id has two tokens")


# ------------------------------------------------------------------------------------------------ what is refused


def refused(out: Path, runs: Path, match: str, started: str = "") -> None:
    """Importing is a ValueError of one sentence, and nothing is left."""
    with pytest.raises(ValueError, match=match) as error:
        import_folder(out, runs / "never", is_chat=False)
    assert str(error.value).startswith(started)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not runs.exists() or not [path for path in runs.iterdir() if "never" in path.name], (
        "something was left behind"
    )


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is none of llama"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map.*code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding_window: 16"),
        ({"use_sliding_window": True, "sliding_window": None, "max_position_embeddings": 8192}, "sliding_window: 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters: 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "rope_scaling": None}, "'mscale'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}, "rope_scaling": None}, "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "contradict"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers|out of range"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers"),
        ({"num_experts_per_tok": 10**400}, "num_experts_per_tok"),
        ({"router_aux_loss_coef": 10**400}, "router_aux_loss_coef"),
        ({"num_experts": 10**9}, "n_routed_experts"),
        ({"num_experts": 3}, r"layers\.0\.mlp\.gate\.weight has the shape"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"vocab_size": 511}, "512|511"),
        ({"moe_intermediate_size": 16}, "has the shape"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"mlp_only_layers": [1]}, "missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"router_aux_loss_coef": "x"}, "router_aux_loss_coef"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_ours_is_refused_and_the_key_named(exported, tmp_path, keys, named):
    _, out = exported()
    change_json(out / "config.json", **keys)
    refused(out, tmp_path / "made", named)


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("mixtral", {"sliding_window": 64}, "sliding_window: 64"),
        ("mixtral", {"num_experts_per_tok": 1}, "norm_topk_prob"),
        ("glm4_moe", {"n_group": 4}, "n_group: 4"),
        ("glm4_moe", {"partial_rotary_factor": None, "rope_parameters": None}, "partial_rotary_factor: 0.5"),
    ],
)  # fmt: skip
def test_what_only_some_classes_have_is_refused_too(exported, tmp_path, kind, keys, named):
    _, out = exported(**SIX[kind])
    change_json(out / "config.json", **keys)
    refused(out, tmp_path / "made", named)


def test_a_window_as_long_as_the_context_has_no_effect(exported, tmp_path):
    _, out = exported(**SIX["mixtral"])
    change_json(out / "config.json", sliding_window=128)
    import_folder(out, tmp_path / "runs/back", is_chat=False)


def change_tensors(out: Path, change) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")


NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), "model.extra.weight belongs to nothing"),
        (lambda t: t.update({NORM: torch.zeros(31)}), rf"{NORM} has the shape \(31,\)"),
        (lambda t: t.update({NORM: torch.full((32,), torch.nan)}), f"{NORM} holds what is not a number"),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), f"{NORM} is I8"),
        (lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)}), f"{NORM} is F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit_are_named(exported, tmp_path, change, named):
    _, out = exported()
    change_tensors(out, change)
    refused(out, tmp_path / "made", named, started=str(out))


def shard(out: Path, **changes) -> None:
    """The weights in two files with an index, whose entries may be changed."""
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names, table = sorted(tensors), {}
    for file, part in (("a-00001.safetensors", names[::2]), ("b-00002.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, out / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": {**table, **changes}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read(exported, tmp_path):
    run, out = exported()
    shard(out)
    import_folder(out, tmp_path / "runs/back", is_chat=False)
    assert torch.equal(logits_of(open_run(tmp_path / "runs/back", device="cpu", precision="float32")), logits_of(run))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "gone.safetensors", "x/y.safetensors", "a.bin", 7]
)
def test_an_index_names_files_of_its_folder_alone(exported, tmp_path, name):
    _, out = exported()
    save_file({NORM: torch.zeros(32)}, tmp_path / "secret.safetensors")
    shard(out, **{NORM: name})
    refused(out, tmp_path / "made", "is no file of this folder|names no files")


def test_broken_files_are_one_sentence(exported, tmp_path):
    _, out = exported()
    good = {path.name: path.read_bytes() for path in out.iterdir()}
    for name, content, named in (
        ("config.json", b"{", "config.json: is no JSON"),
        ("config.json", b"[]", "config.json: is no JSON object"),
        ("config.json", b"[" * 200_000, "config.json: is no JSON"),
        ("config.json", b"\xff\xfe", "config.json: is no JSON"),
        ("config.json", b'{"vocab_size": ' + b"1" * 5000 + b"}", "config.json: is no JSON"),
        ("model.safetensors", good["model.safetensors"][:-100], "model.safetensors: cannot be read"),
        ("model.safetensors", b"\x80\x04K\x01.", "model.safetensors: cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer.json: model must be"),
        ("tokenizer.json", b"\xff", "tokenizer.json: is not UTF-8"),
    ):
        (out / name).write_bytes(content)
        refused(out, tmp_path / "made", named)
        (out / name).write_bytes(good[name])
    for name, named in (
        ("config.json", "config.json: cannot be read"),
        ("tokenizer.json", "tokenizer.json: missing"),
        ("model.safetensors", "pickles"),
    ):
        (out / name).unlink()
        refused(out, tmp_path / "made", named)
        (out / name).write_bytes(good[name])
    os.mkfifo(out / "pipe")
    (out / "config.json").unlink()
    (out / "pipe").rename(out / "config.json")
    refused(out, tmp_path / "made", "no plain file")


def test_tokenizers_that_do_not_fit_are_refused(exported, tmp_path):
    _, out = exported()
    text = (out / "tokenizer.json").read_text()
    (out / "SHA256SUMS").unlink()
    tree = json.loads(text)
    unigram = {**tree, "model": {"type": "Unigram", "vocab": []}}
    lossy = {**tree, "normalizer": {"type": "Lowercase"}}
    larger = {**tree, "added_tokens": [*tree["added_tokens"], {**tree["added_tokens"][0], "id": 700, "content": "<x>"}]}
    half = {**tree, "added_tokens": [{**tree["added_tokens"][0], "content": "\ud800"}]}  # of a character
    negative = {**tree, "added_tokens": [{**tree["added_tokens"][0], "id": -1}]}
    for wrong, named in (
        (unigram, "of type BPE"),
        (lossy, "normalizer"),
        (larger, "another model's tokenizer"),
        (negative, "id"),
        (half, "tokenizer.json: not readable"),
    ):
        (out / "tokenizer.json").write_text(json.dumps(wrong))
        refused(out, tmp_path / "made", named)


def test_nothing_is_written_through_a_link_beside_the_run(exported, tmp_path):
    _, out = exported()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/.back.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        import_folder(out, tmp_path / "runs/back", is_chat=False)
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "runs/back").exists()


def test_nothing_is_written_over(exported, tmp_path):
    _, out = exported()
    import_folder(out, tmp_path / "runs/back", is_chat=False)
    before = (tmp_path / "runs/back/config.yaml").read_bytes()
    with pytest.raises(ValueError, match="already there"):
        import_folder(out, tmp_path / "runs/back", is_chat=True)
    assert (tmp_path / "runs/back/config.yaml").read_bytes() == before
    with pytest.raises(ValueError, match="becomes a folder"):
        import_folder(out, tmp_path / "runs/a b", is_chat=True)


# ------------------------------------------------------------------------------------------------ the commands, really


def command(*arguments: object, cwd: Path, text: str | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(call, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_stranger_is_fine_tuned_evaluated_asked_and_exported(trained, tmp_path):
    """The pretrained run leaves as a folder, comes back under another name, and learns sums as the original did."""
    out = export(open_run(trained.text, device="cpu", precision="float32"), tmp_path / "folder")
    done = command("scripts.import_hf", out, "stranger", "--chat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "base: runs/stranger/config.yaml" in done.stdout and "Qwen3MoeForCausalLM with" in done.stdout
    sft = {
        "base": "runs/stranger/config.yaml",
        "name": "tuned",
        "data": {
            "cache_dir": str(tmp_path / "cache"),
            "context_length": 64,
            "held_out_fraction": 0.1,
            "sources": [{"name": "chat", "kind": "jsonl", "path": str(trained.folder / "chat.jsonl")}],
        },
        "train": {
            "init_from": "runs/stranger", "steps": 60, "tokens_per_step": 2048, "micro_batch_size": 32, "learning_rate": 5e-3,
            "threads": 1, "precision": "float32", "device": "cpu",
        },
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(json.dumps(sft))
    tuned = command("train.sft", "sft.yaml", cwd=tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/tuned/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0], f"it learned nothing: {losses}"
    asked = command("scripts.chat", "runs/stranger", "--prompt", "2 + 3 = ?", "--max-tokens", "8", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    evaluated = command("eval.evaluate", "runs/tuned", "--tasks", "none", "--json", "e.json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((tmp_path / "e.json").read_text())["heldout"]["chat"]["bits_per_byte"] > 0
    again = command("scripts.export_hf", "runs/tuned", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_mistakes_at_the_command_line_are_one_sentence(exported, tmp_path, monkeypatch, capsys):
    _, out = exported()
    (out / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.chdir(tmp_path)
    for arguments, code, words in (
        ((out, "x"), 2, "model_type"),
        ((tmp_path / "no", "x"), 2, "is no folder"),
        ((out, "../.."), 2, "name"),
        (("--help",), 0, "example:"),
    ):
        monkeypatch.setattr(sys, "argv", ["import_hf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(import_hf.main)
        said, errors = capsys.readouterr()
        assert ended.value.code == code and words in said + errors
        assert code == 0 or (said, errors.count("\n"), errors[:7]) == ("", 1, "error: "), errors
    assert not (tmp_path / "runs/x").exists()
