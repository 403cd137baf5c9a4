"""`lora-core inspect`: what an adapter's file holds, layer by layer and by the model's block."""

import argparse
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import command, overwriting, place, reading
from lora_core._cli.progress import Step, progress
from lora_core._errors import LoRAError

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands
    from lora_core._formats import Adapter, AdapterLayer
    from lora_core._formats.families import Family

_LONGEST = 60  # characters of a metadata entry that are shown
_NUMBERED = re.compile(r".*?(?<![A-Za-z0-9])\d+")
_ROW = 0.24  # inches of one block in the picture
_MARGIN = 1.5
_TALLEST = 60.0


class PictureError(LoRAError, ImportError):
    """The package that draws is not installed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer of an adapter in figures.

    Attributes:
        name: Its name in the file.
        component: The part of a pipeline that it is for; "" where the file doesn't say.
        block: The block of the model that it is in.
        kind: What kind of layer it is for, as in `AdapterLayer`.
        form: "LoRA", with its additions; or "difference" or "values".
        rank: Its rank; None where it has no factors.
        alpha: Likewise.
        alpha_from: Where alpha is from.
        scale: Likewise, what its product of factors is multiplied by.
        dtype: Type of its tensors.
        parameters: Numbers in its tensors.
        norm: Frobenius norm of what it adds to the weight, scale included and lengths of DoRA not;
            None of values, which replace the weight.
    """

    name: str
    component: str
    block: str
    kind: str
    form: str
    rank: int | None
    alpha: float | None
    alpha_from: str
    scale: float | None
    dtype: str
    parameters: int
    norm: float | None


@dataclass(frozen=True, slots=True)
class Block:
    """The layers of one block.

    Attributes:
        name: Its name.
        layers: How many there are.
        ranks: Their ranks, each once.
        alphas: Their alphas, each once.
        scales: Their scales, each once.
        parameters: Numbers in their tensors.
        norm: The norm of their updates together.
        largest: The norm of the largest of them.
    """

    name: str
    layers: int
    ranks: Sequence[int]
    alphas: Sequence[float]
    scales: Sequence[float]
    parameters: int
    norm: float
    largest: float


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
    from lora_core._formats.families import family_of

    if args.plot is not None:
        check_drawing()
        check_free(args.plot, force=args.force, what="plot")
    adapter = read_one(args.file, args)
    with progress("measuring") as step:
        layers = measured(adapter, step)
    found, family = blocks(layers), family_of(adapter)
    if args.plot is not None:
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
    layers: list[Measured],
    found: list[Block],
    args: argparse.Namespace,
) -> str:
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


def _layers(layers: list[Measured]) -> str:
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


def measured(adapter: "Adapter", step: Step) -> list[Measured]:
    """The layers of an adapter in figures, in the order of the file."""
    from lora_core._algebra import one_thread

    found = []
    with one_thread():
        for done, (name, layer) in enumerate(adapter.layers.items(), 1):
            found.append(_measured(name, layer))
            step(done, len(adapter.layers))
    return found


def _measured(name: str, layer: "AdapterLayer") -> Measured:
    from lora_core._algebra import form_of, norm_of

    config = layer.config
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in layer.parts.values())
    return Measured(
        name,
        layer.component,
        block_of(name, layer),
        layer.kind,
        form_of(layer),
        None if config is None else config.rank,
        None if config is None else config.alpha,
        "" if config is None else layer.alpha_from,
        None if config is None else config.scale,
        ", ".join(dtypes),
        sum(tensor.numel() for tensor in layer.parts.values()),
        norm_of(layer),
    )


def block_of(name: str, layer: "AdapterLayer") -> str:
    """The part of a model that a layer is in: its name to the first number, or its first word."""
    if layer.spelling == "index":
        return layer.component
    path = layer.path or name
    found = _NUMBERED.match(path.replace("_", ".") if layer.spelling == "stem" else path)
    block = path[: found.end()] if found else path.partition(".")[0]
    return f"{layer.component} {block}".lstrip()


def blocks(layers: Iterable[Measured]) -> list[Block]:
    """The blocks of a model, numbers in their names in the order of numbers."""
    by_block: dict[str, list[Measured]] = {}
    for layer in layers:
        by_block.setdefault(layer.block, []).append(layer)
    return [_block(name, by_block[name]) for name in sorted(by_block, key=_natural)]


def _block(name: str, held: Sequence[Measured]) -> Block:
    norms = [layer.norm for layer in held if layer.norm is not None]
    return Block(
        name,
        len(held),
        sorted({layer.rank for layer in held if layer.rank is not None}),
        sorted({layer.alpha for layer in held if layer.alpha is not None}),
        sorted({layer.scale for layer in held if layer.scale is not None}),
        sum(layer.parameters for layer in held),
        math.hypot(*norms),
        max(norms, default=0.0),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(n), "") if n.isdigit() else (-1, n) for n in re.split(r"(\d+)", name)]


def figures(values: Sequence[float]) -> str:
    """A few numbers, or the ends of many.

    Example:
        >>> figures([4, 8]), figures([1, 2, 3, 4]), figures([])
        ('4, 8', '1 .. 4', '-')
    """
    if len(values) > 3:
        return f"{values[0]:g} .. {values[-1]:g}"
    return ", ".join(f"{value:g}" for value in values) or "-"


def check_drawing() -> None:
    """Refuses to draw without matplotlib.

    Raises:
        PictureError: If it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError(
            "--plot must have 'matplotlib' to draw with, but it is not installed. Run: pip install"
            " 'lora_core[demo]'"
        )


def norms_by_block(held: Sequence[Block], title: str) -> bytes:
    """A bar for each block: the norm of all its updates, and that of the largest in it.

    Returns:
        The bytes of a PNG file; the same for the same adapter.
    """
    from matplotlib.figure import Figure

    height = min(_MARGIN + _ROW * len(held), _TALLEST)
    figure = Figure(figsize=(9, height), dpi=110, layout="constrained")
    panel = figure.subplots()
    rows = range(len(held))
    panel.barh(rows, [b.norm for b in held], color="0.8", label="whole block")
    panel.barh(rows, [b.largest for b in held], height=0.4, color="C0", label="largest layer")
    # a dollar sign in a name is no formula
    names = [f"{b.name} ({b.layers})".replace("$", r"\$") for b in held]
    panel.set_yticks(rows, names, fontsize=8)
    panel.set_ylim(len(held) - 0.4, -0.6)
    panel.set_xlim(0, None)
    panel.set_xlabel("Frobenius norm of the update, scale included")
    panel.set_title(title.replace("$", r"\$"), fontsize=10, loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
