"""The tests run in a folder of theirs, whatever lies where they are started from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what runs commands, or writes files under names without a folder
TOUCHING = (
    *("README.md", "docs", "tests/test_cli.py", "tests/test_cli_commands.py"),
    *("tests/test_cli_docs.py", "tests/test_demo.py"),
)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder and when it was written, by its path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_a_test_begins_in_an_empty_folder() -> None:
    assert list(Path.cwd().iterdir()) == []
    assert ROOT not in (Path.cwd(), *Path.cwd().parents)


@pytest.mark.slow
def test_what_lies_in_the_working_folder_changes_no_test_and_no_test_changes_it(
    tmp_path: Path,
) -> None:
    place, apart = tmp_path / "place", tmp_path / "apart"
    # what the demo, README's example and the examples of docs/cli.md would write
    for name in ("lora-core-demo/report.json", "style.safetensors", "merged.safetensors", "base"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
    before = content(place)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}", f"--basetemp={apart}"),
            *(ROOT / name for name in TOUCHING),
        ],
        cwd=place,
        # what Hypothesis keeps is no test's
        env=os.environ | {"PYTHONPATH": str(ROOT), "HYPOTHESIS_STORAGE_DIRECTORY": str(apart)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert content(place) == before
