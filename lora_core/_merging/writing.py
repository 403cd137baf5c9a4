"""New weights, written in pieces that a processor's cache holds."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core._layers import LoRAMixin, runs_as_torch, stacked

_PIECE = 2**17  # numbers of the weight that one thread adds to at a time
_WHOLE = 4 * _PIECE  # up to here pieces don't pay
_ROWS = 64  # the matrix product takes as many together, or a divisor; others might round otherwise
_WIDE = (torch.float32, torch.float64)  # the product's own sum is rounded as ours would be
_HALF = (torch.float16, torch.bfloat16)


class Product(NamedTuple):
    """A sum with a product of factors: the update itself is never written whole.

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
        rows = 0 if self.weight.dtype in _WIDE else max(_cuts(self.weight))
        return self.lora_A.new_empty(rows, self.weight.shape[1])

    def new(self) -> tuple[Tensor, Tensor]:
        """The sum as a new tensor, rounded once, and the sum of its numbers."""
        if self.weight.dtype in _WIDE and len(_cuts(self.weight)) == 1:
            new = torch.addmm(self.weight, self.lora_B, self.lora_A)
            return new, new.sum()
        new, sums, room = torch.empty_like(self.weight), [], self.room()
        for old, piece, up in self._pieces(self.weight, new):
            _add(old, up, self.lora_A, piece, room)
            sums.append(piece.sum())  # while it is in the cache
        return new, torch.stack(sums).sum()

    def put_in(self, room: Tensor, done: int = 0) -> None:
        """Adds to the weight, in place; each piece is one write, which the weight's version counts.

        Args:
            room: What `room` gave: once a piece is written, no memory is asked for.
            done: How many pieces have been written.
        """
        for piece, up in islice(self._pieces(self.weight), done, None):
            _add(piece, up, self.lora_A, piece, room)

    def _pieces(self, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
        cuts = _cuts(self.weight)
        if len(cuts) == 1:
            return iter([(*more, self.lora_B)])
        return zip(*(torch.split(t, cuts) for t in (*more, self.lora_B)), strict=True)


def product_of(layer: LoRAMixin) -> Product | None:
    """The merged weight as a sum with one product that can be written in place.

    None where it is more than that, as with DoRA, and where the weight's layout, type or
    mode forbids it.
    """
    weight = layer.weight
    fits = (
        weight.is_contiguous()
        and type(weight) is nn.Parameter
        and weight.dtype in (*_WIDE, *_HALF)
        and not weight.is_inference()  # which has no version to tell by
        and not any(layer.lora_state.configs[n].dora for n in layer.lora_state.selection.names)
        and runs_as_torch(layer)
    )
    matrix = layer.lora_kind.matrix(weight) if fits else None
    if matrix is None or matrix.ndim != 2:
        return None
    lora_A, lora_B, gain = stacked(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(wide), lora_B.to(wide) * gain.to(wide)
    if matrix.is_contiguous():
        return Product(matrix, lora_A, lora_B)
    return Product(matrix.T, lora_B.T, lora_A.T)


def _add(old: Tensor, lora_B: Tensor, lora_A: Tensor, out: Tensor, room: Tensor) -> None:
    """Writes ``old + lora_B @ lora_A`` to `out`, at once."""
    if old is out and out.dtype in _WIDE:
        out.addmm_(lora_B, lora_A)
    elif out.dtype in _WIDE:
        torch.addmm(old, lora_B, lora_A, out=out)
    else:
        total = torch.mm(lora_B, lora_A, out=room[: len(out)])
        out.copy_(total.add_(old))


def _cuts(weight: Tensor) -> list[int]:
    """How many rows each piece has; the last one takes what is left over."""
    height, width = weight.shape
    if weight.device.type != "cpu" or weight.numel() <= _WHOLE:
        return [height]
    rows = max(_PIECE * torch.get_num_threads() // width // _ROWS, 1) * _ROWS
    full = max(height // rows - 1, 0)
    return [rows] * full + [height - rows * full]
