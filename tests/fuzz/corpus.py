"""What is damaged: every golden file and a few of our own, each with a model that it fits."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_core
from lora_core.testing.laws import train_pretend
from tests.golden import GOLDEN, TinyMix, cases, models_of, tree

_MODULES = 40  # of a large model, those that stay


@dataclass(frozen=True, slots=True)
class Specimen:
    """A file, or a folder of several, that loads or is refused.

    Attributes:
        name: Its golden name, or "ours/..." for one of this library's own.
        files: Contents by file name; a folder where there are several.
        base: The golden case whose models it is loaded into.
        keywords: What `load` must be told.
        often: How many times as often as another it is taken: the quick ones more often.
    """

    name: str
    files: Mapping[str, bytes]
    base: str = "peft/linear"
    keywords: Mapping[str, Any] = field(default_factory=dict)
    often: int = 8


def specimens() -> list[Specimen]:
    """All of them, in an order that doesn't change."""
    return [*_golden_cases(), *_golden_rest(), *_ours()]


def models(base: str) -> dict[str, nn.Module]:
    """The models of a golden case, large ones pared down to some of their modules."""
    case = GOLDEN / base
    found = models_of(case, json.loads((case / "case.json").read_text()))
    return {part: _pared(model) for part, model in found.items()}


def _pared(model: nn.Module) -> nn.Module:
    weights = {k: t for k, t in model.state_dict().items() if k.endswith(".weight")}
    if isinstance(model, TinyMix) or len(weights) <= _MODULES:
        return model
    some = dict(list(weights.items())[:: len(weights) // _MODULES])
    biases = {f"{k.removesuffix('weight')}bias" for k in some}
    return tree(some | {k: t for k, t in model.state_dict().items() if k in biases})


def _golden_cases() -> list[Specimen]:
    found = []
    for name in cases():
        case = GOLDEN / name
        about = json.loads((case / "case.json").read_text())
        keywords: dict[str, Any] = {}
        if about["peer"] == "loralib":
            alphas = about["r_alpha_of_each_layer (not in the file!)"]
            keywords["alpha"] = {n: alpha for n, (_, alpha) in alphas.items()}
            keywords["enable_lora"] = about["enable_lora"]
        patterns = ("adapter_*", "lora.*", "lycoris.*", "pytorch_lora_weights.*")
        paths = sorted(path for pattern in patterns for path in case.glob(pattern))
        large = "base" in about
        files = {path.name: path.read_bytes() for path in paths}
        often = 16 if len(paths) > 1 or about["peer"] == "loralib" else 2 if large else 8
        found.append(Specimen(name, files, name, keywords, 1 if "sdxl" in name else often))
    return found


def _golden_rest() -> list[Specimen]:
    """Traps, what other algorithms wrote, and the files that hold no adapter at all."""
    taken = {f"{name}/{file}" for name in cases() for file in _adapter_files(GOLDEN / name)}
    found = []
    for path in sorted(GOLDEN.rglob("*")):
        name = str(path.relative_to(GOLDEN))
        if path.suffix not in (".safetensors", ".pt") or name in taken:
            continue
        trap = name.startswith("traps/")
        base = "kohya/sd15_linear" if trap else "peft/linear"
        keywords = {"alpha": 2.0} if "default_in_key" in name else {}
        often = 4 if trap else 1
        found.append(Specimen(name, {path.name: path.read_bytes()}, base, keywords, often))
    return found


def _adapter_files(case: Path) -> list[str]:
    patterns = ("adapter_model.*", "lora.*", "lycoris.*", "pytorch_lora_weights.*")
    return [path.name for pattern in patterns for path in case.glob(pattern)]


def _ours() -> list[Specimen]:
    """This library's own files: plain ones, and one of every extra that they can hold."""
    made = []
    kinds: Sequence[dict[str, Any]] = (
        {},
        {"dora": True},
        {"bias": True, "rslora": True, "dropout": 0.1, "dtype": torch.bfloat16},
        {"init": "pissa"},
    )
    for n, options in enumerate(kinds):
        torch.manual_seed(n)
        model = models("peft/linear")[""]
        targets = ["to_q", "proj", "head"] if options.get("dora") else ["to_q", "conv_in", "head"]
        lora_core.inject(model, rank=2, targets=targets, name="style", **options)
        train_pretend(model, "style")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "style.safetensors"
            lora_core.save(model, path, metadata={"note": "é"})
            made.append(Specimen(f"ours/{n}", {path.name: path.read_bytes()}, often=16))
    return made
