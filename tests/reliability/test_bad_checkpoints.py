"""Checkpoints with flipped, cut and missing bytes: each is named and set aside, and the run ends as if nothing had happened.

tests/train/test_checkpoint.py damages every file in every way; here the commands meet such checkpoints.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.integrity import SUMS, damage
from train import checkpoint
from train.metrics import read_rows

from ..train.conftest import run, start
from .conftest import assert_equal_runs, assert_sound, ends, finish_ranks, start_ranks

EVERY_STEP = ("train.checkpoint_every=1", "train.keep_checkpoints=99")


def flip(path: Path, where: float) -> None:
    """Flips a bit of the byte at this fraction of a file."""
    content = bytearray(path.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 0x04
    path.write_bytes(content)


def cut(path: Path, where: float) -> None:
    path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("model.safetensors", lambda path: flip(path, 0.0)),  # its header's length
    ("model.safetensors", lambda path: flip(path, 0.001)),  # its header
    ("model.safetensors", lambda path: flip(path, 0.5)),
    ("model.safetensors", lambda path: flip(path, 1.0)),  # the last byte
    ("model.safetensors", lambda path: cut(path, 0.9)),
    ("optimizer.safetensors", lambda path: flip(path, 0.001)),
    ("optimizer.safetensors", lambda path: flip(path, 0.7)),
    ("optimizer.safetensors", lambda path: cut(path, 0.0)),
    ("optimizer.safetensors", lambda path: path.unlink()),
    ("state.json", lambda path: flip(path, 0.3)),
    ("state.json", lambda path: path.write_text(path.read_text().replace('"best_step"', '"best_stop"'))),
    ("state.json", lambda path: path.write_text(path.read_text() + " ")),
    ("config.yaml", lambda path: path.write_text(path.read_text().replace("seed: 7", "seed: 8"))),
    ("config.yaml", lambda path: path.unlink()),
    (SUMS, lambda path: path.write_bytes(path.read_bytes().replace(b"  ", b" x"))),
    (SUMS, lambda path: cut(path, 0.5)),
    (SUMS, lambda path: path.unlink()),
]


@pytest.fixture(scope="module")
def dense(workplace) -> Path:
    """The run with a checkpoint of every step."""
    run("train.pretrain", workplace / "pretrain.yaml", "name=every-step", *EVERY_STEP)
    return workplace / "runs/every-step"


def copy_until(dense: Path, name: str, step: int) -> Path:
    """The run folder as it was after `step`, under another name."""
    folder = dense.with_name(name)
    shutil.copytree(dense, folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    checkpoint.point(folder, "latest", checkpoint.checkpoint_name(step))
    checkpoint.point(folder, "best", checkpoint.checkpoint_name(min(step, 10)))
    return folder


def command(workplace: Path, folder: Path) -> tuple:
    return (workplace / "pretrain.yaml", f"name={folder.name}", *EVERY_STEP)


def test_every_damaged_checkpoint_is_named_and_the_newest_whole_one_goes_on_to_an_equal_end(workplace, dense):
    """The newest 17 are damaged, each in another way."""
    folder = copy_until(dense, "damaged", 18)
    where = {18 - i: damage for i, damage in enumerate(DAMAGES)}
    assert min(where) == 2
    for step, (name, change) in where.items():
        change(folder / "checkpoints" / f"step-{step:08d}" / name)
    printed = run("train.pretrain", *command(workplace, folder))
    assert "resumed at step 1\n" in printed
    log = (folder / "log.txt").read_text("utf-8")
    for step, (name, _) in where.items():
        path = f"checkpoints/step-{step:08d}/{name}"
        for text in (printed, log):
            (sentence,) = [line for line in text.splitlines() if f"/step-{step:08d}/" in line]
            assert path in sentence, f"{sentence}: does not name {path}"
            assert f"set aside as damaged-step-{step:08d}" in sentence and "going on from step-00000001" in sentence
        aside = folder / "checkpoints" / f"damaged-step-{step:08d}"
        assert damage(aside, checkpoint.FILES) is not None, f"{aside} was kept as it was found"
    assert_sound(folder)
    assert_equal_runs(dense, folder)


@pytest.mark.slow
def test_all_checkpoints_damaged_is_refused_again_and_again(workplace, dense):
    folder = copy_until(dense, "all-damaged", 3)
    for step, name in ((1, "model.safetensors"), (2, "optimizer.safetensors"), (3, "state.json")):
        flip(folder / "checkpoints" / f"step-{step:08d}" / name, 0.5)
    before = content(folder)
    for processes in (1, 2):
        ended = ends(start_ranks(processes, "train.pretrain", *command(workplace, folder)))
        assert [code for code, _, _ in ended] == [2] * processes
        (error,) = [line for _, _, error in ended for line in error.splitlines() if line.startswith("error: ")]
        assert re.search(
            r"step-0000000\d/(model|optimizer|state)\S+: damaged.* copy one back, or remove .* to start afresh", error
        )
        assert content(folder) == before, "something was changed or removed"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
def test_a_damaged_best_is_noticed_and_another_one_chosen(workplace, dense):
    """`best` is older than the newest checkpoint, which alone must be whole to go on."""
    folder = copy_until(dense, "best-damaged", 12)
    flip(folder / "checkpoints/step-00000010/model.safetensors", 0.5)
    printed = run("train.pretrain", *command(workplace, folder))
    assert "resumed at step 12" in printed and "step-00000010/model.safetensors: damaged" in printed
    assert_sound(folder)
    held_out = {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "held_out"}
    assert checkpoint.pointed(folder, "best").name == "step-00000020", f"the best one left of {held_out}"
    for kind in ("model.safetensors", "optimizer.safetensors"):
        newest = "checkpoints/step-00000020/" + kind
        assert (folder / newest).read_bytes() == (dense / newest).read_bytes()


@pytest.mark.slow
def test_two_processes_agree_which_checkpoint_is_whole(workplace, whole_two):
    folder = workplace / "runs/two-damaged"
    shutil.copytree(whole_two, folder)
    flip(folder / "checkpoints/step-00000020/optimizer.safetensors", 0.4)
    ended = finish_ranks(start_ranks(2, "train.pretrain", workplace / "pretrain.yaml", f"name={folder.name}"))
    assert sum("step-00000020/optimizer.safetensors: damaged" in out for _, out, _ in ended) == 1, (
        "said once, by rank 0"
    )
    assert "going on from step-00000015" in ended[0][1]
    assert_equal_runs(whole_two, folder)


@pytest.mark.slow
def test_no_command_uses_a_damaged_checkpoint(workplace, dense):
    """What only reads names the file, and changes nothing."""
    name = "model.safetensors"
    folder = copy_until(dense, f"read-{name}", 2)
    flip(folder / "checkpoints/step-00000002" / name, 0.5)
    before = content(folder)
    origin = workplace / "sft.yaml", f"train.init_from={folder}", f"name=from-{name}"
    commands = {
        "eval.evaluate": (folder,), "train.sft": origin, "scripts.chat": (folder,), "train.pretrain": (
            workplace / "pretrain.yaml", f"train.init_from={folder / 'checkpoints/step-00000002'}", f"name=also-from-{name}"
        ),
    }  # fmt: skip
    processes = [start(module, *arguments) for module, arguments in commands.items()]
    for (module, _), (code, _, error) in zip(commands.items(), ends(processes), strict=True):
        assert code == 2 and f"step-00000002/{name}" in error and "Traceback" not in error, f"{module}: {error}"
        assert len(error.strip().splitlines()) == 1, error
    assert content(folder) == before
