"""Every YAML under configs/: it loads, its keys carry comments, and scaled down it trains."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import yaml

from data.config import SOURCE_KINDS, SourceConfig
from model import MoEForCausalLM
from model.flops import count_parameters
from scripts.ablation.study import read_study
from train.config import RunConfig, from_dict, load_config, to_dict

from .configs import CONFIGS, ROOT, SCALES, STUDIES

FAMILIES = sorted({path.parent for path in CONFIGS if path.name == "sft.yaml"})
MOE_FAMILIES = [path for path in CONFIGS if path.parent.name == "families" and path.stem != "common"]
ALONE = [path for path in CONFIGS if path.stem == "pretrain" and path.parent not in FAMILIES]  # without fine-tuning
TWINS = [path for path in MOE_FAMILIES if path.stem.endswith("_dense")]
TRAINED = [  # every day; with --all also the twins, and wikitext's model, which is mixture's
    pytest.param(path, marks=pytest.mark.slow) if path in TWINS or path.parent.name == "wikitext" else path
    for path in [*MOE_FAMILIES, *ALONE]
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def test_there_are_configs():
    assert {"tinystories", "fineweb_edu", "minimind", "own"} <= {family.name for family in FAMILIES}
    assert {"wikitext", "mixture"} == {path.parent.name for path in ALONE}
    assert {"experts", "balance", "shape", "top_k", "recipe", "optimizer_sweep"} <= {path.stem for path in STUDIES}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_loads_and_its_sources_are_valid(path):
    config = load_config(path)
    assert config.data.sources, "a config without sources trains on nothing"
    for source in config.data.sources:
        assert source.kind in SOURCE_KINDS
    if path.name == "sft.yaml":
        assert config.data.format == "chat"
        assert config.train.init_from, "fine-tuning starts from a run"
        pretrain = load_config(path.with_name("pretrain.yaml"))
        assert Path(config.train.init_from) == pretrain.run_dir
        assert config.tokenizer.path == pretrain.tokenizer.path
        assert shape(config) == shape(pretrain), "fine-tuning cannot change the model's shape"


def shape(config: RunConfig) -> dict:
    """The fields of the model that decide which parameters it has."""
    loss_fields = ("aux_loss", "router_z", "router_jitter", "dropout", "expert_backend", "max_position")
    return {key: value for key, value in dataclasses.asdict(config.model).items() if not key.startswith(loss_fields)}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_batch_divides_over_one_two_and_four_processes(path):
    config = load_config(path)
    rows, remainder = divmod(config.train.tokens_per_step, config.context_length)
    assert remainder == 0
    processes = {"quickstart": (1, 2), "scales": (1,)}.get(
        path.parent.name, (1, 2, 4)
    )  # a study's cells are run side by side
    for count in processes:
        micro_batch = config.train.micro_batch_size * count
        assert rows % micro_batch == 0, (
            f"{rows} rows a step, {config.train.micro_batch_size} a micro-batch, {count} processes"
        )


def uncommented_keys(path: Path) -> set[str]:
    """Keys without a comment, on their line or on the one above, where they first stand in a file or its parents.

    Sections are left out: their name explains them.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, bool] = {}
    for above, line in zip(["", *lines], lines, strict=False):
        if key := re.match(r"\s*(?:- )?([a-z_0-9]+):\s*[^#\s]", line):
            found[key[1]] = found.get(key[1], False) or " #" in line or above.strip().startswith("#")
    uncommented = {key for key, commented in found.items() if not commented} - {"base"}
    base = re.search(r"^base: *([^ #\n]+)", "\n".join(lines), re.MULTILINE)
    parent_keys = (
        re.findall(r"^\s*(?:- )?([a-z_0-9]+): *[^#\s].* #", (path.parent / base[1]).read_text(), re.MULTILINE)
        if base
        else []
    )
    return uncommented - set(parent_keys)


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=name_of)
def test_every_key_carries_a_comment(path):
    assert not uncommented_keys(path), f"{path}: keys that no comment explains"


def scaled_down(config: RunConfig, folder: Path, **train) -> RunConfig:
    """The same run with few small layers for two steps; each source, with its weight, is a few local documents."""
    tree = to_dict(config)
    model = config.model
    groups = model.num_attention_heads // model.num_key_value_heads
    tree["model"] |= {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": None,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 // groups),
        "head_dim": 8,
        "max_position_embeddings": 64,
        "first_k_dense_replace": min(model.first_k_dense_replace, 1),
        "mlp_only_layers": [layer for layer in model.mlp_only_layers if layer < 2],
    }
    tree["runs_dir"] = str(folder / "runs")
    tree["tokenizer"] = {"path": str(folder / "tokenizer")}
    tree["data"] |= {"cache_dir": str(folder / "data"), "context_length": 32, "held_out_fraction": 0.1}
    path = str(folder / f"{config.data.format}.jsonl")
    local = [SourceConfig(name=s.name, kind="jsonl", path=path, weight=s.weight) for s in config.data.sources]
    tree["data"]["sources"] = [dataclasses.asdict(source) for source in local]
    tree["train"] |= {
        "steps": 2,
        "epochs": None,
        "tokens_per_step": 256,
        "micro_batch_size": 4,
        "warmup_steps": 1,
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "threads": 1,
        "checkpoint_every": 1,
        "log_every": 1,
        **train,
    }
    tree["eval"] |= {"every": 1, "batch_size": 4, "sample_tokens": 4, "best_source": None}
    tree["wandb"]["mode"] = "disabled"
    return from_dict(tree, where=config.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Local documents and conversations, and a tokenizer made of them."""
    from data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("configs")
    words = "the light of day and night was good for every man who went to the water".split()
    texts = [" ".join(words[(i * step) % len(words)] for step in range(1, 40)) + f" {i}." for i in range(80)]
    turns = [
        [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"It is {i}."}] for i in range(80)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8"
    )
    Tokenizer.train(texts, 300, show_progress=False).save(folder / "tokenizer")
    return folder


@pytest.fixture
def signal_handlers():
    """Training takes SIGINT and SIGTERM for itself; pytest gets them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("family", FAMILIES, ids=name_of)
def test_family_pretrains_and_fine_tunes_scaled_down(family, folder):
    from train.loop import train

    pretrain = scaled_down(load_config(family / "pretrain.yaml"), folder)
    sft = scaled_down(load_config(family / "sft.yaml"), folder, init_from=str(pretrain.run_dir))
    for config in (pretrain, sft):
        assert train(config) == 0
        rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        assert len(losses) == 2, f"two steps were asked for, the rows are {rows}"
        assert all(0 < loss < 7 for loss in losses), f"losses {losses} beside ln(300) = 5.7 of a guess"


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_moe_family_trains_scaled_down(path, folder):
    from train.loop import train

    config = scaled_down(load_config(path), folder)
    assert config.model.moe_layers or path in TWINS, "scaled down, the family has no experts left to train"
    assert train(config) == 0
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 2, f"two steps were asked for, the rows are {rows}"
    assert all(0 < loss < 7 for loss in losses), f"losses {losses} beside ln(300) = 5.7 of a guess"


AT_ANY_SCALE = [
    path for path in STUDIES if path.stem in ("experts", "balance", "recipe")
]  # others name widths or learning rates


@pytest.mark.parametrize(
    ("path", "scale"),
    [*((path, None) for path in STUDIES), *((path, scale) for path in AT_ANY_SCALE for scale in SCALES)],
    ids=lambda path: path.stem if path else "own",
)
def test_every_variant_of_a_study_builds_and_has_tokens_enough(path, scale):
    """Reading checks that active parameters, tokens and data are equal."""
    import torch

    study = read_study(path, base=scale)
    for name, config in study.configs.items():
        with torch.device("meta"):
            model = MoEForCausalLM(config.model)
        assert sum(parameter.numel() for parameter in model.parameters()) == study.sizes[name].total
        assert study.sizes[name].tokens >= 20 * study.sizes[name].active, name
    assert len({cell.digest for cell in study.cells}) == len(study.cells), "two variants are the same"


@pytest.mark.slow
@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("path", "variant"),
    [(path, name) for path in STUDIES for name in re.findall(r"- name: ([\w.-]+)", path.read_text(encoding="utf-8"))],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_every_variant_trains_two_steps(path, variant, folder):
    from train.loop import train

    small = [
        "model.vocab_size=300",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.max_position_embeddings=64",
    ]
    small += [
        "data.context_length=32",
        "train.tokens_per_step=512",
        "train.steps=2",
        "train.warmup_steps=1",
        "train.log_every=1",
    ]
    small += [
        f"data.cache_dir={folder}/data",
        f"tokenizer.path={folder}/tokenizer",
        "eval.every=0",
        "eval.best_source=null",
    ]
    sources = [{"name": name, "kind": "jsonl", "path": f"{folder}/text.jsonl"} for name in ("stdlib", "packages")]
    small += [f"runs_dir={folder}/{path.stem}", f"data.sources={json.dumps(sources)}", "data.held_out_fraction=0.1"]
    config = next(cell.config for cell in read_study(path, small).cells if cell.variant == variant)
    assert train(config) == 0
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) >= 2 and all(0 < loss < 7 for loss in losses), losses


@pytest.mark.parametrize("path", [path for path in MOE_FAMILIES if path not in TWINS], ids=name_of)
def test_a_moe_family_says_everything_that_makes_it_itself(path):
    """Every key of routing, shared experts and balance stands in the family's own file, not in a parent or a default."""
    keys = set(yaml.safe_load(path.read_text(encoding="utf-8"))["model"])
    routing = {
        "hidden_act", "gated_ffn", "use_qk_norm", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
        "n_shared_experts", "shared_expert_gate", "num_experts_per_tok", "first_k_dense_replace", "mlp_only_layers",
        "scoring_func", "norm_topk_prob", "routed_scaling_factor", "aux_loss_level", "aux_loss_alpha",
        "router_z_loss_coef", "router_bias_update_rate", "router_jitter_noise",
    }  # fmt: skip
    assert keys >= routing, f"left to a default: {routing - keys}"


@pytest.mark.parametrize("path", TWINS, ids=name_of)
def test_a_dense_twin_is_one_changed_key_and_as_wide_as_the_active_experts(path):
    twin, family = load_config(path), load_config(path.with_name(path.name.replace("_dense", "")))
    expected = dataclasses.asdict(family.model) | {"n_routed_experts": 0}
    assert dataclasses.asdict(twin.model) == expected
    assert dataclasses.asdict(twin.train) == dataclasses.asdict(family.train)
    counts, twin_counts = count_parameters(family.model), count_parameters(twin.model)
    networks = ("dense FFN", "routed experts", "shared experts")
    active = sum(counts[part].active for part in networks if part in counts)
    assert active == twin_counts["dense FFN"].active, "feed-forward parameters that a token uses"
    routing = {"router", "shared expert gate"}
    for part in (counts.keys() | twin_counts.keys()) - routing - set(networks):
        assert counts[part] == twin_counts[part], part


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_model_of_every_config_builds_at_full_size(path):
    """On the meta device: shapes and initialisation code, no memory."""
    import torch

    config = load_config(path)
    with torch.device("meta"):
        model = MoEForCausalLM(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e9


def three_lines(path: Path) -> str:
    """The config that the comment at the head of a ready one tells a person to write."""
    return "".join(re.findall(r"^#   ((?:base|tokenizer|data): .*\n)", path.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.slow
@pytest.mark.usefixtures("signal_handlers")
def test_own_data_takes_three_lines(tmp_path, monkeypatch):
    """The very lines of configs/own, from text to a fine-tuned run, with the sizes alone made smaller."""
    from scripts.train_tokenizer import train_tokenizer
    from train.loop import train

    (tmp_path / "my").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    texts = [f"On day {i} the farmer saw {i * 7 % 31} cows and {i * 5 % 13} sheep in the snow." for i in range(300)]
    chats = [
        [{"from": "human", "value": f"Day {i}?"}, {"from": "gpt", "value": f"{i * 7 % 31} cows."}] for i in range(300)
    ]
    for name, key, values in (("text", "text", texts), ("chat", "conversations", chats)):
        lines = "".join(json.dumps({key: value}) + "\n" for value in values)
        (tmp_path / f"my/{name}.jsonl").write_text(lines, encoding="utf-8")
    small = [
        "model.vocab_size=280",
        "model.hidden_size=32",
        "model.moe_intermediate_size=16",
        "model.num_hidden_layers=1",
    ]
    small += [
        "train.steps=2",
        "train.epochs=null",
        "train.device=cpu",
        "train.precision=float32",
        "train.threads=1",
        "eval.every=1",
    ]
    for name in ("pretrain", "sft"):
        written = three_lines(ROOT / f"configs/own/{name}.yaml")
        assert written.count("\n") == 3
        (tmp_path / f"my/{name}.yaml").write_text(written, encoding="utf-8")
        config = load_config(f"my/{name}.yaml", small)
        train_tokenizer(config, progress=False)
        assert train(config) == 0
        rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["kind"] for row in rows].count("train") > 0 and any(row["kind"] == "held_out" for row in rows)
    assert config.data.format == "chat" and config.data.sources[0].name == "my-chat"
