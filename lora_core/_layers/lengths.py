"""The lengths of rows that DoRA needs, remembered until what they are made from changes."""

import weakref
from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_core import functional
from lora_core.kernels.norms import sum_dtype

_DIRECTION = ("lora_A", "lora_B", "lora_mid", "lora_A0", "lora_B0")  # what an update is made from
_ENOUGH = 2**15  # numbers that are compared in microseconds: a usual factor, or rows of a weight


class _Known:
    """A value, and what the tensors were that it was made from.

    A version alone would not do: it stays where a parameter is written to by way of its `.data`,
    as averages of weights do, and where `fully_shard` gathers it. So numbers are compared too, of
    a large tensor those of some rows. No tensor is referred to weakly, because a conversion that
    swaps a Parameter's contents refuses that; nor is memory kept from being freed, but its address
    is given to no other meanwhile.
    """

    value: Tensor

    def __init__(self, sources: Sequence[Tensor], gain: float) -> None:
        self._memory = [StorageWeakRef(t.untyped_storage()) for t in sources]  # type: ignore[no-untyped-call]
        self._states = [_state(t) for t in sources]
        self._numbers = [_some(t).clone() for t in sources]
        self._gain = gain

    def holds(self, sources: Sequence[Tensor], gain: float) -> bool:
        if gain != self._gain or self._states != [_state(t) for t in sources]:
            return False
        return all(map(torch.equal, self._numbers, map(_some, sources)))


def _state(t: Tensor) -> tuple[object, ...]:
    where = t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype
    return *where, t._version


def _some(t: Tensor) -> Tensor:
    return t.detach()[:: max(1, t.numel() // _ENOUGH)]


# layer -> adapter (or "" for the bare weight; of columns after a ".") -> its norms; no part of the
# layer's own state
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, _Known]] = weakref.WeakKeyDictionary()


def norm_of(
    layer: nn.Module,
    name: str,
    matrix: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float,
) -> Tensor:
    """The rows' norms of ``matrix + gain * lora_B @ lora_A``, a constant to autograd."""
    return _known(
        layer, name, name, gain, lambda: functional.dora_norm(matrix, lora_A, lora_B, gain)
    )


def _keys(layer: nn.Module, name: str) -> tuple[str, ...]:
    """The parameters that an adapter's weight is made from, of the bare weight where it is ""."""
    parts = layer.lora_state.configs[name].parts if name else ()  # type: ignore[union-attr, index]
    return ("weight", *(f"{part}_{name}" for part in _DIRECTION if part in parts))


def column_norm_of(
    layer: nn.Module, name: str, gain: Tensor | float, make: Callable[[], Tensor]
) -> Tensor:
    """The norms of what `make` gives over all dimensions but the second, a constant to autograd.

    Args:
        layer: The layer.
        name: The adapter in it, "" for the bare weight.
        gain: What its update is multiplied by.
        make: The weight, with the update of that adapter.
    """

    def norms() -> Tensor:
        weight = make()
        wide = weight.to(sum_dtype(weight.dtype))
        found: Tensor = torch.linalg.vector_norm(wide, dim=[d for d in range(wide.ndim) if d != 1])
        return found

    return _known(layer, f".{name}", name, gain, norms)


def forget(layer: nn.Module, name: str) -> None:
    """Lets go of an adapter's norms, and with the last of them of the weight's."""
    held = _KNOWN.get(layer)
    if held is None:
        return
    for key in (name, f".{name}"):
        held.pop(key, None)
    if held.keys() <= {"", "."}:
        _KNOWN.pop(layer, None)


def length_of(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The rows' norms of the bare matrix."""

    def make() -> Tensor:
        none = matrix.new_zeros(0)
        rank_0 = none.view(0, matrix.shape[1]), none.view(matrix.shape[0], 0)
        return functional.dora_norm(matrix, *rank_0)

    return _known(layer, "", "", 1.0, make)


def _known(
    layer: nn.Module,
    what: str,
    name: str,
    gain: Tensor | float,
    make: Callable[[], Tensor],
) -> Tensor:
    """What `make` gives, or gave for the same tensors; `what` it is, of adapter `name`."""
    traced = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
    # a graph must not guard on the settings, which the next file replaces by equal ones
    keys = () if traced else _keys(layer, name)
    sources = [p for p in map(layer._parameters.get, keys) if _is_watched(p)]
    if traced or len(sources) < len(keys) or isinstance(gain, Tensor):
        with torch.no_grad():
            return make().detach()
    held = _KNOWN.setdefault(layer, {})
    found = held.get(what)
    if found is not None and found.holds(sources, gain):
        return found.value
    # made in inference mode it could not be trained with
    with torch.inference_mode(mode=False), torch.no_grad():
        made = _Known(sources, gain)
        made.value = make().detach()
    # another thread may have changed a tensor meanwhile: then nobody knows what it is of
    if made.holds(sources, gain):
        held[what] = made
    return made.value


def _is_watched(p: Tensor | None) -> TypeGuard[Tensor]:
    """Whether this is a tensor that can be recognised when it comes again."""
    if p is None or type(p) not in (nn.Parameter, Tensor) or p.is_inference() or p.is_meta:
        return False
    return not (p.is_cuda and torch.cuda.is_current_stream_capturing())
