"""How bold a digit is drawn, and whether it can still be read."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


@torch.no_grad()
def recognised(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that `classifier` reads as the digit asked for.

    Shape:
        - images: ``(batch, 1, 28, 28)`` in [-1, 1]
        - labels: integers, ``(batch,)``
    """
    return float((classifier(images).argmax(dim=1) == labels).float().mean())
