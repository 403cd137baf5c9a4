"""Adapters in and out of files, as the options of a command say."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import FORMATS, by_module
from lora_core._cli.headers import named, open_bases
from lora_core._config import check_name
from lora_core._errors import ConfigError
from lora_core._formats import Adapter, peft, read
from lora_core._formats.writing import write as write_file
from lora_core._reports import AlgebraReport, LayerResult


def read_one(path: Path, args: argparse.Namespace) -> Adapter:
    """The adapter of a file; `args` has the options of `reading`, and perhaps of `naming`."""
    return _named([read(path, allow_pickle=args.allow_pickle, **_told(args))], [path], args)[0]


def read_several(paths: Sequence[Path], args: argparse.Namespace) -> list[Adapter]:
    """The adapters of files; what is said of alphas is for those that need it.

    Raises:
        ConfigError: As `read` does; also if none of the files needs what is said.
    """
    told = _told(args)
    adapters, refusals = [], []
    for path in paths:
        try:
            adapters.append(read(path, allow_pickle=args.allow_pickle, **told))
        except ConfigError as refusal:
            if not told:
                raise
            try:
                adapters.append(read(path, allow_pickle=args.allow_pickle))
            except ConfigError:
                raise refusal from None
            refusals.append(refusal)
    if len(refusals) == len(paths):
        raise refusals[0]
    return _named(adapters, paths, args)


def _told(args: argparse.Namespace) -> dict[str, Any]:
    given = {"alpha": by_module(args.alpha), "enable_lora": by_module(args.enable_lora)}
    return {key: value for key, value in given.items() if value is not None}


def _named(
    adapters: Sequence[Adapter], paths: Sequence[Path], args: argparse.Namespace
) -> list[Adapter]:
    words = getattr(args, "bases", None)
    if not words:
        return list(adapters)
    bases = open_bases(words)
    return [named(a, bases, str(path)) for a, path in zip(adapters, paths, strict=True)]


def check_free(out: Path, *, force: bool, what: str = "out") -> None:
    """Refuses to put a file where something is, unless that is wanted.

    Raises:
        ConfigError: If something is there, or there is no folder for it.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"`{what}` must be in a folder that is there, but {str(out.parent)!r} is none. Make it"
            " first."
        )
    if os.path.lexists(out) and not force:
        raise ConfigError(
            f"`{what}` must be new, but {str(out)!r} is there. Pass --force to replace it."
        )


def write(adapter: Adapter, out: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Writes an adapter; `args` has the options of `writing`.

    Returns:
        What to say of it in JSON, and in words.
    """
    own = adapter.format if adapter.format in FORMATS else "lora_core"
    format_ = args.to or own
    if args.name is not None:
        adapter = replace(adapter, name=check_name(args.name))
    check_free(out, force=args.force)  # once more, after the work
    found = write_file(
        adapter,
        out,
        format_,
        fold=args.fold,
        spelling=args.spelling,
        base=getattr(args, "family", None),
    )
    files = [out] if found.config is None else [out / peft.CONFIG, out / peft.WEIGHTS[0]]
    nbytes = sum(file.stat().st_size for file in files)
    notes = list(dict.fromkeys((*adapter.notes, *found.notes)))
    about: dict[str, Any] = {
        "out": str(out),
        "format": format_,
        "adapter": adapter.name,
        "layers": len(adapter.layers),
        "bytes": nbytes,
        "notes": notes,
    }
    lines = [
        f"wrote {adapter.name} to {out} as {format_}: {len(adapter.layers)} layers,"
        f" {nbytes:,} bytes",
        *(f"note: {note}" for note in notes),
    ]
    return about, "\n".join(lines)


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """The type that ``--dtype`` names; None where it was left out."""
    return None if args.dtype is None else getattr(torch, args.dtype)


def finished(adapter: Adapter, results: Sequence[LayerResult], args: argparse.Namespace) -> Answer:
    """Writes a new adapter, and says what it is."""
    report = AlgebraReport(results)
    about, text = write(adapter, args.out, args)
    return Answer({**about, **errors(report)}, f"{report}\n{text}")


def errors(report: AlgebraReport) -> dict[str, object]:
    """The errors by layer, as JSON has them."""
    keys = ("name", "rank", "error")
    return {
        "results": [{key: asdict(layer)[key] for key in keys} for layer in report.layers],
        "worst_error": report.worst_error,
    }
