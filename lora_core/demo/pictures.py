"""The two pictures of the demo, as the bytes of PNG files."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_core.demo.measures import ink
from lora_core.demo.progress import RunningMean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 2


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
