"""Fixtures for all tests: seeded generators, and a check that tests clean up."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side; before torch is imported

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from helpers import leaks

pytest_plugins = ["pytester"]

# The same examples in every run, and no files of examples that failed.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores for ``-n auto``, since some tests wait for processes or the disk."""
    return (os.cpu_count() or 1) + 1


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse names that differ between processes, with which pytest-xdist cannot run anything."""
    if " at 0x" in item.nodeid:
        raise pytest.UsageError(
            f"the name of a test must not contain an address, give its parameters ids: {item.nodeid}"
        )


@pytest.fixture(scope="session", autouse=True)
def _empty_working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests start in an empty directory, where a file that one of them leaves is seen."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("working_directory"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = leaks.snapshot()
    yield
    if found := leaks.restore(before):
        pytest.fail(f"the test leaks {'; '.join(found)}", pytrace=False)
