"""The options that several commands share, and the types of their values."""

import argparse
import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_core._cli.answers import Answer

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

T = TypeVar("T")
EXITS = "exit codes:"
FORMATS = ("lora_core", "kohya", "lycoris", "peft", "diffusers")
SPELLINGS = ("diffusers", "ldm")
DTYPES = ("float32", "float16", "bfloat16", "float64")
METHODS = ("sum", "ties", "dare", "magnitude_prune")
SVDS = ("auto", "exact", "randomised")
FAMILIES = ("sd_v1", "sd_v2", "sd_v2_v", "sdxl_base_v1-0")
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")


class Plain(argparse.RawDescriptionHelpFormatter):
    """Help whose descriptions are wrapped here, and whose epilog stands as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(EXITS):
            return text
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent)


def with_negatives(parser: argparse.ArgumentParser) -> None:
    """Lets values be negative numbers with an exponent, which argparse takes for options."""
    parser._negative_number_matcher = _NEGATIVE


def command(
    commands: "Commands",
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    """A new command, with the options that every one has.

    Args:
        commands: Where it goes.
        name: Its name.
        run: What it does.
        summary: What it does, in a few words.
        description: The same in full sentences.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=Plain,
        allow_abbrev=False,
    )
    with_negatives(parser)
    parser.set_defaults(run=run)
    common = parser.add_argument_group("in every command")
    common.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, and nothing else"
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def reading(parser: argparse.ArgumentParser) -> None:
    """The options of a command that reads adapters."""
    group = parser.add_argument_group("reading adapters")
    group.add_argument(
        "--alpha",
        action="append",
        type=_alpha,
        metavar="[MODULE=]A",
        help="numerator of the scale, where a file stores none; for one module by its name",
    )
    group.add_argument(
        "--enable-lora",
        action="append",
        type=_slots,
        metavar="[MODULE=]101",
        help="which projections of a loralib MergedLinear were trained: 1 or 0 for each",
    )
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read tensors out of .pt and .bin files; no code in them is run",
    )


def naming(parser: argparse.ArgumentParser) -> None:
    """The option that gives dotted names to modules which a file names with underscores."""
    parser.add_argument(
        "--base",
        dest="bases",
        action="append",
        metavar="[PART=]CHECKPOINT",
        help="file or folder of the base model, of which only names and shapes are read: gives the"
        " modules their dotted names. For one part of a pipeline, as in unet=PATH; may be repeated",
    )


def writing(parser: argparse.ArgumentParser, *, made: bool = False, must: bool = False) -> None:
    """The options of a command that writes an adapter.

    Args:
        parser: The command's.
        made: Whether the adapter is a new one, and not read from a file.
        must: Whether the format must be said.
    """
    usual = "lora_core" if made else "that of the input where that can be written, else lora_core"
    group = parser.add_argument_group("writing an adapter")
    group.add_argument(
        "--to",
        choices=FORMATS,
        required=must,
        help="the format to write" + ("" if must else f" ({usual})"),
    )
    group.add_argument(
        "--fold",
        action="store_true",
        help="express what the format has no place for in plainer terms, where that is exact",
    )
    group.add_argument(
        "--spelling",
        choices=SPELLINGS,
        help="how kohya and lycoris files spell a UNet's modules (ldm for SDXL, else diffusers)",
    )
    own = "default" if made else "that of the input"
    group.add_argument("--name", help=f"the adapter's name ({own})")
    overwriting(parser)


def overwriting(parser: argparse.ArgumentParser) -> None:
    """The option of a command that writes a file."""
    parser.add_argument(
        "--force", action="store_true", help="replace what is at the place of the output"
    )


def cutting(parser: argparse.ArgumentParser) -> None:
    """The options of a command that chooses ranks: exactly one of them."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--rank", type=int, help="the highest rank of a layer")
    group.add_argument(
        "--energy", type=float, help="share of each update's squared norm to keep, in (0, 1]"
    )
    group.add_argument("--error", type=float, help="highest relative error of an update, in [0, 1)")


def casting(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """The option of a command that makes new factors."""
    parser.add_argument("--dtype", choices=DTYPES, help=f"type of the factors ({otherwise})")


def place(parser: argparse.ArgumentParser, name: str, text: str, *, many: bool = False) -> None:
    """A file or folder that the command needs, or several."""
    several = {"nargs": "+"} if many else {}
    parser.add_argument(name, type=Path, metavar=name.upper(), help=text, **several)  # type: ignore[arg-type]


def within(least: int, most: int) -> Callable[[str], int]:
    """The type of a whole number with bounds."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, but is {text!r}."
            )
        return value

    return number


def json_object(text: str) -> Mapping[str, object]:
    """The type of a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON, but is not: {error}.") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'must be a JSON object, as in \'{{"*mid*": {{"rank": 16}}}}\', but is {text!r}.'
        )
    return value


def by_module(given: list[tuple[str, T]] | None) -> T | dict[str, T] | None:
    """Values of a repeated option: one for all, or a dict by module."""
    if not given:
        return None
    names = [name for name, _ in given]
    return given[0][1] if names == [""] else dict(given)


def _alpha(text: str) -> tuple[str, float]:
    module, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, or MODULE=NUMBER, but is {text!r}.")
    return module, value


def _slots(text: str) -> tuple[str, list[bool]]:
    module, _, slots = text.rpartition("=")
    if not slots or set(slots) - {"0", "1"}:
        raise argparse.ArgumentTypeError(
            f"must be a 1 or a 0 for each projection, as in qkv=101, but is {text!r}."
        )
    return module, [slot == "1" for slot in slots]
