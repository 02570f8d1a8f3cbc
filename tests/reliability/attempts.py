"""Commands tried in a child process that reports, instead of doing it, whatever leaves the folder it may write in."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FORBIDDEN = 99  # exit code of a command that tried something it must not do
MEMORY = 6 * 2**30  # more address space than now, for a model of a few KiB
SECONDS = 60
RUNS_SOMETHING = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)


@dataclass
class Outcome:
    code: int  # -n: ended by signal n
    out: str
    err: str


def attempt(
    module: str, *arguments: object, allowed: Path, cwd: Path | None = None, before: Callable[[], None] | None = None
) -> Outcome:
    """`python -m module arguments` in a fork of this process: quick, because nothing is imported anew.

    An audit hook ends it with FORBIDDEN when it starts a process, unpickles, or writes anywhere but under `allowed`; a limit on
    memory and one on time end it when a few bytes of input make it ask for gigabytes or hours. `before` is called first, in the child.
    """
    importlib.import_module(module)
    paths = [allowed / name for name in (".out", ".err")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _in_child(module, [str(a) for a in arguments], allowed, paths, cwd, before)
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{module} {arguments}: still busy after {SECONDS} s")
        time.sleep(0.005)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return Outcome(os.waitstatus_to_exitcode(status), out, err)


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2 and one line on stderr that has these words."""
    assert outcome.code == 2, f"exit code {outcome.code}\n{outcome.out[-1500:]}\n{outcome.err[-1500:]}"
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000, outcome.err[-2000:]
    assert "Traceback" not in outcome.out + outcome.err
    for word in words:
        assert word in lines[0], lines[0]


def _in_child(
    module: str,
    arguments: list[str],
    allowed: Path,
    paths: list[Path],
    cwd: Path | None,
    before: Callable[[], None] | None,
) -> int:
    from train import cli

    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # pytest has put its own things there
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    if before is not None:
        before()
    if cwd is not None:
        os.chdir(cwd)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(allowed / ".inductor")  # torch makes one when an optimizer is imported
    sys.argv = [module, *arguments]
    sys.addaudithook(_guard(allowed.resolve()))
    code = 0
    try:
        cli.run(importlib.import_module(module).main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _guard(allowed: Path):
    """An audit hook: prints what was tried and ends the process."""

    def stop(what: str) -> None:
        os.write(2, f"forbidden: {what}\n".encode(errors="replace"))
        os._exit(FORBIDDEN)

    def may_write(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return True
        where = os.path.realpath(os.fsdecode(path))
        return (
            where.startswith(("/dev/null", "/proc/self/fd/"))
            or os.path.commonpath([where, allowed]) == str(allowed)
            or "__pycache__" in where
        )

    def hook(event: str, arguments: tuple) -> None:
        if event in RUNS_SOMETHING or event == "pickle.find_class":
            stop(f"{event} {arguments!r}"[:500])
        elif (
            event == "open"
            and arguments[2] is not None
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        ):
            if not may_write(arguments[0]):
                stop(f"writing {arguments[0]!r}")
        elif event in CHANGES and not (event == "os.mkdir" and os.path.isdir(arguments[0])):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if not isinstance(path, bytes | str | os.PathLike):
                    continue
                if not may_write(os.path.join(os.path.realpath(os.path.dirname(os.fsdecode(path)) or "."), "x")):
                    stop(f"{event} {arguments!r}"[:500])

    return hook
