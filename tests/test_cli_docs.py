"""docs/cli.md says what the parsers say, no less and no more, and its examples run."""

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lora_core import _cli
from lora_core._cli import parser
from lora_core._cli.answers import MEANINGS
from lora_core._cli.completion import commands_of, options_of

PAGE = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
GOLDEN = Path(__file__).parent / "data" / "golden"
COMMON = {"--json", "--debug", "--help"}
COMMANDS = commands_of(parser())
# what the examples begin with
FILES = {
    "style.safetensors": "kohya/sd15_linear/lora.safetensors",
    "unet.safetensors": "diffusers_base/sd15_tiny_unet.safetensors",
    "text_encoder.safetensors": "diffusers_base/sd15_tiny_te1.safetensors",
    "lora.pt": "loralib/bias_none/lora.pt",
}


def section(title: str) -> str:
    found = re.search(rf"^## `?{re.escape(title)}`?$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"docs/cli.md has no page for {title!r}"
    return found[1]


def row(action: argparse.Action) -> str:
    """The line of the page's table that says what the parser says of an option or a place."""
    words = ", ".join(action.option_strings)
    value = action.metavar or ("" if action.choices else action.dest.upper())
    if action.nargs == 0:
        value = ""
    choices = f". One of {', '.join(map(str, action.choices))}" if action.choices else ""
    name = f"{words} {value}".strip() or action.dest
    return f"| `{name}` | {action.help}{choices} |"


def table(command: argparse.ArgumentParser) -> list[str]:
    return [row(a) for a in command._actions if not COMMON & set(a.option_strings)]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_has_just_what_its_parser_takes(name: str) -> None:
    page = section(f"lora-core {name}")
    assert [line for line in page.splitlines() if line.startswith("| `")] == table(COMMANDS[name])
    description = " ".join((COMMANDS[name].description or "").split())
    assert description in " ".join(page.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_a_page_names_is_one(name: str) -> None:
    known = {word for action in options_of(COMMANDS[name]) for word in action.option_strings}
    words = re.sub(r"```sh.*?```", "", section(f"lora-core {name}"), flags=re.S)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", words))
    assert named <= known


def test_there_is_a_page_for_each_command_and_for_no_other() -> None:
    assert re.findall(r"^## `lora-core (\w+)`$", PAGE, re.M) == list(COMMANDS)


def test_the_exit_codes_are_all_there() -> None:
    lines = [line for line in section("Exit codes").splitlines() if line.startswith("| ")]
    assert lines[1:] == [f"| {code} | {meaning} |" for code, meaning in MEANINGS.items()]


def test_help_has_the_exit_codes_too() -> None:
    whole = parser().format_help()
    assert all(f"{code:>3}  {meaning}" in whole for code, meaning in MEANINGS.items())


def test_what_every_command_takes_is_said_once() -> None:
    page = section("In every command")
    assert all(f"`{option}`" in page for option in COMMON)


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in FILES.items():
        shutil.copy(GOLDEN / source, name)
    blocks = re.findall(r"^```sh\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", PAGE, re.M | re.S)
    first: dict[str, list[str]] = {}
    for commands, shown in blocks:
        out = ""
        for line in commands.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["lora-core"] or words[1] == "demo":
                continue
            first.setdefault(words[1], words[1:])
            wanted = re.search(r"# exits with (\d+)", line)
            assert _cli.main(words[1:]) == int(wanted[1] if wanted else 0), line
            captured = capsys.readouterr()
            out = captured.out + captured.err
        if shown:
            assert out == shown
    assert first.keys() == COMMANDS.keys() - {"demo"}
    for name, words in first.items():
        force = ["--force"] if "`--force`" in section(f"lora-core {name}") else []
        assert _cli.main([*words, "--json", *force]) == 0
        keys = [f"`{key}`" for key in json.loads(capsys.readouterr().out) if key != "command"]
        assert f"`--json` prints {', '.join(keys)}." in section(f"lora-core {name}")
