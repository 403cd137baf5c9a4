"""The common end of the commands that make an adapter: it is written, and its errors are told."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import torch

from lora_core._algebra import AlgebraReport, LayerResult
from lora_core._cli.adapters import write
from lora_core._cli.answers import Answer
from lora_core._formats import Adapter


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
