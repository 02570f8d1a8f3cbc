"""scripts.benchmark: what it computes from seconds, and the command itself on a model of seconds."""

import dataclasses
import json

import pytest
import torch

from model import MoEForCausalLM
from model.flops import flops_per_token, total_count
from scripts import benchmark, contestants, peers
from scripts.contestants import Contestant, Field

TINY = contestants._size(
    2, 32, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16,
)  # fmt: skip
FLOAT32 = Field(torch.device("cpu"), "float32", peers=True, compiled=False, minimind=None)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(contestants.SIZES, "cpu-16", TINY)
    monkeypatch.setattr(contestants, "PROMPT", 24)
    monkeypatch.setattr(contestants, "NEW_TOKENS", 6)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def test_ratios_are_medians_of_the_rounds_own_ratios():
    # In round 2 the machine is ten times slower for both: the ratio of medians would be the same, of means not.
    seconds = {("ours", "float32"): [2.0, 30.0, 4.0], (contestants.TWIN, "float32"): [1.0, 10.0, 1.0]}
    assert benchmark.ratio(seconds, ("ours", "float32"), (contestants.TWIN, "float32")) == 3.0
    assert benchmark.ratio(seconds, ("ours", "float32"), ("absent", "float32")) is None


def test_row_has_the_figures_of_its_contestant():
    contestant = Contestant("ours", "bfloat16", lambda: None, tokens=100, flops=1e9)
    seconds = {
        ("ours", "bfloat16"): [0.5, 0.4, 0.6],
        ("ours", "float32"): [1.0, 0.8, 1.2],
        (contestants.TWIN, "bfloat16"): [0.25, 0.2, 0.3],
        (peers.DENSE, "bfloat16"): [1.0, 0.8, 1.2],
    }
    row = benchmark.row_of(contestant, seconds, peak=1e10, memory=1.5)
    assert row["seconds"] == 0.5 and row["tokens_per_second"] == 200
    assert (row["ratio_to_twin"], row["ratio_to_dense_peer"], row["speed_to_float32"]) == (2.0, 0.5, 2.0)
    assert row["mfu"] == pytest.approx(0.2) and row["peak_memory_gib"] == 1.5
    assert row["speed_to_transformers"] is None


def test_generation_is_compared_with_transformers():
    seconds = {
        ("ours, one stream", "float32"): [1.0, 1.0],
        ("transformers eager, one stream", "float32"): [3.0, 2.0],
        ("transformers grouped_mm, one stream", "float32"): [9.0, 9.0],
    }
    row = benchmark.row_of(Contestant("ours, one stream", "float32", lambda: None, 10, 0.0), seconds, None, None)
    assert row["speed_to_transformers"] == 2.5 and row["mfu"] is None


def test_table_leaves_out_columns_without_figures():
    contestant = Contestant("ours, one stream", "float32", lambda: None, 10, 0.0)
    text = benchmark.table([benchmark.row_of(contestant, {contestant.key: [1.0]}, None, None)])
    assert "tokens/s" in text and "MFU" not in text and "twin" not in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


@pytest.mark.parametrize("size", contestants.SIZES.values(), ids=list(contestants.SIZES))
def test_twin_has_the_same_work_but_for_the_router(size):
    model, router = size.model, size.model.hidden_size * size.model.n_routed_experts * size.model.num_hidden_layers
    assert flops_per_token(model, size.context) - flops_per_token(size.twin(), size.context) == 6 * router


def test_peers_are_as_large_as_ours():
    count = lambda model: sum(parameter.numel() for parameter in model.parameters())  # noqa: E731
    gates, norms = 2 * 32, 2 * 2 * 8  # their shared gate; our QK-norm, which Qwen2-MoE lacks
    assert count(peers.moe_peer(TINY.model, "eager")) - gates == count(MoEForCausalLM(TINY.model)) - norms
    assert count(peers.dense_peer(TINY.twin())) == count(MoEForCausalLM(TINY.twin()))


def test_copied_weights_compute_the_same():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY.model, use_qk_norm=False)
    ours, theirs = MoEForCausalLM(config).eval(), peers.moe_peer(config, "grouped_mm").eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peers.copy_weights(ours, theirs)
    ids = torch.randint(64, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-5)


def test_generation_that_differs_from_transformers_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(peers, "copy_weights", lambda ours, theirs: None)
    with pytest.raises(ValueError, match="tokens differ"):
        contestants.generation(TINY, FLOAT32)


def test_command_measures_everyone_and_writes_json(tiny, monkeypatch, capsys, tmp_path):
    file = tmp_path / "result.json"
    arguments = ["--size", "cpu-16", "--work", "train", "evaluate", "generate", "save"]
    arguments += ["--precision", "float32", "bfloat16"]
    monkeypatch.setattr(
        "sys.argv", ["benchmark", *arguments, "--device", "cpu", "--rounds", "2", "--no-memory", "--json", str(file)]
    )
    benchmark.main()
    result = json.loads(file.read_text())
    assert [part["work"] for part in result["results"]] == ["train", "evaluate", "generate", "save"]
    train = {(row["name"], row["precision"]): row for row in result["results"][0]["rows"]}
    assert set(train) == {(name, p) for name in FLOAT32.names() for p in ("float32", "bfloat16")}
    assert all(row["tokens_per_second"] > 0 and 0 < row["mfu"] for row in train.values())
    assert train[contestants.TWIN, "float32"]["ratio_to_twin"] == 1.0
    speaking = {row["name"]: row for row in result["results"][2]["rows"] if row["precision"] == "float32"}
    assert speaking["ours, one stream"]["speed_to_transformers"] > 0
    for row in result["results"][3]["rows"]:
        assert row["bytes"] > 12 * total_count(TINY.model).total, "weights and two moments, float32"
        assert set(row["ways"]) == {"background", "in line"} and all(
            0 < cost["waited_seconds"]
            and cost["share"] == pytest.approx(cost["added_seconds"] / row["step_seconds"] / 100)
            for cost in row["ways"].values()
        )
    printed = capsys.readouterr().out
    assert "time / our twin" in printed and "training waits, ms" in printed and "torch " in printed


def test_training_contestants_learn(tiny):
    contestant = contestants.training(contestants.OURS, TINY, FLOAT32)
    model, _ = contestant.trained
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    contestant.work()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rounds", "0"], "--rounds: 0"), (["--minimind", "nowhere", "--work", "train"], "model/model_minimind.py")],
)
def test_mistakes_end_in_a_sentence(tiny, monkeypatch, arguments, words):
    monkeypatch.setattr("sys.argv", ["benchmark", "--size", "cpu-16", "--device", "cpu", *arguments])
    with pytest.raises(ValueError, match=words):
        benchmark.main()


@pytest.mark.slow
def test_peak_memory_grows_with_the_model():
    wide = dataclasses.replace(
        TINY, model=dataclasses.replace(TINY.model, moe_intermediate_size=8192, n_routed_experts=32)
    )
    small, large = (benchmark.peak_memory(contestants.OURS, size, FLOAT32, "train") for size in (TINY, wide))
    weights = 4 * 2 * 32 * 3 * 32 * 8192 / 2**30
    assert small < 0.2 and 4 * weights < large < 8 * weights, (small, large, weights)


@pytest.mark.parametrize("work", ["train", "evaluate"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FLOAT32.names(), contestants.COMPILED])
def test_a_contestant_is_what_its_name_says(name, precision, work, monkeypatch):
    """Its mode, precision, backend, peer's experts, compilation and the operations it is credited with."""
    built, compiled, losses = [], [], []
    field = dataclasses.replace(FLOAT32, precision=precision)
    model_of, loss_of = Field.model_of, contestants._loss
    monkeypatch.setattr(MoEForCausalLM, "compile_layers", lambda model: compiled.append(model))
    monkeypatch.setattr(Field, "model_of", lambda *a: built.append(model_of(*a)) or built[-1])

    def spy(model, ids):
        losses.append((model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return loss_of(model, ids)

    monkeypatch.setattr(contestants, "_loss", spy)
    contestant = contestants.BUILD[work](name, TINY, field)
    contestant.work()
    training = work == "train"
    assert losses == [(training, training, precision == "bfloat16")]
    dense = name in (contestants.TWIN, peers.DENSE)
    shape = TINY.twin() if dense else TINY.model
    assert contestant.flops == 64 * flops_per_token(shape, 32) / (1 if training else 3)
    (model,) = built
    if isinstance(model, MoEForCausalLM):
        assert model.config.n_routed_experts == (0 if dense else 4)
        assert model.config.expert_backend == ("loop" if name == contestants.LOOP else "auto")
        assert compiled == ([model] if name == contestants.COMPILED else [])
    else:
        assert type(model).__name__ == ("Qwen3ForCausalLM" if dense else "Qwen2MoeForCausalLM")
        assert dense or peers.EXPERTS[model.config._experts_implementation] == name


def test_unprepared_data_and_a_new_folder_for_the_json_come_first(tiny, monkeypatch, tmp_path):
    arguments = [
        "--size",
        "cpu-16",
        "--work",
        "start",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "new" / "result.json"),
    ]
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments, "--config", "configs/tinystories/pretrain.yaml"])
    with pytest.raises(ValueError, match="tokenizer"):
        benchmark.main()
    assert (tmp_path / "new").is_dir()
