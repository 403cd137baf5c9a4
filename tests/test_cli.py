import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lora_core
import lora_core.demo
from lora_core import _cli
from lora_core._errors import LoRAError


def raising(error: BaseException):
    def tell(settings: object) -> None:
        raise error

    return tell


def test_version_is_printed_without_loading_torch() -> None:
    code = "import sys; from lora_core._cli import main\ntry: main(['--version'])\nfinally: "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"lora-core {lora_core.__version__}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_core", "demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"--{name}" in done.stdout for name in ("rank", "steps", "seed", "out", "quick"))


@pytest.mark.parametrize(
    "words", [[], ["dmeo"], ["demo", "--steps", "0"], ["demo", "--seed", "-1"], ["demo", "--x"]]
)
def test_words_that_make_no_command_exit_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _cli.main(words)
    assert stopped.value.code == 2
    assert "usage: lora-core" in capsys.readouterr().err


def test_a_count_out_of_range_is_shown_with_its_bounds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        _cli.main(["demo", "--steps", "many"])
    wanted = "argument --steps: must be a whole number from 1 to 1000000, but is 'many'.\n"
    assert capsys.readouterr().err.endswith(wanted)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LoRAError("A sentence\n  in two lines."), "A sentence in two lines."),
        (
            FileExistsError(17, "File exists", "place"),
            "the system says 'File exists' about 'place'.",
        ),
        (OSError("a bare reason"), "a bare reason"),
        (LoRAError(), "LoRAError"),
    ],
)
def test_a_users_error_is_one_sentence_and_exit_code_1(
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lora_core.demo, "tell", raising(error))
    assert _cli.main(["demo"]) == 1
    assert capsys.readouterr().err == f"lora-core: error: {said}\n"


def test_a_fault_of_the_program_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_core.demo, "tell", raising(ZeroDivisionError("a bug")))
    assert _cli.main(["demo"]) == 70
    said = "a fault of lora_core, ZeroDivisionError: a bug. Please report what --debug shows."
    assert capsys.readouterr().err == f"lora-core: error: {said}\n"
    with pytest.raises(ZeroDivisionError, match=r"^a bug$"):
        _cli.main(["demo", "--debug"])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_core.demo, "tell", raising(LoRAError("inside")))
    with pytest.raises(LoRAError, match=r"^inside$"):
        _cli.main(["demo", "--debug"])


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_one_that_nobody_reads(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_core.demo, "tell", raising(LoRAError("inside")))
    for words, code in (["completion", "bash"], 0), (["demo"], 1):
        monkeypatch.setattr(sys, stream, None)
        assert _cli.main(words) == code
        getattr(sys, stream).close()


def test_an_interrupt_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_core.demo, "tell", raising(KeyboardInterrupt()))
    assert _cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "lora-core: interrupted\n"


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own_is_one_still(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(*args: object, **kwargs: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(lora_core.demo, "tell", swallow)
    assert _cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "lora-core: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_options_reach_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = []
    monkeypatch.setattr(lora_core.demo, "tell", told.append)
    words = ["--rank", "2", "--steps", "9", "--seed", "5", "--out", os.fspath(tmp_path)]
    assert _cli.main(["demo", *words]) == 0
    assert _cli.main(["demo", "--quick", "--rank", "3"]) == 0
    full, quick = told
    assert (full.rank, full.steps, full.seed, full.out) == (2, 9, 5, tmp_path)
    assert full.convincing
    assert not quick.convincing
    assert quick.rank == 3
    assert quick.steps < lora_core.demo.Settings().steps


def test_a_rank_out_of_range_is_refused_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main(["demo", "--quick", "--rank", "0", "--out", os.fspath(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("lora-core: error: `rank` must be ")
    assert captured.err.count("\n") == 1
    assert "step" not in captured.out
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "taken"
    place.write_text("mine")
    assert _cli.main(["demo", "--quick", "--out", os.fspath(place)]) == 1
    assert repr(os.fspath(place)) in capsys.readouterr().err
    assert place.read_text() == "mine"
