"""What a run folder tells about itself, read without torch: config, metrics, samples, evaluation, machine.

Everything is optional, because a report is most wanted of a run that stopped half-way: a missing file is an empty
part and a line torn by a kill is skipped. After a resume the same step may stand in metrics.jsonl twice: the
last row of a step wins.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass
class Stage:
    """One training run as its folder describes it; a chat model's report shows two, pretraining and fine-tuning."""

    folder: Path
    config: dict = field(default_factory=dict)  # config.yaml as plain mappings
    config_text: str = ""
    train: list[dict] = field(default_factory=list)  # rows of kind train, by step
    held_out: list[dict] = field(default_factory=list)  # rows of kind held_out, by step
    samples: list[dict] = field(default_factory=list)  # by step, then in the order of the prompts
    run: dict = field(default_factory=dict)  # run.json: machine, sessions, summary
    evaluation: dict = field(default_factory=dict)  # evaluation.json
    stages: dict = field(default_factory=dict)  # stages.json: name -> seconds, as scripts/quickstart.sh keeps them

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def is_chat(self) -> bool:
        return self.section("data").get("format") == "chat"

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in (*self.train, *self.held_out)), default=0)

    @property
    def tokens_seen(self) -> int:
        return max((row.get("tokens") or 0 for row in (*self.train, *self.held_out)), default=0)

    @property
    def seconds(self) -> float:
        """Training time: what the metrics counted, or the sum over sessions where they counted nothing."""
        counted = max((row.get("train_seconds") or 0.0 for row in (*self.train, *self.held_out)), default=0.0)
        return counted or sum(session.get("seconds") or 0.0 for session in self.run.get("sessions", []))

    def section(self, key: str) -> dict:
        """A section of the config; empty where the config lacks it."""
        value = self.config.get(key)
        return value if isinstance(value, dict) else {}

    def sources(self) -> dict[str, dict]:
        """Held-out figures of each source: of the evaluation where there is one, otherwise the newest of training."""
        measured = self.evaluation.get("heldout")
        return measured or (self.held_out[-1].get("sources", {}) if self.held_out else {})


def read_stage(folder: str | Path) -> Stage:
    """Reads one run folder. Raises ValueError where it is none (neither config.yaml nor metrics.jsonl)."""
    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(
            f"{folder}: no run folder (neither config.yaml nor metrics.jsonl in it); give one such as runs/NAME"
        )
    rows = _read_json_lines(folder / "metrics.jsonl")
    rows = [row for row in rows if isinstance(row.get("step"), int)]
    text = _read_text(folder / "config.yaml")
    config = yaml.safe_load(text) if text else {}
    return Stage(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        train=_newest_by_step([row for row in rows if row.get("kind") == "train"]),
        held_out=_newest_by_step([row for row in rows if row.get("kind") == "held_out"]),
        samples=_newest_by_step(_read_json_lines(folder / "samples.jsonl"), "prompt"),
        run=_read_json(folder / "run.json"),
        evaluation=_read_json(folder / "evaluation.json"),
        stages=_read_json(folder / "stages.json"),
    )


def read_lineage(folder: str | Path) -> list[Stage]:
    """The run and the runs it started from, oldest first; an ancestor that is no longer there ends the line."""
    stages = [read_stage(folder)]
    while parent := _find_parent(stages[0]):
        if any(parent.resolve() == stage.folder.resolve() for stage in stages):
            break
        stages.insert(0, read_stage(parent))
    return stages


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (
        (folder / "config.yaml").is_file() and not (folder / "state.json").is_file()
    )


def run_folder_of(path: Path) -> Path | None:
    """The run folder that `path` is or lies in: a checkpoint lies two folders deep in its run."""
    return next((folder for folder in (path, *list(path.absolute().parents)[:2]) if is_run(folder)), None)


def _find_parent(stage: Stage) -> Path | None:
    init_from = stage.section("train").get("init_from")
    if not init_from:
        return None
    if found := run_folder_of(Path(init_from)):
        return found
    # Runs that moved to another machine together stand side by side still.
    siblings = (stage.folder.absolute().parent / part for part in Path(init_from).parts if part not in ("/", "..", "."))
    return next((folder for folder in siblings if is_run(folder)), None)


def finite(values: list) -> list[float]:
    """Numbers as they are; null, NaN, infinities and text as NaN, which the charts leave out."""
    good = (isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return [float(v) if ok else math.nan for v, ok in zip(values, good, strict=True)]


def _newest_by_step(rows: list[dict], *more_keys: str) -> list[dict]:
    newest = {(row.get("step", 0), *(row.get(key) for key in more_keys)): row for row in rows}
    return sorted(newest.values(), key=lambda row: row.get("step", 0))


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(_read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_json_lines(path: Path) -> list[dict]:
    rows = []
    for line in _read_text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(row, dict):
            rows.append(row)
    return rows
