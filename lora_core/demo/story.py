"""The demo from beginning to end: train, judge, merge, save, load, and put everything back."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core._adapters import scales
from lora_core._errors import LoRAError, listed
from lora_core._files import load, save
from lora_core._formats.container import write
from lora_core._injection import eject, inject
from lora_core._merging import merge, unmerge
from lora_core.demo.classifier import load_classifier, recognised
from lora_core.demo.pictures import loss_curve, stroke_width, style_score, style_sheet
from lora_core.demo.studio import Studio, progress, style_images, train
from lora_core.models import UNet, pretrained_unet
from lora_core.models.pretrained import CHECKPOINT

_DIGITS = 10


class DemoError(LoRAError, ImportError):
    """The demo lacks a package that it draws with."""


@dataclass(frozen=True)
class Settings:
    """What the user may choose.

    Attributes:
        rank: Rank of the adapter.
        alpha_per_rank: The adapter's scale, ``alpha / rank``.
        steps: Training steps.
        seed: Decides every draw.
        out: The folder to write to.
        judged: Samples that the scores are taken over, the ten shown not among them.
        sampling_steps: Steps from noise to digit.
        convincing: Whether this is meant to convince anybody.
    """

    rank: int = 4
    alpha_per_rank: float = 2.0
    steps: int = 300
    seed: int = 0
    out: Path = Path("lora-core-demo")
    judged: int = 100
    sampling_steps: int = 15
    convincing: bool = True

    @classmethod
    def quick(cls, **chosen: Any) -> "Settings":
        """Seconds rather than minutes: every step of the story, none of its effect."""
        short = {"steps": 6, "judged": 10, "sampling_steps": 3, "convincing": False}
        return cls(**{**short, **chosen})


@dataclass(frozen=True)
class Scores:
    """What the samples of one model measure.

    Attributes:
        stroke_width: Mean width of a stroke, in pixels.
        style: 0 for the base model's stroke width, 1 for that of the style images.
        recognised: Share that the classifier reads as the digit asked for.
    """

    stroke_width: float
    style: float
    recognised: float


def tell(settings: Settings) -> dict[str, Any]:
    """Runs the demo, prints its story, and writes its files, each entirely or not at all.

    Returns:
        What `report.json` holds.

    Raises:
        DemoError: If a package is missing, or what must be exact was not.
        ConfigError: If the rank is out of range.
        OSError: If a file can't be written.
    """
    _require("matplotlib", "rich")
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    # an old report must not stand beside new pictures, should this run be interrupted
    (out / "report.json").unlink(missing_ok=True)
    if not settings.convincing:
        print("A quick run: it shows that everything works; its picture is not meant to convince.")

    studio, unet = Studio.open(settings.sampling_steps), pretrained_unet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        report = inject(unet, settings.rank, settings.rank * settings.alpha_per_rank)
    print(
        f"Training {report.trainable:,} of {report.total:,} parameters"
        f" ({report.trainable / report.total:.1%}): rank {settings.rank} on"
        f" {len(report.layers)} attention projections, learning from 64 bold digits.",
        flush=True,
    )
    losses = _learn(studio, unet, settings)
    saved = save(unet, out / "style.safetensors", metadata={"about": "bold digits"})

    print(
        "Drawing the same digits from the same noise with and without the adapter ...", flush=True
    )
    rows, difference, scores = _compare(studio, unet, settings)
    same = _reproduces(studio, out / "style.safetensors", rows["base + LoRA"], settings)
    eject(unet)
    restored = _same_bits(unet, pretrained_unet())

    checkpoint = CHECKPOINT.stat().st_size
    figures = {
        "settings": {**asdict(settings), "out": str(out)},
        "trainable_parameters": report.trainable,
        "total_parameters": report.total,
        "adapter_bytes": saved.nbytes,
        "checkpoint_bytes": checkpoint,
        "times_smaller": checkpoint / saved.nbytes,
        "losses": losses,
        "scores": {name: asdict(score) for name, score in scores.items()},
        "largest_difference_merged": difference,
        "reproduced_exactly": same,
        "base_restored": restored,
    }
    write(out / "loss.png", loss_curve(losses))
    title = "Same noise, same digits" + ("" if settings.convincing else " (a quick run)")
    write(out / "styles.png", style_sheet(rows, title))
    write(out / "report.json", (json.dumps(figures, indent=2) + "\n").encode())
    _say(figures, scores, out)
    if not (same and restored):
        raise DemoError(
            "The demo must reproduce its images and restore its base exactly, but"
            f" reproduced_exactly is {same} and base_restored is {restored}."
            f" Please report this with {str(out / 'report.json')!r}."
        )
    return figures


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"The demo must have {listed(packages)} to draw with, but {listed(missing)} is not"
            " installed. Run: pip install 'lora_core[demo]'"
        )


def _learn(studio: Studio, unet: UNet, settings: Settings) -> list[float]:
    with progress("Learning the style", settings.steps) as told:
        return train(studio, unet, settings.steps, settings.seed, told)


def _compare(
    studio: Studio, unet: UNet, settings: Settings
) -> tuple[dict[str, Tensor], float, dict[str, Scores]]:
    """The rows of the picture, how far merging moved them, and the scores.

    The base is measured on a model of its own, so that nothing of the adapter can reach it.
    """
    base, classifier = pretrained_unet(), load_classifier()
    shown, judged = torch.arange(_DIGITS), torch.arange(settings.judged) % _DIGITS
    style, labels = style_images()

    def draw(model: UNet) -> Tensor:
        return studio.draw(model, shown, settings.seed)

    rows = {"base": draw(base), "base + LoRA": draw(unet)}
    merge(unet)
    rows["merged"] = draw(unet)
    unmerge(unet)
    with scales(unet, default=0.5):
        rows["LoRA at half scale"] = draw(unet)
    rows["style images"] = torch.stack([style[labels == digit][0] for digit in range(_DIGITS)])
    difference = float((rows["merged"] - rows["base + LoRA"]).abs().max())

    def scored(images: Tensor, asked: Tensor) -> Scores:
        width = stroke_width(images)
        place = style_score(width, ordinary, bold)
        return Scores(width, place, recognised(classifier, images, asked))

    # other noise than the ten shown, so that the picture can't have been chosen for its score
    before = studio.draw(base, judged, settings.seed + 1)
    after = studio.draw(unet, judged, settings.seed + 1)
    ordinary, bold = stroke_width(before), stroke_width(style)
    scores = {
        "base": scored(before, judged),
        "base + LoRA": scored(after, judged),
        "style images": scored(style, labels),
    }
    return rows, difference, scores


def _reproduces(studio: Studio, path: Path, images: Tensor, settings: Settings) -> bool:
    """Whether a fresh model with the file's adapter draws the very same images."""
    fresh = pretrained_unet()
    load(fresh, path)
    return torch.equal(studio.draw(fresh, torch.arange(_DIGITS), settings.seed), images)


def _same_bits(model: UNet, other: UNet) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def _say(figures: Mapping[str, Any], scores: Mapping[str, Scores], out: Path) -> None:
    print(
        f"\nadapter file           {figures['adapter_bytes']:,} bytes,"
        f" {figures['times_smaller']:.1f} times smaller than the checkpoint"
        f" ({figures['checkpoint_bytes']:,} bytes)"
    )
    for name, score in scores.items():
        print(
            f"{name:<22} style {score.style:5.2f}   strokes {score.stroke_width:.2f} pixels wide"
            f"   read as asked {score.recognised:.0%}"
        )
    print(
        f"merged and unmerged    differ by at most {figures['largest_difference_merged']:.1e}"
        " (of a range of 2)\n"
        f"fresh model + load     {_exactly(figures['reproduced_exactly'])} the same images\n"
        f"after unmerge, eject   {_exactly(figures['base_restored'])} the same base weights\n"
        "\nStyle: mean stroke width, 0 = the base model's, 1 = the style images'.\n"
        "Read as asked: the share that a separate classifier reads as the digit asked for.\n"
        f"\nLook at {out / 'styles.png'}; beside it are loss.png, style.safetensors, report.json."
    )


def _exactly(equal: bool) -> str:
    return "exactly" if equal else "NOT"
