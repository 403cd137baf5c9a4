"""`lora-core convert`: an adapter in another program's format."""

import argparse
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import FAMILIES, command, naming, place, reading, writing

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "convert",
        _run,
        "write an adapter in another program's format",
        "Writes an adapter in another format, as the same function. A file of kohya's spells the"
        " names of modules with underscores, which can't be taken apart again: the dotted names"
        " that other formats have are found through the base model, --base.",
    )
    place(parser, "in", "the adapter")
    place(parser, "out", "where to write; for peft a folder")
    naming(parser)
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        help="what kohya's metadata are to say of the base (told by the modules)",
    )
    reading(parser)
    writing(parser, must=True)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._cli.adapters import check_free, read_one, write

    check_free(args.out, force=args.force)
    adapter = read_one(getattr(args, "in"), args)
    about, text = write(adapter, args.out, args)
    return Answer({"from": adapter.format, **about}, f"read {adapter.format}\n{text}")
