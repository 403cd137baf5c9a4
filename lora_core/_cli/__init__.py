"""The command line: `lora-core`, or `python -m lora_core`.

One module per command, whose top is light: PyTorch is loaded when a command runs, so that
``--help``, ``--version`` and completion cost next to nothing.
"""

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lora_core._cli import (
    combine,
    completion,
    convert,
    demo,
    diff,
    extract,
    inspect,
    merge,
    plan,
    resize,
)
from lora_core._cli.answers import (
    BROKEN_PIPE,
    ERROR,
    FAULT,
    INTERRUPTED,
    MEANINGS,
    show,
    visible,
)
from lora_core._cli.arguments import EXITS, Plain, with_negatives
from lora_core._errors import LoRAError
from lora_core._version import __version__

_COMMANDS = (
    *(plan, inspect, convert, combine, resize, extract, merge, diff),
    *(demo, completion),
)

# what a message calls a parameter of the library, where the option has another name
_OPTIONS = {"format": "to"}
# advice that the command line can follow in a shorter way, by the option that it takes
_ADVICE = {
    "bases": [
        ("Load it into its model, and save that.", "Pass --base with its model."),
        ("Load each into the model and save it again.", "Pass --base with their model."),
    ],
    "check_base": [("pass check_base=False.", "pass --no-check-base.")],
    "alpha": [
        (
            "Pass alpha=, a number or a dict by module, as it was trained.",
            "Pass --alpha A, or --alpha MODULE=A for each module, as it was trained.",
        )
    ],
}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it parses knows its command's `run`."""
    codes = [f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items()]
    whole = argparse.ArgumentParser(
        prog="lora-core",
        description="LoRA for any PyTorch module.",
        epilog="\n".join([EXITS, *codes]),
        formatter_class=Plain,
        allow_abbrev=False,
    )
    with_negatives(whole)
    whole.set_defaults(whole=whole)  # which `completion` prints
    whole.add_argument("--version", action="version", version=f"lora-core {__version__}")
    commands = whole.add_subparsers(
        required=True, metavar="COMMAND", dest="command", title="commands"
    )
    for module in _COMMANDS:
        module.add(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after the program's name; None means those of this process.

    Returns:
        The exit code, as in `answers`.

    Raises:
        SystemExit: With code 2 if the words make no command, 0 after ``--help`` or ``--version``.
        BaseException: Whatever a command raises, if ``--debug`` is among the words.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this closed it, and reads nothing
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    args = parser().parse_args(argv)
    presses: list[int] = []
    try:
        with _warnings_told(), _counted(presses):
            answer = args.run(args)
            show(answer, args.command, as_json=args.json)
    except BrokenPipeError:
        # whoever read the output has closed it; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as error:
        if args.debug:  # a traceback is for those who ask for it
            raise
        if presses or isinstance(error, KeyboardInterrupt):
            _say("interrupted")
            return INTERRUPTED
        if isinstance(error, LoRAError | OSError):
            _say(f"error: {_with_options(_sentence(error), args)}")
            return ERROR
        what = f"{type(error).__name__}: {_sentence(error).rstrip('.')}"
        _say(f"error: a fault of lora_core, {what}. Please report what --debug shows.")
        return FAULT
    return int(answer.code)


def _say(words: str) -> None:
    print(visible(f"lora-core: {words}", sys.stderr), file=sys.stderr)


def _sentence(error: BaseException) -> str:
    """The message of an error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename!r}" if error.filename is not None else ""
        return f"the system says {error.strerror!r}{where and ' about'}{where}."
    return " ".join(str(error).split()) or type(error).__name__


def _with_options(sentence: str, args: argparse.Namespace) -> str:
    """A message of the library, whose advice names parameters, in the words of this command.

    Example:
        >>> args = argparse.Namespace(force=False, alpha=None)
        >>> _with_options("Pass force=True, or other=True.", args)
        'Pass --force, or other=True.'
    """

    def option(found: re.Match[str]) -> str:
        if found["quoted"]:
            return found[0]
        name = _OPTIONS.get(found["name"], found["name"])
        if not hasattr(args, name):
            return found[0]
        word = f"--{name.replace('_', '-')}"
        if found["value"] == "None":
            return f"no {word}"
        plain = found["value"] in (None, "True") or found["value"].startswith("{")
        return word if plain else f"{word} {found['value']}"

    for name, pairs in _ADVICE.items():
        for theirs, ours in pairs if hasattr(args, name) else ():
            sentence = sentence.replace(theirs, ours)
    value = r"(?P<value>[A-Za-z0-9_.]+|'[^']*'|\{[^}]*\})?"
    quoted = r"(?<!\w)(?P<quoted>'[^']*')"  # a path may look like anything
    return re.sub(rf"{quoted}|(?<![\w.\[])(?P<name>[a-z_]+)=(?!=){value}", option, sentence)


@contextmanager
def _warnings_told() -> Iterator[None]:
    """The library's warnings as sentences of the program."""

    def tell(message: Warning | str, category: type[Warning], *rest: object) -> None:  # noqa: ARG001
        _say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell  # type: ignore[assignment]
        yield


@contextmanager
def _counted(presses: list[int]) -> Iterator[None]:
    """Each press of Ctrl-C is put down in a list, and interrupts.

    An interrupt that comes amid the native code of a library may leave it as another error.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        presses.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
