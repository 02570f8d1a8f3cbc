"""Shards, their index and the tokenizer: a damaged byte is noticed and named, what is half-written is never used.

Commands are run as a person runs them, in this process where nothing has to be killed.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.integrity import damage
from data.tokenizer import Tokenizer
from scripts import prepare_data, train_tokenizer
from train import checkpoint, cli, pretrain, sft

from ..train.conftest import ROOT, environment

SHORT = ("train.steps=2", "train.checkpoint_every=1", "eval.every=0", "train.stall_timeout=0")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command's main; returns (exit code, the last line of stderr)."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.run(module.main)
        err = capsys.readouterr().err
        assert "Traceback" not in err, err
        return exit.value.code or 0, ([""] + err.strip().splitlines())[-1]

    return call


@pytest.fixture
def place(workplace, tmp_path):
    """A folder of its own with text.jsonl, chat.jsonl, tokenizer/ and text.yaml; cache and runs in it."""
    for name in ("text.jsonl", "chat.jsonl"):
        shutil.copy(workplace / name, tmp_path / name)
    shutil.copytree(workplace / "tokenizer", tmp_path / "tokenizer")
    tree = yaml.safe_load((workplace / "pretrain.yaml").read_text())
    tree["runs_dir"], tree["tokenizer"]["path"] = str(tmp_path / "runs"), str(tmp_path / "tokenizer")
    tree["data"].update(cache_dir=str(tmp_path / "cache"), sources=[source(tmp_path / "text.jsonl")])
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(tree))
    tree["data"].update(format="chat", context_length=64, sources=[source(tmp_path / "chat.jsonl")])
    tree["name"], tree["train"]["init_from"] = "chat", str(tmp_path / "runs/pre")
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def source(path: Path) -> dict:
    return {"name": "topics", "kind": "jsonl", "path": str(path)}


def prepared_folder(place: Path) -> Path:
    (folder,) = (path for path in (place / "cache/prepared").iterdir() if path.is_dir())
    return folder


def content(folder: Path, without: tuple = ()) -> dict[str, str]:
    """{path below: SHA-256} of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def damages(whole: bytes) -> dict[str, bytes | None]:
    """One bit flipped at the beginning, in the middle and at the end; cut; emptied; removed."""
    flipped = {f"bit {at}": whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in (0, len(whole) // 2, len(whole) - 1) if whole}  # fmt: skip
    return {**flipped, "cut": whole[: len(whole) // 2], "empty": b"", "removed": None}


def apply(path: Path, damaged: bytes | None) -> None:
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)


@pytest.mark.parametrize("module", [pytest.param(pretrain, marks=pytest.mark.slow), sft])
def test_any_damage_to_the_shards_is_named_before_a_step_is_made(command, place, module):
    config = {pretrain: "text.yaml", sft: "chat.yaml"}[module]
    if module is sft:
        assert command(pretrain, place / "text.yaml", *SHORT, f"data.cache_dir={place}/other")[0] == 0
    code, err = command(module, place / config, *SHORT)
    assert code == 0, err
    folder = prepared_folder(place)
    names = sorted(path.name for path in folder.iterdir())
    assert ("train-00000.mask" in names) == (module is sft) and "SHA256SUMS" in names
    before, tried = content(place / "runs"), 0
    for name in names:
        whole = (folder / name).read_bytes()
        for kind, damaged in damages(whole).items():
            if name == "index.json" and kind == "removed" or damaged == whole:
                continue  # without its index a source counts as not prepared, and is prepared again
            apply(folder / name, damaged)
            code, err = command(module, place / config, *SHORT, "train.steps=4")
            assert code == 2, f"{name}, {kind}: {err}"
            named = r"\S+" if name == "SHA256SUMS" else rf"({name}|SHA256SUMS)"
            expected = rf"error: {folder}/{named}: .*; remove {folder} and run: python -m scripts\.prepare_data CONFIG"
            assert re.fullmatch(expected, err), f"{name}, {kind}: {err}"
            tried += 1
            (folder / name).write_bytes(whole)
    assert tried > 30 and content(place / "runs") == before, "a refused start must not touch the run"
    (folder / "train-00000.bin").write_bytes(b"")
    shutil.rmtree(folder)  # the remedy
    assert command(prepare_data, place / config)[0] == 0
    assert command(module, place / config, *SHORT, "train.steps=4")[0] == 0
    run_dir = place / "runs" / {pretrain: "pre", sft: "chat"}[module]
    assert checkpoint.read_state(checkpoint.find_checkpoint(run_dir))["step"] == 4


def test_without_the_check_sizes_are_still_compared(command, place):
    assert command(pretrain, place / "text.yaml", *SHORT)[0] == 0
    shard = prepared_folder(place) / "train-00000.bin"
    whole = shard.read_bytes()
    apply(shard, whole[:-2])
    code, err = command(pretrain, place / "text.yaml", *SHORT, "train.steps=4", "data.verify=false")
    assert code == 2 and f"{shard}: missing or not of the size in index.json; remove" in err
    apply(shard, bytes([whole[0] ^ 4]) + whole[1:])
    code, err = command(pretrain, place / "text.yaml", *SHORT, "train.steps=4", "data.verify=false")
    assert code == 0, err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "SHA256SUMS"])
def test_a_damaged_tokenizer_is_named_and_nothing_is_prepared_with_it(command, place, name):
    assert command(pretrain, place / "text.yaml", *SHORT)[0] == 0
    before = content(place / "cache"), content(place / "runs")
    for folder in (place / "tokenizer", place / "runs/pre/tokenizer"):
        whole = (folder / name).read_bytes()
        for kind, damaged in damages(whole).items():
            if kind == "removed" and name != "tokenizer_config.json":
                continue  # SHA256SUMS: as in a folder from elsewhere; tokenizer.json: is missing, said elsewhere
            if name == "SHA256SUMS" and kind.startswith("bit") and damaged.split() == whole.split():
                continue  # another white space
            apply(folder / name, damaged)
            modules = (pretrain, prepare_data, train_tokenizer) if folder == place / "tokenizer" else (pretrain,)
            for module in modules:
                code, err = command(module, place / "text.yaml", *(SHORT if module is pretrain else ()))
                assert code == 2 and err.startswith(f"error: {folder}/"), f"{module.__name__}, {kind}: {err}"
                assert "put back a whole copy" in err and (name in err or name == "SHA256SUMS"), err
            (folder / name).write_bytes(whole)
    assert (content(place / "cache"), content(place / "runs")) == before, "something was prepared or written"
    assert command(pretrain, place / "text.yaml", *SHORT, "train.steps=3")[0] == 0


def test_data_that_changed_under_a_run_are_refused_and_moved_ones_are_not(command, place):
    arguments = (place / "text.yaml", *SHORT)
    assert command(pretrain, *arguments)[0] == 0
    text = (place / "text.jsonl").read_text()
    stamp = (place / "text.jsonl").stat()
    os.utime(place / "text.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    assert command(pretrain, *arguments, "train.steps=3")[0] == 0, "a copy with another date is the same text"
    (place / "elsewhere").mkdir()
    (place / "text.jsonl").rename(place / "elsewhere/text.jsonl")
    moved = f"data.sources=[{json.dumps(source(place / 'elsewhere/text.jsonl'))}]"
    code, err = command(pretrain, *arguments, "train.steps=4", moved)
    assert code == 0, err
    (place / "text.jsonl").write_text(text.replace(" the ", " thy ", 1))
    before = content(place / "runs", without=(".lock",))
    code, err = command(pretrain, *arguments, "train.steps=5")
    assert code == 2 and "source 'topics'" in err and "no longer what the run" in err, err
    lines = text.splitlines(keepends=True)
    (place / "text.jsonl").write_text("".join([*lines[1:], lines[0]]))
    code, err = command(pretrain, *arguments, "train.steps=5")
    assert code == 2 and "source 'topics'" in err, f"another order is other data: {err}"
    (place / "text.jsonl").write_text(text)
    Tokenizer.train([text], 300).save(place / "tokenizer")
    code, err = command(pretrain, *arguments, "train.steps=5")
    assert code == 2 and "another tokenizer" in err, err
    assert content(place / "runs", without=(".lock",)) == before
    shutil.rmtree(place / "tokenizer")
    shutil.copytree(place / "runs/pre/tokenizer", place / "tokenizer")
    assert command(pretrain, *arguments, "train.steps=5")[0] == 0, "the remedy"


@pytest.fixture
def disk(tmp_path):
    """disk(KiB) -> a fresh file system of that size; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kib: int) -> Path:
        while mounted:
            subprocess.run(["umount", mounted.pop()], check=True)
        options = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
        if subprocess.run(options, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    while mounted:
        subprocess.run(["umount", mounted.pop()], check=True)


def grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)


@pytest.mark.parametrize("config", [pytest.param("text.yaml", marks=pytest.mark.slow), "chat.yaml"])
def test_a_disk_that_is_full_at_any_point_of_preparing(command, place, disk, config):
    """File systems of 4 KiB, 8 KiB and so on until all fits: each write is the one that fails, once."""
    reference = None
    for kib in range(4, 400, 4):
        folder = disk(kib)
        code, err = command(prepare_data, place / config, f"data.cache_dir={folder}")
        if code == 0:
            break
        assert code == 2 and re.fullmatch(
            rf"error: data\.cache_dir: .*{folder}/prepared.* (is full; free some|No space).*", err
        ), err
        left = [path.name for path in (folder / "prepared").iterdir()] if (folder / "prepared").exists() else []
        assert left in ([], [".lock"]), f"{kib} KiB: {left}"
        if kib % 16 == 0:
            grow(folder)
            assert command(prepare_data, place / config, f"data.cache_dir={folder}")[0] == 0
            found = content(folder, without=("index.json", "SHA256SUMS"))
            assert reference in (None, found)
            reference = found
    assert code == 0 and kib > 32, f"{kib} KiB: {err}"
    assert content(folder, without=("index.json", "SHA256SUMS")) == reference


def test_a_disk_that_is_full_at_any_point_of_writing_the_tokenizer(command, place, disk):
    assert command(train_tokenizer, place / "text.yaml", f"tokenizer.path={place}/undisturbed")[0] == 0
    undisturbed = content(place / "undisturbed")
    for kib in range(4, 100, 4):
        folder = disk(kib)
        code, err = command(train_tokenizer, place / "text.yaml", f"tokenizer.path={folder}/tokenizer")
        if code == 0:
            break
        assert code == 2 and err.endswith("the disk is full; free some space and repeat the command"), err
        assert list((folder / "tokenizer").iterdir()) == [], f"{kib} KiB"
        if kib % 8 == 0:
            grow(folder)
            assert command(train_tokenizer, place / "text.yaml", f"tokenizer.path={folder}/tokenizer")[0] == 0
            assert content(folder / "tokenizer") == undisturbed
    assert code == 0 and kib > 12, f"{kib} KiB: {err}"
    assert content(folder / "tokenizer") == undisturbed


@pytest.mark.slow
def test_preparing_survives_sigkill_at_any_moment(place, tmp_path):
    """Killed at random moments, most of them while shards are written; then once more: as if nothing had happened."""
    words = (place / "text.jsonl").read_text().split()
    draw = random.Random(4)
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) + "\n" for _ in range(2000)]
    (place / "large.jsonl").write_text("".join(lines))
    tree = yaml.safe_load((place / "text.yaml").read_text())
    tree["data"]["sources"] = [source(place / "text.jsonl"), {**source(place / "large.jsonl"), "name": "large"}]
    (place / "two.yaml").write_text(yaml.safe_dump(tree))

    def start(cache: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.prepare_data", place / "two.yaml", f"data.cache_dir={place / cache}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    began = time.monotonic()
    assert start("undisturbed").communicate() and (place / "undisturbed").exists()
    whole_time = time.monotonic() - began
    killed_while_writing, first_inode = 0, None
    for attempt in range(7):
        process = start("disturbed")
        if attempt < 5:  # wait for the shards to be begun
            while process.poll() is None and not list((place / "disturbed").glob("prepared/*.partial")):
                time.sleep(0.002)
        time.sleep(draw.random() * whole_time * (0.25 if attempt < 5 else 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in (place / "disturbed").glob("prepared/*-*[0-9a-f]"):
            names = [path.name for path in folder.iterdir()]
            assert "index.json" in names, f"{folder.name} bears its name and is not whole: {names}"
            assert damage(folder, [name for name in names if name != "SHA256SUMS"]) is None
            if folder.name.startswith("topics"):
                assert first_inode in (None, folder.stat().st_ino), "a finished source was made again"
                first_inode = folder.stat().st_ino
        killed_while_writing += bool(list((place / "disturbed").glob("prepared/*.partial")))
    process = start("disturbed")
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    ours, theirs = (
        content(place / name, without=("index.json", "SHA256SUMS")) for name in ("disturbed", "undisturbed")
    )
    assert ours == theirs and len(ours) > 8, "other shards, or leftovers"
    for ours in (place / "disturbed").rglob("index.json"):
        theirs = place / "undisturbed" / ours.relative_to(place / "disturbed")
        assert [{**json.loads(p.read_text()), "seconds": 0} for p in (ours,)] == [
            {**json.loads(theirs.read_text()), "seconds": 0}
        ]
    assert killed_while_writing >= 2, f"only {killed_while_writing} of 7 kills fell into the writing"
