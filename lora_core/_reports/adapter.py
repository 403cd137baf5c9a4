"""What happened to an adapter: planned, put on a model, saved, taken off."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lora_core._config import SETTINGS, AdapterConfig
from lora_core._reports.table import table


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
        why: Why the weight itself reads as the sum; "" where the update stands beside the output.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    config: AdapterConfig
    aliases: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    alpha_from: str = ""
    why: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its factors."""
        return self.config.dtype

    @property
    def form(self) -> str:
        """What kind of update it is: "LoRA", or with its additions as in "LoRA, DoRA"."""
        return self.config.form

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
        numbers = 0
        for part, shape in self.shapes.items():
            numbers += 0 if part.endswith("0") else math.prod(shape)
        return numbers

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
        for reason, count in Counter(layer.why for layer in self.layers if layer.why).items():
            lines.append(f"weights that read as the sum: {count} ({reason})")
        for reason, count in Counter(self.left_out.values()).most_common():
            lines.append(f"left out: {count} ({reason})")
        return "\n".join([*lines, *self.notes])


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
