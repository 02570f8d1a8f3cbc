"""What a folder of task YAML may do that is not ours: describe tasks over data, and nothing else.

lm-evaluation-harness takes from a YAML file names of Python functions (`!function`) and of metrics that it would download
and run, paths of pickled tables, file systems that render templates of their own (fsspec's `reference://`), prompts out of
other files, and templates that reach into Python. A folder given with --include-path is read here first, and refused where
it asks for one of these; templates are rendered in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from data.words import one_line, short

MOST_FILES, LARGEST_FILE = 2000, 2**20
FORMATS = ("json", "csv", "parquet", "arrow", "text")  # `datasets` reads these without running anything
PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_OPTIONS = ("data_files", "data_dir", "cache_dir", "revision", "split", "field", "delimiter", "sep", "encoding")
# Paths and addresses; "::" and other schemes name file systems.
PLAIN_PLACE = re.compile(r"(https?://|hf://)?(?!.*(://|::)).*")
FORBIDDEN = ("unsafe_code", "trust_remote_code", "hf_evaluate", "use_prompt")  # code to download, and files of prompts


def check_folder(folder: Path, metrics: set[str], trusted: dict[str, str]) -> None:
    """ValueError, naming file and key, unless every YAML under `folder` describes tasks without code.

    `metrics` are the names that lm_eval knows by itself; `trusted` functions may be named where the Python file beside
    the YAML has this very text.
    """
    if not folder.is_dir():
        raise ValueError(f"--include-path: {folder} is no folder; give one with task YAML in it")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml"))
    if not files or len(files) > MOST_FILES:
        raise ValueError(f"--include-path: {folder} has {len(files):,} YAML files; it must have 1 to {MOST_FILES:,}")
    seen = set()
    while files:
        path = files.pop()
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        for key, node in _entries(_read(path, folder), path, trusted):
            if key == "include":  # such a file may have any name, and any file may be included
                files += _included(node, path, folder)
            else:
                _check_entry(key, node, path, metrics)


def _read(path: Path, folder: Path) -> yaml.Node | None:
    """The file's tree of mappings, lists and scalars, of which nothing is built."""
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{path}: is no plain file of {folder}; put the file itself there")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many for a task; keep data in data files")
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: no readable YAML ({one_line(error)}); mend it or take it out of the folder"
        ) from None


def _entries(node: yaml.Node | None, path: Path, trusted: dict[str, str]) -> Iterator[tuple[str, yaml.Node]]:
    """Every (key, value) of every mapping in it, each node once (aliases can repeat one a billion times), tags checked."""
    seen, todo = set(), [node] if node is not None else []
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag not in PLAIN and not _is_trusted(node, path, trusted):
            raise ValueError(
                f"{path}: line {node.start_mark.line + 1}: {short(node.tag)} names code, which a task from --include-path must "
                "not; use templates, filters and lm_eval's metrics, or, where you trust it, export the run "
                "(scripts.export_hf) and give the folder to lm_eval itself"
            )
        if isinstance(node, yaml.MappingNode):
            yield from ((str(key.value), value) for key, value in node.value)
            todo += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def _is_trusted(node: yaml.Node, path: Path, trusted: dict[str, str]) -> bool:
    if node.tag != "!function" or not isinstance(node.value, str) or node.value not in trusted:
        return False
    code = path.parent / f"{node.value.split('.')[0]}.py"
    if not code.is_file() or code.stat().st_size > LARGEST_FILE:
        return False
    return code.read_bytes() == trusted[node.value].encode()


def _included(node: yaml.Node, path: Path, folder: Path) -> list[Path]:
    names = [item.value for item in node.value] if isinstance(node, yaml.SequenceNode) else [node.value]
    for name in names:
        if not isinstance(name, str) or not (path.parent / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: include: {short(name)} lies outside {folder}; put a copy into the folder")
    return [path.parent / name for name in names]


def _check_entry(key: str, node: yaml.Node, path: Path, metrics: set[str]) -> None:
    value, good, remedy = node.value, True, "leave it out"
    if key == "dataset_path":
        good = isinstance(value, str) and (value in FORMATS or (HUB_NAME.fullmatch(value) and not Path(value).exists()))
        remedy = f"give one of {', '.join(FORMATS)} (and data_files), or the name of a data set on the Hub"
    elif key == "dataset_kwargs" and isinstance(node, yaml.MappingNode):
        unknown = [str(name.value) for name, _ in value if name.value not in DATA_OPTIONS]
        good, value = not unknown, unknown[0] if unknown else value
        remedy = f"its keys may be {', '.join(DATA_OPTIONS)}"
    elif key in ("data_files", "data_dir"):
        strange = [text for text in _texts(node) if not PLAIN_PLACE.fullmatch(text)]
        good, value = not strange, strange[0] if strange else value
        remedy = "give a path, or an address with https://"
    elif key == "metric":  # wherever it stands: a merge key (<<) can carry it into a metric_list
        good = isinstance(value, str) and value in metrics
        remedy = "use a metric of lm_eval itself, such as acc, acc_norm or exact_match"
    elif key in FORBIDDEN:
        good = isinstance(value, str) and value.lower() in ("false", "no", "off", "null", "~", "")
    if not good:
        raise ValueError(f"{path}: {key}: {short(value)} is not allowed in a task from --include-path; {remedy}")


def _texts(node: yaml.Node) -> Iterator[str]:
    """The values in data_files: one, a list, or a mapping of splits to these."""
    if isinstance(node, yaml.ScalarNode):
        yield node.value
        return
    parts = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
    for part in parts:
        inner = part.value if isinstance(part, yaml.SequenceNode) else [part]
        # What is nested deeper is nothing that `datasets` takes; it stands here as a name that is refused.
        yield from (item.value if isinstance(item, yaml.ScalarNode) else "::" for item in inner)


def sandbox_templates() -> None:
    """From here on lm_eval renders task templates in jinja2's sandbox: its own environment lets a template call anything."""
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    if not isinstance(lm_eval.utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
        sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
        lm_eval.utils.env = sandbox
