"""RunConfig: one YAML file describes one run, and nothing is guessed.

    config = load_config("configs/quickstart/pretrain.yaml", ["train.steps=20", "model.n_routed_experts=0"])

The dataclass tree is the YAML tree. `base: OTHER.yaml` (relative to the file) names one parent whose mappings
are merged under this file's; lists are replaced whole. Every key is checked: unknown (with the nearest valid
name), given twice, of the wrong type, out of range. All errors are ValueError with the file, key, value and remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig

POSITIVE = {"min": 0.0, "exclusive": True}
NOT_NEGATIVE = {"min": 0.0}
FRACTION = {"min": 0.0, "max": 1.0}
AT_LEAST_ONE = {"min": 1}


@dataclass
class TrainConfig:
    init_from: str | None = None  # a run folder or a checkpoint whose weights training starts from (fine-tuning)
    steps: int | None = field(default=None, metadata=AT_LEAST_ONE)  # optimizer steps; or give epochs
    epochs: float | None = field(default=None, metadata=POSITIVE)  # passes over the weighted sources; or give steps
    tokens_per_step: int = field(
        default=16384, metadata=AT_LEAST_ONE
    )  # global: rows x context_length over all ranks and micro-batches
    micro_batch_size: int = field(default=16, metadata=AT_LEAST_ONE)  # rows of one forward pass on one rank
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
    weight_decay: float = field(default=0.1, metadata=NOT_NEGATIVE)  # on matrices; never on norms, biases and router
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
        default=None, metadata=AT_LEAST_ONE
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
        default=600.0, metadata=NOT_NEGATIVE
    )  # seconds without a sign of life after which a process says so and ends; 0: never
    log_every: int = field(default=10, metadata=AT_LEAST_ONE)  # steps between rows of metrics.jsonl

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either train.steps or train.epochs (steps={self.steps}, epochs={self.epochs})")


@dataclass
class EvalConfig:
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
    mode: str = field(default="disabled", metadata={"choices": ("disabled", "offline", "online")})
    project: str = "minimoe"
    group: str | None = None  # runs shown together


@dataclass
class RunConfig:
    name: str = "run"  # the run folder is runs_dir/name
    runs_dir: str = "runs"
    seed: int = field(default=0, metadata={"min": 0, "max": 2**32 - 1})
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: {self.name!r} becomes a folder; use letters, digits, '.', '_' and '-' alone")
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
    return _build(RunConfig, tree, where=str(path), key="")


def from_dict(tree: dict, where: str) -> RunConfig:
    """A RunConfig from a plain mapping, such as a checkpoint's saved config; `where` is named in errors."""
    return _build(RunConfig, tree, where=where, key="")


def to_dict(config: RunConfig) -> dict:
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """Text that `load_config` reads back to an equal RunConfig."""
    return yaml.dump(to_dict(config), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=110)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader in which a key given twice is an error, `3e-4` is a number and `on`/`off`/`yes`/`no` are text."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


# YAML 1.2's core numbers and booleans in place of YAML 1.1's, which read 3e-4 as text, no as false and 012 as ten.
# Merge keys (<<) go too: `base` is how a file takes over another's keys.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)
_StrictLoader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node).replace("_", ""))
)
_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that also quotes the texts which _StrictLoader would read as numbers, such as 3e-4."""

    yaml_implicit_resolvers = {
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        + _StrictLoader.yaml_implicit_resolvers.get(first, [])
        for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _StrictLoader.yaml_implicit_resolvers.keys()
    }


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: no tag can build an object
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # `!!bool x`: a KeyError
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where}{line}: not readable as YAML: {reason}") from None


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise ValueError(f"{path}: `base` leads back to this file; remove the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read this config file ({error.strerror}); give the path of a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this config file is not UTF-8 text; save it as UTF-8") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a config is a mapping of keys to values, not {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: {base!r} must be the path of one YAML file")
    return _merge(_read_with_parents(path.parent / base, (*seen, path.resolve())), tree)


def _merge(parent: dict, child: dict) -> dict:
    merged = dict(parent)
    for key, value in child.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def _apply_override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override is written key=value, such as train.steps=100")
    *folders, leaf = key.split(".")
    for folder in folders:
        if not isinstance(tree.setdefault(folder, {}), dict):
            raise ValueError(f"{override!r}: {folder} is not a section")
        tree = tree[folder]
    tree[leaf] = _parse_yaml(text, f"override {override!r}") if text.strip() else None


def build(cls: type, tree: object, where: str) -> typing.Any:
    """Any dataclass from a plain mapping, checked as strictly as a config; `where` is named in errors."""
    return _build(cls, tree, where=where, key="")


def _build(cls: type, tree: object, where: str, key: str) -> typing.Any:
    """Fills dataclass `cls` from a mapping; `key` is the dotted path so far, for errors."""
    if not isinstance(tree, dict):
        raise ValueError(
            f"{where}: {key or 'the file'}: {tree!r} must be a section with keys, not {type(tree).__name__}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(fields)}"
            raise ValueError(f"{where}: unknown key {_join(key, name)!r}; {remedy}")
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
            raise ValueError(f"{where}: {key}: {value!r} must be a list")
        return [_convert(item, typing.get_args(hint)[0], where, f"{key}[{i}]") for i, item in enumerate(value)]
    wanted = origin or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise ValueError(f"{where}: {key}: {value!r} must be {_TYPE_NAMES.get(wanted, wanted.__name__)}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{where}: {key}: {value!r} must be a finite number")
    return value


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
    if "choices" in bounds and value not in bounds["choices"]:
        raise ValueError(f"{where}: {key}: {value!r} is none of {', '.join(bounds['choices'])}")
    low, high = bounds.get("min"), bounds.get("max")
    if low is not None and (value < low or (bounds.get("exclusive") and value <= low)):
        raise ValueError(
            f"{where}: {key}: {value!r} must be {'more than' if bounds.get('exclusive') else 'at least'} {_plain(low)}"
        )
    if high is not None and value > high:
        raise ValueError(f"{where}: {key}: {value!r} must be at most {_plain(high)}")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
