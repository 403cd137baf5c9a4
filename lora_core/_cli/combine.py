"""`lora-core combine`: several adapters as one."""

import argparse
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import (
    METHODS,
    casting,
    command,
    naming,
    place,
    reading,
    within,
    writing,
)
from lora_core._cli.progress import Results, progress

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "combine",
        _run,
        "make one adapter of several",
        "Writes the weighted sum of adapters of one model. Without --rank it is exact, and its"
        " rank the sum of theirs; with --rank each layer is the best approximation of that rank."
        " The other methods need --rank and --density. Prints the error of each layer.",
    )
    place(parser, "adapters", "two adapters or more", many=True)
    place(parser, "out", "where to write")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="a number for each adapter (1)"
    )
    parser.add_argument("--rank", type=int, help="the highest rank of a layer")
    parser.add_argument(
        "--method", choices=METHODS, default="sum", help="how to combine them (sum)"
    )
    parser.add_argument(
        "--density", type=float, help="share of entries that other methods keep, in (0, 1]"
    )
    parser.add_argument(
        "--seed", type=within(0, 2**32 - 1), default=0, help="decides what dare drops (0)"
    )
    casting(parser, "the widest of a layer's")
    naming(parser)
    reading(parser)
    writing(parser)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._algebra import combine
    from lora_core._cli.adapters import check_free, dtype_of, finished, read_several
    from lora_core._errors import ConfigError

    check_free(args.out, force=args.force)
    adapters = read_several(args.adapters, args)
    if len(adapters) < 2:
        raise ConfigError(
            "`combine` must be given two adapters or more, but got one. Use `convert` to write one"
            " another way."
        )
    weights = [1.0] * len(adapters) if args.weights is None else args.weights
    with progress("combining") as step:
        results = Results(step)
        made = combine(
            adapters,
            weights,
            args.rank,
            method=args.method,
            density=args.density,
            seed=args.seed,
            dtype=dtype_of(args),
            told=results,
        )
    return finished(made, results, args)
