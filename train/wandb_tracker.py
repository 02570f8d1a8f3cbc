"""Weights & Biases: the run there has the config, every number of metrics.jsonl, tables, pictures of the load, the report.

`wandb.mode: offline` writes into RUN/wandb, which `wandb sync` uploads later. A resumed run is the same run there: its id is
kept in RUN/wandb_id, and its charts are drawn against the step of the row, never against wandb's own counter. Turned on later,
it begins with what metrics.jsonl has.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import threading
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from train.cli import need
from train.config import RunConfig, load_config
from train.files import open_plain
from train.load_picture import CAPTION, Loads
from train.trackers import AXES, Earlier, Tracker, described, flat, kill_children, one_line

WANDB_SECONDS = 30  # that wandb may take to reach its server at the start, and again to finish uploading at the end
GOING_OFFLINE = 30.0  # seconds more that it may take to give its server up
MOST_ROWS = 200  # of a table, the newest; each evaluation stores it anew
LONGEST_TEXT = 2000  # characters of a text in a table
COLUMNS = {
    "samples": ("step", "prompt", "text"),
    "bad_steps": ("step", "loss", "grad_norm", "mean_norm", "rows", "micro_batches"),
}


class WandbTracker(Tracker):
    """The run at Weights & Biases, or in RUN/wandb/ for `wandb sync`."""

    name = "wandb"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.patience = 2 * WANDB_SECONDS + GOING_OFFLINE  # it may still be looking for its server
        self._config, self._run_dir, self._loads = config, run_dir, Loads()
        self._is_new = not (run_dir / "wandb_id").exists()
        self._wandb, self._run_id, self._run = *_prepare(config, run_dir), None
        self._tables: dict[str, dict] = {name: {} for name in COLUMNS}  # name -> key -> row
        self._new: set[str] = set()  # tables with rows that are not shown yet
        self._step, self._complained = 0, False

    def start(self, earlier: Earlier, note: Callable[[str], None]) -> None:
        self._note = note
        for row in earlier.rows:
            self._keep(row)
        for sample in earlier.samples:
            self.sample(sample)
        self._new.clear()
        self._run = _start(self._wandb, self._config, self._run_dir, self._run_id, note)
        for axis in AXES:
            self._run.define_metric(axis, hidden=axis == "step")
        self._run.define_metric("*", step_metric="step")  # a resumed run goes back some steps; wandb's counter may not
        self._run.define_metric("held_out/loss", step_metric="step", summary="min,last")
        for row in earlier.rows if self._is_new else ():  # wandb was turned on later
            self._run.log(flat(row))

    def log(self, row: dict) -> None:
        self._keep(row)
        self._step = row["step"]
        self._run.log(flat(row))
        if row.get("kind") == "held_out" or "samples" in self._new:
            self._show()

    def sample(self, sample: dict) -> None:
        self._add("samples", (sample.get("step"), sample.get("prompt")), sample)

    def close(self, failed: bool) -> None:
        self._show()
        self._run.finish(exit_code=int(failed))

    def _keep(self, row: dict) -> None:
        self._loads.add(row)
        if row.get("kind") == "bad_step":
            self._add("bad_steps", row["step"], row)

    def _add(self, table: str, key: object, row: dict) -> None:
        self._tables[table].pop(key, None)  # done again after a resume: then it is the newest
        self._tables[table][key] = [_cell(row.get(column)) for column in COLUMNS[table]]
        self._new.add(table)

    def _show(self) -> None:
        """Logs pictures and tables. They ask more of the server, and of this machine, than numbers do: these go on without."""
        try:
            media = {
                name: self._wandb.Image(picture, caption=CAPTION) for name, picture in self._loads.pictures().items()
            }
            for name in self._new:
                rows = list(self._tables[name].values())[-MOST_ROWS:]
                media[name] = self._wandb.Table(columns=list(COLUMNS[name]), data=rows)
            self._new.clear()
            if media:
                self._run.log({**media, "step": self._step})
        except Exception as error:
            if not self._complained:
                self._note(f"wandb: a table or picture was left out: {one_line(error)}")
            self._complained = True


def publish(run_dir: Path, files: list[Path]) -> str:
    """See train.trackers.publish."""
    config = load_config(run_dir / "config.yaml")
    if config.wandb.mode == "disabled":
        config.wandb.mode = "online"  # who asks for it wants it there
    with _not_in_training(run_dir):
        wandb, run_id = _prepare(config, run_dir)
        notes: list[str] = []
        try:
            run = _start(wandb, config, run_dir, run_id, notes.append)
            try:
                artifact = wandb.Artifact(f"report-{run_id}", type="report")
                for file in files:
                    artifact.add_file(str(file), name=file.name)
                logged = run.log_artifact(artifact)
                pages = {file.stem: wandb.Html(str(file), inject=False) for file in files if file.suffix == ".html"}
                if pages:
                    run.log(pages)
                if not run.offline:
                    logged.wait(timeout=WANDB_SECONDS)
            finally:
                run.finish()
        except Exception as error:  # of wandb's own kinds
            raise ValueError(
                f"wandb: {one_line(error)}; not published, the files stay: {', '.join(map(str, files))}"
            ) from None
    names = ", ".join(file.name for file in files)
    return "; ".join((f"wandb: {names} is artifact report-{run_id}", *(note.removeprefix("wandb: ") for note in notes)))


@contextlib.contextmanager
def _not_in_training(run_dir: Path) -> Iterator[None]:
    """Holds the run's lock, as a training does: two processes that write one wandb run spoil each other's rows."""
    with open(run_dir / ".lock", "a+", opener=open_plain) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run_dir}: is being trained, and writes to wandb itself; wait for its end") from None
        except OSError:  # a file system without locks
            pass
        yield


def _prepare(config: RunConfig, run_dir: Path) -> tuple[types.ModuleType, str]:
    """wandb itself, told to be discreet, and the run's id. ValueError for what the user can mend."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import: no crash reports to its makers
    os.environ.setdefault("WANDB_DATA_DIR", _staging_folder(run_dir))
    try:
        wandb = need("wandb", "wandb.mode")
    except ValueError:
        raise ValueError(
            f"wandb.mode: {config.wandb.mode!r} needs wandb; run: pip install wandb, or set wandb.mode to disabled"
        ) from None
    if (run_dir / "wandb").is_symlink():
        raise ValueError(f"{run_dir / 'wandb'}: is a link, and a run writes to plain files alone; remove it")
    _discreet_settings(wandb)
    return wandb, _wandb_id(run_dir / "wandb_id")


def _staging_folder(run_dir: Path) -> str:
    """Where tables and reports are copied until they are uploaded. wandb makes the path a full one and notes it in RUN/wandb:
    this one says nothing of where the run lies, unless that is outside the working folder."""
    folder = Path(os.path.relpath(run_dir)) / "wandb"
    here = Path("/proc/self/cwd")
    return str(here / folder if here.exists() and ".." not in folder.parts else folder.absolute())


def _start(
    wandb: types.ModuleType, config: RunConfig, run_dir: Path, run_id: str, note: Callable[[str], None]
) -> typing.Any:
    """The run's wandb run: the same one again after a resume. Online without a key, or without a network, goes offline."""
    settings = _discreet_settings(wandb)

    def start(mode: str) -> typing.Any:
        return wandb.init(
            project=config.wandb.project, group=config.wandb.group, name=config.name, id=run_id, resume="allow", mode=mode,
            dir=os.path.relpath(run_dir), config=described(config), allow_val_change=True, settings=settings,
        )  # fmt: skip

    run = None
    if config.wandb.mode == "online":
        try:
            wandb.setup(settings)
            if wandb.login(prompt=False, verify=False, timeout=WANDB_SECONDS):
                run = start("online")
                note(f"wandb: {run.url}")
            else:
                note("wandb: no API key found (WANDB_API_KEY or `wandb login`), so this run is logged offline")
        except Exception as error:  # of many kinds: no network, a server that does not answer, a key it does not take
            note(f"wandb: {one_line(error)}; so this run is logged offline")
            _end_service(wandb)  # or it holds on to the run's id
    if run is None:
        run = start("offline")
        note(f"wandb: to upload this run: wandb sync {os.path.relpath(Path(run.dir).parent)}")
    logging.getLogger("wandb").setLevel(logging.CRITICAL)  # its log lies in the run folder, and tracebacks name folders
    for link in run_dir.glob("wandb/*/logs/debug-core.log"):
        link.unlink(missing_ok=True)  # it leads into the home folder
    return run


def _end_service(wandb: types.ModuleType) -> None:
    """Ends wandb's process. Asked to, it would go on trying to reach its server for 20 s."""
    if threading.current_thread() is not threading.main_thread():  # whose other children are not ours
        kill_children(threading.current_thread())
    with contextlib.suppress(Exception, SystemExit):  # it is gone, and wandb would leave with its exit code
        wandb.teardown()


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
            silent=True,  # the run says itself where it is
            init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS, finish_timeout_raises=True,
        )  # fmt: skip
    except Exception as error:
        raise ValueError(
            f"wandb {wandb.__version__} does not take the settings that keep names of machines and people out of its files "
            f"({one_line(error)}); pip install wandb==0.31.0, or set wandb.mode to disabled"
        ) from None


def _wandb_id(path: Path) -> str:
    """The name under which wandb knows this run, made when it is first wanted."""
    with open(path, "a+", encoding="utf-8", opener=open_plain) as file:
        file.seek(0)
        run_id = file.read(100).strip()
        if not run_id:  # new, or cut off by a kill
            run_id = secrets.token_hex(4)
            file.write(run_id)
    if not re.fullmatch("[0-9a-z]{8}", run_id):
        raise ValueError(f"{path}: {run_id!r} is no id of ours, which are eight letters and digits; remove this file")
    return run_id


def _cell(value: object) -> object:
    """What a table shows: numbers as they are, other things as text of a bounded length."""
    return value if isinstance(value, int | float) or value is None else str(value)[:LONGEST_TEXT]
