"""Which keys of the runs' configs differ, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from eval.history import Stage
from eval.page import DASH, Cell, details, figure, run_tables

MOST_KEYS = 120  # shown; runs that differ in more have little in common
LONGEST_KEY, LONGEST_VALUE = 200, 120  # characters
ABSENT, PRESENT = object(), object()
# Where things lie and what they are called says nothing about a run.
PLACES = frozenset(
    ("name", "runs_dir", "data.cache_dir", "tokenizer.path", "wandb.mode", "wandb.project", "wandb.group")
)


def config_differences(stages: Sequence[Stage], names: Sequence[str]) -> str:
    """A card with every key whose values differ; those of folders and names in a drawer."""
    flat = [{key: value for key, value in flattened(stage.tree).items() if len(key) <= LONGEST_KEY} for stage in stages]
    keys = _differing(flat)
    matter = [key for key in keys if key not in PLACES]
    content = run_tables(names, _grouped(matter[:MOST_KEYS], flat))
    more = f" {len(matter) - MOST_KEYS} more differ." if len(matter) > MOST_KEYS else ""
    caption = f"Keys of config.yaml whose values are not the same for all; the rest is equal.{more}"
    if not matter and all(flat):
        content, caption = "<p>All keys of the configs that matter are equal.</p>", ""
    places = run_tables(names, [(key, _cells(key, flat)) for key in keys if key in PLACES])
    return figure("Config", content, caption) + (details("Names and folders", places) if places else "")


def flattened(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as a.b keys; items of a list of mappings by their names, where each has its own: a.NAME is then PRESENT."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        by_name = {str(item["name"]): {key: value for key, value in item.items() if key != "name"} for item in tree}
        if len(by_name) < len(tree):
            return {prefix: tree}
        flat: dict[str, object] = {}
        for name, item in by_name.items():
            flat |= {f"{prefix}.{name}": PRESENT} | (flattened(item, f"{prefix}.{name}") if item else {})
        return flat
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree} if prefix else {}
    flat = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _differing(flat: Sequence[dict]) -> list[str]:
    """Keys whose values are not the same for all. Of an item that a run lacks, that is said once, not of each of its keys."""
    items = {name for each in flat for name, value in each.items() if value is PRESENT}
    found = []
    for key in dict.fromkeys(key for each in flat for key in each):
        owners = [key[:i] for i, letter in enumerate(key) if letter == "." and key[:i] in items]
        values = [each.get(key, ABSENT) for each in flat if all(owner in each for owner in owners)]
        if any(value != values[0] for value in values):
            found.append(key)
    return found


def _grouped(keys: Sequence[str], flat: Sequence[dict]) -> list[tuple]:
    """Rows of a table, with a heading for each section of the config."""
    rows: list[tuple] = []
    sections = dict.fromkeys(key.partition(".")[0] for key in keys)
    for name in sections:
        rows.append((name, None))
        for key in keys:
            head, _, rest = key.partition(".")
            if head == name:
                rows.append((rest or head, _cells(key, flat)))
    return rows


def _cells(key: str, flat: Sequence[dict]) -> list[Cell]:
    return [Cell(_shown(each.get(key, ABSENT))) for each in flat]


def _shown(value: object) -> str:
    if value is ABSENT:
        return DASH
    if value is PRESENT:
        return "yes"
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("\n...\n").strip()
    )
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} …"
