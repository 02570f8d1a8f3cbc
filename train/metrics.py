"""Where numbers go: metrics.jsonl (appended, never rewritten), the console with log.txt, and wandb if the config says so."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import secrets
import select
import stat
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

from train.config import RunConfig, to_dict

WANDB_SECONDS = 30  # that wandb may take to reach its server at the start, and again to finish uploading at the end


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, without a last line that a kill cut off; empty if there is no file.

    A resumed run may log a step again: a reader keeps the last row of each (kind, step).
    """
    rows = []
    if path.is_file():
        with open(path, "rb") as file:  # bytes: a kill may cut inside a character
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # cut off by a kill; the resumed run wrote it again
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def append_row(path: Path, row: dict) -> None:
    """Adds one JSON line. A line that a kill left unfinished is closed first."""
    line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "ab+", opener=_open_plain) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode("utf-8"))


def _open_plain(path: str, flags: int) -> int:
    """An opener for files of a run: a plain file, never what a link leads to, nor a pipe that would wait for a reader."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a pipe or a socket
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise ValueError(f"{path}: is a link or a device, and a run writes to plain files alone; remove it")


def _finite(value: object) -> object:
    """NaN and infinity, of a skipped step, as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reporter:
    """The run's voice, on rank 0; on other ranks every method does nothing.

    `say` prints and keeps in log.txt, `log` adds a row to metrics.jsonl and wandb, `progress` moves tqdm's bar. A context
    manager: leaving it closes the bar and wandb whatever happened. OSError where the disk refuses a line; after the first
    one nothing more is written, so that the last words of a run that ends for it are still printed.
    """

    def __init__(self, config: RunConfig, run_dir: Path, steps: int, start: int, speaks: bool) -> None:
        self.speaks, self.run_dir = speaks, run_dir
        self._wandb = self._bar = None
        self._disk_refused = False
        if not speaks:
            return
        if config.wandb.mode != "disabled":
            self._wandb = _start_wandb(config, run_dir, self.say)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc=config.name, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def say(self, text: str) -> None:
        if not self.speaks:
            return
        self._show(lambda: self._bar.write(text) if self._bar is not None else print(text, flush=True))
        self._write(append_text, "log.txt", without_home(text) + "\n")

    def log(self, row: dict) -> None:
        if not self.speaks:
            return
        self._write(append_row, "metrics.jsonl", row)
        if self._wandb is not None:
            self._to_wandb(lambda run: run.log(_flat(row)))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Keeps a sample in samples.jsonl and says it."""
        if self.speaks:
            self._write(append_row, "samples.jsonl", {"step": step, "prompt": prompt, "text": text})
            self.say(f"  {prompt!r} -> {text!r}")

    def progress(self) -> None:
        if self._bar is not None:
            self._show(self._bar.update)

    def close(self, failed: bool = False) -> None:
        """Closes the bar and wandb, which is told whether the run failed. A second call does nothing."""
        if self._bar is not None:
            self._show(self._bar.close)
        self._bar = None
        if self._wandb is not None:
            self._to_wandb(lambda run: run.finish(exit_code=int(failed)))
        self._wandb = None

    def _show(self, write: Callable[[], object]) -> None:
        """A console that is gone (a closed terminal, a pipe that nobody reads) ends no run: log.txt has every line."""
        try:
            write()
        except OSError:
            self._bar = None
            _leave_dead_console()

    def _write(self, append: Callable[[Path, typing.Any], None], name: str, what: object) -> None:
        if self._disk_refused:
            return
        try:
            append(self.run_dir / name, what)
        except OSError:
            self._disk_refused = True
            raise

    def _to_wandb(self, call: Callable[[typing.Any], None]) -> None:
        """wandb is a guest: what goes wrong with it is said once, and the run goes on without it."""
        try:
            call(self._wandb)
        except Exception as error:
            self._wandb = None
            self.say(f"wandb: {_one_line(error)}; the run goes on without it, metrics.jsonl has every row")


def _leave_dead_console() -> None:
    """Sends standard output, and standard error if it is gone too, to nowhere: else Python's last flush would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    poll = select.poll()
    poll.register(2, 0)
    os.dup2(null, 1)
    if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
        os.dup2(null, 2)
    os.close(null)


def append_text(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", opener=_open_plain) as file:
        file.write(text)


def _start_wandb(config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> object:
    """The run's wandb run: the same one again after a resume. Online without a key, or without a network, goes offline and says so."""
    mode = config.wandb.mode
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # read when wandb is imported: no crash reports to its makers
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"wandb.mode: {mode!r} needs wandb; run: pip install wandb, or set wandb.mode to disabled"
        ) from None
    if (run_dir / "wandb").is_symlink():
        raise ValueError(f"{run_dir / 'wandb'}: is a link, and a run writes to plain files alone; remove it")
    run_id = _wandb_id(run_dir / "wandb_id")

    def start(mode: str) -> typing.Any:
        return wandb.init(
            project=config.wandb.project, group=config.wandb.group, name=config.name, id=run_id, resume="allow", mode=mode,
            dir=os.path.relpath(run_dir), config=_map_texts(to_dict(config), without_home), settings=_discreet_settings(wandb),
        )  # fmt: skip

    run = None
    if mode == "online":
        try:
            if wandb.login(prompt=False, verify=False, timeout=WANDB_SECONDS):
                run = start(mode)
            else:
                say(
                    "wandb: no API key found (WANDB_API_KEY or `wandb login`), so this run is logged offline; `wandb sync` uploads it"
                )
        except Exception as error:  # of many kinds: no network, a server that does not answer, a key it does not take
            say(f"wandb: {_one_line(error)}; so this run is logged offline; `wandb sync` uploads it")
            wandb.teardown()  # or its background process holds on to the run's id
    try:
        run = run or start("offline")
    except Exception as error:
        raise ValueError(
            f"wandb.mode: {mode!r}: wandb could not start ({_one_line(error)}); set wandb.mode to offline or disabled"
        ) from None
    logging.getLogger("wandb").setLevel(logging.CRITICAL)  # its log lies in the run folder, and tracebacks name folders
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # a resumed run goes back some steps; wandb's own counter may not
    for link in run_dir.glob("wandb/*/logs/debug-core.log"):
        link.unlink(missing_ok=True)  # it leads into the home folder
    return run


def _discreet_settings(wandb: types.ModuleType) -> object:
    """wandb notes where and by whom it is run. None of it is for a run folder that moves, or for a server.

    What remains: versions of wandb and Python, the operating system, times, and what the config and the rows say.
    """
    try:
        return wandb.Settings(
            disable_code=True, disable_git=True, save_code=False, x_save_requirements=False,  # the program
            host="", username="", email="", docker="", program="minimoe", x_disable_machine_info=True, x_disable_meta=True,
            x_disable_stats=True,  # it asks a cloud's metadata address which machine this is; our rows have speed and memory
            console="off", symlink=False, use_dot_wandb=False,  # log.txt has what is said; no links within the run folder
            init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS,
        )  # fmt: skip
    except Exception as error:
        raise ValueError(
            f"wandb {wandb.__version__} does not take the settings that keep names of machines and people out of its files "
            f"({_one_line(error)}); pip install wandb==0.31.0, or set wandb.mode to disabled"
        ) from None


def _wandb_id(path: Path) -> str:
    """The name under which wandb knows this run, made when it is first wanted."""
    with open(path, "a+", encoding="utf-8", opener=_open_plain) as file:
        file.seek(0)
        run_id = file.read(100).strip()
        if not run_id:  # new, or cut off by a kill
            run_id = secrets.token_hex(4)
            file.write(run_id)
    if not re.fullmatch("[0-9a-z]{8}", run_id):
        raise ValueError(f"{path}: {run_id!r} is no id of ours, which are eight letters and digits; remove this file")
    return run_id


def without_home(text: str) -> str:
    """The text with ~ for the home folder: logs and reports are passed on, and need not tell whose they are."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _map_texts(value: object, change: Callable[[str], str]) -> typing.Any:
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _flat(row: dict, prefix: str = "") -> dict:
    """Nested mappings as a/b keys; lists of numbers become a mapping by index."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
