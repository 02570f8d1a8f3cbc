"""A GGUF file against the run it was made of: read back by the `gguf` package and computed by our plain reference, which
test_gguf_llama.py holds against llama.cpp itself."""

import dataclasses
import errno
import json
import math
import os
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from data.chat import CHAT_TEMPLATE, encode_prompt
from data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from model import ModelConfig
from scripts import export_gguf
from scripts.export_gguf import export
from scripts.formats import gguf_file, gguf_layout, gguf_tokenizer
from scripts.formats.gguf_check import difference, rounded, rounding
from scripts.formats.gguf_file import TYPES, GGUFFile
from scripts.formats.gguf_layout import architecture_of, entries
from scripts.formats.gguf_reference import logits_of
from train import cli
from train.checkpoint import open_run
from train.config import load_config

from ...configs import ROOT
from .gguf_cases import (
    CONFIGS,
    LOGITS_TOLERANCE,
    SHAPES,
    UNGATED,
    YARN,
    export_of,
    logits,
    others_tokenizer,
    texts_as_ids,
    with_tokenizer,
)


def rest_slow(cases, *everyday: str) -> list:
    """Parameters of a test: those named run every day, the others with --all."""
    assert {*everyday} <= {*cases}
    return [case if case in everyday else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    "shape",
    rest_slow(
        SHAPES,
        "no shared expert, QK-norm",
        "sigmoid, bias, scale",
        "dense among experts",
        "gated shared",
        "dense",
        "YaRN, own factor of attention",
    ),
)
def test_a_file_computes_what_the_run_does(shape, random_run, tmp_path):
    architecture, keys = SHAPES[shape]
    run = export_of(random_run(**keys), tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == architecture
    ids = texts_as_ids(run)[2]
    expected = logits(run.model, ids)
    assert expected.std() > 0.5, "logits this small would agree whatever was computed"
    assert (logits_of(file, ids) - expected).abs().max() < LOGITS_TOLERANCE
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    assert sum(file.tensor(name).numel() for name in file.names()) >= parameters


@pytest.mark.parametrize("wanted", rest_slow(TYPES, "q8_0", "bf16"))
def test_a_smaller_type_changes_each_number_by_its_step_at_most(wanted, random_run, tmp_path):
    run = export_of(random_run(moe_intermediate_size=40), tmp_path / "m.gguf", wanted)
    file, state = GGUFFile(tmp_path / "m.gguf"), run.model.state_dict()
    steps = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 200}
    for entry in entries(run.config.model):
        expected, kind = entry.make(state), file.kind(entry.name)
        largest = expected.abs().max()
        assert (file.tensor(entry.name) - expected).abs().max() <= largest * steps[kind] + 1e-6, entry.name
        matrix = not entry.plain and expected.dim() > 1
        row_of_40 = expected.shape[-1] == 40  # no multiple of 32
        assert kind == ("f32" if not matrix else "f16" if wanted == "q8_0" and row_of_40 else wanted), entry.name
    assert any(entry.make(state).shape[-1] == 40 for entry in entries(run.config.model))
    for router in ("blk.0.ffn_gate_inp.weight", "blk.2.exp_probs_b.bias", "output_norm.weight"):
        assert file.kind(router) == "f32"
    sizes = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.1}
    weights = sum(file.tensor(name).numel() for name in file.names())
    assert (tmp_path / "m.gguf").stat().st_size < sizes[wanted] * weights * 1.25 + 30_000


def test_rounded_weights_are_those_of_the_file(random_run, tmp_path):
    run = export_of(random_run(tie_word_embeddings=False), tmp_path / "m.gguf", "q8_0")
    file, state = GGUFFile(tmp_path / "m.gguf"), rounded(run.model, "q8_0").state_dict()
    for entry in entries(run.config.model):
        assert torch.equal(file.tensor(entry.name), entry.make(state)), entry.name
    assert not torch.equal(state["embed_tokens.weight"], run.model.state_dict()["embed_tokens.weight"])


def test_rounding_bounds_are_kept_and_not_generous():
    torch.manual_seed(0)
    tensor = torch.randn(64, 64) * torch.logspace(-9, 2, 64).unsqueeze(1)
    tensor[0] = 0
    for kind in TYPES:
        stored = torch.from_numpy(np.array(gguf_file.unpacked(gguf_file.packed(tensor, kind, "x"), kind))).view(64, 64)
        error, allowed = (stored - tensor).abs(), rounding(tensor, kind)
        assert (error <= allowed).all(), kind
        if kind != "f32":
            assert error.max() > 0.2 * allowed.max(), f"{kind}: a bound that nothing comes near sees nothing"


def test_metadata_says_what_the_run_is(random_run, tmp_path):
    keys = SHAPES["sigmoid, bias, scale"][1] | {"rope_scaling": {**YARN, "attention_factor": 1.5}}
    run = export_of(random_run("my.run", **keys), tmp_path / "m.gguf", "f16")
    found, tokenizer = GGUFFile(tmp_path / "m.gguf").metadata, run.tokenizer
    assert found["general.name"] == "my.run"
    expected = {
        "context_length": 128, "block_count": 3, "embedding_length": 32, "expert_count": 4, "expert_used_count": 2,
        "expert_shared_count": 1, "expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_gating_func": 2,
        "leading_dense_block_count": 1, "attention.head_count_kv": 2, "rope.scaling.original_context_length": 32,
    }  # fmt: skip
    assert {key: found[f"glm4moe.{key}"] for key in expected} == expected
    assert found["glm4moe.rope.scaling.attn_factor"] * (1 + 0.1 * math.log(4.0)) == pytest.approx(1.5)
    assert found["tokenizer.ggml.tokens"][tokenizer.im_end_id] == "<|im_end|>"
    assert [found["tokenizer.ggml.token_type"][i] for i in (0, 4, 5, 511)] == [3, 3, 1, 1]
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id, "eot": tokenizer.im_end_id}
    assert {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ends} == ends
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_a_run_that_learned_no_turns_gets_no_chat_template(random_run, tmp_path):
    export_of(random_run(format="text"), tmp_path / "m.gguf")
    assert (
        not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & GGUFFile(tmp_path / "m.gguf").metadata.keys()
    )
    assert "im_start" not in (tmp_path / "m.Modelfile").read_text()


# ------------------------------------------------------------------------------------------------ what is refused


REFUSED = {  # the key the sentence names -> model keys
    "gated_ffn": {"gated_ffn": False},
    "hidden_act: gelu": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "attention_bias: true with use_qk_norm": {"attention_bias": True, "use_qk_norm": True, "n_routed_experts": 0},
    "beta_fast": {"rope_scaling": {**YARN, "beta_fast": 16}},
    "original_max_position_embeddings": {"rope_scaling": {**YARN, "original_max_position_embeddings": 32.5}},
    "rope_scaling: original_max_position_embeddings: 8.58993e+09": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 2**33}
    },
    "rope_scaling: factor": {"rope_scaling": {**YARN, "factor": 1e39}},
    "rope_theta: 1e+39": {"rope_theta": 1e39},
    "rms_norm_eps": {"rms_norm_eps": 1e39},
    "routed_scaling_factor: 1e+39": {"routed_scaling_factor": 1e39},
    "num_hidden_layers": {"num_hidden_layers": 513},
    "n_routed_experts": {"n_routed_experts": 1025},
    "norm_topk_prob": {"shared_expert_gate": True},
    "routed_scaling_factor": {"shared_expert_gate": True, "norm_topk_prob": False, "routed_scaling_factor": 2.0},
    "scoring_func": {"shared_expert_gate": True, "norm_topk_prob": False, "scoring_func": "sigmoid"},
    "router_bias_update_rate": {"shared_expert_gate": True, "norm_topk_prob": False, "router_bias_update_rate": 0.1},
    "use_qk_norm": {"shared_expert_gate": True, "norm_topk_prob": False, "use_qk_norm": True},
    "first_k_dense_replace": {"shared_expert_gate": True, "norm_topk_prob": False, "first_k_dense_replace": 1},
    "head_dim": {"shared_expert_gate": True, "norm_topk_prob": False, "head_dim": 16},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_by_its_key(key):
    config = ModelConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3)
    architecture_of(config)
    with pytest.raises(ValueError, match=re.escape(key)) as refused:
        architecture_of(dataclasses.replace(config, **REFUSED[key]))
    assert str(refused.value).startswith(("rope_scaling", key)) and "train a model without it" in str(refused.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_model_but_the_ungated_one_has_an_architecture(path):
    config = load_config(path).model
    if f"{path.parent.name}/{path.stem}" in UNGATED:
        with pytest.raises(ValueError, match="gated_ffn"):
            architecture_of(config)
    else:
        assert architecture_of(config) in ("glm4moe", "qwen2moe", "llama", "qwen3")


def test_numbers_that_f16_has_not_are_refused(random_run, tmp_path):
    run = open_run(random_run(), device="cpu", precision="float32")
    with torch.no_grad():
        run.model.layers[1].self_attn.v_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="blk.1.attn_v.weight holds 100000, which f16 cannot; use bf16 or f32"):
        export(run, tmp_path / "m.gguf", "f16")
    with torch.no_grad():
        run.model.layers[1].self_attn.v_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        export(run, tmp_path / "m.gguf", "f32")
    assert left_in(tmp_path) == []


def test_nothing_that_is_there_is_overwritten(random_run, tmp_path):
    run = open_run(random_run(), device="cpu", precision="float32")
    cases = {"a.gguf": "a.gguf", "b.Modelfile": "b.gguf"}
    for there, out in cases.items():
        (tmp_path / there).symlink_to(tmp_path / "elsewhere")  # it leads nowhere, and is there nevertheless
        with pytest.raises(ValueError, match=f"{there} is already there"):
            export(run, tmp_path / out)
    for name, match in (
        ("m.bin", "must end in .gguf"),
        ('m".gguf', "use letters"),
        ("no/m.gguf", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=match):
            export(run, tmp_path / name)
    partial = tmp_path / f".m.gguf.{os.getpid()}.partial"
    (tmp_path / "victim").write_text("precious")
    partial.symlink_to(tmp_path / "victim")  # laid where we would write
    export(run, tmp_path / "m.gguf")
    assert (tmp_path / "victim").read_text() == "precious"
    assert {"m.gguf", "m.Modelfile"} <= {*left_in(tmp_path)} and not partial.is_symlink()


def test_where_the_disk_has_no_room_for_the_second_file_neither_is_left(random_run, tmp_path, monkeypatch):
    run = open_run(random_run(), device="cpu", precision="float32")

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(export_gguf, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "m.gguf")
    assert left_in(tmp_path) == []


def test_no_more_than_one_copied_tensor_is_in_memory(random_run, tmp_path, monkeypatch):
    """`llama` rotates neighbours, so that its q and k are copies of the run's; none of them outlives its turn."""
    run, alive = open_run(random_run(**SHAPES["dense"][1]), device="cpu", precision="float32"), []
    whole = gguf_layout._interleaved

    def watched(tensor, heads):
        made = whole(tensor, heads)
        alive.append(weakref.ref(made))
        assert sum(reference() is not None for reference in alive) <= 2, "this one, and the one that it replaces"
        return made

    monkeypatch.setattr(gguf_layout, "_interleaved", watched)
    config = run.config.model
    gguf_file.write(
        tmp_path / "m.gguf", config, run.model.state_dict(), gguf_layout.metadata(config, "x", "", "f32"), "f32"
    )
    assert len(alive) == 2 * 4 * config.num_hidden_layers


# ------------------------------------------------------------------------------------------------ the self-check


def changed(monkeypatch, function: str, change) -> None:
    """Lets `change` alter what a function of the export returns. The plan and its comparison both use it: only the logits,
    or the tokens, can tell."""
    module = export_gguf if function == "tokenizer_metadata" else gguf_layout
    whole = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: change(whole(*arguments)))


def swapped(found):
    """Gate and up matrices of the experts, one for the other."""
    names = {"gate": "up", "up": "gate"}
    for entry in found:
        yield entry._replace(name=re.sub("ffn_(gate|up)_exps", lambda m: f"ffn_{names[m[1]]}_exps", entry.name))


def unbiased(found):
    for entry in found:
        is_bias = "exp_probs_b" in entry.name
        yield entry._replace(make=lambda w, whole=entry.make: torch.zeros(4)) if is_bias else entry


def with_key(key: str, value: object):
    return lambda values: values | {f"glm4moe.{key}": value}


DEFECTS = {
    "eps": ("metadata", with_key("attention.layer_norm_rms_epsilon", 1e-2)),
    "theta": ("metadata", with_key("rope.freq_base", 9999.0)),
    "norm": ("metadata", with_key("expert_weights_norm", False)),
    "scale": ("metadata", with_key("expert_weights_scale", 1.0)),
    "gating": ("metadata", with_key("expert_gating_func", 1)),
    "k": ("metadata", with_key("expert_used_count", 1)),
    "gate and up": ("_routed", swapped),
    "bias": ("_routed", unbiased),
    "splitter": ("tokenizer_metadata", lambda values: values | {"tokenizer.ggml.pre": "gpt-2"}),
    "merges": (
        "tokenizer_metadata",
        lambda values: values | {"tokenizer.ggml.merges": values["tokenizer.ggml.merges"][:20]},
    ),
}


@pytest.mark.parametrize("defect", rest_slow(DEFECTS, "theta", "norm", "gate and up", "merges"))
def test_a_file_that_differs_is_not_left_behind(defect, random_run, tmp_path, monkeypatch):
    keys = SHAPES["sigmoid, bias, scale"][1] | {"rms_norm_eps": 1e-6}
    run = open_run(random_run(**keys), device="cpu", precision="float32")
    changed(monkeypatch, *DEFECTS[defect])
    where = "its tokens" if defect in ("splitter", "merges") else "its logits"
    with pytest.raises(ValueError, match=rf"is not the run \({where}.*nothing was left"):
        export(run, tmp_path / "m.gguf")
    assert left_in(tmp_path) == []


def test_rows_that_llama_rotates_otherwise_are_seen(random_run, tmp_path, monkeypatch):
    run = open_run(random_run(**SHAPES["dense"][1]), device="cpu", precision="float32")
    monkeypatch.setattr(gguf_layout, "_interleaved", lambda tensor, heads: tensor)
    with pytest.raises(ValueError, match="its logits"):
        export(run, tmp_path / "m.gguf")


def test_damage_on_the_disk_is_seen(random_run, tmp_path):
    run = export_of(random_run(), tmp_path / "m.gguf")
    path, weights = tmp_path / "m.gguf", run.model.state_dict()
    values = gguf_layout.metadata(run.config.model, "random", "trained with MiniMoE, step 1", "f32")
    values |= gguf_tokenizer.tokenizer_metadata(run.run_dir / "tokenizer", run.tokenizer, 512, True)

    def problem() -> str | None:
        return difference(path, run.model, run.tokenizer, weights, values, "f32")

    assert problem() is None
    whole = path.read_bytes()
    data = whole.index(weights["layers.2.mlp.experts.down_proj"].numpy().tobytes())
    path.write_bytes(whole[: data + 2] + bytes([whole[data + 2] ^ 0x40]) + whole[data + 3 :])
    assert problem() == "tensor blk.2.ffn_down_exps.weight"
    name = whole.index(b"trained with MiniMoE")
    path.write_bytes(whole[:name] + b"T" + whole[name + 1 :])
    assert problem() == "key general.description"
    for cut in (10, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:cut])
        assert "cannot be read" in problem()


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("splitter", rest_slow(("gpt-2", "smollm", "llama-bpe"), "llama-bpe"))
def test_a_known_splitter_of_others_is_written_by_its_name(splitter, random_run, tmp_path):
    tokenizer = others_tokenizer(splitter, ignore_merges=splitter == "llama-bpe")
    folder = with_tokenizer(random_run(vocab_size=640), tokenizer)
    export_of(folder, tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata["tokenizer.ggml.pre"] == splitter
    tokens, kinds = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    assert kinds[tokens.index("WORD")] == gguf_tokenizer.USER_DEFINED
    extra = range(tokenizer.vocab_size, 640)  # ids of the model that no text has
    assert len(tokens) == len(set(tokens)) == 640 and {kinds[i] for i in extra} == {gguf_tokenizer.UNUSED}


def test_a_tokenizer_that_llama_cpp_cannot_be_told_is_refused(random_run, tmp_path):
    folder = with_tokenizer(random_run(vocab_size=640), others_tokenizer("unknown"))
    with pytest.raises(ValueError, match="splits text as none of llama.cpp's qwen2, gpt-2"):
        export_of(folder, tmp_path / "m.gguf")
    tree = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    tree |= {"normalizer": {"type": "NFC"}}
    with_tokenizer(folder, Tokenizer(json.dumps(tree).encode(), "test"))
    with pytest.raises(ValueError, match="normalizer"):
        export_of(folder, tmp_path / "m.gguf")
    with_tokenizer(folder, Tokenizer.train(["nothing to merge"], SMALLEST_VOCABULARY))
    with pytest.raises(ValueError, match="single bytes alone, no merges"):
        export_of(folder, tmp_path / "m.gguf")
    assert left_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------ command and Modelfile


def go_template(text: str, messages: list[dict]) -> str:
    """What Ollama makes of our template: of Go's language, `range .Messages` and its fields alone."""
    head, loop, tail = re.fullmatch(r"(.*)\{\{ range .Messages \}\}(.*)\{\{ end \}\}(.*)", text, re.DOTALL).groups()
    assert "{{" not in head + tail
    turns = [loop.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return head + "".join(turns) + tail


def test_the_modelfile_asks_as_training_did(random_run, tmp_path):
    run = export_of(random_run(), tmp_path / "m.gguf")
    text = (tmp_path / "m.Modelfile").read_text()
    assert text.startswith("FROM ./m.gguf\n")
    assert "PARAMETER num_ctx 128\n" in text and "PARAMETER stop <|im_end|>\n" in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3 = ?"},
        {"role": "assistant", "content": "5."}, {"role": "user", "content": "And 4?"},
    ]  # fmt: skip
    rendered = go_template(template, messages)
    parsing = tokenizers.Tokenizer.from_file(str(run.run_dir / "tokenizer/tokenizer.json"))  # special tokens by name
    ids = [run.tokenizer.bos_id, *parsing.encode(rendered, add_special_tokens=False).ids]
    assert ids == encode_prompt(run.tokenizer, messages)


def test_the_command_writes_both_files_and_says_a_mistake_in_one_line(random_run, tmp_path, monkeypatch, capsys):
    folder = random_run(moe_intermediate_size=40)
    arguments = (str(folder), str(tmp_path / "m.gguf"), "--type", "q8_0")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export_gguf", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(export_gguf.main)
        return ended.value.code, *capsys.readouterr()

    code, shown, error = call(*arguments)
    assert code == 0, error
    assert "q8_0, architecture glm4moe" in shown and "are stored as f16" in shown
    assert left_in(tmp_path) == ["m.Modelfile", "m.gguf"]
    assert str(ROOT) not in (tmp_path / "m.gguf").read_bytes().decode("latin-1"), (
        "a path of this machine is in the file"
    )

    code, _, error = call(*arguments)
    assert code == 2 and error.count("\n") == 1 and "is already there" in error
    code, shown, _ = call("--help")
    assert code == 0
    assert "ollama create" in shown and "llama-cli -m" in shown and "example:" in shown
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    code, _, error = call(*arguments)
    assert code == 2 and error.count("\n") == 1 and "pip install -r requirements-extra.txt" in error
