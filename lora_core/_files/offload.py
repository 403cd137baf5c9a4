"""Tensors that an offloading program keeps elsewhere while a module shows none of their values."""

from typing import Any

from torch import Tensor, nn

_HOOK = "_hf_hook"  # attribute: what accelerate puts on each module whose tensors it moves


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves a module's tensors in for each call, and out after it."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def at_hand(module: nn.Module, key: str, shown: Tensor) -> Tensor:
    """The values of a module's parameter, from where they are kept if it shows none."""
    if not shown.is_meta:
        return shown
    for hook in _hooks(module):
        kept = getattr(hook, "weights_map", None)
        if kept is not None and key in kept:
            values: Tensor = kept[key]
            return values
    return shown


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get(_HOOK)
    return tuple(getattr(hook, "hooks", (hook,)))
