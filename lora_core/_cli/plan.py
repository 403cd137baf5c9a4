"""`lora-core plan`: which layers of a model would be adapted."""

import argparse
from typing import TYPE_CHECKING, Any

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import command, json_object
from lora_core._config import SETTINGS

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands
    from lora_core._reports import LayerReport

# what is off unless it is asked for, and in what words the table of settings says so
_FLAGS = {
    key: setting.help[0].lower() + setting.help[1:].rstrip(".")
    for key, setting in SETTINGS.items()
    if setting.asked and setting.default is False
}


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "plan",
        _run,
        "show which layers of a model would be adapted",
        "Shows what inject would do to a model, which is rebuilt without values from the names and"
        " shapes in its checkpoint: a two-dimensional '.weight' is a linear layer (an embedding"
        " where its name says so, GPT-2's Conv1D where its bias does), one of three to five"
        " dimensions a convolution, 'in_proj_weight' attention, and all else a plain parameter."
        " Where the model's own code is at hand, lora_core.plan knows better.",
    )
    parser.add_argument(
        "base",
        nargs="+",
        metavar="[PART=]CHECKPOINT",
        help="a file, an index of shards, a folder with either, or a pipeline's folder",
    )
    parser.add_argument("--rank", type=int, default=4, help="rank of the updates (4)")
    parser.add_argument("--alpha", type=float, help="numerator of the scale (the rank)")
    parser.add_argument(
        "--targets",
        action="append",
        metavar="GLOB",
        help="layers to adapt, by name or a tail of it; may be repeated (the attention"
        " projections)",
    )
    parser.add_argument(
        "--exclude", action="append", metavar="GLOB", help="layers to leave out; may be repeated"
    )
    parser.add_argument(
        "--rules",
        type=json_object,
        metavar="JSON",
        help='settings by pattern, as \'{"*mid*": {"rank": 16}}\'; later ones win',
    )
    for flag, text in _FLAGS.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._cli.headers import kinds_of, open_bases, skeleton
    from lora_core._injection import plan

    model = skeleton(open_bases(args.base))
    kinds: dict[str, int] = {}
    for kind in kinds_of(model):
        kinds[kind] = kinds.get(kind, 0) + 1
    report = plan(
        model,
        args.rank,
        args.alpha,
        targets=args.targets,
        exclude=args.exclude or (),
        rules=args.rules,
        **{flag: getattr(args, flag) for flag in _FLAGS},
    )
    document = {
        "adapter": report.adapter,
        "layers": [_layer(layer) for layer in report.layers],
        "left_out": dict(report.left_out),
        "parameters": report.parameters,
        "trainable": report.trainable,
        "total": report.total,
        "notes": list(report.notes),
        "told_by_shape": kinds,
    }
    told = ", ".join(
        f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda k: -k[1])
    )
    return Answer(document, f"{report}\nmodules told by names and shapes: {told}")


def _layer(layer: "LayerReport") -> dict[str, Any]:
    keys = (
        *("name", "kind", "in_features", "out_features", "rank", "alpha", "scale", "form"),
        *("parameters", "trainable", "nbytes"),
    )
    return {key: getattr(layer, key) for key in keys} | {"shapes": dict(layer.shapes)}
