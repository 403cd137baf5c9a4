"""Which form a layer's next call takes, and why."""

from torch import Tensor, nn

from lora_core import functional
from lora_core._errors import ConfigError, UnsupportedLayerError
from lora_core._layers.linear import LoRALinear, is_fused
from lora_core._layers.mixin import LoRAMixin
from lora_core.kernels import Plan

_HIDDEN = "the adapters are merged into the weight, and `disabled` shows the base"


def explain(layer: nn.Module, x: Tensor) -> Plan:
    """The form that ``layer(x)`` takes now, and why; computes nothing.

    Forms: "addmm", "merge", "triton1", "triton2" and "composed" as in
    `lora_core.functional.fused_lora_linear`, and "frozen" where no update is added.

    Args:
        layer: An adapted layer.
        x: What it would be called with.

    Raises:
        UnsupportedLayerError: If the layer carries no adapter.
        ConfigError: If `x` is no floating tensor of the layer's width.
        MergeError: If the layer is merged and the call would train an adapter.

    Example:
        >>> import torch
        >>> layer = LoRALinear(nn.Linear(320, 320), rank=4)
        >>> print(explain(layer, torch.randn(77, 320)))
        addmm: two skinny products accumulate in place beside the frozen one
        >>> explain(layer, torch.randn(4096, 320)).form
        'merge'
    """
    if not isinstance(layer, LoRAMixin):
        raise UnsupportedLayerError(
            f"`layer` must carry an adapter, but is a bare {type(layer).__name__}."
            " Pass a layer that `inject` adapted, such as `model.get_submodule(name)`."
        )
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"`x` must be a floating tensor, but is {kind}.")
    if isinstance(layer, LoRALinear) and (x.ndim < 1 or x.shape[-1] != layer.in_features):
        raise ConfigError(
            f"`x` must have shape (..., {layer.in_features}), but has {tuple(x.shape)}."
        )
    active = layer.lora_active(x)
    if layer.lora_merged is not None:
        hidden = layer.lora_merged.merged is not None
        return Plan("frozen", _HIDDEN if hidden else "the adapters are merged into the weight")
    if not active.updates:
        return Plan("frozen", "no adapter is active")
    if not isinstance(layer, LoRALinear):
        return Plan("composed", "the host's own forward makes the base, the update is added")
    if len(active.updates) > 1:
        return Plan("composed", "the active adapters differ in dropout: each is a sum of its own")
    if not is_fused(active):
        return Plan("composed", "an adapter has a magnitude or a bias beside its two factors")
    lora_A, lora_B, gain, dropout = active.updates[0]
    return functional.fused_plan(x, layer.weight, layer.bias, lora_A, lora_B, gain, dropout=dropout)
