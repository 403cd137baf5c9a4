"""What a merged weight can't tell of the original: a byte or half of one for most numbers.

With ``W' = round(W + D)`` the original is close to ``C = round(W' - D)``. Kept is how far its bits,
as a whole number, are from those of C, and of D nothing but its factors: C is made again, from the
merged weight. So that it is the same C to the last bit, on any number of threads and any device,
D is here an `Exact` product, and all else is one rounded operation for each number. The distance is
taken modulo its width, so that any bits can be the original's and any C's.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core._errors import MergeError
from lora_core._merging.exact import Exact, exact
from lora_core._merging.finite import is_finite
from lora_core._merging.sums import WIDE, Sum, add, cuts

_PIECE = 2**16  # numbers of the weight that one thread works on at a time
_LEAST = 2**14  # of fewer numbers a copy takes less time, and little memory
_SAMPLE = 2**12  # numbers by which it is told how large the distances are
_CHUNK = 128  # numbers that are looked over together for those that are far
_FAR = 1 / 16  # of more far numbers than this share, a copy takes hardly more memory
_DEEP, _COLUMNS = 64, 509  # words of one column in a block, of which they are added up at once
_FEW = 1 / 512  # so few that are far from what half a byte holds take no time
_BYTE, _HALF_BYTE = 127, 7  # the largest distance that each can hold; the smallest is one more
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number
_NO_DOUBLE = ("mps",)  # devices without float64


REPAIR = (
    "What was kept of the originals is no whole copy; put the merged values back, or load the base"
    " model again."
)


class ChangedError(Exception):
    """The merged values, or what is made of them, are not as they were."""


class Rooms:
    """Memory for what is passed on at once, which the next piece, and layer, takes again.

    New memory costs more than what is done in it, where it comes from the system.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def room(self, what: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """Some of the memory that is held under a name, of this shape."""
        key, size = (what, dtype, like.device), math.prod(shape)
        held = self.held.get(key)
        if held is None or held.numel() < size:
            held = self.held[key] = like.new_empty(size, dtype=dtype)
        return held[:size].view(shape)


class Residue(NamedTuple):
    """The original of a merged weight, but for what the merged weight tells.

    Attributes:
        merged: The merged values, a matrix in the order of their memory; not a copy.
        shape: Of the weight.
        update: What was added, nearly.
        codes: How far the bits of each number are from what is made again of it: int8, or two in
            each, those of the first half below those of the second.
        places: Where that does not fit, of the flat matrix.
        originals: The bits there.
        sums: Of the bits of the merged values and of the originals.
    """

    merged: Tensor
    shape: torch.Size
    update: Exact
    codes: Tensor
    places: Tensor
    originals: Tensor
    sums: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        kept = (self.codes, self.places, self.originals)
        return self.update.nbytes + sum(t.nbytes for t in kept)

    @property
    def is_packed(self) -> bool:
        """Whether there are two codes in each byte."""
        return self.codes.numel() < self.merged.numel()

    def is_whole(self) -> bool:
        """Whether the merged values are those that were written."""
        return int(_sum(self.merged)) == self.sums[0]

    def kept_on(self, device: torch.device) -> "Residue":
        """The same with what is kept on another device."""
        return self._replace(
            update=self.update.to(device),
            codes=self.codes.to(device),
            places=self.places.to(device),
            originals=self.originals.to(device),
        )

    def values(self, rooms: Rooms | None = None) -> Tensor:
        """The original values.

        Args:
            rooms: Memory for what is made on the way, and for the values; None makes them new.

        Raises:
            ChangedError: If the merged values are not those that were written.
        """
        merged, device = self.merged, self.merged.device
        new, rooms = rooms is None, rooms or Rooms()
        out = merged.new_empty(merged.shape) if new else rooms.room("new", merged, *_kind(merged))
        codes, bits = self.codes.to(device), _as_whole(out)
        if self.is_packed:
            codes = _unpacked(codes, rooms)
        rows = cuts(merged, _PIECE, _PIECE)
        making = _Making(self.update, merged, rows, rooms)
        sizes = [each * merged.shape[1] for each in rows]
        pieces = zip(_split(merged, rows), _split(out, rows), strict=True)
        distances = zip(_split(bits, sizes), _split(codes, sizes), strict=True)
        for i, ((piece, near), (whole, code)) in enumerate(zip(pieces, distances, strict=True)):
            making.again(i, piece, near)
            whole.add_(making.bits[: len(code)].copy_(code))
        bits[self.places.to(device).long()] = self.originals.to(device)
        if (int(_sum(merged)), int(_sum(out))) != self.sums:
            raise ChangedError
        return out.view(self.shape)

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The original values as a layer takes them: so this stands where a copy would.

        Raises:
            MergeError: If the merged values are not those that were written.
        """
        try:
            return self.values().to(device, dtype)
        except ChangedError:
            raise MergeError(
                f"A merged weight must be as `merge` left it, but one of shape {tuple(self.shape)}"
                f" was changed since. {REPAIR}"
            ) from None

    # what the fingerprint of a base asks of a weight

    @property
    def device(self) -> torch.device:
        """That of the merged values."""
        return self.merged.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.merged.dtype

    @property
    def is_meta(self) -> bool:
        """Whether there are no values."""
        return False

    def is_floating_point(self) -> bool:
        """Whether its numbers are floating ones."""
        return True

    def numel(self) -> int:
        """Numbers of the weight."""
        return self.merged.numel()

    def take(self, at: Tensor) -> Tensor:
        """The original values at these places of the flat weight, which alone are made."""
        device, width = self.merged.device, self.merged.shape[1]
        values = self.merged.view(-1)[at]
        left = values if self.dtype in WIDE else values.float()
        for up, down in self.update.terms(device):
            left = left - (up[at // width] * down.T[at % width]).sum(1).to(left.dtype)
        codes, half = self.codes.to(device), self.numel() // 2
        if self.is_packed:
            pairs = codes[at % half]
            codes = torch.where(at < half, (pairs << 4) >> 4, pairs >> 4)
        else:
            codes = codes[at]
        bits = _as_whole(left.to(self.dtype)) + codes
        found = at[:, None] == self.places.to(device)
        bits = torch.where(found.any(1), (found * self.originals.to(device)).sum(1), bits)
        return bits.to(_WHOLE[self.dtype.itemsize]).view(self.dtype)


def pays(weight: Tensor) -> bool:
    """Whether less than a copy can be kept of a weight of this kind, at no loss of time."""
    double = weight.dtype in WIDE
    return weight.numel() >= _LEAST and not (double and weight.device.type in _NO_DOUBLE)


def residue_of(made: Sum, shape: torch.Size, rooms: Rooms) -> tuple[Tensor, Residue | None]:
    """A merged weight, and what that doesn't tell of the original.

    Args:
        made: The sum that the merged weight is.
        shape: The weight's own.
        rooms: Memory for what is made on the way, and for the merged weight.

    Returns:
        The merged weight, whose memory the next one takes, as a matrix; and None where a copy of
        the original takes hardly more memory, or less time: the first is no result then.

    Raises:
        OverflowError: If a merged value is not finite.
    """
    weight, size = made.weight, made.weight.numel()
    update = exact(made.lora_A, made.lora_B, weight.dtype)
    new = rooms.room("new", weight, *_kind(weight))
    if update is None:
        return new, None
    rows = cuts(weight, _PIECE, _PIECE)
    making = _Making(update, weight, rows, rooms)
    sizes = [each * weight.shape[1] for each in rows]
    distances = rooms.room("distances", weight, _WHOLE[weight.itemsize], size)
    codes = rooms.room("codes", weight, torch.int8, size)
    sums, packed = [], False
    pieces = zip(
        _split(weight, rows),
        _split(new, rows),
        _split(made.lora_B, rows),
        _split(_as_whole(weight), sizes),
        _split(distances, sizes),
        _split(codes, sizes),
        strict=True,
    )
    for i, (old, merged, up, whole, distance, code) in enumerate(pieces):
        add(old, up, made.lora_A, merged, making.wide)
        sums.append(merged.sum())
        near = making.again(i, merged, making.near[: len(old)])
        torch.sub(whole, _as_whole(near), out=distance)
        code.copy_(distance)
        if not i:  # some numbers of the first piece stand for all
            some = distance[:: -(-len(distance) // _SAMPLE)]
            packed = size % 2 == 0 and _share(some, _HALF_BYTE) <= _FEW
            if not packed and _share(some, _BYTE) > _FAR:
                return new, None
    if not math.isfinite(torch.stack(sums).sum()) and not is_finite(new):
        raise OverflowError
    places = _beyond(distances, _HALF_BYTE if packed else _BYTE)
    if len(places) > _FAR * size:
        return new, None
    return new, Residue(
        merged=weight.detach(),
        shape=shape,
        update=update,
        codes=_packed(codes) if packed else codes.clone(),
        places=places.to(torch.int32) if size < 2**31 else places,
        originals=_as_whole(weight)[places],
        sums=(int(_sum(new)), int(_sum(weight))),
    )


class _Making:
    """Makes ``C = round(W' - D)`` of pieces, in memory that each next one takes.

    Args:
        update: D.
        like: The matrix that the pieces are of.
        rows: Of each piece.
        rooms: The memory.

    Attributes:
        wide: For numbers in float32 or wider.
        near: For numbers of the weight's type.
        bits: For its bits, when `again` has been done.
    """

    def __init__(self, update: Exact, like: Tensor, rows: list[int], rooms: Rooms) -> None:
        wide = like.dtype if like.dtype in WIDE else torch.float32
        shape = (max(rows), like.shape[1])
        terms = update.terms(like.device)
        self._down = [down for _, down in terms]
        self._ups = list(zip(*(_split(up, rows) for up, _ in terms), strict=True))
        self._product = rooms.room("product", like, update.dtype, *shape)
        self.wide = rooms.room("wide", like, wide, *shape)
        # the less memory this is, the more of it is in a cache
        shared = like.dtype == wide != update.dtype
        self.near = self.wide if shared else rooms.room("near", like, like.dtype, *shape)
        self.bits = _as_whole(self._product.view(-1).view(like.dtype))

    def again(self, i: int, merged: Tensor, out: Tensor) -> Tensor:
        """``round(merged - D)`` of piece `i`, written to `out`."""
        rows, double = len(merged), out.dtype in WIDE
        wide = out if double else self.wide[:rows]
        left = merged if double else wide.copy_(merged)
        for up, down in zip(self._ups[i], self._down, strict=True):
            product = torch.mm(up, down, out=self._product[:rows])
            if product.dtype != wide.dtype:
                product = self.wide[:rows].copy_(product)
            left = torch.sub(left, product, out=wide)
        return out if double else out.copy_(left)


def _kind(matrix: Tensor) -> tuple[torch.dtype, int, int]:
    return (matrix.dtype, *matrix.shape)


def _split(values: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split(values, sizes)


def _as_whole(values: Tensor) -> Tensor:
    """The bits of contiguous values as whole numbers, flat, a view."""
    return values.view(-1).view(_WHOLE[values.itemsize])


def _packed(codes: Tensor) -> Tensor:
    """The last four digits of each code, two in a byte; changes the codes."""
    low, high = codes.chunk(2)
    return torch.bitwise_or(low.bitwise_and_(15), high.bitwise_left_shift_(4))


def _unpacked(pairs: Tensor, rooms: Rooms) -> Tensor:
    """The codes that were packed."""
    codes = rooms.room("codes", pairs, torch.int8, 2 * len(pairs))
    low, high = codes.chunk(2)
    torch.bitwise_left_shift(pairs, 4, out=low)
    low.bitwise_right_shift_(4)
    torch.bitwise_right_shift(pairs, 4, out=high)
    return codes


def _share(distance: Tensor, limit: int) -> float:
    """How many of the distances are outside of ``-limit - 1 .. limit``."""
    return float(((distance > limit) | (distance < -limit - 1)).double().mean())


def _beyond(distance: Tensor, limit: int) -> Tensor:
    """Where the distances are outside of ``-limit - 1 .. limit``."""
    # few are, and to look at the extremes of many together takes a tenth of the time
    chunks = distance.view(-1, math.gcd(len(distance), _CHUNK))
    some = ((chunks.amax(1) > limit) | (chunks.amin(1) < -limit - 1)).nonzero().view(-1)
    few = chunks[some]
    chunk, place = ((few > limit) | (few < -limit - 1)).nonzero().unbind(1)
    return some[chunk] * chunks.shape[1] + place


def _sum(values: Tensor) -> Tensor:
    """A sum over the bits of contiguous values, each times a number of its place, modulo 2^64.

    It tells two numbers that are exchanged, or both negated, unless they stand in one block, and a
    multiple of `_COLUMNS` words apart.
    """
    # of half the bits of a sum: no factor moves the first bit of one, and signs may be first bits
    flat, many = values.view(-1), max(4 // values.itemsize, 1)
    if flat.numel() % many:
        words = _as_whole(flat).to(torch.int32)
    else:  # four bytes at once, which must be at a place that is a multiple of four
        words = (flat.clone() if flat.storage_offset() % many else flat).view(torch.int32)
    blocks = words[: len(words) // (_DEEP * _COLUMNS) * _DEEP * _COLUMNS]
    rest = words[len(blocks) :]
    columns = blocks.view(-1, _DEEP, _COLUMNS).sum(1, dtype=torch.int32)
    columns = columns * _multipliers(_COLUMNS, words)
    total = (columns.sum(1) * _multipliers(len(columns), words)).sum()
    return total + (rest * _multipliers(len(rest), words)).sum()


def _multipliers(many: int, like: Tensor) -> Tensor:
    """So many odd numbers without a pattern, the same everywhere."""
    return _mixed(1 << (many - 1).bit_length() if many > 1 else 1, like.device)[:many]


@lru_cache
def _mixed(many: int, device: torch.device) -> Tensor:
    """Whole numbers, as `splitmix64` mixes them, made odd."""
    mixed = torch.arange(1, many + 1, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return mixed | 1
