"""What a layer of the neutral form adds to a weight, as one dense tensor."""

import torch
from torch import Tensor

from lora_core import functional
from lora_core._formats.fitting import fitted
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import kind_named


def dense_delta(
    name: str,
    layer: AdapterLayer,
    weight: Tensor,
    *,
    kind: str = "",
    transposed: bool | None = None,
    strength: float = 1.0,
) -> Tensor:
    """What the adapted weight is more than `weight`, in float32 or wider.

    ``strength * scale * B @ A``, with the core of a Tucker form in A; under DoRA the difference
    that giving each row (or column) its length makes, the length going from its own to the trained
    one as `strength` goes from 0 to 1, as in `functional.dora_ratio`.

    Args:
        name: The module, for messages.
        layer: What a file has for it.
        weight: The module's weight.
        kind: "linear", "conv", "embedding" or "weight"; "" tells it by the shapes.
        transposed: Whether the weight is stored ``(in, out)``, as GPT-2's Conv1D has it; None
            goes by what the file says, where that fits.
        strength: What the adapter is multiplied by.

    Shape:
        - weight, Output: alike

    Raises:
        MismatchError: If the layer doesn't fit the weight.

    Example:
        >>> from lora_core._config import AdapterConfig
        >>> parts = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(5, 2)}
        >>> layer = AdapterLayer("matrix", AdapterConfig(2, 4.0, 0.0, torch.float32), parts)
        >>> dense_delta("fc", layer, torch.zeros(5, 3)).unique().item()
        4.0
    """
    if transposed is None:
        transposed = layer.transposed and weight.shape == (
            layer.parts["lora_A"].shape[1],
            layer.parts["lora_B"].shape[0],
        )
    matrix = weight.T if transposed else weight
    layer = fitted(name, layer, matrix.shape, kind)
    turned = layer.kind == "embedding"
    matrix = matrix.T if turned else matrix
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for tensor in layer.parts.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    base, parts = matrix.to(dtype), {part: t.to(dtype) for part, t in layer.parts.items()}
    if layer.config is None:
        delta = parts.get("weight")
        if delta is None:
            return torch.zeros_like(base)
        return strength * (delta - base if layer.kind == "values" else delta)
    kind_of_layer = kind_named(layer.kind)
    delta = _product(layer, parts, layer.config.scale * strength)
    if kind_of_layer.own_layout:
        delta = kind_of_layer.like_weight(delta, base)
    delta = delta.reshape(base.shape)
    for part, axis in (("lora_magnitude", 0), ("lora_in_magnitude", 1)):
        if part in parts:
            delta = _stretched(base, delta, parts[part], axis, strength)
    return delta.T if turned is not transposed else delta


def bias_delta(layer: AdapterLayer, bias: Tensor | None, *, strength: float = 1.0) -> Tensor | None:
    """What the adapted bias is more than `bias`, in float32 or wider; None where it stays.

    Shape:
        - bias, Output: ``(out,)``; no bias is one of zeros
    """
    ours = layer.parts.get("lora_bias" if layer.config is not None else "bias")
    if ours is None:
        return None
    ours = ours.to(torch.promote_types(ours.dtype, torch.float32))
    if layer.kind == "values" and bias is not None:
        ours = ours - bias.to(ours.dtype)
    return ours * strength


def _product(layer: AdapterLayer, parts: dict[str, Tensor], gain: float) -> Tensor:
    """The plain update as a matrix, or a stack of them."""
    down, up = parts["lora_A"], parts["lora_B"]
    if "lora_mid" in parts:
        down = functional.tucker_down(down, parts["lora_mid"])
    kind = kind_named(layer.kind)
    flat = layer.kind == "conv" or kind.own_layout
    product = functional.lora_delta(*(kind.as_matrices(down, up) if flat else (down, up)), gain)
    if "lora_A0" in parts:  # what it began with, subtracted on the fly
        first = parts["lora_A0"], parts["lora_B0"]
        product -= functional.lora_delta(*(kind.as_matrices(*first) if flat else first), gain)
    return product


def _stretched(
    base: Tensor, delta: Tensor, magnitude: Tensor, axis: int, strength: float
) -> Tensor:
    """The update with which the rows along an axis get their lengths."""
    both = base + delta
    others = [n for n in range(base.ndim) if n != axis]
    own, norm = (torch.linalg.vector_norm(t, dim=others) for t in (base, both))
    ratio = functional.dora_ratio(magnitude, own, norm, strength)
    return both * ratio.reshape([-1 if n == axis else 1 for n in range(base.ndim)]) - base
