"""What rounding lost of an update, told by samples of many layers at once."""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 16
_COLUMNS = 64


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


def sample(old: Tensor, new: Tensor, *update: Tensor) -> Sample:
    """Evenly spaced rows and columns of a layer, as views.

    Args:
        old: The weight before, a matrix or with its rows first.
        new: The weight after, likewise.
        update: What was to be added: of the weight's shape, or its two factors, the second first.
    """
    if old.ndim != 2:
        old, new, *update = (t.flatten(1) for t in (old, new, *update))  # type: ignore[assignment]
    height, width = old.shape
    rows, columns = slice(None, None, -(-height // _ROWS)), slice(None, None, -(-width // _COLUMNS))
    if height <= _ROWS and width <= _COLUMNS:
        return Sample(old, new, update)
    if len(update) == 1:
        return Sample(old[rows, columns], new[rows, columns], (update[0][rows, columns],))
    return Sample(old[rows, columns], new[rows, columns], (update[0][rows], update[1][:, columns]))


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
        numbers = sample.new.numel()
        if self.waiting and self.numbers + numbers > self.together:
            self.finish()
        self.waiting[name] = sample
        self.numbers += numbers

    def finish(self) -> dict[str, float]:
        """The shares of all that came in, by layer."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, (old, _, update) in self.waiting.items():
            first, last = update[0], update[-1]
            # the new weight is of the old one's kind, and the factors of one dtype
            kind = (old.dtype, old.device, first.dtype, first is last)
            shape = (*kind, old.shape, first.shape, last.shape)
            groups.setdefault(shape, []).append(name)
        found: dict[str, float] = {}
        for group in groups.values():
            shares = _shares([self.waiting[name] for name in group]).tolist()
            found.update(zip(group, shares, strict=True))
        self.shares |= {name: found[name] for name in self.waiting}
        self.waiting, self.numbers = {}, 0
        return self.shares


def _shares(samples: list[Sample]) -> Tensor:
    """The norm of what did not arrive over that of what was asked, for samples of one shape."""
    first = torch.stack([s.update[0] for s in samples]).double()
    asked = first
    if len(samples[0].update) > 1:
        asked = first @ torch.stack([s.update[1] for s in samples]).double()
    missing = torch.stack([s.new for s in samples]).double()
    missing -= torch.stack([s.old for s in samples])
    missing -= asked
    off, norm = (torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (missing, asked))
    return torch.where(norm > 0, off / norm, 0.0)
