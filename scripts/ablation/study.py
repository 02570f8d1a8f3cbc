"""A study: one base config, its variants and seeds, read from YAML and checked whole before the first hour is spent.

    study = read_study("configs/ablations/experts.yaml")
    study.cells        every (seed, variant) as a RunConfig, in the order in which they are run

A cell is an ordinary run. Its folder is named after what it computes (`digest`), so that two studies with the same cell share
it, and so that another name, another place or another rhythm of logging makes no new one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.words import harmless, listed, short, short_name
from model.flops import count_parameters, flops_per_token, total_count
from train import config as run_config
from train import strict_yaml
from train.config import RunConfig, load_config
from train.plan import rows_of_step

LONGEST_NAME = 40  # characters of a variant's name, which becomes part of a folder's
ENOUGH_TOKENS = 20  # per active parameter; below, experts have hardly begun to pay (docs/decisions.md)

# What changes neither a weight nor a held-out figure, and so is no part of a cell's digest.
FREE_KEYS = frozenset(
    ("name", "runs_dir", "wandb", "tensorboard", "data.cache_dir", "train.stall_timeout", "train.checkpoint_every",
     "train.keep_checkpoints", "train.keep_every", "train.async_checkpoint", "train.log_every")
)  # fmt: skip
CELLS = "cells"  # folder of the runs of all studies
OWN_KEYS = ("name", "seed", "runs_dir", "base")  # the study's business, not a variant's


@dataclass
class Variant:
    """One line of the tables: the base with some keys set."""

    name: str
    set: dict = field(default_factory=dict)  # {dotted key: value}, as in train.config's overrides
    of: str | None = None  # an earlier variant, whose keys are set first
    longer: float | None = field(
        default=None, metadata={"min": 1.0, "exclusive": True}
    )  # `of` as it is, trained so many times as long: for comparisons at equal time alone
    unequal: str | None = None  # why its active parameters may differ from the others'

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) or len(self.name) > LONGEST_NAME:
            raise ValueError(
                f"variants: name {short(self.name)} becomes part of a folder's; use at most {LONGEST_NAME} letters, digits, '.', '_' "
                "and '-', a letter or digit first"
            )
        for key, value in self.set.items():
            if "." not in key and isinstance(value, dict):
                raise ValueError(
                    f"variant {self.name!r}: set: {short(key)}: would replace the whole section; write each key with a dot, such as "
                    f"{key}.{next(iter(value), 'KEY')}"
                )
            if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key) or key in OWN_KEYS:
                what = "is set by the study itself" if key in OWN_KEYS else "is no dotted key, such as train.steps"
                raise ValueError(f"variant {self.name!r}: set: {short(key)} {what}; use a key of the run config")
        if self.longer is not None and (self.of is None or self.set):
            raise ValueError(
                f"variant {self.name!r}: longer: {self.longer:g} takes `of`, the variant that is trained longer, and no keys of its own"
            )


@dataclass
class StudyFile:
    """The YAML of a study."""

    question: str
    base: str  # a run config, relative to this file: the scale
    seeds: list[int]
    compare_with: list[str]  # variants that all others are compared with; the first is the main one
    variants: list[Variant]  # in the order of the tables
    tolerance: float = field(
        default=0.03, metadata={"min": 0.0, "max": 1.0}
    )  # largest relative difference of active parameters

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {short(self.seeds)} must be one or more different whole numbers")
        names = [variant.name for variant in self.variants]
        if len({name.lower() for name in names}) < len(names) or not names:
            raise ValueError(f"variants: {listed(names)} must be one or more different names")
        for i, variant in enumerate(self.variants):
            before = [each.name for each in self.variants[:i] if each.longer is None]
            if variant.of is not None and variant.of not in before:
                raise ValueError(
                    f"variant {variant.name!r}: of: {short(variant.of)} is none of the variants before it ({listed(before)}; a longer "
                    "one cannot be built upon)"
                )
        compared = {variant.name for variant in self.variants if variant.longer is None}
        if not self.compare_with or not set(self.compare_with) <= compared:
            raise ValueError(
                f"compare_with: {short(self.compare_with)} must name one or more of the variants {listed(compared)}"
            )


@dataclass
class Cell:
    """One run of a study."""

    variant: str
    seed: int
    config: RunConfig
    digest: str


@dataclass(frozen=True)
class Size:
    """What a variant costs: parameters, operations, tokens."""

    total: int
    active: int
    matmul: int
    active_without_router: int
    flops_per_token: int  # training, forward and backward
    tokens: int

    @staticmethod
    def of(config: RunConfig) -> Size:
        """By arithmetic from the config alone."""
        count = total_count(config.model)
        router = count_parameters(config.model).get("router")
        return Size(
            *count,
            count.active - (router.active if router else 0),
            flops_per_token(config.model, config.context_length),
            config.train.steps * config.train.tokens_per_step,
        )


@dataclass
class Study:
    """A study as it will be run."""

    name: str  # its folder
    path: str  # of its YAML file, as typed
    file: StudyFile
    scale: str  # the base config's stem
    overrides: list[str]  # of the command line, on the base
    base: str | None  # of the command line, in place of the file's own
    root: Path  # folder of all studies' results; their cells are in root/CELLS
    configs: dict[str, RunConfig]  # of each variant; the seed is still the base's
    cells: list[Cell]  # seeds outermost, so that the first results are whole

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def cells_folder(self) -> Path:
        """Where the runs of all studies are."""
        return self.root / CELLS

    @functools.cached_property
    def sizes(self) -> dict[str, Size]:
        return {name: Size.of(config) for name, config in self.configs.items()}

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.file.variants if variant.name == name)


def read_study(path: str | Path, overrides: Sequence[str] = (), base: str | Path | None = None) -> Study:
    """Reads a study's YAML, with `base` in place of its own and `overrides` on the base, and builds every cell's config.

    ValueError, naming file, variant and key, for whatever would go wrong later: a key, a name, unequal variants.
    """
    path = Path(path)
    tree = strict_yaml.parse(run_config.read_text(path), short_name(path))
    file = run_config.build(StudyFile, tree, short_name(path))
    base_path = Path(base) if base is not None else path.parent / file.base
    _check_overrides(overrides)
    plain = load_config(base_path)
    changed = load_config(base_path, overrides)
    name = path.stem if base is None else f"{path.stem}-{base_path.stem}"
    if name.lower() == CELLS:
        raise ValueError(
            f"{short_name(path)}: {name!r} is the name of the runs' own folder; give this file another one"
        )
    if digest(changed) != digest(plain):
        name += f"-{digest(changed)}"  # a trial: its results must not take the place of the study's
    configs: dict[str, RunConfig] = {}
    for variant in file.variants:
        try:
            config = load_config(base_path, [*overrides, *settings(file, variant.name)])
            configs[variant.name] = _longer(config, variant.longer) if variant.longer is not None else config
            _check_alone(configs[variant.name])
        except ValueError as error:
            raise ValueError(f"{short_name(path)}: variant {variant.name!r}: {error}") from None
    try:
        run_config.build(RunConfig, {"name": name}, "the study's name, from its file's")
        _check_together(file, configs)
    except ValueError as error:
        raise ValueError(f"{short_name(path)}: {error}") from None
    runs_dir = Path(changed.runs_dir)
    root = runs_dir.parent if runs_dir.name == CELLS else runs_dir / "ablations"  # a base may name the cells' folder
    study = Study(name, str(path), file, base_path.stem, list(overrides), base and str(base), root, configs, [])
    study.cells = [_cell(study, variant.name, seed) for seed in file.seeds for variant in file.variants]
    return study


def _longer(config: RunConfig, factor: float) -> RunConfig:
    """The same run with so many times as many steps."""
    tree = run_config.to_dict(config)
    if config.train.steps is not None:
        tree["train"]["steps"] = round(config.train.steps * factor)
    return run_config.from_dict(tree, f"longer: {factor:g}")


def settings(file: StudyFile, name: str) -> list[str]:
    """A variant's keys, after those of the variants it is made of, as overrides."""
    variants, chain = {variant.name: variant for variant in file.variants}, [name]
    while (before := variants[chain[0]].of) is not None:
        chain.insert(0, before)
    pairs = [pair for each in chain for pair in variants[each].set.items()]
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in pairs]


def digest(config: RunConfig) -> str:
    """8 hex digits of the SHA-256 of what a run computes: its config without FREE_KEYS, and without what is at its default, so
    that a key which is added later, and changes nothing where it is left out, renames no cell."""
    return hashlib.sha256(json.dumps(_essence(config), sort_keys=True).encode("utf-8")).hexdigest()[:8]


def _essence(value: object, key: str = "") -> object:
    """`value` with its dataclasses as dicts of what is neither free nor at the default of its field."""
    if isinstance(value, list):
        return [_essence(item, f"{key}[]") for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    tree = {}
    for f in dataclasses.fields(value):
        dotted, here = f"{key}.{f.name}".removeprefix("."), getattr(value, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if dotted not in FREE_KEYS and here != default:
            tree[f.name] = _essence(here, dotted)
    return tree


def _cell(study: Study, variant: str, seed: int) -> Cell:
    config = dataclasses.replace(study.configs[variant], seed=seed)
    key = digest(config)
    name = cell_folder(study.cells_folder, key) or f"{variant}-{study.scale[:30]}-seed{seed}-{key}"
    try:
        config = run_config.from_dict(
            run_config.to_dict(config) | {"name": name, "runs_dir": str(study.cells_folder)}, f"seed {seed}"
        )
    except ValueError as error:
        raise ValueError(f"{short_name(study.path)}: {error}") from None
    return Cell(variant, seed, config, key)


def cell_folder(cells: Path, key: str) -> str | None:
    """Name of the folder of the cell with this digest, by whatever study it was made; None before there is one. Of two, which
    studies that began at the same time could make, the one that got further."""
    there = sorted(path for path in cells.glob(f"*-{key}") if path.is_dir())
    newest = {path: max((step.name for step in path.glob("checkpoints/step-*")), default="") for path in there}
    return max(there, key=newest.__getitem__).name if there else None


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.partition("=")[0] in ("name", "seed"):
            raise ValueError(f"{short(override)}: every cell has its own; write it without (--seeds chooses seeds)")


def _check_alone(config: RunConfig) -> None:
    """ValueError where a cell could not be trained, or its tokens counted."""
    if config.data.format != "text":
        raise ValueError(f"data.format: {config.data.format!r}; a study pretrains, which takes 'text'")
    if config.train.steps is None:
        raise ValueError("train.epochs: a study compares at equal tokens; give train.steps")
    names = [source.name for source in config.data.sources]
    if config.eval.best_source not in (None, *names):
        raise ValueError(f"eval.best_source: {config.eval.best_source!r} is no source; use one of {listed(names)}")
    rows_of_step(config, ranks=1)


def _check_together(file: StudyFile, configs: dict[str, RunConfig]) -> None:
    """ValueError where variants are not what a fair comparison needs: equal active parameters, tokens, context, data."""
    main = file.compare_with[0]
    reference, known = configs[main], {}
    active = total_count(reference.model).active
    for variant in file.variants:
        name, config = variant.name, configs[variant.name]
        here, tokens = total_count(config.model).active, Size.of(config).tokens
        if abs(here / active - 1) > file.tolerance and variant.unequal is None:
            raise ValueError(
                f"variants {main!r} and {name!r} have {active:,} and {here:,} active parameters, {here / active - 1:+.1%} apart (tolerance: "
                f"{file.tolerance:g}); make them equal, or give the reason as `unequal`"
            )
        if variant.longer is None and tokens != Size.of(reference).tokens:
            raise ValueError(
                f"variants {main!r} and {name!r} see {Size.of(reference).tokens:,} and {tokens:,} tokens; make train.steps x "
                "train.tokens_per_step equal, or use `longer`"
            )
        if config.context_length != reference.context_length:
            raise ValueError(
                f"variants {main!r} and {name!r} have contexts of {reference.context_length} and {config.context_length} tokens; "
                "make data.context_length equal"
            )
        for section in ("data", "tokenizer", "eval"):
            if _essence(getattr(config, section), section) != _essence(getattr(reference, section), section):
                raise ValueError(f"variants {main!r} and {name!r} differ in {section}; all must be measured alike")
        same = known.setdefault(digest(config), name)
        if same != name:
            raise ValueError(f"variants {same!r} and {name!r} are the same run; take one of them out")


def plan_table(study: Study, done: dict[str, int] | None = None) -> str:
    """Sizes of the variants as text, with how many of each one's cells are done, and a warning where tokens are few."""
    head = ["variant", "total", "active", "w/o router", "MFLOP/token", "tokens", "tokens/active"]
    rows = [head + (["done"] if done is not None else [])]
    for name, size in study.sizes.items():
        ratio = size.tokens / size.active
        row = [name, f"{size.total:,}", f"{size.active:,}", f"{size.active_without_router:,}"]
        row += [f"{size.flops_per_token / 1e6:.2f}", f"{size.tokens:,}", f"{ratio:.1f}"]
        rows.append(row + ([f"{done[name]}/{len(study.file.seeds)}"] if done is not None else []))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    few = [name for name, size in study.sizes.items() if round(size.tokens / size.active) < ENOUGH_TOKENS]
    if few:
        lines.append(f"fewer than {ENOUGH_TOKENS} tokens per active parameter: {', '.join(few)}")
    lines += [f"{v.name}: active parameters differ: {v.unequal}" for v in study.file.variants if v.unequal]
    return harmless("\n".join(lines))
