"""Our known-answer tasks as lm-evaluation-harness reads them: one JSONL of questions and one YAML a task, in a folder.

    python -m eval.harness_tasks my_tasks
    lm_eval --model hf --model_args pretrained=EXPORT --tasks minimoe_sums --include_path my_tasks --apply_chat_template

`python -m eval.evaluate RUN --tasks minimoe_sums` needs no folder. The questions are those of eval/tasks.py, held out of the
training data; NAME.train.jsonl beside them holds examples to show (--fewshot, --num_fewshot). Scoring is written in lm_eval's
own filters and metrics, so that the YAML is a pattern for one's own tasks; only minimoe_modern needs a function.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.exercises import TASKS, exercises
from data.verse_exercises import word_f1
from eval.tasks import Item, tasks
from train import cli
from train.files import replace_file

PREFIX = "minimoe_"
NAMES = tuple(PREFIX + name for name in TASKS)
_OURS = re.compile(r"minimoe_\w+(\.train)?\.\w+|__pycache__")
N_SHOWN = 40  # training questions to draw few-shot examples from
STOPS = ["<|im_end|>", "\n\n"]  # a chat model's end of turn; where examples were shown, the gap between them


class _Function(str):
    """`file.name` of a Python function, written as !function file.name."""


class _Dumper(yaml.SafeDumper):
    """Writes line breaks in a value as \\n, so that a person sees them."""


_Dumper.add_representer(_Function, lambda d, name: d.represent_scalar("!function", name, style=""))
_Dumper.add_representer(
    str, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)
)


def f1_of_words(doc: dict, results: list[str]) -> dict[str, float]:
    """lm_eval calls it as `process_results` with a question's record and the answers."""
    return {"f1": word_f1(results[0], doc["answer"])}


# The Python file beside minimoe_modern.yaml: the two functions as they stand here, for an lm_eval that knows no MiniMoE.
SCORING = "import re\n\n\n" + "\n\n".join(inspect.getsource(function) for function in (word_f1, f1_of_words))
TRUSTED = {"minimoe_words.f1_of_words": SCORING}  # functions that eval/harness_guard.py lets through


def _last_number(answer: str) -> str:
    return re.findall(r"\d+", answer)[-1]


@dataclass(frozen=True)
class _Form:
    """How lm_eval asks a task and judges the answers."""

    target: Callable[[str], str] = str.strip  # right answer -> what the filtered answer must equal
    tokens_per_character: float = 0.5  # an upper bound, for the longest answer that is let through
    filters: tuple[dict, ...] = ({"function": "remove_whitespace"},)
    ignore: tuple[str, ...] = ()  # patterns that do not count in a comparison


_LAST_NUMBER = _Form(
    _last_number,
    1.0,
    ({"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1}, {"function": "take_first"}),
)
_SAME_WORDS = _Form(filters=({"function": "remove_whitespace"}, {"function": "take_first"}), ignore=(r"\W+$", r"^\W+"))
_FORMS = {
    "sums": _LAST_NUMBER,
    "compare": _LAST_NUMBER,
    "backwards": _Form(tokens_per_character=1.0, filters=_SAME_WORDS.filters, ignore=(r"\W",)),
    "modern": _Form(filters=_SAME_WORDS.filters),
    "testament": _SAME_WORDS,
    "book": _SAME_WORDS,
}


def write_tasks(folder: Path, cache: Path | None = None) -> list[Path]:
    """Writes every task into `folder`; `cache` is where `datasets` may keep its copy (None: where it keeps all). Returns the YAML.

    Files of an earlier call are replaced; ValueError where the folder holds anything else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strangers = [path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)]
    if strangers:
        raise ValueError(
            f"{folder}: holds {sorted(strangers)[0]!r}, which is none of these tasks; give an empty or a new folder"
        )
    replace_file(folder / "minimoe_words.py", SCORING)
    written = []
    for name, task in tasks().items():
        files = {"test": (folder / f"{PREFIX}{name}.jsonl", task.items)}
        if task.items[0].choices is None:  # choices are made among the held-out answers alone: nothing to show
            shown = list(itertools.islice(_training_items(name), N_SHOWN))
            files["train"] = (folder / f"{PREFIX}{name}.train.jsonl", shown)
        for path, items in files.values():
            replace_file(path, "".join(json.dumps(_record(name, item), ensure_ascii=False) + "\n" for item in items))
        written.append(folder / f"{PREFIX}{name}.yaml")
        paths = {split: path for split, (path, _) in files.items()}
        config = _config(name, [item.answer for item in task.items], paths, cache)
        config["metadata"] = {
            "version": 1.0,
            "chance": round(task.chance, 6),
            "trivial": round(task.trivial[1], 6),
            "trivial_name": task.trivial[0],
        }
        replace_file(written[-1], yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
    return written


def _training_items(name: str) -> Iterator[Item]:
    """Questions of the training data that stand alone in their conversation."""
    for conversation in exercises(name):
        if not conversation.held_out and len(conversation.messages) == 2:
            yield Item(conversation.messages[:1], conversation.messages[1]["content"])


def _record(name: str, item: Item) -> dict:
    record = {"question": item.messages[-1]["content"], "answer": item.answer}
    if item.choices is not None:
        return {**record, "choices": item.choices, "label": item.choices.index(item.answer)}
    return {**record, "target": _FORMS[name].target(item.answer)}


def _config(name: str, answers: list[str], files: dict[str, Path], cache: Path | None) -> dict:
    """The YAML of a task, as a mapping. lm_eval wants paths of data from the working folder or, better, absolute ones."""
    config = {
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_target": "target",
    }
    if cache is not None:
        config["dataset_kwargs"]["cache_dir"] = str(cache.resolve())
    if "train" not in files:
        metrics = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc_bytes", "acc")
        ]
        # A number in a list is a few-shot example's right choice, so the label itself is given.
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
        return config | {"num_fewshot": 0, "metric_list": metrics}
    form = _FORMS[name]
    longest = round(max(map(len, answers)) * form.tokens_per_character) + 4
    config |= {
        "output_type": "generate_until",
        "fewshot_split": "train",
        "fewshot_config": {"doc_to_target": "answer"},  # examples show whole answers; what is compared may be less
        "generation_kwargs": {"until": STOPS, "max_gen_toks": longest, "do_sample": False},
        "filter_list": [{"name": "none", "filter": list(form.filters)}],
    }
    if name == "modern":
        metric: dict = {"metric": "f1"}
        config["process_results"] = _Function("minimoe_words.f1_of_words")
    else:
        metric = {"metric": "exact_match", "ignore_case": True}
        metric |= {"regexes_to_ignore": list(form.ignore)} if form.ignore else {}
    return config | {"metric_list": [metric | {"aggregation": "mean", "higher_is_better": True}]}


def main() -> int:
    parser = cli.parser(
        "Writes our known-answer tasks for lm-evaluation-harness: questions as JSONL, each task as YAML.",
        "python -m eval.harness_tasks my_tasks\n"
        "  lm_eval --model hf --model_args pretrained=EXPORT --include_path my_tasks --apply_chat_template \\\n"
        f"    --tasks {PREFIX}sums,{PREFIX}continue",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the files; made if it is missing")
    options = parser.parse_args()
    written = write_tasks(options.out)
    print(f"{len(written)} tasks written to {options.out}: {', '.join(path.stem for path in written)}")
    print("The YAML holds the folder's full path: after moving it, write the tasks anew.")
    return 0


if __name__ == "__main__":
    cli.run(main)
