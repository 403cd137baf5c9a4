"""Singular values of products of factors, nearest products of lower rank, and norms.

Letters in the shape notes: in, out = sizes of the matrix, R = rank, K = number of singular values
kept. Leading dimensions, where there are any, are a batch of matrices that share one rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core._merging import is_finite as all_finite

_OVERSAMPLED = 16  # columns that a random subspace has beyond the rank
_SWEEPS = 8  # of the subspace iteration
_TOGETHER = 2**18  # numbers of what a subspace lacks that are worked out at a time
_NOISE = 8  # roundings of the largest singular value, or term, that those of zero may reach


class Spectrum(NamedTuple):
    """A matrix by its singular values, ``(U * S[..., None, :]) @ Vh``, and what that lacks of it.

    Attributes:
        U: Left singular vectors, ``(..., out, K)``.
        S: Singular values, ``(..., K)``, in falling order.
        Vh: Right singular vectors, ``(..., K, in)``.
        rest: The squared norm of the part outside these vectors; 0 where they are all.
        terms: The norm of the terms that the matrix is a sum of, which may cancel; 0 where it is
            none.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    rest: float = 0.0
    terms: float = 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``(lora_A, lora_B)`` of the nearest product of this rank, each with half of each value.

        Shape:
            - Output: ``(..., rank, in)`` and ``(..., out, rank)``
        """
        root = self.S[..., :rank].sqrt()
        return root[..., :, None] * self.Vh[..., :rank, :], self.U[..., :rank] * root[..., None, :]

    def tails(self) -> list[float]:
        """The squared norm that is lost at each rank, from 0 on; rounding alone counts as zero."""
        # in Python: so few numbers are no work for tensors
        rows: list[list[float]] = self.S.reshape(-1, self.S.shape[-1]).tolist()
        noise = [_NOISE * torch.finfo(self.S.dtype).eps * row[0] for row in rows]
        each = [
            # a power of floats raises where a product is infinite
            sum(value * value for value, zero in zip(column, noise, strict=True) if value > zero)
            for column in zip(*rows, strict=True)
        ]
        tails = [lost + self.rest for lost in accumulate([0.0, *reversed(each)])][::-1]
        is_zero = math.sqrt(tails[0]) < _rounding(self.terms, self.S.dtype)
        return [0.0] * len(tails) if is_zero else tails

    def error(self, rank: int) -> float:
        """The norm of what is lost at this rank, over the norm of all; 0 where all is zero."""
        tails = self.tails()
        return math.sqrt(tails[min(rank, len(tails) - 1)] / tails[0]) if tails[0] else 0.0


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite, in one pass where they are."""
    # a sum is finite only of finite numbers; where it isn't, it may have overflowed
    return math.isfinite(values.sum().item()) or all_finite(values)


def terms_norm(lora_A: Tensor, lora_B: Tensor) -> float:
    """The norm of the terms that ``lora_B @ lora_A`` is a sum of, as if none cancelled another.

    Each is a column times a row; that of all is the root of the sum of their squares.
    """
    columns, rows = (torch.linalg.vector_norm(t, dim=d) for t, d in ((lora_B, -2), (lora_A, -1)))
    return float(torch.linalg.vector_norm(columns.double() * rows.double()))  # over (..., R)


def _rounding(terms: float, dtype: torch.dtype) -> float:
    """The norm that the rounding of terms of this norm may reach where their sum is zero."""
    return _NOISE * torch.finfo(dtype).eps * terms


def over(gap: float, norm: float, terms: float, dtype: torch.dtype) -> float:
    """The norm of what is lost over that of a sum, or of its terms where these cancel."""
    whole = terms if norm < _rounding(terms, dtype) else norm
    return gap / whole if whole else 0.0 if not gap else math.inf


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact SVD; NaN of a matrix that is not finite, of which LAPACK makes an error."""
    if is_finite(matrix):
        return tuple(torch.linalg.svd(matrix, full_matrices=False))
    *batch, out, width = matrix.shape
    count = min(out, width)
    shapes = (*batch, out, count), (*batch, count), (*batch, count, width)
    U, S, Vh = (matrix.new_tensor(math.nan).expand(shape) for shape in shapes)
    return U, S, Vh


def spectrum(lora_A: Tensor, lora_B: Tensor) -> Spectrum:
    """The singular values of ``lora_B @ lora_A``, from small matrices alone.

    QR of both factors leaves a core of the rank's size, whose singular values they are; nothing of
    size (out, in) is made, and the work is of order ``(in + out) * R**2``. All is NaN where a
    number is not finite or the product overflows.

    Shape:
        - lora_A: ``(..., R, in)``; lora_B: ``(..., out, R)``, float32 or wider

    Reference:
        Golub and Van Loan, "Matrix Computations", 4th edition, 2013, section 5.4.

    Example:
        >>> spectrum(torch.ones(2, 1000), torch.ones(500, 2)).S.shape
        torch.Size([2])
    """
    left, upper = torch.linalg.qr(lora_B)
    right, lower = torch.linalg.qr(lora_A.mT)
    U, S, Vh = _decomposed(upper @ lower.mT)
    # the triangles' columns are as long as those of the factors
    return Spectrum(left @ U, S, Vh @ right.mT, terms=terms_norm(lower.mT, upper))


def dense_spectrum(
    matrix: Tensor, rank: int | None = None, generator: torch.Generator | None = None
) -> Spectrum:
    """The singular values of a dense matrix: all of them, or the first few by a random subspace.

    All is NaN where a number is not finite.

    Args:
        matrix: The matrix, or a batch.
        rank: How many values are wanted of the random subspace; None decomposes exactly.
        generator: Where the subspace's start comes from, on the CPU.

    Shape:
        - matrix: ``(..., out, in)``, float32 or wider

    Reference:
        Halko, Martinsson and Tropp, "Finding Structure with Randomness: Probabilistic Algorithms
        for Constructing Approximate Matrix Decompositions", 2011, algorithms 4.4 and 5.1.

    Example:
        >>> dense_spectrum(torch.eye(5, 3)).S.shape
        torch.Size([3])
    """
    if rank is None or not is_finite(matrix):
        return Spectrum(*_decomposed(matrix))
    *batch, out, width = matrix.shape
    wanted = min(rank + _OVERSAMPLED, out, width)
    start = torch.randn(*batch, width, wanted, generator=generator, dtype=torch.float32)
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_SWEEPS):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    inside = basis.mT @ matrix  # (..., wanted, in)
    return spectrum(inside, basis)._replace(rest=_outside(matrix, basis, inside))


def _outside(matrix: Tensor, basis: Tensor, inside: Tensor) -> float:
    """The squared norm of ``matrix - basis @ inside``, with a few rows of that in memory."""
    rows = max(_TOGETHER // max(matrix.shape[-1], 1), 1)
    pieces = zip(*(torch.split(t, rows, -2) for t in (matrix, basis)), strict=True)
    return sum(float((some - up @ inside).double().square().sum()) for some, up in pieces)


def product_norm(lora_A: Tensor, lora_B: Tensor) -> float:
    """The Frobenius norm of ``lora_B @ lora_A``, without cancellation and without forming it.

    Shape:
        - lora_A: ``(..., R, in)``; lora_B: ``(..., out, R)``, float32 or wider

    Example:
        >>> round(product_norm(torch.ones(2, 3), torch.ones(3, 2)), 4)
        6.0
    """
    upper, lower = torch.linalg.qr(lora_B, mode="r").R, torch.linalg.qr(lora_A.mT, mode="r").R
    return float((upper @ lower.mT).double().norm())


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The norm of the difference of two products, over the norm of the first; 0 for two zeros.

    Where the first is zero but for rounding, because its terms cancel, it is over theirs.

    Args:
        one: ``(lora_A, lora_B)``.
        other: Likewise, of any rank.

    Shape:
        - lora_A: ``(..., R, in)``; lora_B: ``(..., out, R)``, float32 or wider

    Example:
        >>> A, B = torch.eye(2, 3), torch.eye(4, 2)
        >>> distance((A, B), (A, 0 * B))
        1.0
    """
    (A, B), (other_A, other_B) = one, other
    gap = product_norm(torch.cat([A, other_A], dim=-2), torch.cat([B, -other_B], dim=-1))
    return over(gap, product_norm(A, B), terms_norm(A, B), A.dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """For matrices so small that sharing them among threads takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
