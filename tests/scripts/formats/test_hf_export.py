"""Which class a model becomes, what is refused, that the command notices its own mistakes, and what it leaves on the disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from model import ModelConfig
from scripts import export_hf
from scripts.export_hf import export
from scripts.formats import hf_folder
from scripts.formats.hf_folder import CLASSES, choose_layout
from scripts.formats.hf_reference import Reference
from train import cli
from train.checkpoint import open_run
from train.config import load_config

from ...configs import CONFIGS, ROOT
from .hf_cases import SMALL, VARIANTS, YARN

BY_FAMILY = {
    "plain_moe": "gated_ffn", "plain_moe_dense": "gated_ffn", "mixtral": "MixtralForCausalLM", "deepseek_v3": "Glm4MoeForCausalLM",
    "deepseek_v3_dense": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "qwen3_moe_dense": "Qwen3ForCausalLM",
}  # fmt: skip
FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "SHA256SUMS",
}  # fmt: skip


@pytest.fixture
def opened(random_run):
    """opened(**model_keys) -> a Run with random weights."""
    return lambda format="chat", **keys: open_run(random_run(format=format, **keys), device="cpu", precision="float32")


def outcome(config: ModelConfig) -> str:
    """The class, or the key that a refusal names."""
    try:
        return choose_layout(config).architecture
    except ValueError as error:
        return str(error).removeprefix("model.").partition(":")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_shipped_config_gets_its_class_or_names_the_key(path):
    config = load_config(path).model
    expected = BY_FAMILY.get(path.stem)
    if expected is None:
        expected = {True: "Qwen3MoeForCausalLM", False: "Qwen2MoeForCausalLM"}[config.use_qk_norm]
        expected = expected if config.moe_layers else "LlamaForCausalLM"
    assert outcome(config) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_get_the_plainest_class_that_is_exact(name):
    expected, keys = VARIANTS[name]
    assert outcome(ModelConfig(**{**SMALL, **keys})) == expected


@pytest.mark.parametrize(
    ("key", "model_keys"),
    [
        ("gated_ffn", {"gated_ffn": False}),
        ("gated_ffn", {"gated_ffn": False, "n_routed_experts": 0}),
        ("router_bias_update_rate", {"router_bias_update_rate": 1e-3}),
        ("shared_expert_gate", {"shared_expert_gate": True, "use_qk_norm": True}),
        ("shared_expert_gate", {"shared_expert_gate": True, "scoring_func": "sigmoid"}),
        ("norm_topk_prob", {"norm_topk_prob": False, "use_qk_norm": True}),
        ("mlp_only_layers", {"mlp_only_layers": [1], "scoring_func": "sigmoid"}),
        (
            "n_routed_experts",
            {"n_routed_experts": 1, "num_experts_per_tok": 1, "scoring_func": "sigmoid"},
        ),
        ("head_dim", {"head_dim": 12, "norm_topk_prob": False}),
        ("head_dim", {"head_dim": 12, "shared_expert_gate": True}),
        ("num_attention_heads", {"num_attention_heads": 6, "n_routed_experts": 0}),
    ],
)
def test_what_no_class_computes_is_refused_and_the_key_named(key, model_keys):
    assert outcome(ModelConfig(**{**SMALL, **model_keys})) == key


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_a_bias_that_the_class_has_no_place_for_is_refused_unless_it_is_zero(opened, tmp_path, scoring_func):
    run = opened(attention_bias=True, scoring_func=scoring_func)
    with pytest.raises(ValueError, match=r"^model\.attention_bias: true"):
        export(run, tmp_path / "out")
    for layer in run.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    assert export(run, tmp_path / "out").is_dir()


SIX = {
    "llama": {"n_routed_experts": 0, "attention_bias": True, "tie_word_embeddings": False},
    "qwen3": {"n_routed_experts": 0, "use_qk_norm": True, "rope_scaling": {**YARN, "factor": 3.0}},
    "mixtral": {"n_shared_experts": 0, "routed_scaling_factor": 2.5},
    "qwen2_moe": {"n_shared_experts": 2, "norm_topk_prob": False, "mlp_only_layers": [1]},
    "qwen3_moe": {"use_qk_norm": True, "routed_scaling_factor": 1.7},
    "glm4_moe": {"scoring_func": "sigmoid", "router_bias_update_rate": 1e-3, "first_k_dense_replace": 1},
}


@pytest.mark.parametrize("kind", CLASSES)
def test_an_export_checks_itself_and_leaves_whole_files(opened, tmp_path, kind):
    run = opened(**SIX[kind])
    out = export(run, tmp_path / "deep/out", license="mit")
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"], "something unfinished was left behind"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "files with different permissions"
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    sums = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert sums.returncode == 0, sums.stdout

    reference = Reference(out)
    rows = export_hf.sample_rows(run)
    with torch.no_grad():
        for row in rows:
            ours = run.model(torch.tensor([row])).logits[0]
            assert torch.allclose(reference.logits(torch.tensor(row)).float(), ours, atol=2e-5), (
                "float32 against float64"
            )
    assert reference.read == reference.tensors.keys(), (
        "tensors that a forward pass never reads, or experts nobody chose"
    )


def test_bfloat16_weights_are_the_runs_own_rounded(opened, tmp_path):
    run = opened(scoring_func="sigmoid", router_bias_update_rate=1e-3, tie_word_embeddings=False)
    out = export(run, tmp_path / "out", dtype="bfloat16")
    tensors = load_file(out / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors[bias].dtype == torch.float32, "a selection bias in bfloat16 stalls at 0.5"
    assert {t.dtype for name, t in tensors.items() if not name.endswith("correction_bias")} == {torch.bfloat16}
    assert torch.equal(tensors["lm_head.weight"], run.model.lm_head.weight.bfloat16())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def broken_tensors(change):
    """hf_folder.to_tensors with its result changed: a mistake in the export."""

    def broken(config, layout, state):
        tensors = hf_folder.to_tensors(config, layout, state)
        change(tensors)
        return tensors

    return broken


def swapped_experts(tensors):
    names = [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def undoubled(tensors):
    for name in [name for name in tensors if name.endswith("shared_expert.down_proj.weight")]:
        tensors[name] = tensors[name] / 2


def slightly_off(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.0001


@pytest.mark.parametrize("change", [swapped_experts, undoubled, slightly_off])
def test_a_mistake_in_the_tensors_is_noticed_and_nothing_is_left(opened, tmp_path, monkeypatch, change):
    monkeypatch.setattr(export_hf, "to_tensors", broken_tensors(change))
    with pytest.raises(ValueError, match="other logits than the run"):
        export(opened(), tmp_path / "made/out")
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 9999.0),
        ("norm_topk_prob", False),
        ("rms_norm_eps", 1e-4),
        ("num_experts_per_tok", 3),
        ("hidden_act", "gelu"),
    ],
)
def test_a_mistake_in_config_json_is_noticed(opened, tmp_path, monkeypatch, key, value):
    def broken(*arguments):
        tree = hf_folder.config_json(*arguments)
        if key == "rope_theta":
            tree["rope_parameters"][key] = value
        assert tree[key] != value
        return {**tree, key: value}

    monkeypatch.setattr(export_hf, "config_json", broken)
    with pytest.raises(ValueError, match="other logits than the run"):
        export(opened(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_both_transformers_find_the_same_positions(opened, tmp_path, monkeypatch):
    def broken(*arguments):
        return {**hf_folder.config_json(*arguments), "rope_scaling": None}

    monkeypatch.setattr(export_hf, "config_json", broken)
    with pytest.raises(ValueError, match="transformers 4"):
        export(opened(rope_scaling=YARN), tmp_path / "out")


def test_other_ids_are_noticed(opened, tmp_path, monkeypatch):
    run = opened()
    encode = run.tokenizer.encode
    monkeypatch.setattr(
        run.tokenizer, "encode", lambda text: [*encode(text), 7] if text.startswith("0 12") else encode(text)
    )
    with pytest.raises(ValueError, match=r"other ids than the run for '0 12"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_yarn_over_a_context_too_short_for_it_is_refused(opened, tmp_path):
    """Where low > high, transformers' ramp runs backwards and ours is a step: a real difference, found by the check."""
    run = opened(rope_theta=10.0, rope_scaling={**YARN, "original_max_position_embeddings": 1})
    with pytest.raises(ValueError, match="other logits"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("damage", ["weights", "tokenizer"])
def test_a_run_that_is_no_model_is_refused(opened, tmp_path, damage):
    run = opened(vocab_size=512 if damage == "weights" else 500)
    if damage == "weights":
        run.model.layers[1].mlp.gate.weight.data[2, 3] = torch.nan
    words = {"weights": r"layers\.1\.mlp\.gate\.weight holds what is not a number", "tokenizer": "has 512 tokens"}
    with pytest.raises(ValueError, match=words[damage]):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ where it is written


def test_an_earlier_export_is_replaced_and_nothing_else_is(opened, tmp_path):
    run, out = opened(), tmp_path / "out"
    export(run, out)
    assert export(run, out, dtype="bfloat16") == out
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="other things in it"):
        export(run, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").unlink()
    (out / "README.md").write_text("my own words")
    with pytest.raises(ValueError, match="other things in it"):
        export(run, out)


def test_what_a_kill_left_behind_is_swept_away(opened, tmp_path):
    run, out = opened(), tmp_path / "out"
    export(run, out)
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    out.rename(tmp_path / ".out.old")  # killed between the two renames
    export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_an_earlier_export_is_back_where_the_new_one_cannot_take_its_place(opened, tmp_path, monkeypatch):
    run, out = opened(), tmp_path / "out"
    export(run, out)
    before, rename = (out / "model.safetensors").read_bytes(), Path.rename

    def refusing(path, target):
        if path.name == ".out.partial":
            raise OSError("no rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="no rename"):
        export(run, out, dtype="bfloat16")
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_a_full_disk_leaves_nothing_and_says_so(opened, tmp_path, monkeypatch):
    def full(*_arguments, **_more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_hf, "save_file", full)
    with pytest.raises(OSError, match="free some disk space"):
        export(opened(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_folder_of_someone_else_a_file_and_a_link_are_refused(opened, tmp_path):
    run = opened()
    other, link, file = tmp_path / "other", tmp_path / "link", tmp_path / "file"
    other.mkdir()
    (other / "config.json").write_text('{"minimoe": 1}')
    file.write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    link.symlink_to(empty)
    for out in (other, file, link):
        with pytest.raises(ValueError, match=f"^{out}: is"):
            export(run, out)
    assert (other / "config.json").read_text() == '{"minimoe": 1}'
    assert not list(empty.iterdir())
    assert export(run, empty).is_dir()


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) -> (exit code, stdout, stderr) of scripts.export_hf."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export_hf", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(export_hf.main)
        return ended.value.code, *capsys.readouterr()

    return call


def test_the_command_says_what_it_made(random_run, tmp_path, command):
    run = random_run(format="text", use_qk_norm=True)
    code, said, errors = command(run, tmp_path / "out", "--license", "apache-2.0")
    assert (code, errors) == (0, "")
    assert said.startswith(f"{tmp_path / 'out'}: Qwen3MoeForCausalLM, 0.")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [2], (
        "a text run ends at <|eos|> alone"
    )


def test_mistakes_end_in_one_sentence(random_run, tmp_path, command):
    run = random_run(gated_ffn=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    for arguments, words in (
        ((run, tmp_path / "out"), "model.gated_ffn: false"),
        ((run, tmp_path / "full"), "give another OUT"),
        ((tmp_path / "none", tmp_path / "out"), "is not there"),
        ((run, ".."), "give OUT a name"),
        ((random_run(name="fine"), tmp_path / "out", "--license", "Do what you like"), "--license"),
    ):
        code, said, errors = command(*arguments)
        assert (code, said, errors.count("\n")) == (2, "", 1), errors
        assert errors.startswith("error: ") and words in errors
    assert not (tmp_path / "out").exists()
    code, said, _ = command("--help")
    assert code == 0 and "example:" in said


def test_reference_knows_nothing_of_our_model():
    """What checks the export must not share its mistakes."""
    source = Path(sys.modules["scripts.formats.hf_reference"].__file__).read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports and not [
        line for line in imports if line.split()[1].split(".")[0] in ("model", "data", "train", "eval", "scripts")
    ]
