"""`lora-core diff`: whether two adapters are the same function."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_core._cli.answers import DIFFERENT, DONE, Answer
from lora_core._cli.arguments import command, naming, place, reading
from lora_core._cli.progress import progress

if TYPE_CHECKING:
    from lora_core._algebra import Comparison
    from lora_core._cli.arguments import Commands

_TOLERANCE = 1e-5
_SHOWN = 20  # layers that each list shows; --json has all


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "diff",
        _run,
        "say whether two adapters are the same function",
        "Compares what two adapters add to each layer, whatever their formats, ranks and alphas."
        " They are the same function where no layer's updates differ by more than --tolerance of"
        " the larger, and what one alone has adds nothing. Exits with 0 if so, with 3 if not.",
    )
    place(parser, "a", "an adapter")
    place(parser, "b", "another")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=_TOLERANCE,
        help=f"largest relative difference of a layer ({_TOLERANCE:g})",
    )
    naming(parser)
    reading(parser)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._algebra import compare
    from lora_core._cli.adapters import read_several
    from lora_core._config import check_finite
    from lora_core._errors import ConfigError

    tolerance = check_finite("tolerance", args.tolerance)
    if tolerance < 0:
        raise ConfigError(f"`tolerance` must be at least 0, but is {tolerance:g}.")
    one, other = read_several([args.a, args.b], args)
    with progress("comparing") as step:
        found = compare(one, other, step)
    same = found.is_same(tolerance)
    document = {
        "same": same,
        "tolerance": tolerance,
        "largest_difference": found.largest,
        "layers": [asdict(layer) for layer in found.layers],
        "only_in_a": found.alone[0],
        "only_in_b": found.alone[1],
    }
    return Answer(document, _text(found, args, same=same), DONE if same else DIFFERENT)


def _text(found: "Comparison", args: argparse.Namespace, *, same: bool) -> str:
    from lora_core._reports import table

    lines = []
    layers = sorted(found.layers, key=lambda layer: -layer.difference)
    above = [layer for layer in layers if layer.difference > args.tolerance]
    if above:
        rows = [(x.name, f"{x.difference:.2e}", x.why) for x in above[:_SHOWN]]
        lines += [table(("layer", "difference", ""), rows), *_rest(len(above))]
    for file, alone in zip((args.a, args.b), found.alone, strict=True):
        if alone:
            lines.append(f"only in {file}: {len(alone)} layers")
            lines += [f"  {name}  norm {norm:.4g}" for name, norm in list(alone.items())[:_SHOWN]]
            lines += _rest(len(alone))
    if all(found.alone) and not args.bases:
        lines.append(
            "what only one has may be the other's under a name as another program spells it: pass"
            " --base with the model of both"
        )
    verdict = "the same function" if same else "not the same function"
    lines.append(
        f"{verdict}: {len(above)} of {len(layers)} layers differ by more than {args.tolerance:g}"
        + (f", {layers[0].difference:.2e} at most" if layers else "")
    )
    return "\n".join(lines)


def _rest(count: int) -> list[str]:
    return [f"  and {count - _SHOWN} more"] if count > _SHOWN else []
