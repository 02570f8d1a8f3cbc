"""Nothing in the sources can turn a file's bytes or a config's values into code: a walk over every syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from train import strict_yaml

from ..train.conftest import ROOT

PACKAGES = ("model", "data", "train", "eval", "scripts", "tests")
OURS = ("model", "data", "train", "eval")  # these start no process at all

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "runpy",
    "code",
}
CALLS = {
    "eval", "exec", "compile", "__import__", "execfile",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "yaml.load_all",
    "jinja2.Environment", "jinja2.Template", "Environment", "Template",
}  # fmt: skip
PICKLING = {  # methods that pickle what goes through them, or may
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list",
    "load_pickle", "read_pickle", "to_pickle", "apply_chat_template",
}  # fmt: skip
STARTERS = ("subprocess.", "os.exec", "os.spawn", "os.posix_spawn", "os.fork")

# Where a rule is broken for a reason: (file, what) -> the reason.
ALLOWED = {
    ("train/strict_yaml.py", "yaml.load"): "with its own loader, of which a test below says that it is a SafeLoader",
    ("tests/data/test_chat.py", "apply_chat_template"): "our own template, rendered by transformers",
    ("tests/eval/test_harness.py", "apply_chat_template"): "our own template, rendered by lm_eval",
    ("tests/scripts/formats/transformers_worker.py", "apply_chat_template"): "our own template, rendered by transformers",
}  # fmt: skip


def dotted(node: ast.AST) -> str:
    """a.b.c of a name or attribute; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else f".{node.attr}"
    return ""


def findings(source: str, ours: bool) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in the source that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in (names if isinstance(node, ast.Import) else [node.module or ""])}
            for name in roots & MODULES:
                yield node.lineno, name
            if ours and "subprocess" in roots:
                yield node.lineno, "subprocess"
            if isinstance(node, ast.ImportFrom) and node.module in (
                "torch",
                "yaml",
                "os",
                "jinja2",
                "torch.distributed",
            ):
                for name in names:
                    if (
                        f"{node.module}.{name}" in CALLS
                        or name in PICKLING
                        or name in ("load", "Loader", "UnsafeLoader", "FullLoader")
                    ):
                        yield node.lineno, f"{node.module}.{name}"
        elif isinstance(node, ast.Attribute) and dotted(node) in (
            "yaml.Loader",
            "yaml.UnsafeLoader",
            "yaml.FullLoader",
        ):
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or name.rsplit(".", 1)[-1] in PICKLING:
                yield node.lineno, name.rsplit(".", 1)[-1] if name.rsplit(".", 1)[-1] in PICKLING else name
            if ours and name.startswith(STARTERS):
                yield node.lineno, name
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                    if not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                        yield node.lineno, keyword.arg


def test_no_source_can_run_what_it_reads():
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 60
    found = []
    for path in files:
        name = str(path.relative_to(ROOT))
        for line, what in findings(path.read_text(encoding="utf-8"), ours=name.split("/")[0] in OURS):
            if (name, what) not in ALLOWED:
                found.append(f"{name}:{line}: {what}")
    assert not found, "\n".join(found)


def test_the_allow_list_is_needed():
    for (name, what), reason in ALLOWED.items():
        assert reason and what in {found for _, found in findings((ROOT / name).read_text(encoding="utf-8"), False)}, (
            name,
            what,
        )


def test_the_one_yaml_loader_builds_no_objects():
    assert issubclass(strict_yaml._Loader, yaml.SafeLoader)
    assert strict_yaml._Loader.yaml_multi_constructors == yaml.SafeLoader.yaml_multi_constructors
    assert set(strict_yaml._Loader.yaml_constructors) == set(yaml.SafeLoader.yaml_constructors)


def test_shell_scripts_evaluate_nothing_and_pipe_nothing_into_a_shell():
    for path in sorted(ROOT.rglob("*.sh")) + [ROOT / ".ci/run"]:
        if ".venv" in path.parts:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        bad = [
            line
            for line in lines
            if re.search(r"(^|[;&|]\s*)eval\s|\|\s*(ba|z|da)?sh\b|\bcurl\b|\bwget\b", line.split(" #")[0])
        ]
        assert not bad, f"{path}: {bad}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(f)", "import torch\ntorch.save(x, f)", "eval(text)", "exec(text)",
        "import os\nos.system(text)", "import subprocess\nsubprocess.run(text, shell=True)", "load_dataset(name, trust_remote_code=flag)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)", "import yaml\nyaml.load(text)", "from torch import load", "dist.all_gather_object(x, y)",
        "numpy.load(f, allow_pickle=True)", "tokenizer.apply_chat_template(m)", "import jinja2\njinja2.Environment()",
    ],
)  # fmt: skip
def test_the_walk_sees(source):
    assert list(findings(source, ours=False))


def test_the_walk_sees_processes_in_our_packages():
    assert list(findings("import subprocess", ours=True)) and list(findings("import os\nos.execv(a, b)", ours=True))


def test_no_hidden_pickles_lie_about():
    """Every binary file that a run leaves is one of these; none is a pickle or a zip, which torch.save writes."""
    tracked = [
        path for folder in (*PACKAGES, "configs", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    for path in tracked:
        if "__pycache__" not in path.parts:
            head = path.read_bytes()[:2]
            assert not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), path
    assert Path(ROOT / "model").is_dir()
