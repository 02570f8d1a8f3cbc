"""How the fuzz tests run: so many generated cases, the same ones every time, and counted.

pytest tests/reliability                            the everyday number of cases
pytest tests/reliability --all                      all of them, 2,000 and more
MINIMOE_FUZZ=20 pytest tests/reliability --all      20 times as many, other ones in each run; a failure is made smaller
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

MORE = int(os.environ.get("MINIMOE_FUZZ", "0"))  # 0: the same cases in every run
LONGEST_SENTENCE = 400  # characters of what a person is told about a mistake, beside the names of files


class Cases(NamedTuple):
    everyday: int
    all: int  # with --all


CASES = {  # of each test, by its name
    "configs": Cases(80, 700),
    "yaml_pieces": Cases(40, 300),
    "overrides": Cases(40, 300),
    "documents": Cases(20, 150),
    "conversations": Cases(30, 250),
    "prepared": Cases(8, 50),
    "tokenizer_text": Cases(40, 250),
    "tokenizer_ids": Cases(20, 100),
    "config_commands": Cases(40, 300),
    "run_commands": Cases(25, 150),
    "chat_lines": Cases(10, 80),
}


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """fuzz(name, strategy, check, first): check(case) for each of `first`, then for CASES[name] cases that the strategy
    generates; it raises where one is wrong."""

    def run(name: str, strategy: SearchStrategy, check: Callable, first: Iterable = ()) -> None:
        for case in first:
            check(case)
        cases = CASES[name].all if request.config.getoption("--all") else CASES[name].everyday
        done = 0

        def one(case: object) -> None:
            nonlocal done
            check(case)
            done += 1

        one.__qualname__ = one.__name__ = name  # what the cases are drawn from, when they are the same in every run
        settings(
            max_examples=cases * max(MORE, 1),
            derandomize=MORE == 0,
            deadline=None,
            database=None,
            print_blob=True,
            phases=tuple(Phase)
            if MORE
            else (Phase.explicit, Phase.generate),  # to make a failure smaller takes minutes
            suppress_health_check=list(HealthCheck),
        )(given(strategy)(one))()
        assert done >= cases, f"{name}: only {done} of {cases} cases; the strategy holds no more"

    return run


def sentence_of(error: ValueError, *, names: tuple[str, ...] = ()) -> str:
    """The error's text, which must be one short line that names one of `names`."""
    text = str(error)
    assert type(error) is ValueError, f"{type(error).__name__} is no sentence for a person: {text}"
    assert "\n" not in text and "\r" not in text, f"more than one line: {text!r}"
    assert len(text) < LONGEST_SENTENCE, f"{len(text)} characters: {text[:500]!r}"
    assert not names or any(name in text for name in names), f"names none of {names}: {text!r}"
    return text


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """Every file's content and every folder under `folder`; what must be equal before and after a command that fails."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found
