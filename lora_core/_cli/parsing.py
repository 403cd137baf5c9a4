"""The words that make a command: one parser, and one below it for each command."""

import argparse

from lora_core import __version__
from lora_core._cli import (
    combining,
    completing,
    converting,
    demonstrating,
    diffing,
    extracting,
    inspecting,
    merging,
    planning,
    resizing,
)
from lora_core._cli.arguments import EXITS, Plain, with_negatives
from lora_core._cli.exits import MEANINGS

_COMMANDS = (
    *(planning, inspecting, converting, combining, resizing, extracting, merging, diffing),
    *(demonstrating, completing),
)


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
    whole.add_argument("--version", action="version", version=f"lora-core {__version__}")
    commands = whole.add_subparsers(
        required=True, metavar="COMMAND", dest="command", title="commands"
    )
    for module in _COMMANDS:
        module.add(commands)
    return whole
