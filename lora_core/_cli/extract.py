"""`lora-core extract`: the difference of two models as an adapter."""

import argparse
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import SVDS, casting, command, cutting, place, within, writing
from lora_core._cli.progress import Results, progress

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "extract",
        _run,
        "make an adapter of the difference of two models",
        "Writes the adapter that makes one checkpoint of another, as nearly as its ranks allow,"
        " reading one pair of tensors at a time. A tensor '.weight' of two dimensions is taken for"
        " that of a linear layer, one of three to five for a convolution's. Prints the error of"
        " each layer, and says which other tensors differ.",
    )
    place(parser, "base", "the model before: a file, an index of shards, or a folder with either")
    place(parser, "tuned", "the model after")
    place(parser, "out", "where to write")
    cutting(parser)
    parser.add_argument(
        "--svd",
        choices=SVDS,
        default="auto",
        help="how to find singular values (auto: exactly in small matrices, or for a share)",
    )
    parser.add_argument(
        "--seed", type=within(0, 2**32 - 1), default=0, help="decides the random subspace (0)"
    )
    casting(parser, "float32")
    writing(parser, made=True)


def _run(args: argparse.Namespace) -> Answer:
    import warnings

    import torch

    from lora_core._algebra import extract
    from lora_core._cli.adapters import check_free, dtype_of, finished

    check_free(args.out, force=args.force)
    with progress("extracting") as step, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its note says the same
        results = Results(step)
        made = extract(
            args.base,
            args.tuned,
            rank=args.rank,
            energy=args.energy,
            error=args.error,
            svd=args.svd,
            seed=args.seed,
            dtype=dtype_of(args) or torch.float32,
            told=results,
        )
    return finished(made, results, args)
