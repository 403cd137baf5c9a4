"""How the adapters of a model stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_core._errors import listed
from lora_core._reports.table import table


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
        idle: Names of the layers on which it is as it began, and adds nothing.
        gone: Names of the layers that it was put on and that are no more, replaced perhaps.
        unreached: Names of the layers that train and have no gradient, where others have one: no
            loss depends on them.
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
    idle: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

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
        if not rows:
            return f"no adapters; {tail}"
        asleep = [idleness(a.name, a.layers, a.idle) for a in self.adapters if a.idle]
        lost = [
            f"{a.name!r} was on {len(a.gone)} layers more, which are gone or were replaced:"
            f" {listed(a.gone)}"
            for a in self.adapters
            if a.gone
        ]
        missed = [
            f"{a.name!r} got no gradient at {len(a.unreached)} of {len(a.layers)} layers, where the"
            f" others did: {listed(a.unreached)}"
            for a in self.adapters
            if a.unreached
        ]
        return "\n".join([table(header, rows), tail, *asleep, *lost, *missed])


def idleness(name: str, layers: Sequence[str], idle: Sequence[str]) -> str:
    """Which layers of an adapter never trained, in a sentence; of some."""
    if len(idle) == len(layers):
        return f"{name!r} adds nothing yet: it is as it began on all {len(layers)} layers"
    return (
        f"{name!r} adds nothing on {len(idle)} of {len(layers)} layers, where it is as it began:"
        f" {listed(idle)}"
    )


def _shown(value: float | tuple[float, ...]) -> str:
    many = isinstance(value, tuple)
    return "per sample" if many else f"{value:g}"


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
