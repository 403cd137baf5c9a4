"""Giving a layer other values, or its own back, and what it was merged with."""

from torch import Tensor, nn

from lora_core._layers import LoRAMixin, Merged, change


def strengths_of(layer: LoRAMixin) -> dict[str, float]:
    """The active adapters and their strengths."""
    return layer.lora_state.strengths  # type: ignore[return-value]  # no mix per sample


def adds_to_bias(layer: LoRAMixin) -> bool:
    """Whether an active adapter has a bias of its own."""
    return any(layer.lora_state.configs[name].bias for name in layer.lora_state.selection.names)


def own_weight(layer: LoRAMixin) -> nn.Parameter:
    """The Parameter that is adapted, whole."""
    home, key = layer.lora_kind.home(layer)
    weight = home._parameters[key]
    assert weight is not None
    return weight


def is_moved(layer: LoRAMixin) -> bool:
    """Whether the Parameter that was merged is no longer its owner's."""
    home, key = layer.lora_kind.home(layer)
    return home._parameters.get(key) is None


def put(
    layer: LoRAMixin,
    own: nn.Parameter,
    values: Tensor,
    bias: Tensor | None,
    state: Merged | None,
) -> None:
    """Gives a layer this Parameter, with these values, and this state, in place."""
    home, key = layer.lora_kind.home(layer)
    home._parameters[key] = own
    layer.lora_kind.put(layer, values, bias)
    change(layer, merged=state)


def restore(layer: LoRAMixin, state: Merged) -> None:
    """Gives a layer its own values back, in place."""
    assert state.kept is not None
    if state.parameter is not None:  # the shared Parameter was never written
        layer._parameters["weight"] = state.parameter
        if state.bias is not None:
            layer.lora_kind.put(layer, state.parameter.data, state.bias)
    else:
        layer.lora_kind.put(layer, state.kept, state.bias)
    change(layer, merged=None)
