"""Whether an update may stand beside what a layer gives, by its class or by trying."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._errors import listed
from lora_core._layers.kind import KINDS, computes_as_torch, host_kind, peek
from lora_core.kernels.norms import sum_dtype

_LARGEST = 2**24  # numbers of a weight on the meta device for which others are drawn to try


def why_read(module: nn.Module) -> str:
    """Why an update can't stand beside the output of a layer; "" where it can.

    A class that computes as torch's own needs no look. Others are tried: by how much the output
    moves from a weight of zeros to the layer's own must be what torch's forward makes of it. A
    weight that is no plain numbers, as with 4 bits, is known to its host alone, and left to it.
    """
    cls: Any = type(module)
    kind = host_kind(cls)
    if kind is None or computes_as_torch(cls):
        return ""
    own = module._parameters.get("weight")
    plain = type(own) is nn.Parameter and own.is_floating_point() and own.dtype.itemsize > 1
    if own is None or not plain:
        return ""
    said = f"the forward of {cls.__name__}"
    if own.is_meta and own.numel() > _LARGEST:
        return f"{said} can't be tried on the meta device"
    if options(cls.forward):
        return f"{said} takes {listed(options(cls.forward))} beside its input"
    # in a type that tells a small difference from rounding, where the host takes it
    for dtype in dict.fromkeys((sum_dtype(own.dtype), own.dtype)):
        try:
            different = _difference(module, cls, kind, dtype)
        except Exception:  # noqa: BLE001, S112  # whatever a host's own forward raises
            continue
        return different and f"{said} {different}"
    return f"{said} can't be tried with an input alone"


def _difference(
    module: nn.Module, cls: type[nn.Module], kind: type[nn.Module], dtype: torch.dtype
) -> str:
    """What a class does with a layer's weight that torch's own does not; "" if nothing."""
    for training in (False, True):
        moved = _moved(module, cls, kind, dtype, training=training)
        asked = _moved(module, kind, kind, dtype, training=training)
        if moved is None or asked is None or moved.shape != asked.shape:
            return "gives something else than torch's"
        bound = 64 * torch.finfo(dtype).eps * float(asked.norm())
        if not bool((moved - asked).norm() <= bound):
            return "does more with the weight than torch's" + " in training" * training
    return ""


def options(forward: Callable[..., Any]) -> list[str]:
    """What a forward takes beside its input, which is its first argument."""
    taken = list(inspect.signature(forward).parameters.values())
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [str(p) for i, p in enumerate(taken) if i > 1 or p.kind not in plain]


def _moved(
    module: nn.Module,
    cls: type[nn.Module],
    kind: type[nn.Module],
    dtype: torch.dtype,
    *,
    training: bool,
) -> Tensor | None:
    """What a forward gives with a layer's weight less what it gives with zeros; None if no tensor.

    Args:
        module: The layer.
        cls: The class whose forward it is.
        kind: The layer's kind.
        dtype: What is computed in.
        training: The mode in which it is tried.
    """
    own = peek(module)
    if own.is_meta:
        generator = torch.Generator("cpu").manual_seed(0)
        own = torch.randn(own.shape, generator=generator).to(own.dtype)
    zeros = own.new_zeros(()).expand(own.shape)
    given: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[own.device] if own.is_cuda else []):
        for weight in (own, zeros):
            # a forward may write to what it computes with
            twin = nn.Module.to(_twin(module, cls, weight.clone()), dtype).train(training)
            x = KINDS[kind].probe(twin, torch.Generator("cpu").manual_seed(0))
            torch.manual_seed(0)
            out: Any = cls.forward(twin, x)
            if not isinstance(out, Tensor):
                return None
            given.append(out.double())
    return given[0] - given[1]


def _twin(module: nn.Module, cls: type[nn.Module], weight: Tensor) -> nn.Module:
    """An object of a class that is like a layer, with a weight of its own and no hooks."""
    twin = cls.__new__(cls)
    own = vars(module)
    parameters = {
        name: None
        if p is None
        else nn.Parameter(torch.zeros_like(p, device="cpu"), False)
        if p.is_meta
        else nn.Parameter(p.detach().clone(), False)
        for name, p in module._parameters.items()
        if name != "weight"
    }
    parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    held = {
        key: value.clone() if isinstance(value, Tensor) else copy.copy(value)
        for key, value in own.items()
        if isinstance(value, Tensor | list | dict | set)
    }
    inside = copy.deepcopy(module._modules)
    vars(twin).update({**own, **held}, _parameters=parameters, _buffers=buffers, _modules=inside)
    return twin
