"""The neutral form between files and models: an adapter without a model, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lora_core._adapters import glob
from lora_core._config import AdapterConfig
from lora_core._errors import ConfigError, TargetError, listed
from lora_core._formats.bases import rebased


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AdapterLayer:
    """One module's adapter as a file holds it, its tensors in the layouts of the layers here.

    Attributes:
        kind: What kind of layer it is for: "linear", "conv", "embedding", or "weight" for a
            parameter that is read; "matrix" where factors of two dimensions are all that is known.
            "difference" where `parts` are added to the module's parameters of the same names, and
            "values" where they replace them.
        config: Its settings; None where there are no factors.
        parts: Its tensors by what they are: ``lora_A`` and ``lora_B`` always, ``lora_mid``,
            ``lora_magnitude`` (over outputs), ``lora_in_magnitude`` (over inputs) and
            ``lora_bias`` where the file has them; of a difference or of values ``weight`` and
            ``bias``, either or both.
        aliases: Other dotted names of the same module.
        component: Which model of a pipeline the file says it is for, as "unet", "text_encoder",
            "text_encoder_2", "transformer" or "prior"; "" where it does not say.
        path: The module's name in that model, as the file spells it; "" where that is its key.
        spelling: How `path` is spelled: "dotted", "stem" with underscores for the dots, or "index"
            for the number that the module has among those that were adapted.
        alpha_from: Where alpha is from, in words for a report; "" where there is none.
        transposed: Whether the file says that the module stores its weight ``(in, out)``, as
            GPT-2's Conv1D does; the factors are as ever.
    """

    kind: str
    config: AdapterConfig | None
    parts: Mapping[str, Tensor]
    aliases: tuple[str, ...] = ()
    component: str = ""
    path: str = ""
    spelling: str = "dotted"
    alpha_from: str = "the file"
    transposed: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether all is equal, the tensors bit for bit."""
        if not isinstance(other, AdapterLayer):
            return NotImplemented
        mine, theirs = self.parts, other.parts
        return (
            all(
                getattr(self, f.name) == getattr(other, f.name)
                for f in fields(self)
                if f.name != "parts"
            )
            and mine.keys() == theirs.keys()
            and all(is_same(mine[part], theirs[part]) for part in mine)
        )

    __hash__ = None  # type: ignore[assignment]  # as of what it holds

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} {tuple(t.shape)}" for part, t in self.parts.items())
        return f"AdapterLayer({self.kind}, {parts}, {self.config})"

    @property
    def settings(self) -> AdapterConfig:
        """The settings of its factors, of a layer that has some."""
        assert self.config is not None
        return self.config


@dataclass(frozen=True, slots=True, repr=False)
class Adapter:
    """An adapter outside any model: the neutral form between files and layers.

    Attributes:
        name: The name it was saved under.
        layers: Its parts by the file's own module names.
        base: Fingerprint of the weights that it was trained on, empty where a file has none.
        metadata: The file's other entries, verbatim.
        format: What wrote it, as "kohya" or "peft".
        notes: What a reader should know about it, one sentence each.
    """

    name: str
    layers: Mapping[str, AdapterLayer]
    base: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "lora_core"
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.format}, {len(self.layers)} layers)"

    def select(self, *patterns: str) -> "Adapter":
        """The adapter on some of its layers alone.

        Args:
            patterns: Globs over the dotted names, or over any tail of one.

        Raises:
            TargetError: If a pattern matches no layer.

        Example:
            >>> import lora_core, torch
            >>> block = torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in ("to_q", "mlp")})
            >>> _ = lora_core.inject(block, rank=2, targets=["to_q", "mlp"])
            >>> list(lora_core.adapter_of(block).select("to_*").layers)
            ['to_q']
        """
        for pattern in patterns:
            if not any(map(glob(pattern).fullmatch, self.layers)):
                raise TargetError(
                    f"`select` must match a layer with each pattern, but {pattern!r} matches none"
                    f" of {len(self.layers)}: {listed(self.layers)}."
                )
        kept = {n: x for n, x in self.layers.items() if any(glob(p).fullmatch(n) for p in patterns)}
        base = rebased(self.base, self.layers, {name: name for name in kept})
        return replace(self, layers=kept, base=base)


def part_of(adapter: Adapter, only: str | None, what: str) -> Adapter:
    """The layers for one model of a pipeline; all where none is named.

    Args:
        adapter: The adapter.
        only: The part, as "unet".
        what: What to call the adapter in a message.

    Raises:
        ConfigError: If it has none for that part.
    """
    if only is None:
        return adapter
    parts = sorted({layer.component for layer in adapter.layers.values()})
    if only not in parts:
        raise ConfigError(
            f"`only` must name a part of {what}, but is {only!r}; it has"
            f" {listed([part or '(no part)' for part in parts])}."
        )
    layers = {name: layer for name, layer in adapter.layers.items() if layer.component == only}
    base = rebased(adapter.base, adapter.layers, {name: name for name in layers})
    return replace(adapter, layers=layers, base=base)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type and hold the same numbers."""
    return one.dtype == other.dtype and torch.equal(one, other)
