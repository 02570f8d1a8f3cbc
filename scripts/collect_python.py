"""Collects this machine's Python sources as text to train on: cache/python/{stdlib,packages}.jsonl and manifest.json.

    python -m scripts.collect_python [--out cache/python]

The ablation studies (configs/ablations/) train on them. Written once: a second call finds them and does nothing, so that a
package installed later does not change the text in the middle of a study. The manifest says what they hold, which packages
are held out, what was left out and why, and has the fingerprint to name beside a figure.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

from data.python_sources import Survey, manifest, sources
from train import cli
from train.files import replace_file


def collect(out: Path) -> dict:
    """Writes the files unless they are there, and returns the manifest. ValueError where `out` cannot be written."""
    if found := _found(out):
        return found
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make the folder {out} ({error.strerror}); choose another") from None
    with open(out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and then finds them
        return _found(out) or _write(out)


def _write(out: Path) -> dict:
    survey = Survey()
    files = {group: (out / f"{group}.jsonl.partial").open("wb") for group in survey.packages}
    hashes = {group: hashlib.sha256() for group in files}
    for source in sources(survey):
        record = {"text": source.text, "package": source.package, "path": source.path, "held_out": source.held_out}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        files[source.group].write(line)
        hashes[source.group].update(line)
    for group, file in files.items():
        file.close()
        os.replace(file.name, out / f"{group}.jsonl")
    found = manifest(survey, {f"{group}.jsonl": digest.hexdigest() for group, digest in hashes.items()})
    replace_file(out / "manifest.json", json.dumps(found, indent=1) + "\n")  # last: where it is, the others are whole
    return found


def _found(out: Path) -> dict | None:
    """The manifest of files that are all there, else None."""
    path = out / "manifest.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        summary(found)  # all that it needs is there
        return found if all((out / name).is_file() for name in found["files"]) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it to collect the sources again") from None


def summary(found: dict) -> str:
    """The manifest in a few lines."""
    lines = []
    for group, about in found["groups"].items():
        train, held_out = about["train"], about["held_out"]
        lines.append(
            f"{group:<9} {len(about['packages']):>4} packages: {train['bytes'] / 1e6:7.1f} MB in {train['files']:,} files to train on, "
            f"{held_out['bytes'] / 1e6:.2f} MB in {held_out['files']:,} held out ({', '.join(about['held_out_packages']) or 'none'})"
        )
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in found["left_out"].items())
    return "\n".join([*lines, f"left out: {left_out or 'nothing'}", f"fingerprint {found['fingerprint'][:16]}"])


def main() -> int:
    parser = cli.parser(
        "Collects this machine's Python sources as text to train on.",
        "python -m scripts.collect_python --out cache/python",
    )
    parser.add_argument("--out", type=Path, default=Path("cache/python"), help="default: cache/python")
    arguments = parser.parse_args()
    there = _found(arguments.out) is not None
    found = collect(arguments.out)
    print(f"{arguments.out}: {'found' if there else 'written'} (Python {found['python']})\n{summary(found)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
