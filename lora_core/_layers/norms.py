"""The row norms that a DoRA adapter needs, remembered until what they are made from changes."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_core import functional


class _Known:
    """A value, and the tensors that it was made from as they were then."""

    def __init__(self, sources: tuple[Tensor, ...], gain: float, value: Tensor) -> None:
        self._sources = [(weakref.ref(t), t._version) for t in sources]
        self._lora_gain, self.value = gain, value

    def holds(self, sources: tuple[Tensor, ...], gain: float) -> bool:
        now = zip(self._sources, sources, strict=False)
        return gain == self._lora_gain and all(r() is t and v == t._version for (r, v), t in now)


# layer -> adapter (or "" for the bare weight) -> its norms; no part of the layer's own state
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
    keys = ("weight", f"lora_A_{name}", f"lora_B_{name}")
    return _known(
        layer, name, keys, gain, lambda: functional.dora_norm(matrix, lora_A, lora_B, gain)
    )


def length_of(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The rows' norms of the bare matrix."""

    def make() -> Tensor:
        none = matrix.new_zeros(0)
        rank_0 = none.view(0, matrix.shape[1]), none.view(matrix.shape[0], 0)
        return functional.dora_norm(matrix, *rank_0)

    return _known(layer, "", ("weight",), 1.0, make)


def _known(
    layer: nn.Module,
    name: str,
    keys: tuple[str, ...],
    gain: Tensor | float,
    make: Callable[[], Tensor],
) -> Tensor:
    sources = [layer._parameters.get(key) for key in keys]
    number = None if isinstance(gain, Tensor) else gain
    traced = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
    if traced or number is None or any(p is None or p.is_inference() for p in sources):
        with torch.no_grad():
            return make().detach()
    held = _KNOWN.setdefault(layer, {})
    found = held.get(name)
    if found is None or not found.holds(tuple(sources), number):  # type: ignore[arg-type]
        # made in inference mode it could not be trained with
        with torch.inference_mode(mode=False), torch.no_grad():
            found = held[name] = _Known(tuple(sources), number, make().detach())  # type: ignore[arg-type]
    return found.value
