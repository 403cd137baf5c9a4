"""Forked children and data-loader workers can use an adapted model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_core
from tests.laws.forking import LAWS, locks
from tests.laws.zoo import ZOO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]


@pytest.fixture(scope="module")
def found():
    """What the program found; a process of its own, since forks and pytest's threads don't mix."""
    done = subprocess.run(
        # of Python 3.12 on: forks beside threads are what this is about
        [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.laws.forking"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_after_a_fork_this_holds(found, law, name):
    assert found[law][name] == "fine"


def test_the_locks_that_the_program_holds_are_found():
    assert callable(lora_core.scales)  # comes when it is asked for, and its lock with it
    assert locks()
