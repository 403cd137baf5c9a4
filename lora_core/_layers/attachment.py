"""Putting an adapter on one layer, exchanging it and taking it off."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_core._config import AdapterConfig, NamedSettings, check_name, checked_settings
from lora_core._errors import ConfigError, UnsupportedLayerError
from lora_core._layers.fit import layer_config, why_not
from lora_core._layers.lengths import forget
from lora_core._layers.members import Members
from lora_core._layers.mixin import LoRAMixin, adapted_class
from lora_core._layers.parts import drawing, fresh_parts, parts_of
from lora_core._layers.state import FROZEN, NOTHING, STATE, Change, State, Strength, change, select
from lora_core._layers.weight import LoRAWeight, Slot


def call_me(module: nn.Module, args: tuple[object, ...]) -> None:
    """A forward pre-hook that does nothing: torch's fused paths call a layer that has one."""


def attach(
    module: nn.Module | Slot,
    name: str,
    config: AdapterConfig,
    tensors: Mapping[str, nn.Parameter],
    strength: Strength | None = 1.0,
    slot: Mapping[str, Members] | None = None,
    alike: dict[Any, Any] | None = None,
) -> LoRAMixin:
    """Puts one adapter on a layer, in place; active beside those that are, but for None.

    Args:
        module: The layer.
        name: The adapter's name.
        config: Its settings there.
        tensors: Its tensors.
        strength: How strongly it is active; None for not at all.
        slot: By its name its members, on all its layers, which may share the dict; None makes one.
        alike: What other layers in the same call share, where their settings are equal; see
            `select`.

    Returns:
        The layer as it is now.
    """
    if isinstance(module, Slot):
        layer: LoRAMixin = module.occupy()
    else:
        if STATE not in vars(module):  # before the class: another thread's call finds it
            vars(module)[STATE] = State(change=Change())  # of its own: another stand of tensors
        if not isinstance(module, LoRAMixin):
            # as `module.__class__ = ...`, past what a module does for each attribute
            host = adapted_class(type(module), read=config.read)
            object.__setattr__(module, "__class__", host)
        assert isinstance(module, LoRAMixin)
        layer = module
    state = layer.lora_state
    # the names are known to be free: `register_parameter` would look for each once more
    for part in config.parts:
        layer._parameters[f"{part}_{name}"] = tensors[part]
    alike = {} if alike is None else alike
    key = (id(state.configs), id(config))
    configs = alike.get(key) or alike.setdefault(key, {**state.configs, name: config})
    chosen = dict(zip(state.selection.names, state.selection.strengths, strict=True))
    if strength is not None:
        chosen[name] = strength
    slots = {name: Members()} if slot is None else slot
    change(
        layer,
        configs=configs,
        slots={**state.slots, **slots} if state.slots else slots,
        selection=select(layer, chosen, configs, alike if len(chosen) == 1 else None),
    )
    return layer


def exchange(
    layer: LoRAMixin, name: str, config: AdapterConfig, tensors: Mapping[str, nn.Parameter]
) -> None:
    """Puts another adapter in the place of one on a layer, which keeps its strength; in place.

    What of it trains stays, part by part; a part that the old one had not trains if any of it did.
    """
    old, held, state = parts_of(layer, name), dict(layer._parameters), layer.lora_state
    training = any(p.requires_grad for p in old.values())
    for part in old.keys() - tensors.keys():
        del held[f"{part}_{name}"]
    for part, p in tensors.items():
        known = old[part].requires_grad if part in old else training
        p.requires_grad_(known and not part.endswith("0"))
        held[f"{part}_{name}"] = p
    if config is state.configs[name]:  # a pin tells what was replaced by its settings
        config = dataclasses.replace(config)
    configs = {**state.configs, name: config}
    new = state.having(
        configs=configs, selection=select(layer, state.strengths, configs), change=Change()
    )
    # at once: another thread sees the layer before or after
    vars(layer).update({"_parameters": held, STATE: new})


def detach(layer: LoRAMixin, name: str) -> None:
    """Takes one adapter off a layer, in place; with the last one goes every trace."""
    state, own = layer.lora_state, vars(layer)
    gone = state.configs[name].parts
    if len(state.configs) == 1:
        configs, slots, selection = {}, {}, NOTHING
    else:
        configs, slots = dict(state.configs), dict(state.slots)
        del configs[name], slots[name]
        selection = select(layer, state.strengths, configs)
    change(layer, configs=configs, slots=slots, selection=selection, change=Change())
    state.slots[name].leave(layer)
    for part in gone:
        del layer._parameters[f"{part}_{name}"]
    forget(layer, name)
    if configs:
        return
    for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is call_me]:
        del layer._forward_pre_hooks[key]
    if isinstance(layer, LoRAWeight):
        layer.leave()
        return
    # before the state: another thread's call that finds nothing any more calls the host's
    object.__setattr__(layer, "__class__", layer.lora_host_class)
    del own[STATE]


def adopt(
    layer: Any, host: nn.Module, rank: int, alpha: float | None, settings: NamedSettings
) -> None:
    """Makes an adapted layer of a plain one, whose Parameters it takes over; in place.

    The constructor that `LoRALinear` and its kin share.

    Raises:
        ConfigError: If a setting is out of range for this layer.
        UnsupportedLayerError: If `host` is not of the very class that `layer` adapts, or has what
            a new module would lose.
    """
    plain: type[nn.Module] = layer.lora_host_class
    what = f"`{plain.__name__.lower()}`"
    if type(host) is not plain:
        raise UnsupportedLayerError(
            f"{what} must be a plain nn.{plain.__name__}, but is {type(host).__name__}."
            " Use `inject(model, targets=...)`, which keeps a subclass's own forward."
        )
    problem = why_not(host)
    if problem:
        raise UnsupportedLayerError(f"{what} must be adaptable, but {problem}")
    own = vars(host)
    hooks = [key for key in own if key.endswith("_hooks")]
    if set(own) != layer.lora_plain_attributes or any(own[key] for key in hooks):
        raise UnsupportedLayerError(
            f"{what} must be without hooks and attributes of its own, but this one has some"
            f" that a new module would lose. Use `inject(..., targets=nn.{plain.__name__})`,"
            " which keeps the object."
        )
    given = dict(settings)
    name = check_name(given.pop("name", "default"))
    config = layer_config(host, checked_settings({"rank": rank, "alpha": alpha, **given}))
    if config.read:
        raise ConfigError(
            "`read` must be False for a layer that is made anew, but is True. Use"
            " `inject(model, read=True)`, which gives a layer the class that reads."
        )
    with drawing():
        tensors = fresh_parts(host, layer.lora_kind, config)
    nn.Module.__init__(layer)
    for key in own.keys() - vars(layer).keys():
        vars(layer)[key] = own[key]
    for key, p in host._parameters.items():
        layer.register_parameter(key, p)
    layer.training = host.training
    attach(layer, name, config, tensors)  # which may refuse, and then the host is as it was
    trained = {key: True for key, p in host.named_parameters() if p.requires_grad}
    if trained:
        vars(layer)[FROZEN] = {name: trained}
    for p in host.parameters():
        p.requires_grad_(False)
        p.grad = None  # an optimiser would go on stepping with it
    # placed by hand, nobody tells the nn.TransformerEncoderLayer above
    layer.register_forward_pre_hook(call_me)


def plain_attributes(host: nn.Module) -> frozenset[str]:
    """The attributes that a plain host has."""
    return frozenset(vars(host))
