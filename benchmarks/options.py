"""Options that the benchmarks' commands share, checked before the work, and where results go."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

_PICTURES = (".png", ".svg", ".pdf")


def add_outputs(parser: argparse.ArgumentParser, results: str, picture: str | None = None) -> None:
    """Adds ``--json``, and ``--plot`` for a `picture`, in place.

    Both are refused where nothing could be written.
    """
    parser.add_argument(
        "--json",
        type=_results,
        metavar="PATH",
        help=f"write the {results} here; - prints them, and no table",
    )
    if picture is not None:
        parser.add_argument(
            "--plot", type=_picture, metavar="PATH", help=f"draw the {picture} as PNG"
        )


def write_json(data: object, where: str, indent: int) -> None:
    """Writes to the file `where`, or prints it for ``-``."""
    text = json.dumps(data, indent=indent) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def at_least_one(what: str) -> Callable[[str], int]:
    """Reads a whole number from 1; `what` is its name in the refusal."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = 0
        if number < 1:
            raise argparse.ArgumentTypeError(
                f"{what} must be a whole number of at least 1, but is {text!r}"
            )
        return number

    return read


def _results(text: str) -> str:
    return text if text == "-" else str(_writable(text))


def _picture(text: str) -> Path:
    path = _writable(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"a picture must end in {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}, but is {text!r}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "a picture must have matplotlib to be drawn, but it is not installed: run"
            " `pip install 'lora_core[demo]'`"
        )
    return path


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"a result must go to a file, but {text!r} is a folder")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there != path and not there.is_dir():
        raise argparse.ArgumentTypeError(
            f"a result must go into a folder, but {str(there)!r} is a file"
        )
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"a result must go where you may write, but {str(there)!r} forbids it"
        )
    return path
