"""The sum of a weight and a product of factors, written in pieces that a cache holds."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

_PIECE = 2**17  # numbers of the weight that one thread adds to at a time
_WHOLE = 4 * _PIECE  # up to here pieces don't pay
_ROWS = 64  # the matrix product takes as many together, or a divisor; others might round otherwise
WIDE = (torch.float32, torch.float64)  # the product's own sum is rounded as ours would be
HALF = (torch.float16, torch.bfloat16)


class Sum(NamedTuple):
    """A weight plus a product of factors: the update itself is never written whole.

    Attributes:
        weight: What is added to, ``(out, in)``, a view of a layer's weight.
        lora_A: ``(R, in)``.
        lora_B: ``(out, R)``, scaled.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor

    def room(self) -> Tensor:
        """Memory for one piece of the sum before it is rounded; none where nothing rounds it."""
        rows = 0 if self.weight.dtype in WIDE else max(cuts(self.weight))
        return self.lora_A.new_empty(rows, self.weight.shape[1])

    def new(self) -> tuple[Tensor, Tensor | None]:
        """The sum as a new tensor, rounded once, and the sum of its numbers.

        None where that is one pass as well as another: of what is written at once.
        """
        rows = cuts(self.weight)
        if self.weight.dtype in WIDE and len(rows) == 1:
            return torch.addmm(self.weight, self.lora_B, self.lora_A), None
        new, sums, room = torch.empty_like(self.weight), [], self.room()
        for old, piece, up in self.pieces(rows, self.weight, new):
            add(old, up, self.lora_A, piece, room)
            sums.append(piece.sum())  # while it is in the cache
        return new, torch.stack(sums).sum()

    def put_in(self, room: Tensor, done: int = 0) -> None:
        """Adds to the weight, in place; each piece is one write, which the weight's version counts.

        Args:
            room: What `room` gave: once a piece is written, no memory is asked for.
            done: How many pieces have been written.
        """
        # a wide sum needs no room, and so no pieces
        rows = [len(self.weight)] if self.weight.dtype in WIDE else cuts(self.weight)
        for piece, up in islice(self.pieces(rows, self.weight), done, None):
            add(piece, up, self.lora_A, piece, room)

    def pieces(self, rows: list[int], *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """These and `lora_B`, some rows at a time."""
        if len(rows) == 1:
            return iter([(*more, self.lora_B)])
        return zip(*(torch.split(t, rows) for t in (*more, self.lora_B)), strict=True)


def add(old: Tensor, lora_B: Tensor, lora_A: Tensor, out: Tensor, room: Tensor) -> None:
    """Writes ``old + lora_B @ lora_A`` to `out`, at once."""
    if old is out and out.dtype in WIDE:
        out.addmm_(lora_B, lora_A)
    elif out.dtype in WIDE:
        torch.addmm(old, lora_B, lora_A, out=out)
    else:
        total = torch.mm(lora_B, lora_A, out=room[: len(out)])
        out.copy_(total.add_(old))


def cuts(weight: Tensor, numbers: int | None = None, whole: int | None = None) -> list[int]:
    """How many rows each piece has; the last one takes what is left over.

    Args:
        weight: The matrix that is cut.
        numbers: How many of its numbers one thread works on at a time.
        whole: Of how many pieces don't pay.
    """
    height, width = weight.shape
    if weight.device.type != "cpu" or weight.numel() <= (whole or _WHOLE):
        return [height]
    most = (numbers or _PIECE) * torch.get_num_threads()
    rows = max(most // width // _ROWS, 1) * _ROWS
    full = max(height // rows - 1, 0)
    return [rows] * full + [height - rows * full]
