"""What the Triton kernels compute, by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("numpy")  # the interpreter computes with it

CASES = Path(__file__).parent / "interpreted.py"


def test_the_kernels_agree_with_float64_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES],
        capture_output=True,
        text=True,
        check=False,
        cwd=CASES.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
