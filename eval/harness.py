"""Tasks of lm-evaluation-harness (lm_eval) on a run itself, without an export.

    chosen = load_tasks(["minimoe_sums", "arc_easy"])         # their data: local files, or the Hub
    scores, notes = run_harness(run, chosen, limit=100)       # {"arc_easy": {"score": 0.31, "chance": 0.25, ...}, ...}

lm_eval makes the prompts and judges the answers; eval/harness_model.py is the model, so that the scores are those of
`lm_eval --model hf` on the export. A chat run is asked through its chat template, as by --apply_chat_template. Code of
models is never run, code of data sets and of other people's YAML neither (eval/harness_guard.py).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.machinery
import io
import logging
import math
import os
import random
import socket
import sys
import tempfile
import types
import typing
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.words import one_line
from eval import harness_guard, harness_tasks
from eval.harness_scores import group_score, measured_of, task_score
from train import cli

if typing.TYPE_CHECKING:
    from train.checkpoint import Run

SEED = 1234  # lm_eval's own, for the choice of examples (its random module gets 0)
BOOTSTRAPS = 1000  # for standard errors that have no formula; lm_eval's 100,000 cost a minute a metric
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "em")  # metrics from 0 to 1
WITHOUT_THE_HUB = (
    f"offline there are {', '.join(harness_tasks.NAMES[:2])} ... (python -m eval.harness_tasks OUT writes them as a pattern) and "
    "your own tasks over local files (--include-path DIR)"
)


@dataclass(frozen=True)
class Loaded:
    """Tasks with their data; `asked` are the names of `--tasks`, in their order."""

    asked: list[str]
    tasks: dict  # lm_eval's TaskDict: tasks, groups, group_map


def load_tasks(names: list[str], *, fewshot: int | None = None, include_path: Path | None = None) -> Loaded:
    """Finds tasks, groups and tags by name, in `include_path` before lm_eval's own, and opens their data sets.

    Raises ValueError, naming the task and the remedy, for a name that does not exist or data that cannot be had.
    """
    cli.need("lm_eval", f"--tasks {names[0]} (a task of lm-evaluation-harness)")
    _quiet()
    from lm_eval.api.metrics import mean  # noqa: F401  (fills the registry of metrics)
    from lm_eval.api.registry import METRIC_REGISTRY
    from lm_eval.tasks import TaskManager

    harness_guard.sandbox_templates()
    _refuse_foreign_metrics()
    with tempfile.TemporaryDirectory(prefix="minimoe-tasks-") as folder:
        managers = []
        if include_path is not None:
            harness_guard.check_folder(include_path, set(METRIC_REGISTRY.keys()), harness_tasks.TRUSTED)
            managers.append(TaskManager(include_path=str(include_path), include_defaults=False))
        left = [name for name in names if not managers or name not in managers[0].task_index]
        if any(name in harness_tasks.NAMES for name in left):
            own = Path(folder) / "tasks"
            harness_tasks.write_tasks(own, cache=Path(folder) / "cache")
            managers.append(TaskManager(include_path=str(own), include_defaults=False))
        if any(name not in harness_tasks.NAMES for name in left):
            managers.append(_all_tasks())
        found = {name: next((m for m in managers if name in m.task_index), None) for name in names}
        is_local = all(manager and _dataset(name, manager) in harness_guard.FORMATS for name, manager in found.items())
        with contextlib.nullcontext() if is_local else _offline_where_it_is():
            parts = [_load(name, manager, managers) for name, manager in found.items()]
    loaded: dict = {"tasks": {}, "groups": {}, "group_map": {}}
    for part in parts:
        for key, items in part.items():
            loaded[key] |= items
    for name, task in loaded["tasks"].items():
        _check(name, task)
        _set_fewshot(name, task, fewshot)
        _let_perplexity_be_infinite(task)
    return Loaded(names, loaded)


def run_harness(
    run: Run,
    chosen: Loaded,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool | None = None,
    add_bos: bool = False,
) -> tuple[dict[str, dict], list[str]]:
    """Scores of the tasks, in the order asked for, and what a reader must know besides, in sentences.

    chat_template None: yes for a chat run. Per task: score, metric, n, fewshot, higher_is_better and metrics (all of them), and
    where they are known standard_error, chance, trivial and examples.
    """
    raw = evaluate(run, chosen, limit=limit, batch_size=batch_size, chat_template=chat_template, add_bos=add_bos)
    groups = chosen.tasks["groups"]
    scores = {name: task_score(raw, name, task) for name, task in chosen.tasks["tasks"].items()}
    for name, group in groups.items():
        if measured := measured_of(raw, name):
            parts = [scores[task.task_name] for task in group.get_all_tasks()]
            scores[name] = group_score(raw, name, measured, parts)
    first = [name for name in chosen.asked if name in scores]
    return {name: scores[name] for name in [*first, *(n for n in scores if n not in first)]}, raw["notes"]


def evaluate(
    run: Run,
    chosen: Loaded,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    chat_template: bool | None = None,
    add_bos: bool = False,
) -> dict:
    """lm_eval's own results (`results`, `samples`, ...), and `notes`, sentences about cut questions and answers.

    Raises ValueError where a task's template meets a question that lacks what it names.
    """
    import numpy as np
    import torch
    from jinja2 import TemplateError
    from lm_eval import evaluator

    from eval.harness_model import RunLM

    model = RunLM(run, batch_size=batch_size, add_bos=add_bos)
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        with _hidden_output():
            results = evaluator.evaluate(
                lm=model,
                task_dict=chosen.tasks,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=model.is_chat if chat_template is None else chat_template,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=False,
            )
    except TemplateError as error:  # of the first question alone it is seen while the task is loaded
        names = ", ".join(chosen.asked)
        raise ValueError(f"--tasks: a template of {names} fails on a question: {one_line(error)}; {_MEND}") from None
    return {**results, "notes": model.notes()}


# ---- loading ----------------------------------------------------------------------------------------------------------


@functools.cache
def _all_tasks() -> typing.Any:
    """A TaskManager over lm_eval's own folder: thousands of YAML files, some ten seconds."""
    from lm_eval.tasks import TaskManager

    print("reading lm-evaluation-harness's list of tasks ...", file=sys.stderr)
    return TaskManager()


def _load(name: str, manager: typing.Any, managers: list) -> dict:
    if manager is None:
        known = [task for m in managers for task in m.all_tasks]
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them"
        raise ValueError(f"--tasks: {name!r} is no task of ours, nor of lm-evaluation-harness; {remedy}")
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise ValueError(_runs_code(name))
    try:
        with _hidden_output():
            return manager.load([name])
    except Exception as error:  # whatever lm_eval, datasets and the network meet
        short = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, ConnectionError) or "Offline" in short:
            short = f"its data set {_dataset(name, manager)} is not on this machine, and the Hub is out of reach; {WITHOUT_THE_HUB}"
        elif isinstance(error, ValueError):
            short = f"{one_line(error)}; {_MEND}"
        else:
            short = f"{short}; {_MEND}"
        raise ValueError(f"--tasks: {name} cannot be opened: {short}") from None


def _dataset(name: str, manager: typing.Any) -> str:
    """What the task gives to `load_dataset`; nothing for a group."""
    return str((manager.task_index[name].cfg or {}).get("dataset_path") or "")


_MEND = "mend its YAML or its data, or leave it out"


def _runs_code(name: str) -> str:
    return (
        f"--tasks: {name} runs code that the model writes, which MiniMoE does not do; export the run (scripts.export_hf) and "
        "give it to lm_eval with --confirm_run_unsafe_code, in a container"
    )


def _check(name: str, task: typing.Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(_runs_code(name))
    judged_here = getattr(task.config, "process_results", None) is not None
    if not judged_here and any(function is None for function in getattr(task, "_metric_fn_list", {}).values()):
        raise ValueError(f"--tasks: {name} is judged by {_FOREIGN_METRIC}; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"--tasks: {name} shows pictures or sound, and this model reads text; leave it out")


def _set_fewshot(name: str, task: typing.Any, fewshot: int | None) -> None:
    """As lm_eval's simple_evaluate does: a task that fixes 0 keeps it, one that says nothing has none."""
    fixed = task.get_config("num_fewshot")
    if fewshot is not None and fixed == 0 and fewshot > 0:
        print(f"{name} is always asked without examples; --fewshot {fewshot} does not change it", file=sys.stderr)
    elif fewshot is not None:
        task.set_config(key="num_fewshot", value=fewshot)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _let_perplexity_be_infinite(task: typing.Any) -> None:
    """lm_eval's perplexity per word ends in an OverflowError above e**709, where a text without spaces is one word."""
    from lm_eval.api.metrics import weighted_perplexity

    def of(items: list[tuple[float, float]]) -> float:
        try:
            return weighted_perplexity(items)
        except OverflowError:
            return math.inf

    kinds = getattr(task, "_aggregation_list", {})
    kinds.update({metric: of for metric, kind in kinds.items() if kind is weighted_perplexity})


def _quiet() -> None:
    """lm_eval's log and bars: errors, and a bar only where a person watches."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=None, leave=False)
    os.environ["DISABLE_MULTIPROC"] = "1"  # resampling takes a second, and no pool of processes


_FOREIGN_METRIC = "a script that would be fetched from the Hub and run, which MiniMoE does not do"


def _refuse_foreign_metrics() -> None:
    """`evaluate.load` runs a Python file of the working folder or of the Hub; some tasks call it while they are loaded.

    Of the package lm_eval and its tasks use this one function, so a stand-in of one function takes its place: its import
    costs four seconds.
    """

    def refuse(*_: object, **__: object) -> None:
        raise ValueError(f"its metric is {_FOREIGN_METRIC}")

    if "evaluate" not in sys.modules:
        package = types.ModuleType("evaluate")
        package.__spec__ = importlib.machinery.ModuleSpec("evaluate", None)  # for importlib.util.find_spec
        sys.modules["evaluate"] = package
    sys.modules["evaluate"].load = refuse


@contextlib.contextmanager
def _offline_where_it_is() -> Iterator[None]:
    """Where the Hub's name is unknown, what an earlier run fetched is used at once, instead of after a minute of attempts."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    behind_a_proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    try:
        host = urllib.parse.urlsplit(constants.ENDPOINT)
        if not behind_a_proxy:
            socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _hidden_output() -> Iterator[None]:
    """What lm_eval prints while it loads and judges: our stdout may be a JSON file."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
