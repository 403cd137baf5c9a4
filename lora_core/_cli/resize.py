"""`lora-core resize`: an adapter at another rank."""

import argparse
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import casting, command, cutting, naming, place, reading, writing
from lora_core._cli.progress import Results, progress

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "resize",
        _run,
        "write an adapter at a lower rank",
        "Writes the nearest adapter of a lower rank, chosen for each layer by its singular values."
        " Prints the error of each layer.",
    )
    place(parser, "in", "the adapter")
    place(parser, "out", "where to write")
    cutting(parser)
    casting(parser, "that of each layer")
    naming(parser)
    reading(parser)
    writing(parser)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._algebra import resize
    from lora_core._cli.adapters import check_free, dtype_of, finished, read_one

    check_free(args.out, force=args.force)
    adapter = read_one(getattr(args, "in"), args)
    with progress("resizing") as step:
        results = Results(step)
        made = resize(
            adapter,
            rank=args.rank,
            energy=args.energy,
            error=args.error,
            dtype=dtype_of(args),
            told=results,
        )
    return finished(made, results, args)
