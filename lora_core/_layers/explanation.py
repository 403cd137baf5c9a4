"""Which form a layer's next call takes, and why."""

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._errors import ConfigError, UnsupportedLayerError, listed
from lora_core._layers.attachment import call_me
from lora_core._layers.kind import computes_as_torch, own_weight
from lora_core._layers.linear import LoRALinear
from lora_core._layers.mixin import LoRAMixin
from lora_core._layers.updates import active
from lora_core._layers.weight import WeightReader
from lora_core.kernels import Form

_HIDDEN = "the adapters are merged into the weight, and `disabled` shows the base"


def explain(layer: nn.Module, x: Tensor) -> Form:
    """The form that ``layer(x)`` takes now, and why; computes nothing.

    Forms: "addmm", "merge", "triton1", "triton2" and "composed" as in
    `lora_core.functional.fused_lora_linear`, and "frozen" where no update is added.

    Args:
        layer: An adapted layer.
        x: What it would be called with.

    Raises:
        UnsupportedLayerError: If the layer carries no adapter.
        ConfigError: If the layer can't be called with an `x` of this kind or shape.
        MergeError: If the layer is merged and the call would train an adapter.

    Example:
        >>> import torch
        >>> layer = LoRALinear(nn.Linear(320, 320), rank=4)
        >>> print(explain(layer, torch.randn(77, 320)))
        addmm: two skinny products accumulate in place beside the frozen one
        >>> explain(layer, torch.randn(4096, 320)).form
        'merge'
    """
    if isinstance(layer, WeightReader):
        children = [child for _, child in layer.lora_reads]
        raise UnsupportedLayerError(
            f"`layer` must carry an adapter itself, but a {layer.lora_host.__name__} reads its"
            f" parameters through {listed(children)}. Pass one of these, and the parameter as `x`."
        )
    if not isinstance(layer, LoRAMixin):
        raise UnsupportedLayerError(
            f"`layer` must carry an adapter, but is a bare {type(layer).__name__}."
            " Pass a layer that `inject` adapted, such as `model.get_submodule(name)`."
        )
    read = layer.lora_is_read and not isinstance(layer, LoRALinear)
    if not read or layer.lora_kind.is_read:  # else its host knows what it is called with
        _check_input(layer, x)
    # the dropout of ranks draws, and the layer's own call must draw the same
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        found, merged = active(layer, None if read else x), layer.lora_state.merged
    if merged is not None:
        hidden = merged.merged is not None
        return Form("frozen", _HIDDEN if hidden else "the adapters are merged into the weight")
    if not found.updates:
        return Form("frozen", "no adapter is active")
    if read:
        return Form("composed", "the parameter reads as its value plus the update")
    if not isinstance(layer, LoRALinear):
        return Form("composed", "the host's own forward makes the base, the update is added")
    if len(found.updates) > 1:
        return Form("composed", "the active adapters differ in dropout: each is a sum of its own")
    if not found.is_one_update:
        return Form("composed", "an adapter has a magnitude or a bias beside its two factors")
    lora_A, lora_B, gain, dropout = found.updates[0]
    weight = own_weight(layer)
    return functional.fused_plan(x, weight, layer.bias, lora_A, lora_B, gain, dropout=dropout)


def _check_input(layer: LoRAMixin, x: Tensor) -> None:
    """Refuses what the call would stumble over, as far as it is known what the host makes of it."""
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    if layer.lora_kind.takes_indices:
        if kind not in (torch.int64, torch.int32):
            raise ConfigError(f"`x` must be a tensor of int64 or int32 indices, but is {kind}.")
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ConfigError(f"`x` must be a floating tensor, but is {kind}.")
    if not _is_known(layer):
        return
    weight, shape, fits = layer.weight, *layer.lora_kind.inputs(layer, x)
    if not fits:
        raise ConfigError(f"`x` must have shape {shape}, but has {tuple(x.shape)}.")
    is_plain = type(weight) in (Tensor, nn.Parameter)
    if is_plain and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ConfigError(
            f"`x` must have the weight's dtype {weight.dtype}, but has {x.dtype}. Cast it, or call"
            " under autocast."
        )


def _is_known(layer: LoRAMixin) -> bool:
    """Whether the host is called with `x` as it is, and by a forward of torch's own."""
    if any(hook is not call_me for hook in layer._forward_pre_hooks.values()):
        return False
    return computes_as_torch(layer.lora_host_class)  # type: ignore[arg-type]
