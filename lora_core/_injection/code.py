"""What the code of a module's class says: which weights it reads, and which names it uses."""

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType

from torch import nn

# what of a weight is asked without a look at its numbers
_ABOUT = frozenset(
    (
        *("dtype", "device", "shape", "ndim", "size", "dim", "numel", "stride", "is_cuda"),
        *("is_meta", "requires_grad", "element_size", "is_contiguous", "untyped_storage"),
    )
)
_ASKERS = frozenset(("isinstance", "hasattr", "type", "id"))  # nor by these


@lru_cache
def weights_read(cls: type) -> frozenset[str]:
    """The names of the layers whose weight a class's forward, and what it calls of it, reads."""
    return frozenset(name for code in _reached(cls) for name in _names_read(code))


@lru_cache
def names_used(cls: type) -> frozenset[str]:
    """The names, in text too, that a class's forward uses, and what it calls of the class."""
    found: set[str] = set()
    for code in _reached(cls):
        found |= {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    return frozenset(found)


def _reached(cls: type) -> list[CodeType]:
    """The code of a class's forward and of all methods and properties that it may call."""
    if not issubclass(cls, nn.Module):
        return []
    own = cls.__mro__[: cls.__mro__.index(nn.Module)]
    methods: dict[str, list[CodeType]] = {}
    for kind in own:
        if kind.__module__.startswith("torch.nn."):  # which read what is their own
            continue
        for name, value in vars(kind).items():
            methods.setdefault(name, []).extend(_codes(value))
    found, left = dict.fromkeys(methods.get("forward", [])), list(methods.get("forward", []))
    while left:
        code = left.pop()
        more = [c for name in code.co_names for c in methods.get(name, ())]
        more += [c for c in code.co_consts if isinstance(c, CodeType)]
        for inner in more:
            if inner not in found:
                found[inner] = None
                left.append(inner)
    return list(found)


def _codes(value: object) -> Iterator[CodeType]:
    """The code of a method, under whatever decorators, or of a property."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    seen: set[int] = set()
    left = [value]
    while left:
        function = left.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        yield function.__code__
        left.append(getattr(function, "__wrapped__", None))
        left += [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]


def _is_full(cell: object) -> bool:
    try:
        cell.cell_contents  # type: ignore[attr-defined]  # noqa: B018
    except ValueError:
        return False
    return True


def _names_read(code: CodeType) -> Iterator[str]:
    """What stands before ``.weight`` in code, where the numbers of the weight are asked for."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL")]
    for at, step in enumerate(steps):
        if step.argval != "weight" or not step.opname.startswith("LOAD_ATTR"):
            continue
        after = steps[at + 1] if at + 1 < len(steps) else None
        if after is not None and after.argval in _ABOUT and after.opname.startswith("LOAD_"):
            continue
        owner = at - 1
        if steps[owner].opname.startswith("BINARY_"):  # of a list
            owner -= 2
        if owner < 0 or not steps[owner].opname.startswith("LOAD_ATTR"):
            continue
        before = steps[owner - 2] if owner > 1 else None
        if before is not None and before.argval in _ASKERS:
            continue
        yield str(steps[owner].argval)
