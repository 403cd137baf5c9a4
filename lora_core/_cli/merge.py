"""`lora-core merge`: an adapter merged into a checkpoint."""

import argparse
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import command, overwriting, place, reading
from lora_core._cli.progress import Results, progress

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "merge",
        _run,
        "write a checkpoint with an adapter merged in",
        "Writes a checkpoint with an adapter in its weights, one tensor at a time, bit for bit as"
        " in memory. Tensors that the adapter has nothing for are copied as they are. Of shards"
        " with an index the output is a new folder.",
    )
    place(parser, "base", "the model: a file, an index of shards, or a folder with either")
    place(parser, "adapter", "the adapter")
    place(parser, "out", "where to write")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="what the update is multiplied by (1)"
    )
    parser.add_argument("--only", metavar="PART", help="the layers for one part alone, as unet")
    parser.add_argument(
        "--transposed",
        action=argparse.BooleanOptionalAction,
        help="whether square matrices are stored (in, out), as GPT-2's are (told by the others)",
    )
    parser.add_argument(
        "--check-base",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the model must be the one that the adapter was trained on (yes)",
    )
    reading(parser)
    overwriting(parser)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._algebra import merge_file
    from lora_core._cli.adapters import check_free, errors, read_one
    from lora_core._reports import AlgebraReport

    check_free(args.out, force=args.force)
    adapter = read_one(args.adapter, args)
    with progress("merging") as step:
        results = Results(step)
        report = merge_file(
            args.base,
            adapter,
            args.out,
            strength=args.strength,
            only=args.only,
            transposed=args.transposed,
            force=args.force,
            check_base=args.check_base,
            told=results,
        )
    about = {
        "out": report.path,
        "adapter": report.adapter,
        "strength": report.strength,
        "changed": report.changed,
        "untouched": report.untouched,
        "bytes": report.nbytes,
    }
    told = AlgebraReport(results)
    return Answer({**about, **errors(told)}, f"{told}\n{report}")
