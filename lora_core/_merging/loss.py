"""What rounding lost of an update, told by samples of many layers at once."""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 16
_COLUMNS = 256


class Sample(NamedTuple):
    """Some numbers of a layer, to tell by them what rounding lost.

    Attributes:
        old: The weight before.
        new: The weight after.
        update: What was to be added, as matrices whose product it is.
    """

    old: Tensor
    new: Tensor
    update: tuple[Tensor, ...]


def some_rows(values: Tensor) -> Tensor:
    """Evenly spaced rows, a view."""
    height = values.shape[0]
    return values[:: -(-height // _ROWS)] if height > _ROWS else values


def some_columns(values: Tensor) -> Tensor:
    """Evenly spaced columns of a matrix; of a larger tensor, each row is flattened first."""
    matrix = values if values.ndim == 2 else values.flatten(1)
    width = matrix.shape[1]
    return matrix[:, :: -(-width // _COLUMNS)] if width > _COLUMNS else matrix


def sampled(values: Tensor) -> Tensor:
    """Evenly spaced numbers of a weight."""
    return some_columns(some_rows(values))


class Losses:
    """The share of each update that rounding lost: samples go in, and shares come out.

    Args:
        together: How many numbers may wait to be worked out together.
    """

    def __init__(self, together: int) -> None:
        self.together = together
        self.waiting: dict[str, Sample] = {}
        self.numbers = 0
        self.shares: dict[str, float] = {}

    def add(self, name: str, sample: Sample) -> None:
        """Takes one layer's sample in."""
        if self.waiting and self.numbers + sample.new.numel() > self.together:
            self.finish()
        self.waiting[name] = sample
        self.numbers += sample.new.numel()

    def finish(self) -> dict[str, float]:
        """The shares of all that came in, by layer."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, (old, _, update) in self.waiting.items():
            first, last = update[0], update[-1]
            # the new weight is of the old one's kind, and the factors of one dtype
            shape = (old.shape, old.dtype, old.device, first.shape, last.shape, first.dtype)
            groups.setdefault(shape, []).append(name)
        found: dict[str, float] = {}
        for group in groups.values():
            shares = _shares([self.waiting[name] for name in group]).tolist()
            found.update(zip(group, shares, strict=True))
        self.shares.update((name, found[name]) for name in self.waiting)
        self.waiting, self.numbers = {}, 0
        return self.shares


def _shares(samples: list[Sample]) -> Tensor:
    """The norm of what did not arrive over that of what was asked, for samples of one shape."""
    first, *second = (
        torch.stack(c).double() for c in zip(*(s.update for s in samples), strict=True)
    )
    asked = first @ second[0] if second else first
    missing = torch.stack([s.new for s in samples]).double()
    missing -= torch.stack([s.old for s in samples])
    missing -= asked
    off, norm = (torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (missing, asked))
    return torch.where(norm > 0, off / norm, 0.0)
