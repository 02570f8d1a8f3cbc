"""What a run folder tells about itself, read without torch: config, metrics, samples, evaluation, machine.

Everything is optional, because a report is most wanted of a run that stopped half-way: a missing file is an empty
part and a line torn by a kill is skipped. After a resume the same step may stand in metrics.jsonl twice: the
last row of a step wins. A run folder may come from a stranger: what does not fit the shapes below is left out as if it
were missing, a link is not followed, and what is too large to be ours is refused.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train.strict_yaml import parse

TEXT_LIMIT = 64 * 2**20  # bytes of a file that is read whole
CONFIG_LIMIT = 2**20  # of config.yaml, whose parser is slow
ROWS_LIMIT = 4 * 2**30  # of metrics.jsonl and samples.jsonl
LARGEST = 1e15  # of numbers: above, floating point no longer counts steps

# Shapes: int, float, bool and str stand for themselves (numbers finite and of a size that can be drawn), object for any plain value,
# [shape] for a list, {"key": shape} for a mapping whose other keys are ignored, {str: shape} for one with any keys.
FIGURES = {"loss": float, "perplexity": float, "bits_per_byte": float, "tokens": float, "bytes": float}
ROUTING = {"layers": [int], "load": [[float]], "max_vio": [float], "router_entropy": [float]}
TRAIN_ROW = {
    "step": int, "tokens": float, "train_seconds": float, "loss": float, "tokens_per_second": float, "routing": ROUTING,
    "learning_rate": float, "grad_norm": float, "memory_gib": float, "mfu": float, "skipped_steps": int,
}  # fmt: skip
HELD_OUT_ROW = {"step": int, "tokens": float, "train_seconds": float, "loss": float, "sources": {str: FIGURES}}
SAMPLE = {"step": int, "prompt": str, "text": str}
CONFIG = {
    "name": str,
    "model": {str: object},
    "data": {"format": str, "context_length": int, "sources": [{"name": str}]},
    "train": {"steps": int, "tokens_per_step": int, "init_from": str},
    "eval": {"best_source": str},
}
RUN = {"started": str, "machine": {"device": str, "processes": int, str: object}, "sessions": [{"seconds": float}]}
EXAMPLE = {"question": str, "answer": str, "wanted": str, "score": float}
TASK = {
    "metric": str, "score": float, "chance": float, "trivial": float, "trivial_name": str, "standard_error": float, "n": int,
    "higher_is_better": bool, "examples": [EXAMPLE],
}  # fmt: skip
EVALUATION = {
    "heldout": {str: FIGURES},
    "tasks": {str: TASK},
    "routing": {**ROUTING, "typical_tokens": [[[{"token": str, "lift": float}]]]},
    "seconds": float,
    "step": int,
}
STAGES = {str: float}


@dataclass
class Stage:
    """One training run as its folder describes it; a chat model's report shows two, pretraining and fine-tuning."""

    folder: Path
    config: dict = field(default_factory=dict)  # what is shown of config.yaml, as plain mappings
    config_text: str = ""
    tree: dict = field(default_factory=dict)  # all of config.yaml, as plain values
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
        """Whether it was trained on conversations."""
        return self.section("data").get("format") == "chat"

    @property
    def last_step(self) -> int:
        """The newest step that was logged."""
        return max((row["step"] for row in (*self.train, *self.held_out)), default=0)

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far."""
        return max((row.get("tokens") or 0 for row in (*self.train, *self.held_out)), default=0)

    @property
    def seconds(self) -> float:
        """Training time: what the metrics counted, or the sum over sessions where they counted nothing."""
        counted = max((row.get("train_seconds") or 0.0 for row in (*self.train, *self.held_out)), default=0.0)
        return counted or sum(session.get("seconds") or 0.0 for session in self.run.get("sessions") or [])

    def section(self, key: str) -> dict:
        """A section of the config; empty where the config lacks it."""
        value = self.config.get(key)
        return value if isinstance(value, dict) else {}

    def sources(self) -> dict[str, dict]:
        """Held-out figures of each source: of the evaluation where there is one, otherwise the newest of training."""
        measured = self.evaluation.get("heldout")
        return measured or (self.held_out[-1].get("sources") or {} if self.held_out else {})


def read_stage(folder: str | Path) -> Stage:
    """Reads one run folder. Raises ValueError where it is none (neither config.yaml nor metrics.jsonl)."""
    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(
            f"{folder}: no run folder (neither config.yaml nor metrics.jsonl in it); give one such as runs/NAME"
        )
    rows = list(_json_lines(folder / "metrics.jsonl"))
    text = "".join(_lines(folder / "config.yaml", CONFIG_LIMIT))
    tree = _tree(text)
    return Stage(
        folder=folder,
        config=fitting(tree, CONFIG),
        config_text=text,
        tree=fitting(tree, {str: object}),
        train=_newest_by_step(routed(fitting(row, TRAIN_ROW)) for row in rows if row.get("kind") == "train"),
        held_out=_newest_by_step(fitting(row, HELD_OUT_ROW) for row in rows if row.get("kind") == "held_out"),
        samples=_newest_by_step((fitting(row, SAMPLE) for row in _json_lines(folder / "samples.jsonl")), "prompt"),
        run=read_json(folder / "run.json", RUN),
        evaluation=routed(read_json(folder / "evaluation.json", EVALUATION)),
        stages=read_json(folder / "stages.json", STAGES),
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
    """Whether the folder is a run's: a checkpoint, which has a config.yaml too, is none."""
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
    try:
        if found := run_folder_of(Path(init_from)):
            return found
        # Runs that moved to another machine together stand side by side still.
        parts = (part for part in Path(init_from).parts if part not in ("/", "..", "."))
        return next((folder for part in parts if is_run(folder := stage.folder.absolute().parent / part)), None)
    except (OSError, ValueError):  # a text that can be no path: too long, or with a NUL
        return None


def finite(values: list) -> list[float]:
    """Numbers as they are; null, NaN, infinities and text as NaN, which the charts leave out."""
    good = (isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return [float(v) if ok else math.nan for v, ok in zip(values, good, strict=True)]


def _newest_by_step(rows: Iterable[dict], *more_keys: str) -> list[dict]:
    newest = {(row["step"], *(row.get(key) for key in more_keys)): row for row in rows if row.get("step", -1) >= 0}
    return sorted(newest.values(), key=lambda row: row["step"])


def fitting(value: object, shape: object) -> typing.Any:
    """What of `value` fits the shape; None for a value that does not, which a mapping then leaves out."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return {}
        pairs = ((key, fitting(item, shape.get(key, shape.get(str, None)))) for key, item in value.items())
        return {key: item for key, item in pairs if item is not None}
    if isinstance(shape, list):
        return [fitting(item, shape[0]) for item in value] if isinstance(value, list) else None
    if shape is None or isinstance(value, bool):
        return value if shape in (bool, object) else None
    if isinstance(value, int | float):
        fits = shape in (int, float, object) and (isinstance(value, int) or shape is not int)
        return value if fits and -LARGEST <= value <= LARGEST else None  # NaN is neither above nor below
    if isinstance(value, str):
        return value if shape in (str, object) else None
    return _plain(value) if shape is object else None


def _plain(value: object) -> object:
    """A mapping or list of plain values, a few levels deep, such as run.json's description of a machine."""
    if isinstance(value, dict):
        return fitting(value, {str: object})
    return fitting(value, [object])


def routed(row: dict) -> dict:
    """The row without routing whose lists do not fit together: L layers, and a load of L x E numbers."""
    routing = row.get("routing") or {}
    layers, load = routing.get("layers") or [], routing.get("load") or []
    widths = {len(experts or ()) for experts in load}
    whole = None not in layers and all(share is not None and share >= 0 for experts in load for share in experts or ())
    if "routing" in row and not (whole and load and len(layers) == len(load) and len(widths) == 1 and widths != {0}):
        del row["routing"]
    elif "typical_tokens" in routing and not _fits(routing["typical_tokens"], len(layers)):
        del routing["typical_tokens"]
    return row


def _fits(typical_tokens: list, n_layers: int) -> bool:
    """Whether there is a list for every layer, of lists of tokens with their lift."""
    return len(typical_tokens) == n_layers and all(
        token.keys() == {"token", "lift"}
        for experts in typical_tokens
        for tokens in experts or [[{}]]
        for token in tokens or ()
    )


def read_config(folder: Path) -> dict:
    """What is shown of a run's config.yaml; empty where there is none that can be read."""
    return fitting(_tree("".join(_lines(folder / "config.yaml", CONFIG_LIMIT))), CONFIG)


def _tree(text: str) -> object:
    try:
        return parse(text, "config.yaml")
    except ValueError:
        return {}


def open_plain(path: Path, limit: int) -> typing.BinaryIO | None:
    """The file, if it is a plain one; None where it is missing. ValueError where it is a link or larger than ours ever are."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(
                f"{path}: is a link, and only plain files of a run are read; put the file itself there"
            ) from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO):
            return None
        raise
    file = open(descriptor, "rb")
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_size <= limit:
        return file
    file.close()
    if stat.S_ISREG(about.st_mode):
        raise ValueError(
            f"{path}: has {about.st_size:,} bytes, and {limit:,} are read at most; remove or shorten this file"
        )
    return None


def _lines(path: Path, limit: int) -> Iterator[str]:
    """The lines of a plain file; none where it is missing."""
    if (file := open_plain(path, limit)) is not None:
        with io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n") as text:
            yield from text


def read_json(path: Path, shape: dict) -> dict:
    """What of a JSON file fits the shape; empty where it is missing or damaged. ValueError where it is a link or far too large."""
    text = "".join(_lines(path, TEXT_LIMIT))
    try:
        return fitting(json.loads(text or "{}"), shape)
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of more digits than Python reads
        return {}


def _json_lines(path: Path) -> Iterator[dict]:
    for line in _lines(path, ROWS_LIMIT):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn by a kill
        if isinstance(row, dict):
            yield row
