"""Where numbers go: metrics.jsonl (appended, never rewritten), the console with log.txt, and wandb if the config says so."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from pathlib import Path

from train.config import RunConfig, to_dict


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, without a last line that a kill cut off; empty if there is no file.

    A resumed run may log a step again: a reader keeps the last row of each (kind, step).
    """
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():  # bytes: a kill may cut inside a character
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill; the resumed run wrote it again
    return rows


def append_row(path: Path, row: dict) -> None:
    """Adds one JSON line. A line that a kill left unfinished is closed first."""
    line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode("utf-8"))


def _finite(value: object) -> object:
    """NaN and infinity, of a skipped step, as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reporter:
    """The run's voice, on rank 0; on other ranks every method does nothing.

    `say` prints and keeps in log.txt, `log` adds a row to metrics.jsonl and wandb, `progress` moves tqdm's bar.
    """

    def __init__(self, config: RunConfig, run_dir: Path, steps: int, start: int, speaks: bool) -> None:
        self.speaks, self.run_dir = speaks, run_dir
        self._wandb = self._bar = None
        if not speaks:
            return
        if config.wandb.mode != "disabled":
            self._wandb = _start_wandb(config, run_dir, self.say)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc=config.name, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        if not self.speaks:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
        with open(self.run_dir / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def log(self, row: dict) -> None:
        if not self.speaks:
            return
        append_row(self.run_dir / "metrics.jsonl", row)
        if self._wandb is not None:
            self._wandb.log(_flat(row))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Keeps a sample in samples.jsonl and says it."""
        if self.speaks:
            append_row(self.run_dir / "samples.jsonl", {"step": step, "prompt": prompt, "text": text})
            self.say(f"  {prompt!r} -> {text!r}")

    def progress(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: RunConfig, run_dir: Path, say) -> object:
    """The run's wandb run: the same one again after a resume. Online without a key goes offline and says so."""
    mode = config.wandb.mode
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"wandb.mode: {mode!r} needs wandb; run: pip install wandb, or set wandb.mode to disabled"
        ) from None

    id_file = run_dir / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            say(
                "wandb: no API key found (WANDB_API_KEY or `wandb login`), so this run is logged offline; `wandb sync` uploads it"
            )
            mode = "offline"
        run = wandb.init(
            project=config.wandb.project, group=config.wandb.group, name=config.name, id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow", mode=mode, dir=str(run_dir), config=to_dict(config),
        )  # fmt: skip
    except wandb.Error as error:
        raise ValueError(
            f"wandb.mode: {mode!r}: wandb could not start ({error}); set wandb.mode to offline or disabled"
        ) from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # a resumed run goes back some steps; wandb's own counter may not
    return run


def _flat(row: dict, prefix: str = "") -> dict:
    """Nested mappings as a/b keys; lists of numbers become a mapping by index."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
