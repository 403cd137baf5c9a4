"""All that a merge asks of layers and gives them; its arithmetic knows tensors alone."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core._config import AdapterConfig
from lora_core._layers import (
    LoRAMixin,
    Merged,
    PerSample,
    factors_of,
    parts_of,
    set_merged,
    stacked,
    swap,
)
from lora_core._merging.residue import Residue
from lora_core._merging.sums import HALF, WIDE, Sum


class Site(NamedTuple):
    """A layer that a merge changes.

    Attributes:
        layer: The layer.
        owner: The module that has the adapted Parameter.
        key: The Parameter's name there.
        own: The Parameter, whole.
        weight: What is adapted of it: all, or some of its rows.
        bias: The layer's bias, where an active adapter has one of its own.
        strengths: The active adapters and their strengths.
    """

    layer: LoRAMixin
    owner: nn.Module
    key: str
    own: nn.Parameter
    weight: Tensor
    bias: Tensor | None
    strengths: dict[str, float]


def site_of(layer: LoRAMixin) -> Site | None:
    """What a merge reads of a layer; None where its weight is computed."""
    owner, key = layer.lora_kind.home(layer)
    own = owner._parameters.get(key)
    if own is None:
        return None
    weight, state, bias = layer.weight if layer.lora_kind.is_read else own, layer.lora_state, None
    names, strengths, *_ = state.selection
    for name in names:
        if state.configs[name].bias:
            bias = layer._parameters["bias"]
    # no mix per sample: it was refused
    active: dict[str, float] = dict(zip(names, strengths, strict=True))  # type: ignore[arg-type]
    return Site(layer, owner, key, own, weight, bias, active)


def is_part(site: Site) -> bool:
    """Whether the Parameter is one that is read, and not the weight of a layer."""
    return site.layer.lora_kind.is_read


def is_moved(layer: LoRAMixin) -> bool:
    """Whether the Parameter that was merged is no longer its owner's."""
    owner, key = layer.lora_kind.home(layer)
    return owner._parameters.get(key) is None


def is_mixed(layer: LoRAMixin) -> bool:
    """Whether an active adapter has a strength for each sample."""
    _, strengths, *_ = layer.lora_state.selection
    return PerSample in map(type, strengths)


def tensors_of(site: Site) -> list[Tensor]:
    """The tensors of the active adapters, in the order of their parts."""
    found: list[Tensor] = []
    layer = site.layer
    for name in site.strengths:
        if _is_one_product(layer.lora_state.configs[name]):
            found += factors_of(layer, name)
        else:
            found += parts_of(layer, name).values()
    return found


def adapters_of(site: Site) -> list[str]:
    """The adapter that each of `tensors_of` is of."""
    return [name for name in site.strengths for _ in parts_of(site.layer, name)]


def _is_one_product(config: AdapterConfig) -> bool:
    return not (config.dora or config.tucker or config.bias or config.subtracted)


def sum_of(site: Site) -> Sum | None:
    """The merged weight as a sum with one product that can be written in place.

    None where it is more than that, as with DoRA, and where the weight's layout, type or
    mode forbids it.
    """
    layer, weight = site.layer, site.weight
    for name in site.strengths:
        if layer.lora_state.configs[name].dora:
            return None
    fits = (
        type(weight) is nn.Parameter
        and weight.dtype in (*WIDE, *HALF)
        and weight.is_contiguous()
        and not weight.is_inference()  # which has no version to tell by
    )
    matrix = layer.lora_kind.matrix(weight) if fits else None
    if matrix is None or matrix.ndim != 2:
        return None
    lora_A, lora_B, gain = _stacked(layer)
    wide = weight.dtype if weight.dtype in WIDE else torch.float32
    if lora_A.dtype != wide or lora_B.dtype != wide:
        lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    lora_B = lora_B * (gain if gain.dtype is wide else gain.to(wide))
    if matrix is weight or matrix.is_contiguous():
        return Sum(matrix, lora_A, lora_B)
    return Sum(matrix.T, lora_B.T, lora_A.T)


def largest_update(site: Site, norms: Iterator[float]) -> float:
    """What no entry of the update exceeds; infinity where that is unknown.

    By Cauchy-Schwarz no entry of a product of matrices exceeds the product of their norms.

    Args:
        site: Where the update goes.
        norms: Those of `tensors_of`, of which as many are taken as this site has.
    """
    total = 0.0
    for name, strength in site.strengths.items():
        config = site.layer.lora_state.configs[name]
        if _is_one_product(config):
            total += next(norms) * next(norms) * abs(strength * config.scale)
            continue
        size = {part: next(norms) for part in config.parts}
        one = size["lora_A"] * size["lora_B"] * size.get("lora_mid", 1.0)
        one += size.get("lora_A0", 0.0) * size.get("lora_B0", 0.0)
        total += math.inf if config.dora else one * abs(strength * config.scale)
    return total


def _stacked(layer: LoRAMixin) -> tuple[Tensor, Tensor, Tensor]:
    names, _, _, bank, _ = layer.lora_state.selection
    if not (names[1:] or bank[1:]):
        _, recipe, gain, *_ = bank[0]
        if not recipe.tucker and not recipe.subtracted and type(gain) is Tensor:
            lora_A, lora_B = factors_of(layer, names[0])
            if lora_A.ndim == 2 and lora_B.ndim == 2 and not layer.lora_kind.own_layout:
                return lora_A, lora_B, gain
            return (*layer.lora_kind.as_matrices(lora_A, lora_B), gain)
    return stacked(layer)


Kept = Tensor | Residue  # what a reversible merge keeps of a weight


def kept_by(state: Merged) -> Kept:
    """What a reversible merge kept of the weight."""
    assert state.kept is not None
    return state.kept


def merged_with(site: Site, kept: Kept, own: nn.Parameter | None, bias: Tensor | None) -> Merged:
    """What a layer knows of a reversible merge.

    Args:
        site: The layer.
        kept: What is kept of its weight. A layer, and whoever shows its originals, asks a
            `Residue` for no more than `to`.
        own: The layer's own Parameter, where it was untied.
        bias: The bias before, where it changes.
    """
    return Merged(site.strengths, kept, None, own, bias)  # type: ignore[arg-type]


def commit(site: Site, values: Tensor, bias: Tensor | None, state: Merged | None) -> None:
    """Writes a layer's values in place, and what it knows of them: all of it or nothing."""
    version = site.own._version

    def rest() -> None:
        if bias is not None:
            own = site.layer._parameters["bias"]
            assert own is not None
            swap(own, bias)
        set_merged(site.layer, state)

    try:
        site.weight.copy_(values)
        rest()
    except BaseException:  # an interrupt may come after the one write
        if site.own._version != version:
            rest()
        raise


def put(
    layer: LoRAMixin, own: nn.Parameter, values: Tensor, bias: Tensor | None, state: Merged | None
) -> None:
    """Gives a layer this Parameter, with these values, and this state, in place."""
    owner, key = layer.lora_kind.home(layer)
    owner._parameters[key] = own
    layer.lora_kind.put(layer, values, bias)
    set_merged(layer, state)


def restore(layer: LoRAMixin, state: Merged) -> None:
    """Gives a layer its own values back, in place."""
    assert state.kept is not None
    if state.parameter is not None:  # the shared Parameter was never written
        layer._parameters["weight"] = state.parameter
        if state.bias is not None:
            layer.lora_kind.put(layer, state.parameter.data, state.bias)
    else:
        layer.lora_kind.put(layer, state.kept, state.bias)
    set_merged(layer, None)
