"""RunConfig: one YAML file describes one run, and nothing is guessed.

    config = load_config("configs/quickstart/pretrain.yaml", ["train.steps=20", "model.n_routed_experts=0"])

The dataclass tree is the YAML tree. `base: OTHER.yaml` (relative to the file) names one parent whose mappings
are merged under this file's; lists are replaced whole. Every key is checked: unknown (with the nearest valid
name), given twice, of the wrong type, out of range. All errors are ValueError with the file, key, value and remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from data.config import DataConfig, TokenizerConfig
from data.words import short, short_name
from model.bounds import out_of_bounds
from model.config import ModelConfig
from train import strict_yaml

POSITIVE = {"min": 0.0, "exclusive": True}
NOT_NEGATIVE = {"min": 0.0}
FRACTION = {"min": 0.0, "max": 1.0}
AT_LEAST_ONE = {"min": 1}
MOST_STEPS = 10_000_000  # the learning rate of each one is kept in a table
LARGEST_FILE = 2**20  # bytes of a config; YAML is read at about 60 KB a second
MOST_PARENTS = 10  # files that `base` leads to, one after another
PATHS = ("runs_dir", "cache_dir", "path", "init_from")  # keys that name files and folders
LONGEST_NAME = 100  # characters of a run's name, which becomes a folder


@dataclass
class TrainConfig:
    """How it is trained: length, batch, learning rate, device, checkpoints."""

    init_from: str | None = None  # a run folder or a checkpoint whose weights training starts from (fine-tuning)
    steps: int | None = field(default=None, metadata={"min": 1, "max": MOST_STEPS})  # optimizer steps; or give epochs
    epochs: float | None = field(
        default=None, metadata={**POSITIVE, "max": 1e6}
    )  # passes over the weighted sources; or give steps
    tokens_per_step: int = field(
        default=16384, metadata=AT_LEAST_ONE
    )  # global: rows x context_length over all ranks and micro-batches
    micro_batch_size: int = field(default=16, metadata=AT_LEAST_ONE)  # rows of one forward pass on one rank
    optimizer: str = field(
        default="adamw", metadata={"choices": ("adamw", "muon")}
    )  # muon: Muon for the matrices inside the layers, AdamW for the rest
    learning_rate: float = field(default=1e-3, metadata=POSITIVE)  # peak
    min_learning_rate: float = field(default=0.1, metadata=FRACTION)  # at the end, as a fraction of the peak
    schedule: str = field(default="cosine", metadata={"choices": ("cosine", "linear", "wsd", "constant")})
    warmup_steps: int = field(default=0, metadata=NOT_NEGATIVE)  # linear from 0 to the peak
    decay_fraction: float = field(
        default=0.2, metadata=FRACTION
    )  # schedule wsd: the last part of the steps, falling linearly
    beta1: float = field(default=0.9, metadata={"min": 0.0, "max": 0.9999})
    beta2: float = field(default=0.95, metadata={"min": 0.0, "max": 0.99999})
    adam_eps: float = field(default=1e-8, metadata=POSITIVE)
    muon_momentum: float = field(default=0.95, metadata={"min": 0.0, "max": 0.9999})  # Nesterov's, of optimizer muon
    weight_decay: float = field(default=0.1, metadata=NOT_NEGATIVE)  # on matrices; never on norms, biases and router
    expert_weight_decay: float | None = field(
        default=None, metadata=NOT_NEGATIVE
    )  # on the routed experts' matrices; null: weight_decay
    router_lr_multiplier: float = field(default=1.0, metadata=POSITIVE)  # router's learning rate, relative
    grad_clip: float = field(
        default=1.0, metadata=NOT_NEGATIVE
    )  # largest gradient norm; 0: no clipping (the norm is still logged)
    spike_factor: float = field(
        default=10.0, metadata=NOT_NEGATIVE
    )  # skip a step whose gradient norm exceeds factor x its running mean; 0: only non-finite steps
    max_bad_steps: int = field(default=10, metadata=AT_LEAST_ONE)  # so many skipped steps in a row end the run
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda")})
    threads: int | None = field(
        default=None, metadata={"min": 1, "max": 1024}
    )  # CPU threads of a process; null: cores / processes on this machine
    precision: str = field(
        default="auto", metadata={"choices": ("auto", "float32", "bfloat16")}
    )  # autocast; weights stay float32
    compile: str = field(
        default="auto", metadata={"choices": ("auto", "on", "off")}
    )  # torch.compile of each decoder layer; auto: on CUDA with bfloat16
    activation_checkpointing: bool = (
        False  # recompute each layer in the backward pass: less memory, about a third more time
    )
    deterministic: bool = False  # CUDA: repeatable kernels, slower (the CPU is repeatable as it is)
    checkpoint_every: int = field(default=500, metadata=NOT_NEGATIVE)  # steps; 0: only at the end
    keep_checkpoints: int = field(default=2, metadata=AT_LEAST_ONE)  # the newest so many, beside the best
    keep_every: int = field(default=0, metadata=NOT_NEGATIVE)  # and those of every so many steps for ever; 0: none
    async_checkpoint: bool = True  # written beside the training, from a copy in memory; false: training waits, no copy
    stall_timeout: float = field(
        default=600.0, metadata={"min": 0.0, "max": 1e6}
    )  # seconds without a sign of life after which a process says so and ends; 0: never
    log_every: int = field(default=10, metadata=AT_LEAST_ONE)  # steps between rows of metrics.jsonl

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either train.steps or train.epochs (steps={self.steps}, epochs={self.epochs})")


@dataclass
class EvalConfig:
    """What is measured and said while training."""

    every: int = field(default=250, metadata=NOT_NEGATIVE)  # steps between held-out losses; 0: only at the end
    max_tokens: int | None = field(
        default=None, metadata=AT_LEAST_ONE
    )  # held-out tokens per source during training; null: all
    batch_size: int = field(default=32, metadata=AT_LEAST_ONE)  # rows of one forward pass
    prompts: list[str] = field(
        default_factory=list
    )  # text continued (pretraining) or user turns answered (SFT) at each evaluation
    sample_tokens: int = field(default=64, metadata=AT_LEAST_ONE)  # tokens of each sample
    best_source: str | None = None  # the source whose held-out loss chooses `best`; null: the mean over all targets


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = field(
        default="disabled", metadata={"choices": ("disabled", "offline", "online")}
    )  # offline: files in RUN/wandb, for `wandb sync`
    project: str = "minimoe"  # where wandb shows the run
    group: str | None = None  # runs shown together


@dataclass
class RunConfig:
    """One run: the whole YAML file."""

    name: str = "run"  # the run folder is runs_dir/name
    runs_dir: str = "runs"
    seed: int = field(default=0, metadata={"min": 0, "max": 2**32 - 1})
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False  # RUN/tensorboard/ as well, for `tensorboard --logdir runs`

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"name: {short(self.name)} becomes a folder; begin with a letter or digit and use letters, digits, "
                "'.', '_' and '-' alone"
            )
        if len(self.name) > LONGEST_NAME:
            raise ValueError(f"name: {short(self.name)} has {len(self.name)} characters; use at most {LONGEST_NAME}")
        if self.data.context_length is not None and self.data.context_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.context_length: {self.data.context_length} is more than model.max_position_embeddings: "
                f"{self.model.max_position_embeddings}; lower the first or raise the second"
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def context_length(self) -> int:
        """Tokens of a training row."""
        return self.data.context_length or self.model.max_position_embeddings


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, its parents and `a.b=value` overrides into a checked RunConfig.

    Raises ValueError naming file, key, value and remedy; FileNotFoundError never (it becomes a ValueError).
    """
    tree = _read_with_parents(Path(path), seen=())
    for override in overrides:
        _apply_override(tree, override)
    return _build(RunConfig, tree, where=short_name(path), key="")


def from_dict(tree: dict, where: str) -> RunConfig:
    """A RunConfig from a plain mapping, such as a checkpoint's saved config; `where` is named in errors."""
    return _build(RunConfig, tree, where=where, key="")


def to_dict(config: RunConfig) -> dict:
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """Text that `load_config` reads back to an equal RunConfig. ValueError if it grew too large to be read back."""
    text = strict_yaml.dump(to_dict(config))
    if len(text.encode("utf-8")) > LARGEST_FILE:
        raise ValueError(
            f"the config with every default written out is longer than the {LARGEST_FILE >> 20} MiB that are read; "
            "take many files together in one source by a glob"
        )
    return text


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict:
    if not _may_be_a_path(str(path)):
        raise ValueError(f"{short(str(path))}: no file can have this name; give the path of a YAML file")
    text = read_text(path)
    real = path.resolve()
    if real in seen:
        raise ValueError(f"{short_name(path)}: `base` leads back to this file; remove the circle")
    if len(seen) > MOST_PARENTS:
        raise ValueError(f"{short_name(path)}: `base` leads through more than {MOST_PARENTS} files; put them together")
    tree = strict_yaml.parse(text, short_name(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{short_name(path)}: a config is a mapping of keys to values, not {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ValueError(f"{short_name(path)}: base: {short(base)} must be the path of one YAML file")
    return _merge(_read_with_parents(path.parent / base, (*seen, real)), tree)


def read_text(path: Path) -> str:
    """A YAML file's text. ValueError, with the remedy, where there is none, or where it is too long or no UTF-8."""
    remedy = "give the path of a YAML file"
    try:
        if path.exists() and not path.is_file():  # a device or a pipe might never end
            what = "a folder" if path.is_dir() else "not a regular file"
            raise ValueError(f"{short_name(path)}: cannot read this config file (it is {what}); {remedy}")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(f"{short_name(path)}: cannot read this config file ({error.strerror}); {remedy}") from None
    if len(content) > LARGEST_FILE:
        raise ValueError(
            f"{short_name(path)}: larger than the {LARGEST_FILE >> 20} MiB that a config may have; {remedy}"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{short_name(path)}: this config file is not UTF-8 text; save it as UTF-8") from None


def _may_be_a_path(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character
        return False


def _merge(parent: dict, child: dict) -> dict:
    merged = dict(parent)
    for key, value in child.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _apply_override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{short(override)}: an override is written key=value, such as train.steps=100")
    if key == "base":
        raise ValueError(f"{short(override)}: `base` is a key of the file alone; write it there")
    if len(text) > LARGEST_FILE:
        raise ValueError(f"override {short(override)}: longer than the {LARGEST_FILE >> 20} MiB that a config may have")
    *folders, leaf = key.split(".")
    for folder in folders:
        if not isinstance(tree.setdefault(folder, {}), dict):
            raise ValueError(f"{short(override)}: {short_name(folder)} is not a section")
        tree = tree[folder]
    tree[leaf] = strict_yaml.parse(text, f"override {short(override)}") if text.strip() else None


def build(cls: type, tree: object, where: str) -> typing.Any:
    """Any dataclass from a plain mapping, checked as strictly as a config; `where` is named in errors."""
    return _build(cls, tree, where=where, key="")


def _build(cls: type, tree: object, where: str, key: str) -> typing.Any:
    """Fills dataclass `cls` from a mapping; `key` is the dotted path so far, for errors."""
    if not isinstance(tree, dict):
        raise ValueError(
            f"{where}: {key or 'the file'}: {short(tree)} must be a section with keys, not {type(tree).__name__}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = _type_hints(cls)
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(str(name)[:100], fields, n=1, cutoff=0.5)
            whole = ", ".join(fields)
            file = f"{cls.__module__.replace('.', '/')}.py"
            valid = whole if len(whole) < 200 else f"those of {cls.__name__} in {file}"
            remedy = f"did you mean {near[0]!r}?" if near else f"valid keys: {valid}"
            raise ValueError(f"{where}: unknown key {short(_join(key, name))}; {remedy}")
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in tree:
            raise ValueError(f"{where}: {_join(key, name)} is missing")
    values = {name: _convert(value, hints[name], where, _join(key, name)) for name, value in tree.items()}
    for name, value in values.items():
        _check_bounds(value, fields[name].metadata, where, _join(key, name))
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


_type_hints = functools.cache(typing.get_type_hints)  # 60 us each, and a config may have thousands of sources


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _convert(value: object, hint: typing.Any, where: str, key: str) -> typing.Any:
    """`value` as the type `hint`, or a ValueError that says what the key takes."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, key)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: {key}: {short(value)} must be a list")
        return [_convert(item, typing.get_args(hint)[0], where, f"{key}[{i}]") for i, item in enumerate(value)]
    wanted = origin or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise ValueError(f"{where}: {key}: {short(value)} must be {_TYPE_NAMES.get(wanted, wanted.__name__)}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{where}: {key}: {value!r} must be a finite number")
    if wanted is str and _SURROGATES.search(value):
        raise ValueError(f"{where}: {key}: {short(value)} holds half a character (a lone surrogate); remove it")
    if wanted is str and "\0" in value and key.rpartition(".")[2] in PATHS:
        raise ValueError(f"{where}: {key}: {short(value)} holds NUL, which no path can; remove it")
    return value


_SURROGATES = re.compile("[\ud800-\udfff]")

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a section",
    list: "a list",
}


def _check_bounds(value: object, bounds: typing.Mapping, where: str, key: str) -> None:
    if value is None or isinstance(value, (list, dict)):
        return
    if wrong := out_of_bounds(value, bounds):
        raise ValueError(f"{where}: {key}: {short(value)} {wrong}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {key}: {short(value)} must be a whole number of at most 64 bits")
