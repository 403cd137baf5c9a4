"""What a merge added to weights, on a model or in a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` added to the weights, or what `unmerge` gave back.

    Attributes:
        adapters: Names of the adapters, with their strengths.
        layers: Names of the layers.
        reversible: Whether the originals are (or were) kept.
        loss: By layer, the share of the update lost to rounding: the norm of what was asked
            minus what arrived, over the norm of what was asked; 0 for an exact sum. Taken over at
            most 16 evenly spaced rows of the weight, and 64 columns.
        kept: Bytes that a compact merge keeps of the originals; None of any other.
        copied: Layers of which a compact merge keeps a copy, because less would not do.
    """

    adapters: Mapping[str, float]
    layers: tuple[str, ...]
    reversible: bool
    loss: Mapping[str, float] = field(default_factory=dict)
    kept: int | None = None
    copied: tuple[str, ...] = ()

    @property
    def worst_loss(self) -> float:
        """The largest entry of `loss`, 0 if there is none."""
        return max(self.loss.values(), default=0.0)

    def __str__(self) -> str:
        names = ", ".join(f"{name} x {s:g}" for name, s in self.adapters.items())
        if not self.loss:
            return f"unmerged {names} from {len(self.layers)} layers"
        way = "originals kept" if self.reversible else "no originals kept"
        if self.kept is not None:
            way += f" in {self.kept:,} bytes"
            way += f" ({len(self.copied)} layers copied)" if self.copied else ""
        return (
            f"merged {names} into {len(self.layers)} layers, {way};"
            f" rounding lost at most {self.worst_loss:.2%} of an update"
        )


@dataclass(frozen=True, slots=True)
class FileMergeReport:
    """What `merge_file` wrote.

    Attributes:
        path: Where.
        adapter: The adapter's name.
        strength: How strongly it was added.
        layers: By layer, the share of its update that rounding lost, as in `MergeReport`.
        changed: How many tensors are new.
        untouched: How many are the base's, byte for byte.
        nbytes: Bytes of the file, or of all shards together.
    """

    path: str
    adapter: str
    strength: float
    layers: Mapping[str, float] = field(default_factory=dict)
    changed: int = 0
    untouched: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        worst = max(self.layers.values(), default=0.0)
        return (
            f"merged {self.adapter} x {self.strength:g} into {self.path}: {self.changed} tensors"
            f" changed, {self.untouched} copied, {self.nbytes:,} bytes; rounding lost at most"
            f" {worst:.2%} of an update"
        )
