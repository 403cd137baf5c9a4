"""The program as a process: codes, streams, signals, pipes, shells, and how light its top is."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lora_core._cli import parser
from lora_core._cli.completion import commands_of, options_of

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "data" / "golden"
PEFT = GOLDEN / "peft" / "linear"
PROGRAM = (sys.executable, "-m", "lora_core")


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, words)], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned model, and an adapter, all tiny."""
    place = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    base = {f"{name}.to_q.weight": torch.randn(8, 8) for name in "ab"}
    tuned = {name: t + torch.randn(8, 1) @ torch.randn(1, 8) for name, t in base.items()}
    safetensors.torch.save_file(base, place / "base")
    safetensors.torch.save_file(tuned, place / "tuned")
    done = run("extract", "base", "tuned", "lora", "--rank", 2, cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    return place


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("plan", "base", "--rank", "2"), 0),
        (("inspect", "lora"), 0),
        (("convert", "lora", "peft", "--to", "peft"), 0),
        (("combine", "lora", "lora", "sum", "--weights", "0.5", "0.5"), 0),
        (("resize", "lora", "one", "--rank", "1"), 0),
        (("extract", "base", "tuned", "again", "--energy", "0.9"), 0),
        (("merge", "base", "lora", "merged"), 0),
        (("diff", "lora", "lora"), 0),
        (("diff", "lora", str(PEFT)), 3),
        (("diff", "lora", "base"), 1),
        (("completion", "fish"), 0),
    ],
)
def test_every_command_runs_and_prints_one_document(
    words: tuple[str, ...], code: int, folder: Path
) -> None:
    done = run(*words, "--json", cwd=folder)
    assert done.returncode == code
    if code == 1:
        assert done.stdout == ""
        assert done.stderr.startswith("lora-core: error: ")
        assert done.stderr.count("\n") == 1
        return
    assert json.loads(done.stdout)["command"] == words[0]
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["convert", "--help"], ["completion", "bash"], ["inspekt"]],
    ids=" ".join,
)
def test_what_needs_no_pytorch_loads_none(words: list[str]) -> None:
    code = (
        "import sys; from lora_core._cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'safetensors', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_that_pip_installs_is_the_program() -> None:
    script = shutil.which("lora-core", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == run("--version").stdout


def test_debug_shows_the_traceback_of_an_error() -> None:
    done = run("inspect", "missing", "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "FileNotFoundError" in done.stderr
    plain = run("inspect", "missing")
    assert plain.returncode == 1
    said = "the system says 'No such file or directory' about 'missing'."
    assert plain.stderr == f"lora-core: error: {said}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_the_demo_with_130(tmp_path: Path) -> None:
    words = [*PROGRAM, "demo", "--out", str(tmp_path)]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell runs in the background passes over Ctrl-C, and so do its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Training")
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:  # it came amid a finaliser, where Python passes over it
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "lora-core: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*PROGRAM, "completion", "bash"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
@pytest.mark.parametrize("stream", [1, 2])
def test_a_stream_that_is_closed_from_the_start_is_no_error(stream: int) -> None:
    words = [*PROGRAM, "inspect", str(PEFT)]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {stream}>&-', "sh", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("rank" in done.stdout) == (stream == 2)


def test_names_that_the_terminal_can_not_show_are_spelled_out(tmp_path: Path) -> None:
    shutil.copytree(PEFT, tmp_path / "é")
    done = subprocess.run(
        [*PROGRAM, "inspect", str(tmp_path / "é")],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"\\xe9" in done.stdout


# completion


def bash(*words: str) -> set[str]:
    """What bash completes the last of these words to."""
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("there is no bash here")
    script = (
        f"source <({' '.join(PROGRAM)} completion bash)\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))\n'
        '_lora_core; printf "%s\\n" "${COMPREPLY[@]}"\n'
        "complete -p lora-core >/dev/null"
    )
    done = subprocess.run(
        [shell, "--norc", "-c", script, "bash", *words], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("lora-core", ""), {*commands_of(parser()), "-h", "--help", "--version"}),
        (("lora-core", "in"), {"inspect"}),
        (("lora-core", "inspect", "--a"), {"--alpha", "--allow-pickle"}),
        (("lora-core", "inspect", "fi"), set()),
        (("lora-core", "convert", "--to", "l"), {"lora_core", "lycoris"}),
        (("lora-core", "convert", "--to", "=", "p"), {"peft"}),
        (
            ("lora-core", "convert", "a", "b", "--to", "="),
            {"lora_core", "kohya", "lycoris", "peft", "diffusers"},
        ),
        (("lora-core", "completion", ""), {"bash", "zsh", "fish"}),
        (("lora-core", "merge", "--no-t"), {"--no-transposed"}),
    ],
)
def test_a_real_bash_completes(words: tuple[str, ...], found: set[str]) -> None:
    assert bash(*words) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_option_is_in_every_script(shell: str) -> None:
    script = run("completion", shell).stdout
    for name, command in commands_of(parser()).items():
        assert name in script
        for action in options_of(command):
            for word in action.option_strings:
                assert (f"-l {word[2:]}" if shell == "fish" else word) in script or len(word) == 2
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"there is no {shell} here to read it")
    read = subprocess.run([found, "-n"], input=script, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def test_a_real_fish_completes() -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("there is no fish here")
    code = f"{' '.join(PROGRAM)} completion fish | source; complete -C 'lora-core convert --to l'"
    done = subprocess.run([fish, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["lora_core", "lycoris"]
