"""The command line: `lora-core`, or `python -m lora_core`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_core import __version__
from lora_core._errors import LoRAError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after the program's name; None means those of this process.

    Returns:
        The exit code: 0, 1 after an error that is the user's to repair, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 if the words make no command, 0 after ``--help`` or ``--version``.
    """
    args = _parser().parse_args(argv)
    try:
        _demo(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("lora-core: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (LoRAError, OSError) as error:
        if args.debug:
            raise
        print(f"lora-core: error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _demo(args: argparse.Namespace) -> None:
    # here, so that `--help` and `--version` need no PyTorch
    from lora_core.demo import Settings, tell

    chosen = {
        name: getattr(args, name)
        for name in ("rank", "steps", "seed", "out")
        if getattr(args, name) is not None
    }
    tell(Settings.quick(**chosen) if args.quick else Settings(**chosen))


def _sentence(error: BaseException) -> str:
    """The message of an error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename!r}" if error.filename is not None else ""
        return f"the system says {error.strerror!r}{where and ' about'}{where}."
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-core", description="LoRA for any PyTorch module.")
    parser.add_argument("--version", action="version", version=f"lora-core {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    demo = commands.add_parser(
        "demo",
        help="teach the shipped digit model a style and draw it",
        description=(
            "Trains an adapter on 64 bold digits, on top of the shipped digit model, and shows"
            " what it changed. Takes under two minutes on two CPU cores."
        ),
    )
    demo.add_argument("--rank", type=int, help="rank of the adapter (4)")
    demo.add_argument("--steps", type=_count, help="training steps")
    demo.add_argument("--seed", type=_seed, help="decides every draw (0)")
    demo.add_argument("--out", type=Path, help="folder to write to (lora-core-demo)")
    demo.add_argument("--quick", action="store_true", help="seconds; not meant to convince")
    demo.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _count(text: str) -> int:
    return _within(text, 1, 1_000_000)


def _seed(text: str) -> int:
    return _within(text, 0, 2**32 - 1)


def _within(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {least} to {most}, but is {text!r}."
        )
    return number
