"""Every place in a model that could carry an adapter, with all the names that it has."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import compress
from types import NoneType
from typing import Any

import torch
from torch import nn

from lora_core._adapters import clean
from lora_core._injection.code import names_used
from lora_core._injection.dialects import LAST_NAMES
from lora_core._injection.fused import FUSE, fused_in
from lora_core._layers import (
    CHILD,
    FROZEN,
    LINEAR,
    PROJECTIONS,
    STATE,
    WEIGHT,
    Kind,
    LoRAWeight,
    Slot,
    kind_for,
    slots,
    why_not,
)

_MOST_NAMES = 16  # names of one module that are told apart
_MOST_HELD = 4096  # a longer list or dict is one of data
_DEEPEST = 3  # lists of dicts of lists
_HOLDERS = (list, tuple, dict)
_NO_PARTS = frozenset((*vars(nn.Module()), STATE, FROZEN))  # attributes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module or parameter, all its dotted names, and why it can't be adapted ("" if it can).

    Attributes:
        names: Every dotted name under which it is reached, the first one first.
        module: The module, or the place of a parameter that is read and never called.
        kind: What an adapter on it would be; None where its kind can carry none.
        problem: What stands in the way on a layer of an adaptable kind.
        owners: The modules by whose class it is found.
        raw: Whether it is a parameter that only its own name finds.
        name: The first of its names.
        adaptable: Whether its kind can carry an adapter.
    """

    names: tuple[str, ...]
    module: nn.Module | Slot
    kind: Kind | None
    problem: str
    owners: tuple[nn.Module, ...]
    raw: bool = False
    name: str = field(init=False)
    adaptable: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.names[0])
        object.__setattr__(self, "adaptable", self.kind is not None)


def walk(model: nn.Module) -> list[Candidate]:
    """Every module of `model` once, with all its names, in the order of `named_modules`.

    A module's parameters that can be adapted where they are read come right after it.
    """
    seen: dict[nn.Module, list[str]] = {}
    parents: _Parents = {}
    _visit(model, "", (), seen, parents)
    found = []
    for module, names in seen.items():
        if isinstance(module, LoRAWeight):
            owners = (module.owner, *_readers(module.owner, parents))
            found.append(
                Candidate(
                    tuple(names),
                    module,
                    module.lora_kind,
                    "",
                    owners,
                    _is_raw(module.owner, module.lora_label),
                )
            )
            continue
        if isinstance(module, torch.jit.ScriptModule):
            has_matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
            problem = why_not(module) if has_matrix else ""
            kind = LINEAR if has_matrix else None
            found.append(Candidate(tuple(names), module, kind, problem, (module,)))
            continue
        kind = kind_for(module)
        adaptable = kind is not None
        readers = _readers(module, parents) if adaptable and module in parents else []
        there = CHILD in module._modules
        problem = why_not(module) if adaptable and not (readers and there) else ""
        is_read = bool(readers) and not problem
        own = None if is_read else kind
        found.append(Candidate(tuple(names), module, own, problem, (module,)))
        if is_read and not there:
            owners = (module, *readers)
            found.append(Candidate(tuple(names), Slot(module, "weight", ""), WEIGHT, "", owners))
        beside = [Slot(module, "bias", "bias")] if is_read and _has_bias(module) else []
        for slot in (*slots(module, is_layer=adaptable), *beside):
            if slot.child not in module._modules:
                labelled = tuple(f"{name}.{slot.label}".lstrip(".") for name in names)
                raw = _is_raw(module, slot.label)
                found.append(Candidate(labelled, slot, WEIGHT, why_not(slot), (module,), raw))
    fused: dict[Any, str] = {}
    for module in seen:
        if hasattr(type(module), FUSE):
            fused |= fused_in(module)
    for i, c in enumerate(found) if fused else ():
        if c.module in fused:
            found[i] = replace(
                c,
                problem=f"is fused into {fused[c.module]!r}, which is called in its place. Name"
                " that one, or call `unfuse_qkv_projections()` first.",
            )
    for i, problem in _uncalled(found).items():
        found[i] = replace(found[i], problem=problem)
    return found


def _uncalled(found: Sequence[Candidate]) -> dict[int, str]:
    """Which are a weight's second name and never called, and what to name instead.

    That a layer is called is seen by its name in the code of the model's classes.
    """
    sharing: dict[int, list[int]] = {}
    many = False
    for i, c in enumerate(found):
        if isinstance(c.module, nn.Module) and c.adaptable and not (c.problem or c.raw):
            own = c.module._parameters.get("weight")
            if own is not None:
                group = sharing.setdefault(id(own), [])
                group.append(i)
                many = many or len(group) > 1
    if not many:
        return {}
    modules: dict[str, Any] = {name: c.module for c in found for name in c.names}
    used = set[str]().union(*(names_used(type(m)) for m in modules_of(found)))  # type: ignore[arg-type]
    problems = {}
    for group in sharing.values():
        called = [
            i for i in group if any(_is_called(name, modules, used) for name in found[i].names)
        ]
        for i in group if called else ():
            if i not in called:
                problems[i] = (
                    f"is never called, and only lends its weight to {found[called[0]].name!r}. Name"
                    " that one instead, or exclude this one."
                )
    return problems


def _is_called(name: str, modules: Mapping[str, Any], used: Set[str]) -> bool:
    """Whether a layer may be called under a name: its own is used, or its parent's is by turns."""
    parent, _, own = name.rpartition(".")
    return own in used or isinstance(
        modules.get(parent), nn.ModuleList | nn.ModuleDict | nn.Sequential | NoneType
    )


def unregistered(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The layers of adaptable kinds that a plain list or dict keeps from torch's own walk."""
    held = [(c.name, c.module) for c in candidates if isinstance(c.module, nn.Module)]
    (_, root), seen = held[0], {module for _, module in held}
    found = []
    for name, holder in held:  # which grows
        inside: list[tuple[str, nn.Module, str]] = []
        for key, value in vars(holder).items():
            if isinstance(value, _HOLDERS) and value and key not in _NO_PARTS:
                inside += _modules_in(value, key, _DEEPEST)
        for tail, module, kind in inside:
            if root in module.modules():  # a part that knows its whole
                continue
            problem = (
                f"is held in a plain {kind}, where torch does not see it: neither `parameters`, nor"
                " `.to`, nor `state_dict`. Use nn.ModuleList or nn.ModuleDict."
            )
            for inner, m in module.named_modules(prefix=f"{name}.{tail}".lstrip(".")):
                if m not in seen:
                    seen.add(m)
                    held.append((inner, m))
                    would = kind_for(m)
                    if would is not None:
                        found.append(Candidate((clean(inner),), m, would, problem, (m,)))
    return found


def _modules_in(value: object, name: str, depth: int) -> Iterator[tuple[str, nn.Module, str]]:
    """The modules that stand in lists and dicts of an attribute, their names, and in what."""
    if not depth or not isinstance(value, _HOLDERS) or len(value) > _MOST_HELD:
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, nn.Module):
            yield f"{name}.{key}", item, "dict" if isinstance(value, dict) else "list"
        else:
            yield from _modules_in(item, f"{name}.{key}", depth - 1)


def modules_of(candidates: Iterable[Candidate]) -> list[nn.Module]:
    """The modules among these, each once."""
    return [c.module for c in candidates if isinstance(c.module, nn.Module)]


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _is_raw(owner: nn.Module, label: str) -> bool:
    """Whether a parameter is none of those that a known kind of module is made of."""
    packed = isinstance(owner, nn.MultiheadAttention) and label in PROJECTIONS
    return bool(label) and not packed and not isinstance(owner, nn.RNNBase | nn.RNNCellBase)


# the parents of modules that they call by the name of a projection
_Parents = dict[nn.Module, list[nn.Module]]


def _visit(
    module: nn.Module,
    name: str,
    above: tuple[nn.Module, ...],
    seen: dict[nn.Module, list[str]],
    parents: _Parents,
) -> None:
    names = seen.setdefault(module, [])
    # a module that contains itself, or whose names would multiply without end
    if module in above or len(names) == _MOST_NAMES:
        return
    names.append(name)
    if above and name.rpartition(".")[2] in LAST_NAMES:
        parents.setdefault(module, []).append(above[-1])
    if not module._modules:
        return
    above = (*above, module)
    for part, child in module._modules.items():
        if child is not None:
            _visit(child, clean(f"{name}.{part}".lstrip(".")), above, seen, parents)


def _readers(module: nn.Module, parents: _Parents) -> list[nn.Module]:
    """The parents that read this layer's weight themselves and never call the layer."""
    found = parents.get(module, [])
    return list(compress(found, map(_reads_weights, map(type, found))))


@lru_cache
def _reads_weights(cls: type) -> bool:
    """Whether this class hands weights to `F.multi_head_attention_forward` instead of calling."""
    kinds = cls.__mro__
    methods = [m for kind in kinds[: kinds.index(nn.Module)] for m in vars(kind).values()]
    code = [inspect.unwrap(m).__code__ for m in methods if inspect.isfunction(m)]
    return any("multi_head_attention_forward" in c.co_names for c in code)
