"""All that a merge asks of layers and gives them; its arithmetic knows tensors alone."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core._config import SUBTRACTED
from lora_core._layers import KINDS, LoRAMixin, LoRAWeight, Merged
from lora_core._merging.sums import HALF, WIDE, Sum


class Site(NamedTuple):
    """A layer that a merge changes.

    Attributes:
        layer: The layer.
        owner: The module that has the adapted Parameter.
        key: The Parameter's name there.
        weight: What is adapted of it: all, or some of its rows.
    """

    layer: LoRAMixin
    owner: nn.Module
    key: str
    weight: Tensor

    @property
    def own(self) -> nn.Parameter:
        """The adapted Parameter, whole."""
        own = self.owner._parameters[self.key]
        assert own is not None
        return own

    @property
    def is_part(self) -> bool:
        """Whether the Parameter is one that is read, and not the weight of a layer."""
        return isinstance(self.layer, LoRAWeight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of a layer, where an active adapter has one of its own."""
        return self.layer._parameters["bias"] if adds_to_bias(self.layer) else None


def site_of(layer: LoRAMixin) -> Site | None:
    """Where a layer's weight is; None where it is computed."""
    owner, key = layer.lora_home()
    own = owner._parameters.get(key)
    if own is None:
        return None
    return Site(layer, owner, key, layer.weight if isinstance(layer, LoRAWeight) else own)


def is_moved(layer: LoRAMixin) -> bool:
    """Whether the Parameter that was merged is no longer its owner's."""
    owner, key = layer.lora_home()
    return owner._parameters.get(key) is None


def is_mixed(layer: LoRAMixin) -> bool:
    """Whether an active adapter has a strength for each sample."""
    _, strengths, *_ = layer.lora_selection
    return tuple in map(type, strengths)


def strengths_of(layer: LoRAMixin) -> dict[str, float]:
    """The active adapters and their strengths."""
    names, strengths, *_ = layer.lora_selection
    return dict(zip(names, strengths, strict=True))  # type: ignore[arg-type]  # no mix per sample


def adds_to_bias(layer: LoRAMixin) -> bool:
    """Whether an active adapter has a bias of its own."""
    configs = layer.lora_configs
    return True in [configs[name].bias for name in layer.lora_selection.names]


def factors_of(layer: LoRAMixin) -> dict[tuple[str, str], Tensor]:
    """The tensors of the active adapters, by the adapter's name and the part's."""
    found: dict[tuple[str, str], Tensor] = {}
    for adapter in layer.lora_selection.names:
        for part, factor in layer.lora_parts(adapter).items():
            found[adapter, part] = factor
    return found


def is_linear_in_weight(layer: LoRAMixin) -> bool:
    """Whether the host's forward is one that is known to be."""
    return layer.lora_linear_in_weight or any(
        issubclass(layer.host_class, kind) and layer.host_class.forward is kind.forward
        for kind in KINDS
    )


def sum_of(site: Site) -> Sum | None:
    """The merged weight as a sum with one product that can be written in place.

    None where it is more than that, as with DoRA, and where the weight's layout, type or
    mode forbids it.
    """
    layer, weight = site.layer, site.weight
    fits = (
        type(weight) is nn.Parameter
        and weight.dtype in (*WIDE, *HALF)
        and weight.is_contiguous()
        and not weight.is_inference()  # which has no version to tell by
        and True not in [layer.lora_configs[n].dora for n in layer.lora_selection.names]
        and is_linear_in_weight(layer)
    )
    matrix = layer.lora_matrix(weight) if fits else None
    if matrix is None or matrix.ndim != 2:
        return None
    lora_A, lora_B, gain = _stacked(layer)
    wide = weight.dtype if weight.dtype in WIDE else torch.float32
    if lora_A.dtype != wide:
        lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    lora_B = lora_B * (gain if gain.dtype == wide else gain.to(wide))
    if matrix.is_contiguous():
        return Sum(matrix, lora_A, lora_B)
    return Sum(matrix.T, lora_B.T, lora_A.T)


def largest_update(layer: LoRAMixin, norms: Mapping[tuple[str, str], float]) -> float | None:
    """What no entry of the update exceeds, by the norms of its parts; None where that is unknown.

    By Cauchy-Schwarz no entry of a product of matrices exceeds the product of their norms.
    """
    total = 0.0
    for name, strength in strengths_of(layer).items():
        config = layer.lora_configs[name]
        if config.dora:
            return None
        one = norms[name, "lora_A"] * norms[name, "lora_B"]
        if config.tucker:
            one *= norms[name, "lora_mid"]
        if config.init in SUBTRACTED:
            one += norms[name, "lora_A0"] * norms[name, "lora_B0"]
        total += one * abs(strength * config.scale)
    return total


def _stacked(layer: LoRAMixin) -> tuple[Tensor, Tensor, Tensor]:
    names, _, gains, _ = layer.lora_selection
    if len(names) == 1:
        config, gain = layer.lora_configs[names[0]], gains[0].value
        if not config.tucker and config.init not in SUBTRACTED and isinstance(gain, Tensor):
            lora_A, lora_B = layer.lora_factors(names[0])
            if lora_A.dtype == lora_B.dtype:
                return (*layer.lora_as_matrices(lora_A.detach(), lora_B.detach()), gain)
    return layer.lora_stacked()


def put(
    layer: LoRAMixin,
    own: nn.Parameter,
    values: Tensor,
    bias: Tensor | None,
    state: Merged | None,
) -> None:
    """Gives a layer this Parameter, with these values, and this state, in place."""
    owner, key = layer.lora_home()
    owner._parameters[key] = own
    layer.lora_put(values, bias)
    vars(layer)["lora_merged"] = state


def restore(layer: LoRAMixin, state: Merged) -> None:
    """Gives a layer its own values back, in place."""
    assert state.kept is not None
    if state.parameter is not None:  # the shared Parameter was never written
        layer._parameters["weight"] = state.parameter
        if state.bias is not None:
            layer.lora_put(state.parameter.data, state.bias)
    else:
        layer.lora_put(state.kept, state.bias)
    vars(layer)["lora_merged"] = None
