"""A folder for each test, the Python blocks of the Markdown pages, and settings of the tools."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# shared machines stall: a slow example is no failure
hypothesis.settings.register_profile("lora_core", deadline=None, max_examples=50)
hypothesis.settings.load_profile("lora_core")

# `make coverage` measures the processes that pytest starts; what a test starts runs as a user's
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture(scope="session")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Working folders, the last one empty."""
    return [tmp_path_factory.mktemp("cwd")]


@pytest.fixture(autouse=True)
def empty_folder(_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of every test and example, so that none meets the user's files."""
    before = Path.cwd()
    os.chdir(_folders[-1])
    yield _folders[-1]
    os.chdir(before)
    if any(_folders[-1].iterdir()):
        _folders.append(tmp_path_factory.mktemp("cwd"))


# a block of a page asks for no fixture, not even one that every test has
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    fixtures=["empty_folder"],
).pytest()
