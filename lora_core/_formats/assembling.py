"""One module's tensors, whatever the format, into an `AdapterLayer`: halves, ranks, axes."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_core._config import AdapterConfig
from lora_core._errors import CorruptFileError
from lora_core._formats.keys import Key
from lora_core._formats.native import DTYPES
from lora_core._formats.neutral import AdapterLayer

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)
Shape = tuple[int, ...]


@dataclass(slots=True)
class Module:
    """What a file has of one module.

    Attributes:
        key: The first of its keys.
        parts: Its tensors by leaf.
        families: The grammars that its keys follow.
    """

    key: Key
    parts: dict[str, Tensor] = field(default_factory=dict)
    families: set[str] = field(default_factory=set)


def wide(name: str, tensor: Tensor, where: str) -> Tensor:
    """A floating tensor of 16 bits or more: float8 has no arithmetic."""
    if tensor.dtype in FLOAT8:
        return tensor.to(torch.float32)
    if tensor.dtype not in DTYPES:
        raise CorruptFileError(
            f"The factors of {where!r} must be floating numbers, but {name!a} has {tensor.dtype}."
            " Fetch or save the file again."
        )
    return tensor


def number(name: str, tensor: Tensor, where: str) -> float:
    """An alpha or a scale: one number, of any kind."""
    value = tensor.double().item() if tensor.numel() == 1 and not tensor.is_complex() else math.nan
    if not math.isfinite(value):
        has = value if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise CorruptFileError(
            f"An alpha of {where!r} must be one finite number, but that of {name!a} is {has}."
            " Fetch or save the file again."
        )
    return value


def paired(name: str, parts: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """The two factors of a module, with as many dimensions each, their ranks alike.

    Raises:
        CorruptFileError: If they are no such pair.
    """
    halves = [half for half in ("down", "up") if half in parts]
    if len(halves) < 2:
        has = f"has only the {halves[0]} factor" if halves else f"has only {' and '.join(parts)}"
        raise CorruptFileError(
            f"Every module of {where!r} must have both factors, but {name!a} {has}. Fetch or save"
            " the file again."
        )
    down, up = (wide(name, parts[half], where) for half in halves)
    shapes = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
    if min(down.ndim, up.ndim) < 2 or (not down.numel() * up.numel() and down.shape[0]):
        raise CorruptFileError(
            f"Every factor of {where!r} must be a matrix or a kernel with numbers in it, but"
            f" {name!a} has {shapes}: shards that were never gathered look so. Save it again,"
            " whole."
        )
    if up.ndim > 2 and up.shape[2:].numel() == 1:
        up = up.flatten(1)
    if up.ndim != 2 or down.shape[0] != up.shape[1]:
        hint = (
            " They look transposed."
            if up.ndim == down.ndim == 2
            and down.shape[1] == up.shape[0] < min(down.shape[0], up.shape[1])
            else " Fetch or save the file again."
        )
        raise CorruptFileError(
            f"The factors of {name!a} in {where!r} must be (rank, in, ...) and (out, rank), but"
            f" are {shapes}.{hint}"
        )
    dtype = torch.promote_types(down.dtype, up.dtype)
    return down.to(dtype), up.reshape(*up.shape, *[1] * (down.ndim - 2)).to(dtype)


def layer(
    module: Module,
    pair: tuple[Tensor, Tensor],
    alpha: tuple[float, str],
    where: str,
    *,
    rslora: bool = False,
    embedding: bool = False,
    transposed: bool = False,
) -> AdapterLayer:
    """The layer that these factors and the module's other tensors make.

    Raises:
        CorruptFileError: If a tensor doesn't fit the factors.
    """
    name, (down, up) = module.key.module, pair
    rank = down.shape[0]
    parts = {"lora_A": down, "lora_B": up}
    if "mid" in module.parts:
        parts |= _tucker(name, down, up, wide(name, module.parts["mid"], where), where)
    if "dora_scale" in module.parts:
        scale = wide(name, module.parts["dora_scale"], where)
        parts |= _dora(name, scale, up.shape[0], down.shape[1], where)
    if "magnitude" in module.parts:
        scale = wide(name, module.parts["magnitude"], where)
        _check_length(name, "magnitude", scale, up.shape[0], where)
        parts["lora_magnitude"] = scale.reshape(-1)
    config = AdapterConfig(
        rank=rank,
        alpha=alpha[0],
        dropout=0.0,
        dtype=down.dtype,
        rslora=rslora,
        dora=not parts.keys().isdisjoint(("lora_magnitude", "lora_in_magnitude")),
        dora_in="lora_in_magnitude" in parts,
        bias="bias" in module.parts,
        tucker="lora_mid" in parts,
    )
    if config.bias:
        bias = wide(name, module.parts["bias"], where)
        _check_length(name, "bias", bias, up.shape[0], where)
        # it stands inside the update, whose scale it has; ours is added as it is
        parts["lora_bias"] = (bias.reshape(-1).double() * config.scale).to(bias.dtype)
    key = module.key
    kind = "embedding" if embedding else "matrix" if parts["lora_A"].ndim == 2 else "conv"
    return AdapterLayer(
        kind,
        config,
        {part: tensor.contiguous() for part, tensor in parts.items()},
        component=key.component,
        path=key.path,
        spelling=key.spelling,
        alpha_from=alpha[1],
        transposed=transposed and kind == "matrix",
    )


def whole(module: Module, kind: str, name: str, where: str) -> AdapterLayer:
    """A difference, or values, of a module's parameters."""
    key = module.key
    parts = {leaf: wide(key.module, t, where) for leaf, t in module.parts.items()}
    # of one dtype, as factors are: what is beyond the narrower one must not become infinite
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in parts.values()))
    parts = {leaf: t.to(dtype) for leaf, t in parts.items()}
    path = key.path or ("" if name == key.module else key.module)
    return AdapterLayer(
        kind, None, parts, component=key.component, path=path, spelling=key.spelling, alpha_from=""
    )


def _tucker(name: str, down: Tensor, up: Tensor, mid: Tensor, where: str) -> dict[str, Tensor]:
    rank, kernel = down.shape[0], mid.shape[2:]
    if mid.ndim < 3 or mid.shape[:2] != (rank, rank) or down.shape[2:].numel() != 1:
        raise CorruptFileError(
            f"The middle factor of {name!a} in {where!r} must be ({rank}, {rank}, ...) between two"
            f" of 1x1, but is {tuple(mid.shape)} with down {tuple(down.shape)}. Fetch or save the"
            " file again."
        )
    ones = [1] * len(kernel)
    return {
        "lora_A": down.reshape(*down.shape[:2], *ones),
        "lora_B": up.reshape(*up.shape[:2], *ones),
        "lora_mid": mid.to(down.dtype),
    }


def _dora(name: str, scale: Tensor, outs: int, ins: int, where: str) -> dict[str, Tensor]:
    """Which axis the lengths are of is told by their shape alone, the outputs first."""
    shape = tuple(scale.shape)
    if scale.ndim and scale.numel() == outs == shape[0]:
        return {"lora_magnitude": scale.reshape(-1)}
    if scale.ndim and scale.numel() == ins and ins in shape[:2] and shape[0] in (1, ins):
        return {"lora_in_magnitude": scale.reshape(-1)}
    raise CorruptFileError(
        f"The `dora_scale` of {name!a} in {where!r} must be ({outs}, 1, ...) or (1, {ins}, ...),"
        f" but is {shape}. Fetch or save the file again."
    )


def _check_length(name: str, what: str, values: Tensor, length: int, where: str) -> None:
    if values.numel() != length or max(values.shape, default=0) != length:
        raise CorruptFileError(
            f"The {what} of {name!a} in {where!r} must have one number for each of {length}"
            f" outputs, but is {tuple(values.shape)}. Fetch or save the file again."
        )
