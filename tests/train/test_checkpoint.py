"""A checkpoint is whole or not there, whatever the disk does; and what others wrote into one is never trusted."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from data.integrity import SUMS, damage, write_checksums
from model import ModelConfig, MoEForCausalLM
from train import checkpoint
from train.config import RunConfig, TrainConfig
from train.optim import build_optimizer, state_tensors, step_if

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 8,
}


def config(**shape) -> RunConfig:
    return RunConfig(model=ModelConfig(**{**SHAPE, **shape}), train=TrainConfig(steps=9))


class Made:
    """A model and its optimizer after one step, which write checkpoints into `run_dir`."""

    def __init__(self, run_dir: Path, **shape) -> None:
        self.run_dir, self.config = run_dir, config(**shape)
        torch.manual_seed(0)
        self.model = MoEForCausalLM(self.config.model)
        self.optimizer = build_optimizer(self.model, self.config.train)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        step_if(self.optimizer, torch.tensor(True))

    def save(self, step: int, **state) -> Path:
        return checkpoint.save(self.run_dir, step, self.model, self.optimizer, state, self.config)


@pytest.fixture
def made(tmp_path) -> Made:
    return Made(tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps(run_dir: Path) -> list[int]:
    return [checkpoint.read_state(path)["step"] for path in checkpoint.complete_checkpoints(run_dir)]


def test_weights_moments_and_state_come_back_bit_for_bit(made, tmp_path):
    folder = made.save(7, guard={"mean_norm": 0.1}, progress={"tokens": 5})
    other = Made(tmp_path / "other")
    for parameter in other.model.parameters():
        torch.nn.init.zeros_(parameter)
    checkpoint.load_weights(other.model, folder)
    checkpoint.load_optimizer(other.optimizer, other.model, folder)
    for ours, theirs in (
        (made.model.state_dict(), other.model.state_dict()),
        (state_tensors(made.optimizer, made.model), state_tensors(other.optimizer, other.model)),
    ):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.read_state(folder) == {"step": 7, "guard": {"mean_norm": 0.1}, "progress": {"tokens": 5}}
    assert checkpoint.read_config(folder) == made.config


def test_a_checkpoint_is_the_documented_files_and_no_pickle(made):
    folder = made.save(7)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*checkpoint.FILES, SUMS))
    assert damage(folder, checkpoint.FILES) is None
    assert (folder.parent / "latest").read_text() == "step-00000007\n"
    for name in ("model.safetensors", "optimizer.safetensors"):
        header = (folder / name).read_bytes()[8:]
        assert header.startswith(b"{"), "a safetensors file begins with its header's length and JSON"


# The disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB; skipped where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_costs_the_new_checkpoint_alone(small_disk):
    made = Made(small_disk / "run")
    made.save(1)
    before = content(made.run_dir)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(
        b"x" * (free - len(before["checkpoints/step-00000001/model.safetensors"]) - 20_000)
    )
    with pytest.raises(OSError, match="step-00000002: cannot write this checkpoint .*free some disk space") as error:
        made.save(2)
    assert "\n" not in str(error.value)
    assert content(made.run_dir) == before
    (small_disk / "ballast").unlink()
    made.save(2)
    assert steps(made.run_dir) == [1, 2]


REFUSED = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.yaml",
    "checksums",
    "folder",
    "rename",
    "latest",
)


@pytest.mark.parametrize("refused", REFUSED)
def test_whatever_the_disk_refuses_nothing_half_written_stays(made, monkeypatch, refused):
    """Each write of a save in its turn fails; the checkpoint before is still there, whole, and the next save works."""
    made.save(1)
    before = content(made.run_dir)
    real_flush, real_replace, real_mkdir, real_sums = (
        checkpoint.flush_to_disk,
        os.replace,
        Path.mkdir,
        checkpoint.write_checksums,
    )
    full = OSError(28, "No space left on device")

    def flush(path):
        if path.name == refused:
            raise full
        real_flush(path)

    def replace(source, target):
        if Path(target).name == {"rename": "step-00000002", "latest": "latest"}.get(refused):
            raise full
        real_replace(source, target)

    def sums(folder, names):
        real_sums(folder, names)
        if refused == "checksums":
            raise full

    def mkdir(self, *arguments, **options):
        if refused == "folder" and "partial" in self.name:
            raise full
        real_mkdir(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush_to_disk", flush)
        patch.setattr(checkpoint, "write_checksums", sums)
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(OSError, match="step-00000002: cannot write this checkpoint .*free some disk space"):
            made.save(2)
    after = content(made.run_dir)
    assert {name: after[name] for name in before} == before, "an earlier checkpoint was touched"
    expected = [1, 2] if refused == "latest" else [1]  # the folder is whole before anything points at it
    assert steps(made.run_dir) == expected
    assert not [name for name in after if "partial" in name]
    made.save(2)
    assert steps(made.run_dir) == [1, 2] and checkpoint.pointed(made.run_dir, "latest").name == "step-00000002"


@pytest.mark.parametrize("missing", (*checkpoint.FILES, SUMS))
def test_a_folder_without_all_its_files_is_never_chosen(made, missing):
    made.save(1)
    newest = made.save(2)
    (newest / missing).unlink()
    assert steps(made.run_dir) == [1]
    assert checkpoint.find_checkpoint(made.run_dir).name == "step-00000001"
    with pytest.raises(ValueError, match=f"step-00000002: this checkpoint lacks {missing}; use another"):
        checkpoint.find_checkpoint(newest)
    assert checkpoint.pointed(made.run_dir, "latest") is None, "a pointer to half a checkpoint points nowhere"


def test_what_a_kill_left_behind_is_not_a_checkpoint_and_is_swept_away(made):
    made.save(1)
    leftover = made.run_dir / "checkpoints" / ".partial-step-00000002"
    shutil.copytree(made.run_dir / "checkpoints/step-00000001", leftover)
    (made.run_dir / "checkpoints/.latest.partial").write_text("step-0000")
    assert steps(made.run_dir) == [1]
    checkpoint.prune(made.run_dir, keep=1)
    assert sorted(path.name for path in (made.run_dir / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def test_pruning_keeps_the_newest_and_the_best(made):
    for step in range(1, 7):
        made.save(step)
    checkpoint.point(made.run_dir, "best", "step-00000002")
    checkpoint.prune(made.run_dir, keep=2)
    assert steps(made.run_dir) == [2, 5, 6]
    checkpoint.point(made.run_dir, "best", "step-00000006")
    checkpoint.prune(made.run_dir, keep=2)
    assert steps(made.run_dir) == [5, 6]
    checkpoint.prune(made.run_dir, keep=99)
    assert steps(made.run_dir) == [5, 6]


def test_pruning_keeps_those_of_every_so_many_steps_for_ever(made):
    for step in range(1, 10):
        made.save(step)
        checkpoint.point(made.run_dir, "best", "step-00000002") if step == 2 else None
        checkpoint.prune(made.run_dir, keep=1, keep_every=3)
    assert steps(made.run_dir) == [2, 3, 6, 9]
    made.save(10)
    checkpoint.prune(made.run_dir, keep=1, keep_every=5)
    assert steps(made.run_dir) == [2, 10], "the rule of now decides, not that of before"


def test_what_is_removed_loses_its_name_before_its_files(made, monkeypatch):
    """A kill in the middle of a removal leaves nothing that looks like a checkpoint."""
    made.save(1)
    made.save(2)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # killed before a file was removed
    checkpoint.prune(made.run_dir, keep=1)
    monkeypatch.undo()
    assert steps(made.run_dir) == [2]
    checkpoint.sweep(made.run_dir)
    assert sorted(path.name for path in (made.run_dir / "checkpoints").iterdir()) == ["latest", "step-00000002"]


def test_the_same_step_can_be_saved_again(made):
    made.save(3, note="first")
    made.save(3, note="second")
    assert checkpoint.read_state(checkpoint.find_checkpoint(made.run_dir))["note"] == "second"


# Copies for a writer beside the training


def test_a_snapshot_stays_as_it_was_while_training_goes_on(made):
    expected = {
        **{name: tensor.clone() for name, tensor in made.model.state_dict().items()},
        **{name: tensor.clone() for name, tensor in state_tensors(made.optimizer, made.model).items()},
    }
    snapshot = checkpoint.take_snapshot(made.model, made.optimizer, 1, {"note": "x"}, made.config)
    step_if(made.optimizer, torch.tensor(True))
    found = {**snapshot.weights, **snapshot.moments}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, found[name]) for name, tensor in made.model.named_parameters() if name in found)
    again = checkpoint.take_snapshot(made.model, made.optimizer, 2, {}, made.config, snapshot)
    assert all(again.weights[name].data_ptr() == tensor.data_ptr() for name, tensor in snapshot.weights.items()), (
        "the next snapshot takes new memory"
    )
    assert torch.equal(again.weights["norm.weight"], made.model.state_dict()["norm.weight"])


# Damage


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "flipped in the header": lambda path: flip(path, 9),
    "flipped at the front": lambda path: flip(path, 0),
    "flipped in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "flipped at the end": lambda path: flip(path, -1),
    "cut by two bytes": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", (*checkpoint.FILES, SUMS))
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damage_is_named_set_aside_and_the_checkpoint_before_it_chosen(made, name, how):
    first, second = made.save(1), made.save(2)
    checkpoint.point(made.run_dir, "best", second.name)
    DAMAGES[how](second / name)
    newest, notes = checkpoint.newest_intact(made.run_dir)
    assert newest == first and len(notes) == 1
    assert str(second) in notes[0] and name in notes[0] and "\n" not in notes[0], notes
    assert "damaged-step-00000002" in notes[0] and (second.parent / "damaged-step-00000002").is_dir()
    assert steps(made.run_dir) == [1]
    assert checkpoint.pointed(made.run_dir, "latest") == first, "latest must name what is whole"
    assert not (second.parent / "best").exists(), "best named the damaged one and nothing else is known to be best"
    assert checkpoint.newest_intact(made.run_dir) == (first, []), "said once"


def test_all_checkpoints_damaged_is_refused_however_often_it_is_tried(made):
    for step in (1, 2):
        flip(made.save(step) / "model.safetensors", 500)
    for _ in range(2):
        with pytest.raises(ValueError, match="model.safetensors: damaged.*copy one back, or remove") as error:
            checkpoint.newest_intact(made.run_dir)
        assert "\n" not in str(error.value)


def test_a_run_without_checkpoints_has_none_and_that_is_no_mistake(made):
    assert checkpoint.newest_intact(made.run_dir) == (None, [])
    made.run_dir.mkdir()
    (made.run_dir / "checkpoints").mkdir()
    assert checkpoint.newest_intact(made.run_dir) == (None, [])


def test_a_pointer_that_a_kill_left_behind_the_newest_checkpoint_is_brought_up(made):
    first, second = made.save(1), made.save(2)
    checkpoint.point(made.run_dir, "latest", first.name)
    assert checkpoint.newest_intact(made.run_dir) == (second, [])
    assert checkpoint.pointed(made.run_dir, "latest") == second


# What others wrote


@pytest.mark.parametrize(
    "hostile",
    [b"../../outside", b"/etc", b"step-00000001/../../../outside", b"..", b".", b"", b"step-1", b"step-99999999", b"\xff\xfe\x00", b"a\x00b",
     b"step-00000001\nstep-00000002", b"x" * 100_000],
)  # fmt: skip
def test_hostile_pointers_point_nowhere(made, tmp_path, hostile):
    made.save(1)
    made.save(2)
    shutil.copytree(made.run_dir / "checkpoints/step-00000001", tmp_path / "outside")
    (made.run_dir / "checkpoints/best").write_bytes(hostile)
    assert checkpoint.pointed(made.run_dir, "best") is None
    checkpoint.prune(made.run_dir, keep=1)
    assert steps(made.run_dir) == [2] and (tmp_path / "outside/state.json").is_file()
    with pytest.raises(ValueError, match="checkpoints/best: names no whole checkpoint"):
        checkpoint.find_checkpoint(made.run_dir / "checkpoints/best")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '{"progress": {}}', '{"step": "7"}', "[" * 100_000])
def test_a_broken_state_is_named(made, text):
    folder = made.save(1)
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match="state.json: .*use another checkpoint") as error:
        checkpoint.read_state(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_file_cut_short_or_of_another_kind_is_named(made, name):
    folder = made.save(1)
    whole = (folder / name).read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], b"", b"\x80\x04\x95" + whole):
        (folder / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name}: cannot be read .*use another checkpoint"):
            if name.startswith("model"):
                checkpoint.load_weights(made.model, folder)
            else:
                checkpoint.load_optimizer(made.optimizer, made.model, folder)


def test_no_file_of_a_checkpoint_can_run_code(made, tmp_path):
    folder = made.save(1)
    trace = tmp_path / "was-run"
    for text in (
        f"!!python/object/apply:os.system ['touch {trace}']",
        f"train: !!python/object/apply:os.system ['touch {trace}']",
    ):
        (folder / "config.yaml").write_text(text)
        write_checksums(folder, checkpoint.FILES)  # a stranger can do that too
        with pytest.raises(ValueError, match="config.yaml"):
            checkpoint.read_config(folder)
    assert not trace.exists()


# Shapes


def test_a_key_of_another_shape_is_named_with_both_values(made):
    folder = made.save(1)
    checkpoint.check_same_shape(made.config.model, folder)
    for key, value in (("hidden_size", 32), ("n_routed_experts", 8), ("num_hidden_layers", 3), ("vocab_size", 41)):
        mistaken = config(**{key: value}).model
        with pytest.raises(
            ValueError, match=rf"model\.{key}: {value} here, but .*step-00000001 was trained with .*use its value"
        ):
            checkpoint.check_same_shape(mistaken, folder)
    checkpoint.check_same_shape(config(max_position_embeddings=1024, dropout=0.5, aux_loss_alpha=0.0).model, folder)


@pytest.mark.parametrize(
    "shape, name",
    [
        ({"vocab_size": 41}, "embed_tokens.weight"),
        ({"n_routed_experts": 5}, "mlp.*"),
        ({"num_hidden_layers": 3}, "layers.2.*absent there"),
        ({"num_hidden_layers": 1}, "layers.1.*model has absent"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named_and_the_model_stays_as_it_was(made, shape, name):
    folder = made.save(1)
    model = MoEForCausalLM(config(**shape).model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    sentences = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"model.safetensors: .*{name}.*give the model section") as error:
            checkpoint.load_weights(model, folder)
        sentences.add(str(error.value))
    assert len(sentences) == 1
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


# Which checkpoint is meant


def test_a_run_a_checkpoint_and_a_pointer_are_found(made):
    first, second = made.save(1), made.save(2)
    checkpoint.point(made.run_dir, "best", first.name)
    for path, expected in (
        (made.run_dir, second),
        (first, first),
        (first.parent / "best", first),
        (first.parent / "latest", second),
    ):
        assert checkpoint.find_checkpoint(path).resolve() == expected.resolve()
    with contextlib.chdir(first):
        assert checkpoint.find_checkpoint(".").resolve() == first


def test_a_place_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, why in (("empty", "has no complete checkpoint"), ("nowhere", "is not there")):
        with pytest.raises(ValueError, match=f"{name}: {why}; give a run folder such as runs/NAME"):
            checkpoint.find_checkpoint(tmp_path / name)


def test_a_checkpoint_that_a_running_training_removes_while_it_is_read_gives_way_to_a_newer_one(
    random_run, monkeypatch
):
    run_dir = random_run()
    old = checkpoint.find_checkpoint(run_dir)
    new = old.with_name("step-00000002")
    real = checkpoint.check_intact

    def removed_meanwhile(path: Path, names) -> None:
        if path == old:
            shutil.copytree(old, new)
            shutil.rmtree(old)
        real(path, names)

    monkeypatch.setattr(checkpoint, "check_intact", removed_meanwhile)
    assert checkpoint.open_run(run_dir, device="cpu").checkpoint == new
    with pytest.raises(ValueError, match="step-00000001.* is not there"):
        checkpoint.open_run(old, device="cpu")
    (new / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="model.safetensors"):  # one that stays is opened or refused, once
        checkpoint.open_run(run_dir, device="cpu")
