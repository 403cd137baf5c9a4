"""The receipts that the verbs return; each prints as a table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lora_core._config import SETTINGS, AdapterConfig


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a header, each column as wide as its widest cell; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer that an adapter goes on.

    Attributes:
        name: Dotted name of the layer; "" is the model itself.
        kind: Class of the host layer.
        in_features: Columns of the matrix that is adapted: all that one output sees.
        out_features: Its rows.
        config: The adapter's settings there.
        aliases: Other dotted names of the same module object.
        shapes: The shape of each of the adapter's tensors.
        alpha_from: Where a file's alpha is from; "" where there is no file.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    config: AdapterConfig
    aliases: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    alpha_from: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its factors."""
        return self.config.dtype

    @property
    def form(self) -> str:
        """What kind of update it is: "LoRA", or with its additions as in "LoRA, DoRA"."""
        having = (setting.form(self.config) for setting in SETTINGS.values())
        return ", ".join(["LoRA", *filter(None, having)])

    @property
    def rank(self) -> int:
        """Inner dimension of the update."""
        return self.config.rank

    @property
    def alpha(self) -> float:
        """Numerator of the scale."""
        return self.config.alpha

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with `rslora`."""
        return self.config.scale

    @property
    def rslora(self) -> bool:
        """Whether the scale divides by the rank's square root."""
        return self.config.rslora

    @property
    def parameters(self) -> int:
        """Numbers in the adapter's tensors together."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def trainable(self) -> int:
        """Those of them that can train."""
        first = [shape for part, shape in self.shapes.items() if part.endswith("0")]
        return self.parameters - sum(map(math.prod, first))

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's tensors together."""
        return self.parameters * self.config.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Report:
    """What `plan` would do, or what `inject` or `load` did.

    Attributes:
        adapter: The adapter's name.
        layers: The adapted layers, in the order of the model.
        left_out: Why each other layer of an adaptable kind was left out, by name.
        trainable: Numbers that train afterwards, the adapter's included.
        total: Numbers in the model afterwards, the adapter's included.
        notes: What else the user should know, a sentence each.
        metadata: The entries of the user's own in the file that was loaded.
        format: What kind of file that was; "" where there was none.
    """

    adapter: str
    layers: tuple[LayerReport, ...]
    left_out: Mapping[str, str]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = ""

    @property
    def parameters(self) -> int:
        """Numbers that the adapter adds."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        told = bool(self.format)
        rows = [
            (
                f"{layer.name or '(the model)'}",
                layer.kind,
                f"{layer.in_features} -> {layer.out_features}",
                layer.rank,
                f"{layer.alpha:g}",
                f"{layer.scale:g}",
                layer.parameters,
                *((layer.alpha_from, str(layer.dtype).removeprefix("torch."), layer.form) * told),
            )
            for layer in self.layers
        ]
        header = (
            *("layer", "kind", "shape", "rank", "alpha", "scale", "parameters"),
            *(("alpha from", "dtype", "form") * told),
        )
        share = self.trainable / max(self.total, 1)
        lines = [
            table(header, rows),
            f"adapter {self.adapter!r}: {len(self.layers)} layers, {self.parameters:,} parameters;"
            f" {self.trainable:,} of {self.total:,} train ({share:.2%})",
        ]
        for setting in SETTINGS.values():
            said = Counter(setting.note(layer.config) for layer in self.layers)
            lines += [f"{what} on {having} layers" for what, having in said.items() if what]
        for reason, count in Counter(self.left_out.values()).most_common():
            lines.append(f"left out: {count} ({reason})")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One adapter as it stands on a model.

    Attributes:
        name: The adapter's name.
        layers: Names of the layers it is on.
        ranks: Its ranks, sorted, each once.
        scales: Its scales, sorted, each once: what a strength multiplies.
        parameters: Numbers in its factors.
        nbytes: Bytes of its factors.
        strengths: Its strengths where it is active, each once; empty where it is nowhere active.
        trainable: Whether any of its factors requires a gradient.
        merged: Whether it is merged into the weights.
    """

    name: str
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    parameters: int
    nbytes: int
    strengths: tuple[float | tuple[float, ...], ...]
    trainable: bool
    merged: bool

    @property
    def active(self) -> bool:
        """Whether it takes part in a forward."""
        return bool(self.strengths)


@dataclass(frozen=True, slots=True)
class Summary:
    """The adapters of a model and how they stand.

    Attributes:
        adapters: One entry per adapter, in order of arrival.
        trainable: Numbers in the model that train.
        total: Numbers in the model.
    """

    adapters: tuple[AdapterSummary, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        def joined(values: Sequence[float | tuple[float, ...]]) -> str:
            return ", ".join(map(_shown, values)) or "-"

        rows = [
            (
                a.name,
                len(a.layers),
                joined(a.ranks),
                joined(a.scales),
                a.parameters,
                a.nbytes,
                joined(a.strengths),
                "yes" if a.trainable else "no",
                "yes" if a.merged else "no",
            )
            for a in self.adapters
        ]
        header = (
            "adapter",
            "layers",
            "rank",
            "scale",
            "parameters",
            "bytes",
            "strength",
            "trains",
            "merged",
        )
        share = self.trainable / max(self.total, 1)
        tail = f"{self.trainable:,} of {self.total:,} parameters train ({share:.2%})"
        return f"{table(header, rows)}\n{tail}" if rows else f"no adapters; {tail}"


@dataclass(frozen=True, slots=True)
class EjectReport:
    """What `eject` took out.

    Attributes:
        adapters: Names of the adapters, in order of arrival.
        layers: Names of the layers they were on.
        parameters: Numbers that left the model.
        restored: How many `requires_grad` flags were set back.
    """

    adapters: tuple[str, ...]
    layers: tuple[str, ...]
    parameters: int
    restored: int

    def __str__(self) -> str:
        names = ", ".join(self.adapters) or "nothing but guards"
        return (
            f"ejected {names}: {len(self.layers)} layers, {self.parameters:,} parameters;"
            f" {self.restored} requires_grad flags restored"
        )


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What `save` wrote.

    Attributes:
        path: Where.
        adapter: The adapter's name.
        layers: Names of the layers it is on.
        parameters: Numbers in its factors.
        nbytes: Bytes of the file.
        notes: How what was written differs from the adapter, a sentence each.
    """

    path: str
    adapter: str
    layers: tuple[str, ...]
    parameters: int
    nbytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = (
            f"saved {self.adapter} to {self.path}: {len(self.layers)} layers,"
            f" {self.parameters:,} parameters, {self.nbytes:,} bytes"
        )
        return "\n".join([said, *self.notes])


@dataclass(frozen=True, slots=True)
class NormReport:
    """What `limit_norm` found, and what it scaled down.

    Attributes:
        max_norm: The limit.
        before: By adapter and layer, the norm of the update before.
    """

    max_norm: float
    before: Mapping[str, Mapping[str, float]]

    @property
    def limited(self) -> dict[str, tuple[str, ...]]:
        """By adapter, the layers that were above the limit."""
        return {
            adapter: tuple(layer for layer, norm in norms.items() if norm > self.max_norm)
            for adapter, norms in self.before.items()
        }

    def __str__(self) -> str:
        lines = []
        for adapter, norms in self.before.items():
            above = len(self.limited[adapter])
            lines.append(
                f"limited {above} of {len(norms)} layers of {adapter!r} to a norm of"
                f" {self.max_norm:g}; the largest was {max(norms.values()):g}"
            )
        return "\n".join(lines)


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


def _shown(value: float | tuple[float, ...]) -> str:
    many = isinstance(value, tuple)
    return "per sample" if many else f"{value:g}"


def count(parameters: Sequence[torch.nn.Parameter]) -> int:
    """Numbers in these parameters."""
    return sum(map(torch.Tensor.numel, parameters))
