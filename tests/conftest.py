"""One thread for every test, and `--all` for the slow ones."""

import pytest
import torch

torch.set_num_threads(1)  # two threads on a busy two-core machine can be ten times slower than one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --all"))
