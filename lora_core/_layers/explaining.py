"""Which form a layer's next call takes, and why."""

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._errors import ConfigError, UnsupportedLayerError, listed
from lora_core._layers.attaching import call_me
from lora_core._layers.linear import LoRALinear, is_fused
from lora_core._layers.mixin import KINDS, LoRAMixin
from lora_core._layers.weights import LoRAWeight, WeightReader
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
    _check_input(layer, x)
    # the dropout of ranks draws, and the layer's own call must draw the same
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        active = layer.lora_active(x)
    if layer.lora_merged is not None:
        hidden = layer.lora_merged.merged is not None
        return Plan("frozen", _HIDDEN if hidden else "the adapters are merged into the weight")
    if not active.updates:
        return Plan("frozen", "no adapter is active")
    if isinstance(layer, LoRAWeight):
        return Plan("composed", "the parameter reads as its value plus the update")
    if not isinstance(layer, LoRALinear):
        return Plan("composed", "the host's own forward makes the base, the update is added")
    if len(active.updates) > 1:
        return Plan("composed", "the active adapters differ in dropout: each is a sum of its own")
    if not is_fused(active):
        return Plan("composed", "an adapter has a magnitude or a bias beside its two factors")
    lora_A, lora_B, gain, dropout = active.updates[0]
    return functional.fused_plan(x, layer.weight, layer.bias, lora_A, lora_B, gain, dropout=dropout)


def _check_input(layer: LoRAMixin, x: Tensor) -> None:
    """Refuses what the call would stumble over, as far as it is known what the host makes of it."""
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    if layer.lora_kind == "embedding":
        if kind not in (torch.int64, torch.int32):
            raise ConfigError(f"`x` must be a tensor of int64 or int32 indices, but is {kind}.")
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ConfigError(f"`x` must be a floating tensor, but is {kind}.")
    if not _is_known(layer):
        return
    weight, shape, fits = layer.weight, *_shape_of_input(layer, x)
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
    return layer.lora_linear_in_weight or any(
        issubclass(layer.host_class, kind) and layer.host_class.forward is kind.forward
        for kind in KINDS
    )


def _shape_of_input(layer: LoRAMixin, x: Tensor) -> tuple[str, bool]:
    """The shape that an input must have, and whether this one has it."""
    if isinstance(layer, LoRAWeight):
        home, name = layer.lora_home()
        whole = home._parameters[name]
        assert whole is not None
        return str(tuple(whole.shape)), x.shape == whole.shape
    if layer.lora_kind == "conv":
        channels, places = int(layer.in_channels), layer.weight.ndim - 2  # type: ignore[arg-type]
        rest = ", ".join(["size"] * places)
        shape = f"(batch, {channels}, {rest}), or the same without batch"
        return shape, x.ndim - places in (1, 2) and x.shape[-places - 1] == channels
    size, _ = layer.lora_sizes(layer)
    return f"(..., {size})", x.ndim > 0 and x.shape[-1] == size
