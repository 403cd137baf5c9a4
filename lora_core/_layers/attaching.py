"""Putting an adapter on one layer, exchanging it and taking it off."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_core._config import AdapterConfig
from lora_core._layers.fitting import mixin_of
from lora_core._layers.mixin import LoRAMixin, adapted_class
from lora_core._layers.norms import forget
from lora_core._layers.state import Strength, bare_state
from lora_core._layers.weights import LoRAWeight, Slot

OWN = tuple(bare_state())  # what every adapted layer has
PARTS = (
    *("lora_A", "lora_B", "lora_mid", "lora_magnitude", "lora_in_magnitude", "lora_bias"),
    *("lora_A0", "lora_B0"),
)


def factor_names(adapters: Iterable[str]) -> set[str]:
    """The names that the parameters of these adapters may have on a layer."""
    return {f"{part}_{name}" for name in adapters for part in PARTS}


def non_finite(factors: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """The layers one of whose factors holds NaN or infinity; few operations where none does."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for f in (f for pair in factors.values() for f in pair):
        groups.setdefault((f.device, f.dtype), []).append(f.detach().reshape(-1))
    # a sum is finite only of finite numbers; where it isn't, it may have overflowed
    if all(bool(torch.cat(group).sum().isfinite()) for group in groups.values()):
        return []
    return [n for n, pair in factors.items() if not all(bool(f.isfinite().all()) for f in pair)]


def call_me(module: nn.Module, args: tuple[object, ...]) -> None:
    """A forward pre-hook that does nothing: torch's fused paths call a layer that has one."""


def attach(
    module: nn.Module | Slot,
    name: str,
    config: AdapterConfig,
    parts: Mapping[str, nn.Parameter],
    strength: Strength | None = 1.0,
    slot: dict[str, object] | None = None,
) -> LoRAMixin:
    """Puts one adapter on a layer, in place; active beside those that are, but for None.

    Args:
        module: The layer.
        name: The adapter's name.
        config: Its settings there.
        parts: Its tensors.
        strength: How strongly it is active; None for not at all.
        slot: By its name what tells it from another of that name, on all its layers, which may
            share the dict; None makes one.

    Returns:
        The layer as it is now.
    """
    if isinstance(module, Slot):
        layer: LoRAMixin = module.occupy()
    else:
        if "lora_configs" not in vars(module):  # before the class: another thread's call finds it
            vars(module).update(bare_state())
        if not isinstance(module, LoRAMixin):
            module.__class__ = adapted_class(type(module))
        assert isinstance(module, LoRAMixin)
        layer = module
    # the names are known to be free: `register_parameter` would look for each once more
    layer._parameters.update({f"{part}_{name}": parts[part] for part in config.parts})
    configs = {**layer.lora_configs, name: config}
    slots = {name: object()} if slot is None else slot
    if layer.lora_slots:
        slots = {**layer.lora_slots, **slots}
    chosen = layer.lora_strengths() | ({} if strength is None else {name: strength})
    # at once: another thread sees the layer before or after
    vars(layer).update(
        lora_configs=configs,
        lora_slots=slots,
        lora_selection=layer.lora_select(chosen, configs),
    )
    return layer


def exchange(
    layer: LoRAMixin, name: str, config: AdapterConfig, parts: Mapping[str, nn.Parameter]
) -> None:
    """Puts another adapter in the place of one on a layer, which keeps its strength; in place.

    What of it trains stays, part by part; a part that the old one had not trains if any of it did.
    """
    old, held = layer.lora_parts(name), dict(layer._parameters)
    training = any(p.requires_grad for p in old.values())
    for part in old.keys() - parts.keys():
        del held[f"{part}_{name}"]
    for part, p in parts.items():
        known = old[part].requires_grad if part in old else training
        p.requires_grad_(known and not part.endswith("0"))
        held[f"{part}_{name}"] = p
    configs = {**layer.lora_configs, name: config}
    selection = layer.lora_select(layer.lora_strengths(), configs)
    # at once: another thread sees the layer before or after
    vars(layer).update(_parameters=held, lora_configs=configs, lora_selection=selection)


def reserved(
    module: nn.Module | Slot, config: AdapterConfig, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter with zeros for the ranks that its settings reserve."""
    mixin, wide = mixin_of(module), dict(parts)
    for part in parts if config.room > config.rank else ():
        for dim in mixin.lora_ranks_of(part):
            shape = list(wide[part].shape)
            shape[dim] = config.room - config.rank
            wide[part] = torch.cat([wide[part], wide[part].new_zeros(shape)], dim)
    return wide


def detach(module: LoRAMixin, name: str) -> None:
    """Takes one adapter off a layer, in place; with the last one goes every trace."""
    own = vars(module)
    parts = module.lora_configs[name].parts
    configs = {n: c for n, c in module.lora_configs.items() if n != name}
    slots = {n: s for n, s in module.lora_slots.items() if n != name}
    selection = module.lora_select(module.lora_strengths(), configs)
    own.update(lora_configs=configs, lora_slots=slots, lora_selection=selection)
    for part in parts:
        del module._parameters[f"{part}_{name}"]
    forget(module, name)
    if configs:
        return
    for key in [k for k, hook in module._forward_pre_hooks.items() if hook is call_me]:
        del module._forward_pre_hooks[key]
    if isinstance(module, LoRAWeight):
        module.leave()
        return
    # before the rest: another thread's call that finds nothing any more calls the host's
    module.__class__ = module.host_class  # type: ignore[assignment]
    for attribute in OWN:
        del own[attribute]
