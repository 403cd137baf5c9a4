"""Changing many modules entirely or not at all, and the flags of what trained before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_core._injection.guards import settle
from lora_core._layers import FROZEN, factor_names, state_of, undone_by

_NONE: Mapping[Any, Any] = {}


class _Snapshot(NamedTuple):
    """A module as it was."""

    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    children: Mapping[str, nn.Module | None]
    hooks: Mapping[int, Any]


class _Training(NamedTuple):
    """What of many parameters trained, and the gradients that there were.

    A few lists for all: thousands of small objects cost the collector dear.
    """

    trained: list[nn.Parameter]
    frozen: list[nn.Parameter]
    gradients: list[tuple[nn.Parameter, torch.Tensor]]


@contextmanager
def all_or_nothing(model: nn.Module, changed: Iterable[nn.Module]) -> Iterator[None]:
    """Restores these modules where what follows raises, and settles the guards of the model."""
    training = _Training([], [], [])
    before = [_snapshot(m, training) for m in changed]

    def back() -> None:
        _restore(before, training)
        settle(model)

    with undone_by(back):
        yield
        settle(model)


def _snapshot(module: nn.Module, training: _Training) -> _Snapshot:
    parameters = dict(module._parameters.items())  # a scripted module's are no dict
    for p in parameters.values():
        if p is None:
            continue
        (training.trained if p.requires_grad else training.frozen).append(p)
        if p.grad is not None:
            training.gradients.append((p, p.grad))
    # most have none: thousands of empty dicts cost the collector dear
    hooks = dict(module._forward_pre_hooks) if module._forward_pre_hooks else _NONE
    children = dict(module._modules) if module._modules else _NONE
    return _Snapshot(module, type(module), dict(vars(module)), parameters, children, hooks)


def _restore(before: Sequence[_Snapshot], training: _Training) -> None:
    for p in (*training.trained, *training.frozen):
        p.grad = None
    for p in training.frozen:
        p.requires_grad_(False)
    for p in training.trained:
        p.requires_grad_(True)
    for p, grad in training.gradients:
        p.grad = grad
    for module, cls, attributes, parameters, children, hooks in before:
        if isinstance(module, torch.jit.ScriptModule):
            continue  # nothing else of it was changed, and what it holds can't be replaced
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(attributes)
        module._parameters.clear()
        module._parameters.update(parameters)
        module._modules.clear()
        module._modules.update(children)
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(hooks)


def freeze_module(module: nn.Module, adapter: str, *, others: bool) -> None:
    """Freezes a module's parameters, drops their gradients, and notes what trained."""
    record = vars(module).get(FROZEN, {})
    held = {key for found in record.values() for key in found} if record else ()
    state = None if others else state_of(module)
    adapters = () if state is None else state.configs
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
