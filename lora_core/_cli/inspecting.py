"""`lora-core inspect`: what an adapter's file holds."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import command, overwriting, place, reading
from lora_core._cli.progress import progress

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands
    from lora_core._cli.measures import Block, Measured
    from lora_core._formats import Adapter
    from lora_core._formats.families import Family

_LONGEST = 60  # characters of a metadata entry that are shown


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "inspect",
        _run,
        "show what an adapter's file holds",
        "Shows an adapter's format, the family of its base model and how that was told, ranks,"
        " alphas and where they are from, scales, types, and the norm of the update in each block"
        " of the model. Nothing is loaded into a model.",
    )
    place(parser, "file", "an adapter: a file, or a folder of PEFT's or diffusers'")
    parser.add_argument("--layers", action="store_true", help="list every layer too")
    parser.add_argument(
        "--plot", type=_png, metavar="PNG", help="draw the norms by block as a picture"
    )
    reading(parser)
    overwriting(parser)


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in '.png', but is {text!r}.")
    return Path(text)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._cli.adapters import check_free, read_one
    from lora_core._cli.measures import blocks, measured
    from lora_core._formats.families import family_of

    if args.plot is not None:
        from lora_core._cli.pictures import check_drawing

        check_drawing()
        check_free(args.plot, force=args.force, what="plot")
    adapter = read_one(args.file, args)
    with progress("measuring") as step:
        layers = measured(adapter, step)
    found, family = blocks(layers), family_of(adapter)
    if args.plot is not None:
        from lora_core._cli.pictures import norms_by_block
        from lora_core._formats import container

        title = f"{args.file.name}: {adapter.format}, {family.name}, {len(layers)} layers"
        data = norms_by_block(found, title)
        check_free(args.plot, force=args.force, what="plot")
        container.write(args.plot, data)
    document = {
        "file": str(args.file),
        "name": adapter.name,
        "format": adapter.format,
        "family": family._asdict(),
        "parameters": sum(layer.parameters for layer in layers),
        "blocks": [asdict(block) for block in found],
        "layers": [asdict(layer) for layer in layers],
        "notes": list(adapter.notes),
        "metadata": dict(adapter.metadata),
        "plot": None if args.plot is None else str(args.plot),
    }
    return Answer(document, _text(adapter, family, layers, found, args))


def _text(
    adapter: "Adapter",
    family: "Family",
    layers: "list[Measured]",
    found: "list[Block]",
    args: argparse.Namespace,
) -> str:
    from lora_core._cli.measures import figures
    from lora_core._reports import table

    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    alphas = sorted({layer.alpha for layer in layers if layer.alpha is not None})
    scales = sorted({layer.scale for layer in layers if layer.scale is not None})
    sources = "; ".join(dict.fromkeys(layer.alpha_from for layer in layers if layer.alpha_from))
    claimed = f"; the file itself says {family.claimed!r}" if family.claimed else ""
    facts = (
        ("file", args.file),
        ("name", adapter.name),
        ("format", adapter.format),
        ("family", f"{family.name} ({family.because}{claimed})"),
        ("layers", f"{len(layers)}, {sum(layer.parameters for layer in layers):,} parameters"),
        ("form", "; ".join(dict.fromkeys(layer.form for layer in layers))),
        ("rank", figures(ranks)),
        ("alpha", f"{figures(alphas)} (from {sources})" if sources else "-"),
        ("scale", figures(scales)),
        ("dtype", "; ".join(dict.fromkeys(layer.dtype for layer in layers))),
    )
    header = ("block", "layers", "rank", "alpha", "scale", "parameters", "norm", "largest")
    rows = [
        (
            *(b.name or "(the model)", b.layers, figures(b.ranks), figures(b.alphas)),
            *(figures(b.scales), b.parameters, f"{b.norm:.4g}", f"{b.largest:.4g}"),
        )
        for b in found
    ]
    lines = [f"{what:<8} {words}" for what, words in facts]
    lines += ["", table(header, rows)]
    if args.layers:
        lines += ["", _layers(layers)]
    lines += [f"note: {note}" for note in adapter.notes]
    if adapter.metadata:
        lines += ["", f"metadata, {len(adapter.metadata)} entries"]
        lines += [f"  {key}: {_cut(value)}" for key, value in sorted(adapter.metadata.items())]
    if args.plot is not None:
        lines += ["", f"drew {args.plot}"]
    return "\n".join(lines)


def _layers(layers: "list[Measured]") -> str:
    from lora_core._reports import table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    header = ("layer", "kind", "form", "rank", "alpha", "scale", "dtype", "norm")
    rows = [
        (
            *(x.name, x.kind, x.form, number(x.rank), number(x.alpha), number(x.scale)),
            *(x.dtype, number(x.norm)),
        )
        for x in layers
    ]
    return table(header, rows)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ... ({len(text):,} characters)"
