"""Whether a file's layer fits a module's weight, and its parts in the shapes that it has there.

Files disagree about trailing ones (a 1x1 convolution is a matrix to some) and flatten kernels;
none of that changes a number. What can't be meant for the weight is refused, never guessed at.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from lora_core._errors import MismatchError
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import kind_named


def fitted(
    name: str, layer: AdapterLayer, shape: Sequence[int], kind: str = "", where: str = ""
) -> AdapterLayer:
    """The layer as a module with a weight of this shape carries it.

    Args:
        name: The module, for messages.
        layer: What the file has for it.
        shape: The weight's shape, ``(out, in, ...)``, of an embedding ``(entries, dim)``.
        kind: "linear", "conv", "embedding" or "weight"; "" tells it by the shape.
        where: The file, for messages.

    Returns:
        The layer, its kind and its parts those of the module.

    Raises:
        MismatchError: If it doesn't fit; the message has the module and both shapes.
    """
    shape = tuple(shape)
    if layer.config is None:
        return _whole(name, layer, shape, where, kind)
    if len(shape) == 1 and kind == "weight":
        shape = (1, *shape)  # a vector is a row
    if len(shape) < 2:
        _refuse(name, layer, shape, kind, where)
    if not kind:
        flat = "embedding" if layer.kind == "embedding" else "linear"
        kind = "conv" if len(shape) > 2 and layer.kind != "weight" else flat
    own = kind_named(kind if kind_named(layer.kind) is kind_named("matrix") else layer.kind)
    if own.own_layout:
        wanted = own.fitting(shape, layer.settings)
        held = {part: tuple(t.shape) for part, t in layer.parts.items()}
        wanted.pop("lora_bias", None)  # the number of groups, which no weight tells, decides it
        held.pop("lora_bias", None)
        if held != wanted:
            _refuse(name, layer, shape, kind, where)
        return replace(layer, kind=own.name)
    parts = dict(layer.parts)
    if kind == "embedding" or (kind != "conv" and len(shape) == 2):
        outs, ins = (*shape[::-1],) if kind == "embedding" else shape
        parts |= {part: _flat(t) for part, t in parts.items() if t.ndim > 2}
        lead: tuple[int, ...] = ()
    elif kind == "conv":
        (outs, ins), lead = shape[:2], ()
        layer = _as_kernels(layer, shape)
        parts = dict(layer.parts)
    else:
        *stacked, outs, ins = shape
        lead = tuple(stacked)
    config = layer.settings
    kernel = shape[2:] if kind == "conv" else ()
    ones = (1,) * len(kernel)
    down = (config.rank, ins, *(ones if config.tucker else kernel))
    rows = (*lead, outs)
    expected = {
        "lora_A": (*lead, *down),
        "lora_B": (*rows, config.rank, *ones),
        "lora_A0": (*lead, *down),
        "lora_B0": (*rows, config.rank, *ones),
        "lora_mid": (config.rank, config.rank, *kernel),
        "lora_magnitude": rows,
        "lora_bias": rows,
        "lora_in_magnitude": (ins,),
    }
    fits = all(tuple(t.shape) == expected.get(part) for part, t in parts.items())
    if not fits or (layer.kind == "embedding") > (kind == "embedding"):
        _refuse(name, layer, shape, kind, where)
    return replace(layer, kind=kind, parts=parts)


def _whole(
    name: str, layer: AdapterLayer, shape: tuple[int, ...], where: str, kind: str
) -> AdapterLayer:
    """A difference or values: ones at the end of a shape say nothing."""
    parts = dict(layer.parts)
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is not None and _bare(weight.shape) == _bare(shape):
        weight = parts["weight"] = weight.reshape(shape)
    # a matrix may be stored (in, out)
    outs = {shape[:1], shape[-1:]} if len(shape) == 2 else {shape[:1]}
    if kind and kind_named(kind).out_dim:  # the layer's own bias says how many groups there are
        outs = {tuple(bias.shape)} if bias is not None and bias.ndim == 1 else set()
    if (weight is not None and tuple(weight.shape) != shape) or (
        bias is not None and tuple(bias.shape) not in outs
    ):
        _refuse(name, layer, shape, "", where)
    return replace(layer, parts=parts)


def _as_kernels(layer: AdapterLayer, shape: tuple[int, ...]) -> AdapterLayer:
    """Two matrices as kernels, where that is the same product."""
    down, up = layer.parts["lora_A"], layer.parts["lora_B"]
    if down.ndim != 2 or up.ndim != 2:
        return layer
    (outs, ins), kernel = shape[:2], shape[2:]
    ones = [1] * len(kernel)
    if down.shape[1] == ins * math.prod(kernel):  # minLoRA, and any 1x1 convolution
        parts = {
            **layer.parts,
            "lora_A": down.reshape(-1, ins, *kernel),
            "lora_B": up.reshape(*up.shape, *ones),
        }
        return replace(layer, parts=parts)
    size, plain = kernel[0], set(layer.parts) == {"lora_A", "lora_B"}
    of_loralib = (down.shape[1], up.shape[0]) == (ins * size, outs * size)
    if of_loralib and plain and kernel == (size, size) and not down.shape[0] % size:
        return _from_loralib(layer, shape)
    return layer


def _from_loralib(layer: AdapterLayer, shape: tuple[int, ...]) -> AdapterLayer:
    """Loralib sees ``B @ A`` as the kernel, number after number.

    A row of the kernel is then several rows of the product, one after the other: a plain update of
    so many times the rank.

    Shape:
        - lora_A: ``(rank * k, in * k)``; lora_B: ``(out * k, rank * k)``
        - Output: ``(rank * k * k, in, k, k)``, ``(out, rank * k * k, 1, 1)``
    """
    down, up, config = layer.parts["lora_A"], layer.parts["lora_B"], layer.settings
    (outs, ins), kernel = shape[:2], shape[2:]
    size = kernel[0]  # rows of the product in one of the kernel
    blocks = torch.block_diag(*[down] * size)  # type: ignore[no-untyped-call]
    rank = size * down.shape[0]
    parts = {
        "lora_A": blocks.reshape(rank, ins, *kernel),
        "lora_B": up.reshape(outs, rank, *[1] * len(kernel)),
    }
    # alpha is divided by its own rank, which is that of the file's factors without the kernel
    alpha = config.alpha * size * size
    return replace(layer, kind="conv", config=replace(config, rank=rank, alpha=alpha), parts=parts)


def _flat(factor: Tensor) -> Tensor:
    return factor.flatten(1) if factor.shape[2:].numel() == 1 else factor


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _refuse(
    name: str, layer: AdapterLayer, shape: tuple[int, ...], kind: str, where: str
) -> NoReturn:
    has = ", ".join(f"{part} {tuple(t.shape)}" for part, t in layer.parts.items())
    source = f" in {where!r}" if where else ""
    what = f" of kind {kind!r}" if kind else ""
    pointwise = kind == "conv" and layer.parts["lora_A"].shape[2:].numel() == 1
    hint = (
        " A 1x1 down-projection needs a `lora_mid` on a larger kernel."
        if pointwise and math.prod(shape[2:]) > 1 and "lora_mid" not in layer.parts
        else " Load it into the model it was made for."
    )
    raise MismatchError(
        f"The adapter of {name!a}{source} must fit a weight{what} of shape {shape}, but has"
        f" {has}.{hint}"
    )
