"""Products of matrices that come out the same, to the bit, in every order of summation.

A matrix product sums in an order that depends on the library, the threads and the device. Where
both factors are whole multiples of powers of two, of so few digits that every partial sum is held
exactly, no order rounds anything, and all give the same.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SMALL = 2**14  # whole numbers up to here, and their negatives, fit into 16 bits


class Exact(NamedTuple):
    """A product of matrices as whole numbers.

    Attributes:
        lora_A: ``(R, in)`` each, the more significant digits first.
        lora_B: ``(out, R)`` each, likewise.
        exponent: The product of the first two is in units of two to this power.
        digits: How many digits each has; units of the next are smaller by two to this power.
        dtype: What holds every sum of their products exactly.
    """

    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    exponent: int
    digits: int
    dtype: torch.dtype

    def terms(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """``(lora_B, lora_A)`` of the products whose sum this is, the larger ones first."""
        found = []
        for level in range(len(self.lora_A)):
            pairs = [(self.lora_B[i], self.lora_A[level - i]) for i in range(level + 1)]
            up = torch.cat([B.to(device, self.dtype) for B, _ in pairs], 1)
            down = torch.cat([A.to(device, self.dtype) for _, A in pairs], 0)
            found.append((up * 2.0 ** (self.exponent - level * self.digits), down))
        return found

    def to(self, device: torch.device) -> "Exact":
        """The same on another device."""
        lora_A, lora_B = (tuple(t.to(device) for t in each) for each in self[:2])
        return self._replace(lora_A=lora_A, lora_B=lora_B)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(t.nbytes for t in (*self.lora_A, *self.lora_B))


def exact(lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Exact | None:
    """``lora_B @ lora_A`` with the last digits of its factors cut off.

    Of float32 and float64 so many digits are left, relative to the largest number of each rank,
    that rounding the product to `dtype` loses more; of 16-bit types eight.

    Args:
        lora_A: ``(R, in)``, finite.
        lora_B: ``(out, R)``, finite.
        dtype: What the product will be rounded to.

    Returns:
        None where its numbers are too large or too small to be held so.

    Example:
        >>> made = exact(torch.randn(2, 3), torch.randn(5, 2), torch.bfloat16)
        >>> ((up, down),) = made.terms(torch.device("cpu"))
        >>> up.shape, down.shape, made.lora_A[0].dtype
        (torch.Size([5, 2]), torch.Size([2, 3]), torch.int16)
    """
    spare = math.ceil(math.log2(lora_A.shape[0]))  # digits that a sum of so many may need
    if dtype in _HALF:
        # eight digits are whole in bfloat16 too, to which a product may be allowed to round
        wide, held, digits, levels, least, most = torch.float32, 24, 8, 1, -80, 100
    else:
        wide, held, digits, levels = torch.float64, 53, 26, 1 + (dtype == torch.float64)
        least, most = -800, 900
    digits = min(digits, (held - spare) // 2)
    # on one device for all, so that nothing depends on how another takes powers
    A, B = (f.detach().to("cpu", torch.float64) for f in (lora_A, lora_B))
    sizes_A, sizes_B = A.abs().amax(1).tolist(), B.abs().amax(0).tolist()
    # each is below two to this power
    of_A, of_B = ([math.frexp(size)[1] for size in sizes] for sizes in (sizes_A, sizes_B))
    ranks = zip(sizes_A, sizes_B, of_A, of_B, strict=True)
    top = max([least, *(a + b for size_A, size_B, a, b in ranks if size_A and size_B)])
    # all ranks count in the same units, so that their sum does
    exponent = top - 2 * digits
    units = [a - digits + max(top - a - b, 0) // 2 for a, b in zip(of_A, of_B, strict=True)]
    if top + spare > most or max(map(abs, units)) > most or abs(exponent) > most:
        return None
    A = A * torch.tensor([2.0**-unit for unit in units], dtype=torch.float64)[:, None]
    B = B * torch.tensor([2.0 ** (unit - exponent) for unit in units], dtype=torch.float64)
    kept = torch.int16 if 2**digits <= _SMALL else torch.int32
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for level in range(levels):
        if level:
            A, B = ((rest - rest.round()) * 2.0**digits for rest in (A, B))
        for parts, rest in zip(found, (A, B), strict=True):
            parts.append(rest.round().to(kept))
    down, up = (tuple(part.to(lora_A.device) for part in parts) for parts in found)
    return Exact(down, up, exponent, digits, wide)
