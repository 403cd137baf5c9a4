"""What the verbs of the algebra say of each layer while they work, and of all at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_core._reports.table import table


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer of the result.

    Attributes:
        name: Its name.
        rank: Its rank there.
        error: How far its update is from what was asked: the norm of the difference over the norm
            of what was asked. The rounding of float32 is not counted, that of narrower types is.
            Terms that cancel to nothing but their own rounding ask for zero: what is lost of that
            is nothing, and what narrow types round off is over the norm of the terms.
        done: How many layers are done, this one included.
        total: How many there are.
    """

    name: str
    rank: int
    error: float
    done: int
    total: int


Told = Callable[[LayerResult], object]
"""Told of each layer when it is done: a progress bar, or ``results.append``."""


@dataclass(frozen=True, slots=True)
class AlgebraReport:
    """What was told of the layers, as a table.

    Attributes:
        layers: One entry per layer.

    Example:
        >>> print(AlgebraReport([LayerResult("to_q", 4, 0.25, 1, 1)]))
        layer  rank  error
        -----  ----  --------
        to_q      4  2.50e-01
        1 layers, relative error 2.50e-01 at most
    """

    layers: Sequence[LayerResult]

    @property
    def worst_error(self) -> float:
        """The largest error, 0 if there is no layer."""
        return max((layer.error for layer in self.layers), default=0.0)

    def __str__(self) -> str:
        rows = [(layer.name, layer.rank, f"{layer.error:.2e}") for layer in self.layers]
        return (
            f"{table(('layer', 'rank', 'error'), rows)}\n{len(rows)} layers,"
            f" relative error {self.worst_error:.2e} at most"
        )


class Teller:
    """Counts the layers, tells of each, and remembers the worst."""

    def __init__(self, told: Told | None, total: int) -> None:
        self._told, self._total, self._done = told, total, 0
        self.worst = 0.0

    def __call__(self, name: str, rank: int, error: float) -> None:
        """One more layer is done."""
        self._done += 1
        self.worst = max(self.worst, error)
        if self._told is not None:
            self._told(LayerResult(name, rank, error, self._done, self._total))
