"""Digits as pictures: how bold they are drawn, and the two pages of the demo, as PNG files."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.demo.studio import RunningMean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 2


def ink(images: Tensor) -> Tensor:
    """Images in [-1, 1] as ink from 0 (none) to 1 (full)."""
    return ((images + 1) / 2).clamp(0, 1)


def stroke_widths(images: Tensor) -> Tensor:
    """The mean width of each image's strokes, in pixels.

    ``2 * area / perimeter``: area is the sum of the ink, perimeter its total variation, so that a
    grey edge counts as the part of a pixel that it covers. Exact for long straight strokes. Noise
    has much perimeter and little area, so a smeared or grainy picture does not pass for a bold one.

    Shape:
        - images: ``(batch, 1, height, width)`` in [-1, 1]
        - Output: ``(batch,)``; 0 for an empty image

    Reference:
        Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms", 1992,
        for the total variation; the area formula for perimeters follows from the coarea formula.

    Example:
        >>> bar = torch.full((1, 1, 9, 9), -1.0)
        >>> bar[..., 3:6] = 1.0
        >>> stroke_widths(bar).shape
        torch.Size([1])
    """
    amount = F.pad(ink(images), (1, 1, 1, 1))  # (b, 1, h + 2, w + 2), the page ends without ink
    down = amount[..., 1:, :-1] - amount[..., :-1, :-1]
    right = amount[..., :-1, 1:] - amount[..., :-1, :-1]
    area = amount.sum(dim=(1, 2, 3))
    perimeter = (down.square() + right.square()).sqrt().sum(dim=(1, 2, 3))
    return torch.where(perimeter > 0, 2 * area / perimeter.clamp(min=1e-12), 0.0)


def stroke_width(images: Tensor) -> float:
    """The mean of `stroke_widths` over the batch, in pixels."""
    return float(stroke_widths(images).mean())


def style_score(width: float, ordinary: float, style: float) -> float:
    """Where a stroke width stands between ordinary digits (0) and the style images (1).

    ``(width - ordinary) / (style - ordinary)``; below 0 is thinner than ordinary, above 1 bolder
    than the style.

    Raises:
        ValueError: If the two ends are equal, so that there is no scale.

    Example:
        >>> style_score(3.0, ordinary=2.0, style=4.0)
        0.5
    """
    if style == ordinary:
        raise ValueError(
            f"`style` must differ from `ordinary`, but both are {style:g} pixels."
            " Choose style images with another stroke width."
        )
    return (width - ordinary) / (style - ordinary)


def strip(images: Tensor) -> Tensor:
    """Images side by side as one page of paper, from 0 (ink) to 1 (paper).

    Shape:
        - images: ``(batch, 1, height, width)`` in [-1, 1]
        - Output: ``(height, batch * (width + 2) - 2)``

    Example:
        >>> strip(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([28, 88])
    """
    gap = torch.zeros(images.shape[2], _GAP)
    pieces = [piece for image in ink(images)[:, 0] for piece in (gap, image)]
    return 1 - torch.cat(pieces[1:], dim=1)


def style_sheet(rows: Mapping[str, Tensor], title: str) -> bytes:
    """One labelled row of images per entry, under each other."""
    from matplotlib.figure import Figure

    count = max(len(images) for images in rows.values())
    figure = Figure(figsize=(2.6 + 0.8 * count, 0.55 + 0.92 * len(rows)), dpi=110)
    figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, (label, images) in zip(axes, rows.items(), strict=True):
        panel.imshow(strip(images).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        panel.set_axis_off()
        panel.text(
            -0.02, 0.5, label, transform=panel.transAxes, ha="right", va="center", fontsize=12
        )
    figure.subplots_adjust(left=0.24, right=0.99, top=0.9, bottom=0.02, hspace=0.08)
    return _png(figure)


def loss_curve(losses: Sequence[float]) -> bytes:
    """The loss of each step, and its running mean."""
    from matplotlib.figure import Figure

    mean = RunningMean()
    steps = range(1, len(losses) + 1)
    figure = Figure(figsize=(7, 3.5), dpi=110, layout="constrained")
    panel = figure.subplots()
    panel.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    panel.plot(steps, [mean(loss) for loss in losses], color="C0", label="running mean")
    panel.set(xlabel="step", ylabel="weighted loss", ylim=(0, None), title="Training the adapter")
    panel.legend(frameon=False)
    return _png(figure)


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    # without matplotlib's version the same picture is the same bytes everywhere it draws alike
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
