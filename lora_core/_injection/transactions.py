"""Changing many modules entirely or not at all, and the flags of what trained before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_core._injection.guarding import settle
from lora_core._layers import FROZEN, factor_names

# a module, its class, attributes, children and hooks, and its parameters with their flags and
# gradients
_Snapshot = tuple[
    nn.Module,
    type[nn.Module],
    dict[str, Any],
    Mapping[str, nn.Module | None],
    Mapping[int, Any],
    dict[str, tuple[nn.Parameter, bool, torch.Tensor | None] | None],
]


_NONE: Mapping[Any, Any] = {}


@contextmanager
def all_or_nothing(model: nn.Module, changed: Iterable[nn.Module]) -> Iterator[None]:
    """Restores these modules where what follows raises, and settles the guards of the model."""
    before = [_snapshot(m) for m in changed]
    try:
        yield
        settle(model)
    except BaseException:
        _restore(before)
        settle(model)
        raise


def _snapshot(module: nn.Module) -> _Snapshot:
    parameters = {
        key: None if p is None else (p, p.requires_grad, p.grad)
        for key, p in module._parameters.items()
    }
    # most have none: thousands of empty dicts cost the collector dear
    hooks = dict(module._forward_pre_hooks) if module._forward_pre_hooks else _NONE
    children = dict(module._modules) if module._modules else _NONE
    return module, type(module), dict(vars(module)), children, hooks, parameters


def _restore(before: Sequence[_Snapshot]) -> None:
    for module, cls, attributes, children, hooks, parameters in before:
        for p, flag, grad in filter(None, parameters.values()):
            p.requires_grad_(flag)
            p.grad = grad
        if isinstance(module, torch.jit.ScriptModule):
            continue  # nothing else of it was changed, and what it holds can't be replaced
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(attributes)
        module._parameters.clear()
        module._parameters.update({key: p and p[0] for key, p in parameters.items()})
        module._modules.clear()
        module._modules.update(children)
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(hooks)


def freeze_module(module: nn.Module, adapter: str, *, others: bool) -> None:
    """Freezes a module's parameters, drops their gradients, and notes what trained."""
    record = vars(module).get(FROZEN, {})
    held = {key for found in record.values() for key in found} if record else ()
    adapters = () if others else vars(module).get("lora_configs", ())
    spared = factor_names(adapters) if adapters else ()
    found = {}
    for key, p in module._parameters.items():
        if p is None or key in spared:
            continue
        # what an earlier arrival froze is relied on by this one too
        if p.requires_grad or key in held:
            found[key] = p.requires_grad
        p.requires_grad_(False)
        p.grad = None
    if found:
        vars(module)[FROZEN] = {**record, adapter: found}


def thaw(module: nn.Module, names: Sequence[str]) -> int:
    """Makes flags what they would be had these adapters never come; how many now train again.

    What an adapter found training passes to the next one that keeps it frozen; where there is
    none, it trains again.
    """
    record = dict(vars(module).get(FROZEN, {}))
    gone, order, restored = factor_names(names), list(record), 0
    own = dict(module._parameters.items())  # a scripted module's have no `get`
    for i, name in enumerate(order):
        if name not in names:
            record[name] = {key: flag for key, flag in record[name].items() if key not in gone}
            continue
        for key in [key for key, trained in record.pop(name).items() if trained]:
            p = own.get(key)
            heir = next((n for n in order[i + 1 :] if key in record[n]), None)
            if heir is not None:
                record[heir] = {**record[heir], key: True}
            elif p is not None:
                p.requires_grad_(True)
                restored += 1
    record = {name: found for name, found in record.items() if found}
    if record:
        vars(module)[FROZEN] = record
    else:
        vars(module).pop(FROZEN, None)
    return restored
