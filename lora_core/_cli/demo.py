"""`lora-core demo`: the story of style fine-tuning."""

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import command, within

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "demo",
        _run,
        "teach the shipped digit model a style and draw it",
        "Trains an adapter on 64 bold digits, on top of the shipped digit model, and shows what it"
        " changed. Takes under two minutes on two CPU cores.",
    )
    parser.add_argument("--rank", type=int, help="rank of the adapter (4)")
    parser.add_argument("--steps", type=within(1, 1_000_000), help="training steps (300)")
    parser.add_argument("--seed", type=within(0, 2**32 - 1), help="decides every draw (0)")
    parser.add_argument("--out", type=Path, help="folder to write to (lora-core-demo)")
    parser.add_argument(
        "--force", action="store_true", help="replace what an earlier run left in that folder"
    )
    parser.add_argument("--quick", action="store_true", help="seconds; not meant to convince")


def _run(args: argparse.Namespace) -> Answer:
    from lora_core._errors import ConfigError
    from lora_core.demo import Settings, tell

    chosen = {
        name: getattr(args, name)
        for name in ("rank", "steps", "seed", "out")
        if getattr(args, name) is not None
    }
    out = Settings().out if args.out is None else args.out
    if not args.force and out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"`--out` must be a new or an empty folder, but {str(out)!r} holds something. Choose"
            " another, or pass --force to replace what an earlier run left there."
        )
    settings = Settings.quick(**chosen) if args.quick else Settings(**chosen)
    # the story goes where it does no harm to the document
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        report = tell(settings)
    return Answer({"report": report}, "")
