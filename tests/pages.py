"""The pages people read (READMEs, docs/*.md) as tests see them: files to write, commands to type, code to run, in their order."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCS = sorted(ROOT.glob("docs/*.md"))
RECORDS = ("decisions.md", "results.md")  # what was typed then, on some day; no one is told to type it again

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`(my/[\w.-]+\.\w+)`")  # in the reader's own folder
INLINE = re.compile(r"`(python -m [\w.]+ [^`\n]+|torchrun [^`\n]+ -m [^`\n]+|bash scripts/[^`\n]+)`")
CONSOLE = re.compile(r"^\$ (.*)\n(?!error: )", re.MULTILINE)  # shown errors are compared, not run
OUR_PACKAGES = ("data", "eval", "model", "scripts", "train")
FULL_WIDTH_COLON = "\uff1a"
TEXT_KEYS = {"text", "content", "value", "input", "output", "completion"}
COPIES = 300  # lines of a data file, made from the one or two that a page shows


@dataclass(frozen=True)
class Step:
    """What a reader does next: `file` (write `content` to `name`), `bash` (type `content`), or `python` (run `content`)."""

    kind: str
    content: str
    name: str = ""


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @functools.cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """(language, text) of each fenced block."""
        return BLOCK.findall(self.text)

    @property
    def prose(self) -> str:
        """The page without its blocks."""
        return BLOCK.sub("", self.text)

    @property
    def inline(self) -> list[str]:
        """What stands between single backticks."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def steps(self) -> list[Step]:
        """In the page's order. A block that begins with #! is a script of its own, and no step."""
        steps, end = [], 0
        for block in BLOCK.finditer(self.text):
            steps += self._inline_steps(self.text[end : block.start()])
            language, content, end = block[1], block[2], block.end()
            if name := file_announced(self.text[: block.start()]):
                steps.append(Step("file", content, name))
            elif language == "bash" and not content.startswith("#!"):
                steps += [Step("bash", line) for line in commands_of(content)]
            elif language == "console":
                steps += [Step("bash", command) for command in CONSOLE.findall(content)]
            elif language == "python":
                steps.append(Step("python", content))
        return steps + self._inline_steps(self.text[end:])

    @property
    def commands(self) -> list[str]:
        return [step.content for step in self.steps if step.kind == "bash"]

    def _inline_steps(self, prose: str) -> list[Step]:
        if self.path.name in RECORDS:
            return []
        return [Step("bash", command) for command in INLINE.findall(prose)]

    def write_files(self, folder: Path) -> None:
        for step in self.steps:
            if step.kind == "file":
                write_file(step, folder)


def file_announced(before: str) -> str | None:
    """The file whose content a block is: the paragraph above names it, and ends with a colon."""
    paragraph = before.rstrip().rpartition("\n\n")[2]
    name = FILE.search(paragraph)
    return name[1] if name and paragraph.endswith((":", FULL_WIDTH_COLON)) else None


def commands_of(block: str) -> list[str]:
    """The lines of a bash block, continued ones joined, without comments."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    return [line for line in (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in lines) if line]


def write_file(step: Step, folder: Path) -> None:
    """A page's file. JSON lines are multiplied, each copy with words of its own: a page shows the shape of one or two."""
    path = folder / step.name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = step.content
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in text.splitlines()]
        text = "".join(json.dumps(_copy(records[i % len(records)], i)) + "\n" for i in range(COPIES))
    path.write_text(text, encoding="utf-8")


def _copy(value: object, i: int, is_text: bool = False) -> object:
    """The same record with other words in its texts."""
    if isinstance(value, dict):
        return {key: _copy(item, i, key in TEXT_KEYS) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item, i) for item in value]
    return f"{value} {i % 9} of {i}" if is_text and isinstance(value, str) and value else value


def python_part(command: str) -> tuple[str, list[str]] | None:
    """Module and arguments of `python -m MODULE ...` or `torchrun ... -m MODULE ...`, of ours; None for other commands."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module, f"{command}: torchrun needs -m before the module"
        module, arguments = parsed.training_script, parsed.training_script_args
    elif words[:2] == ["python", "-m"]:
        module, arguments = words[2], words[3:]
    else:
        return None
    if is_wrapper(module, arguments):
        module, *arguments = arguments
    return (module, arguments) if module.partition(".")[0] in OUR_PACKAGES else None


def is_wrapper(module: str, arguments: list[str]) -> bool:
    """Whether this is a reader's own command in front of one of ours, as docs/own_router.md has it: python -m my.router train.pretrain ..."""
    return module.startswith("my.") and arguments[:1] != [] and arguments[0].partition(".")[0] in OUR_PACKAGES


def call(module: str, arguments: list[str], monkeypatch) -> int:
    """`python -m module arguments` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        return importlib.import_module(module).main() or 0
    except SystemExit as leaving:
        return leaving.code or 0
