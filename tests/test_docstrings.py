"""Everything public says what it is: modules, classes and functions of the program, but for what the rules below let go.

A docstring that repeats a name helps no one, so it may be missing where
- the name, the annotated return and a body of one statement say all (a property, a conversion);
- the method is one that torch calls and the class's docstring describes (`BY_CLASS`), or a base class of ours describes it;
- it is a command's `main`: the module's docstring is what `--help` and the reader get.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for folder in ("data", "eval", "model", "scripts", "train") for path in (ROOT / folder).rglob("*.py")
)
BY_CLASS = {"forward", "backward", "reset_parameters"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_public(node: ast.AST) -> bool:
    return isinstance(node, Definition) and not node.name.startswith("_")


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
CLASSES = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}


def described_by_a_base(cls: ast.ClassDef, method: str) -> bool:
    """Whether a class of ours, somewhere above `cls`, has a docstring on this method."""
    for base in cls.bases:
        above = CLASSES.get(
            base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
        )
        if above is None or above is cls:
            continue
        same = [node for node in above.body if is_public(node) and node.name == method]
        if any(ast.get_docstring(node) for node in same) or described_by_a_base(above, method):
            return True
    return False


def may_be_silent(node: Definition, cls: ast.ClassDef | None) -> bool:
    if isinstance(node, ast.ClassDef):
        return False
    if cls is None:
        return node.name == "main" or says_itself(node)
    by_class = node.name in BY_CLASS and ast.get_docstring(cls) is not None
    return by_class or says_itself(node) or described_by_a_base(cls, node.name)


def says_itself(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
    return len(node.body) == 1 and node.returns is not None and all(a.annotation is not None for a in arguments)


def silent(path: Path) -> Iterator[str]:
    tree = TREES[path]
    if tree.body and ast.get_docstring(tree) is None:
        yield f"{name_of(path)}: the module"
    for node in tree.body:
        if not is_public(node):
            continue
        if ast.get_docstring(node) is None and not may_be_silent(node, None):
            yield f"{name_of(path)}:{node.lineno}: {node.name}"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if is_public(method) and ast.get_docstring(method) is None and not may_be_silent(method, node):
                    yield f"{name_of(path)}:{method.lineno}: {node.name}.{method.name}"


@pytest.mark.parametrize("folder", ["data", "eval", "model", "scripts", "train"])
def test_everything_public_has_a_docstring(folder):
    missing = [line for path in FILES if name_of(path).startswith(f"{folder}/") for line in silent(path)]
    assert not missing, "these say nothing of what they are:\n" + "\n".join(missing)


def test_commands_show_how_they_are_run():
    """The docstring of every command has the line to type."""
    commands = [path for path in FILES if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    assert len(commands) > 10
    for path in commands:
        module = name_of(path).removesuffix(".py").replace("/", ".")
        assert f"python -m {module}" in (ast.get_docstring(TREES[path]) or ""), f"{name_of(path)}: how is it run?"
