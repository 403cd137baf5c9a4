"""Whether a layer can carry an adapter, and what its settings are there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._config import AdapterConfig, check_alpha, check_rank
from lora_core._errors import ConfigError
from lora_core._layers.kind import KINDS, TRANSPOSED, Kind, computes_as_torch, host_kind, peek
from lora_core._layers.mixin import LoRAMixin
from lora_core._layers.parts import wide_dtype
from lora_core._layers.weight import WEIGHT, Slot


def kind_for(module: nn.Module | Slot) -> Kind | None:
    """What adapters are on modules of this kind, None if nothing."""
    if isinstance(module, LoRAMixin):
        return module.lora_kind
    if isinstance(module, Slot):
        return WEIGHT
    host = host_kind(type(module))  # type: ignore[arg-type]
    if host is not None:
        return KINDS[host]
    # transformers' Conv1D, known by its looks so that transformers need not be installed
    weight = getattr(module, "weight", None)
    looks = type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2
    return TRANSPOSED if looks and hasattr(module, "nf") else None


def kind_of(module: nn.Module | Slot) -> Kind:
    """The same for a module of an adaptable kind."""
    kind = kind_for(module)
    assert kind is not None
    return kind


def sizes(module: nn.Module | Slot) -> tuple[int, int]:
    """``(in, out)`` of the matrix that an adapter of this layer changes."""
    return kind_of(module).sizes(module)


def why_not(module: nn.Module | Slot) -> str:
    """Why a layer of an adaptable kind can't be adapted, with the repair; "" if it can."""
    if isinstance(module, Slot):
        return _why_not_weight(module.weight)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and has no shape yet. Run one batch through the model first."
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module, whose class can't change. Adapt it before scripting."
    if "forward" in vars(module):
        return (
            "has a `forward` patched onto the instance (offloading hooks do this), which would"
            " bypass the adapter. Remove that patch, adapt, and put it back."
        )
    # an attribute that is looked up in vain takes long on a module
    known = (
        "max_norm" in vars(module)
        or "max_norm" in module._buffers
        or "max_norm" in module._parameters
        or hasattr(type(module), "max_norm")
    )
    if known and module.max_norm is not None:
        return (
            "has a `max_norm`, which rewrites rows of its weight in every forward. Renormalise the"
            " table once, set `max_norm = None`, and adapt it then."
        )
    if module._modules and _is_owner(module):
        return "has an adapter on a parameter of its own. Eject that first, or exclude the layer."
    host: Any = module.lora_host_class if isinstance(module, LoRAMixin) else type(module)
    own = not computes_as_torch(host)
    if own and "parametrizations" in module._modules:
        return (
            "has a forward of its own and a weight that is computed, so that nothing shows where an"
            " update belongs. Take the parametrization off, adapt, and put it back."
        )
    weight = getattr(module, "weight", None) if own else peek(module)
    if own and isinstance(weight, Tensor) and not _is_sharded(weight):
        return ""  # whatever the weight is stored as, the host's forward knows
    return _why_not_weight(weight)


def _is_owner(module: nn.Module) -> bool:
    """Whether a parameter of a module is adapted where it is read."""
    return any("lora_owner" in vars(m) for m in module._modules.values() if m is not None)


def _is_sharded(weight: Tensor) -> bool:
    return type(weight).__name__ == "DTensor"


def _why_not_weight(weight: object) -> str:
    if isinstance(weight, Tensor) and _is_sharded(weight):
        return "is sharded already. Adapt the model before `fully_shard` or tensor parallelism."
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "has a weight that is no floating-point tensor. Exclude it."
    if weight.dtype.itemsize < 2:
        return (
            f"has a weight of {weight.dtype}, which nothing but a cast can take. Cast the layer to"
            " 16 bits or more, or exclude it."
        )
    return ""


def layer_config(
    module: nn.Module | Slot, checked: Mapping[str, Any], where: str = ""
) -> AdapterConfig:
    """The settings of one layer, with what follows from it.

    Args:
        module: The layer.
        checked: What `checked_settings` made of the settings.
        where: The layer, for messages.
    """
    kind, weight = kind_of(module), peek(module)
    size, out = kind.sizes(module)
    rank, reserve = check_rank(checked["rank"], size, out, where), checked["reserve_rank"]
    if reserve is not None:
        reserve = check_rank(reserve, size, out, where, what="reserve_rank")
        if reserve < rank:
            raise ConfigError(
                f"`reserve_rank` must be at least the rank {rank}, but is {reserve}{where}."
            )
    alpha = check_alpha(checked["alpha"], rank)
    if alpha == 0:  # a file may hold it: what was saved comes back
        raise ConfigError(
            f"`alpha` must not be 0, but is {checked['alpha']!r}{where}: the adapter could have no"
            " effect and no gradient. Use `scales` to turn an adapter off."
        )
    dtype = checked["dtype"] or wide_dtype(weight)
    own: dict[str, Any] = {"rank": rank, "reserve_rank": reserve, "alpha": alpha, "dtype": dtype}
    own["read"] = checked["read"] and not kind.is_read  # which such a kind is anyway
    config = AdapterConfig(**{**checked, **own})
    refusal = kind.refusal(module, config) or _unreadable(weight, config)
    refusal = refusal or (unread(module, config) if config.read else "")
    if config.bias and not has_bias(module):
        refusal = refusal or "`bias=True` needs a bias to add to, and this layer has none"
    if refusal:
        raise ConfigError(f"A setting must fit its layer, but {refusal}{where}.")
    return config


def drops_inputs(module: nn.Module | Slot, *, read: bool) -> bool:
    """Whether an adapter can drop numbers of an input: where one adds to an output.

    Args:
        module: The layer.
        read: Whether its weight reads as the sum; of a plain `nn.Linear` its own call adds as ever.
    """
    if kind_of(module).is_read:
        return False
    host = module.lora_host_class if isinstance(module, LoRAMixin) else type(module)
    return not read or host is nn.Linear


def unread(module: nn.Module | Slot, config: AdapterConfig) -> str:
    """What does not go with settings by which a layer's weight reads as the sum; "" if all does."""
    assert isinstance(module, nn.Module)
    if isinstance(module, LoRAMixin) and not module.lora_is_read:
        return "`read=True` is for a layer's first adapter, and the first one here is not read"
    if "weight" not in module._parameters:
        return "`read=True` needs a weight that is a Parameter, and this one is computed"
    asked = {
        "`dropout`": config.dropout and not drops_inputs(module, read=True),
        "`bias`": config.bias,
        "`init='eva'`": config.starts_from == "inputs",
    }
    wrong = [what for what, value in asked.items() if value]
    if wrong:
        return f"{wrong[0]} is for layers that are called, and the weight of this one is read"
    return ""


def has_bias(module: nn.Module | Slot) -> bool:
    """Whether a layer has a bias that an adapter can add to."""
    return isinstance(module, nn.Module) and isinstance(getattr(module, "bias", None), Tensor)


def _unreadable(weight: Tensor, config: AdapterConfig) -> str:
    """Which setting needs values of the weight that can't be read; "" if none."""
    if config.dora or config.subtracted:
        plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
        what = "`dora=True`" if config.dora else f"`init={config.init!r}`"
        if not plain:
            found = f"a {type(weight).__name__} of {weight.dtype}"
            return f"{what} needs a weight of plain floating numbers, not {found}"
        if weight.is_meta:
            return f"{what} needs the weight's values, which the meta device has none of"
        if config.subtracted and config.scale <= 0:
            return f"{what} needs a scale above 0, not {config.scale:g}"
    return ""
