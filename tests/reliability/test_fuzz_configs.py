"""Whatever stands in a config: a RunConfig that is read back equal, or one short sentence that names the file or key."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from train.config import LARGEST_FILE, RunConfig, load_config, to_dict, to_yaml

from ..configs import CONFIGS
from ..train.conftest import ROOT, environment
from .fuzz import CASES, fuzz, sentence_of  # noqa: F401  (a fixture)

REAL = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in CONFIGS}
BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)

HOSTILE_VALUES = [
    "", "~", "null", "true", "no", "on", "-1", "0", "1", "-0", "1e5", "3e-4", '"3e-4"', '"012"', '"1_0"', "'true'", "1e999", "-1e999", ".nan", ".inf",
    "-.inf", "1e-400", "012", "0x1F",
    "1_000",
    "1" + "0" * 25, "-" + "9" * 40, "9" * 400, "9" * 5000, "9" * 400 + ".5", "9223372036854775807", "9223372036854775808", "-9223372036854775809",
    "4294967296",
    "[]", "{}", "[[]]", "[1, 2]", "{a: b}", "[~]", "{? [a] : b}", "[" * 15 + "]" * 15, "[" * 2000, "{a: " * 300, "- " * 200, "? " * 200,
    "&a x", "*a", "&a [*a]", "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "!!omap [a: b]",
    "!!int x",
    "!!map [[a, b]]", "!!timestamp 2001-99-99", "!x y", "! 5", "<<", "2001-01-01", "1:30", "'", '"', "''", '"\\0"', '"\\ud800"', '"\\u2028"',
    '"a\\nb"', "|", ">", "|\n    text",
    "../../etc/passwd", "/dev/zero", "~/x", "a" * 300, "é" * 100, "\U0001f600", "x" * 100_000, "$(id)", "{{ 1 }}", "%s%n", "auto", "cpu", "jsonl",
    "yarn", "-", "--help",
    "{rope_type: yarn, factor: 1e308, original_max_position_embeddings: 1" + "0" * 400 + "}",
    "{rope_type: yarn, factor: 2, original_max_position_embeddings: 64}",
    "{rope_type: [yarn]}", "[0, 0]", "[" + "0, " * 3000 + "0]", "[{name: a, kind: jsonl, path: x}]", "[{name: a}]", "[{}]",
    "[{name: a, kind: jsonl, path: x, weight: 1e300}]",
]  # fmt: skip
VALUES = (
    st.sampled_from(HOSTILE_VALUES)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ).map(lambda value: json.dumps(value, ensure_ascii=False))
)
LINES = st.sampled_from(
    [BILLION_LAUGHS, "base: x.yaml", "base: [a]", "base: /dev/zero", "base: .", "base: missing.yaml", 'base: "a\\0b"', "<<: {seed: 1}", "? a", "---",
     "...", "%YAML 9.9", "%TAG ! x"]
    + ["\tseed: 1", "seed: 1", "# comment", "- a", "'", "[", "}", ": :", "model:", "train: {steps: 1}", "\x00", "\x85", "\u2028", "\ufeff"]
)  # fmt: skip


def set_value(line: str, value: str) -> str:
    key, colon, _ = line.partition(":")
    return f"{key}: {value}" if colon else f"{line} {value}"


def change(lines: list[str], at: int, how: str, value: str, line: str) -> list[str]:
    """The lines of a config with the one at `at` changed."""
    at %= max(len(lines), 1)
    before, here, after = lines[:at], lines[at : at + 1] or [""], lines[at + 1 :]
    indent = here[0][: len(here[0]) - len(here[0].lstrip())]
    changed = {
        "drop": [],
        "double": here * 2,
        "rename": [here[0].replace(":", "x:", 1)],
        "swap letters": [indent + here[0].strip()[::-1]],
        "value": [set_value(here[0], value)],
        "insert": [*here, indent + line],
        "indent": [" " + here[0]],
        "tab": [here[0].replace("  ", "\t")],
        "value as key": [f"{indent}{value}: 1"],
    }
    return [*before, *changed[how], *after]


def encode(text: str, how: str, at: int) -> bytes:
    """The file's bytes; in most cases just UTF-8."""
    raw = text.encode("utf-8", "surrogatepass")
    at %= len(raw) + 1
    return {
        "CRLF": raw.replace(b"\n", b"\r\n"),
        "CR": raw.replace(b"\n", b"\r"),
        "BOM": b"\xef\xbb\xbf" + raw,
        "UTF-16": text.encode("utf-16", "surrogatepass"),
        "latin-1": raw[:at] + b"\xe9" + raw[at:],
        "cut": raw[:at],
        "NUL": raw[:at] + b"\0" + raw[at:],
        "twice": raw + raw,
        "much": raw + b"name: " + b"x" * 1_000_000,
        "too much": raw + b"#" * LARGEST_FILE,
    }.get(how, raw)


HOW = [*["value"] * 12, "drop", "drop", "rename", "double", "swap letters", "insert", "indent", "tab", "value as key"]
CHANGES = st.tuples(st.integers(0, 400), st.sampled_from(HOW), VALUES, LINES)
ENCODINGS = [*[""] * 80, *["CRLF", "BOM"] * 2, "CR", "UTF-16", "latin-1", "cut", "NUL", "twice", "much", "too much"]


@st.composite
def mutated_configs(draw: st.DrawFn) -> tuple[str, bytes]:
    """(name of a real config, its bytes after one to three changes)"""
    name = draw(st.sampled_from(sorted(REAL)))
    lines = REAL[name].splitlines()
    for change_ in draw(st.lists(CHANGES, min_size=1, max_size=3)):
        lines = change(lines, *change_)
    return name, encode("\n".join(lines) + "\n", draw(st.sampled_from(ENCODINGS)), draw(st.integers(0, 5000)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of configs/, so that `base` leads where it does."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def check_file(path: Path, folder: Path) -> None:
    """`path` loads to a config that is read back equal, or gets its sentence."""
    try:
        config = load_config(path)
    except ValueError as error:
        sentence_of(error, names=(str(folder), "/dev/zero: cannot read this config file"))
        return
    assert_read_back_equal(config, folder)


def assert_read_back_equal(config: RunConfig, folder: Path) -> None:
    assert dataclasses.is_dataclass(config)
    saved = folder / "saved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config


def test_fuzz_real_configs_changed_in_any_way(fuzz, folder):  # noqa: F811
    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        path = folder / name
        path.write_bytes(content)
        try:
            check_file(path, folder)
        finally:
            path.write_text(REAL[name], encoding="utf-8")

    first = [("configs/families/mixtral.yaml", b"base: |\n  a\n  b\n"), *((name, REAL[name].encode()) for name in REAL)]
    fuzz("configs", mutated_configs(), check, first)


PIECES = st.sampled_from(
    ["train", "steps", "seed", "base", "name", ": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!int ", "!!map ", "!!seq ",
     "!!set ", "!!float ",
     "!!omap ", "!!pairs ", "!!merge ", "!!null ", "!!str ", "!!binary ", "!!timestamp ", "!!value ", "!x ", "! ", "!<tag> ", "<<", "|\n ", "|9\n",
     ">-\n ", "'", '"', "%TAG ! x\n", "---\n",
     "...\n", "? ", "#", "\t", "1e5", "0", ".nan", "~", "=", "\\", "\\x41", "\\ud800", "\r", "\ufeff", "\ud800", "\x00", "\x1b[2J"]
)  # fmt: skip


def test_fuzz_any_pieces_of_yaml_and_any_bytes(fuzz, folder):  # noqa: F811
    def check(content: str | bytes) -> None:
        path = folder / "any.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        check_file(path, folder)

    fuzz(
        "yaml_pieces", st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join) | st.binary(max_size=60), check
    )


def leaves(tree: dict, prefix: str = "") -> list[str]:
    """The dotted names of all keys."""
    names = []
    for key, value in tree.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict):
            names += leaves(value, f"{prefix}{key}.")
    return names


KEYS = (
    st.sampled_from(leaves(to_dict(RunConfig())))
    | st.sampled_from(["", ".", "..", "base", "model.", ".model", "train..steps", "a.b.c.d", "name.x", "data.sources.0", "x" * 5000, "a." * 3000,
    "--help", "-"])
    | st.text(max_size=10)
)  # fmt: skip


def test_fuzz_overrides(fuzz, folder):  # noqa: F811
    path = folder / "configs/quickstart/pretrain.yaml"

    def check(overrides: list[tuple[str, str, str]]) -> None:
        texts = ["".join(parts) for parts in overrides]
        try:
            config = load_config(path, texts)
        except ValueError as error:
            sentence_of(error, names=(str(path), *(repr(text)[:40] for text in texts)))
        else:
            assert_read_back_equal(config, folder)

    equals = st.sampled_from(["=", "=", "=", "=", "==", " = ", "", ":"])
    first = [[(key, "=", value)] for value in HOSTILE_VALUES for key in ("wandb.project", "model.rope_scaling")]
    fuzz("overrides", st.lists(st.tuples(KEYS, equals, VALUES), min_size=1, max_size=3), check, first)


# What would take for ever, or all memory, is read by a process that has little of both.

LOADER = """
import sys
from train.config import load_config
for path in sys.argv[1:]:
    try:
        load_config(path)
        print("loaded")
    except ValueError as error:
        print(error)
"""


def test_time_and_memory_are_bounded(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def link(name: str, target: str) -> Path:
        (tmp_path / name).symlink_to(target)
        return tmp_path / name

    for i in range(30):
        write(f"chain-{i}.yaml", f"base: chain-{i + 1}.yaml")
    os.mkfifo(tmp_path / "pipe")
    os.truncate(write("sparse.yaml", ""), 8 * 2**30)
    expected = {
        write("laughs.yaml", BILLION_LAUGHS): "laughs.yaml, line 1: not readable as YAML: anchors and aliases",
        write("alias.yaml", "train: &a {steps: *a}"): "line 1: not readable as YAML: anchors and aliases",
        write("merge.yaml", "<<: {seed: 1}"): "unknown key '<<'",
        write("tag.yaml", "seed: !!python/object/apply:os.getpid []"): "line 1: not readable as YAML: tags (!) are not taken",
        write("deep.yaml", "[" * 500_000): "line 1: not readable as YAML: nested more than 20 deep",
        write("deeper.yaml", "- " * 500_000): "not readable as YAML: nested more than 20 deep",
        write("large.yaml", b"#" * (LARGEST_FILE + 1)): "larger than the 1 MiB that a config may have",
        write("scalar.yaml", "name: " + "x" * 1_000_000): "name: 'xxx",
        write("key.yaml", "x" * 1_000_000 + ": 1"): "not readable as YAML",
        write("number.yaml", "seed: " + "9" * 1_000_000): "a number of 1000000 digits",
        write("list.yaml", "train: {steps: 1}\nmodel: {mlp_only_layers: [" + "0," * 20_000 + "]}"): "a layer is named twice",
        write("layers.yaml", "model: {num_hidden_layers: 1000000000000}"): "model.num_hidden_layers: 1000000000000 must be at most 1024",
        write("twice.yaml", "".join(f"k{i}: 1\n" for i in range(20_000)) + "k0: 2"): "line 20001: not readable as YAML: key 'k0' is given twice",
        write("many.yaml", "".join(f"k{i}: 1\n" for i in range(20_000))): "unknown key 'k0'",
        write("binary.yaml", bytes(range(256)) * 4000): "not UTF-8 text",
        write("half.yaml", r'runs_dir: "\ud800"'): r"runs_dir: '\ud800' holds half a character",
        write("nul.yaml", r'runs_dir: "\0"'): r"runs_dir: '\x00' holds NUL",
        link("zero.yaml", "/dev/zero"): "not a regular file",
        link("loop.yaml", "loop.yaml"): "cannot read this config file (Too many levels of symbolic links)",
        link("self.yaml", "."): "it is a folder",
        tmp_path / "pipe": "not a regular file",
        tmp_path / "sparse.yaml": "larger than the 1 MiB that a config may have",
        tmp_path / "chain-0.yaml": "`base` leads through more than 10 files",
        tmp_path / "no/such": "cannot read this config file (No such file or directory)",
        write("file", "seed: 1") / "below": "cannot read this config file (Not a directory)",
        Path("n" * 5000): "cannot read this config file (File name too long)",
    }  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (100, 100))  # seconds for all of them; a hang is killed
        resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))  # bytes; torch alone takes a quarter of it

    process = subprocess.run(
        [sys.executable, "-c", LOADER, *map(str, expected)],
        cwd=ROOT, env=environment(), preexec_fn=limit, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    lines = process.stdout.splitlines()
    assert len(lines) == len(expected), process.stdout
    for line, (path, words) in zip(lines, expected.items()):
        assert words in line and len(line) < 600, f"{path.name[:40]}: {line}"


def test_cases_are_as_many_as_promised():
    assert sum(cases.everyday for cases in CASES.values()) >= 300
    assert sum(cases.all for cases in CASES.values()) >= 2000
