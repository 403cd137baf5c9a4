"""What a file of another program holds of a module, as an adapter of the model's own layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._config import AdapterConfig
from lora_core._errors import MismatchError
from lora_core._formats.fitting import fitted
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import Slot, kind_of, peek, sizes


def conformed(name: str, found: AdapterLayer, module: nn.Module | Slot, where: str) -> AdapterLayer:
    """A layer of a file as an adapter of this very module.

    Whole differences become two factors, one of them the identity, and an addition to the bias;
    values in place of the module's their difference from those, in float32 or wider. They come off
    again as any adapter does.

    Raises:
        MismatchError: If it doesn't fit the module.
    """
    kind = kind_of(module)
    weight = peek(module)
    # what is whole has the layout of the weight itself
    turned = found.config is not None and _is_transposed(module)
    found = fitted(name, found, weight.shape[::-1] if turned else weight.shape, kind.name, where)
    if found.config is None:
        found = _as_factors(found, module)
    if "lora_in_magnitude" in found.parts:
        _check_columns(name, found, module, where)
    if found.settings.bias and getattr(module, "bias", None) is None:
        raise MismatchError(
            f"The adapter of {name!a} in {where!r} must find a bias to add to, but the layer has"
            " none. Load it into the model it was made for."
        )
    return replace(found, kind=kind.name, path="", spelling="dotted", component="")


def apart(name: str, layer: AdapterLayer) -> dict[str, AdapterLayer]:
    """A whole difference of a module as one of each of its parameters, by their names.

    So it goes on a module that is no layer with a matrix, as one of normalisation.

    Args:
        name: The module's name.
        layer: The difference.
    """
    mark = "_" if layer.spelling == "stem" else "."
    path = f"{layer.path or name}{mark}"
    return {
        f"{name}{mark}{part}": replace(layer, parts={"weight": tensor}, path=f"{path}{part}")
        for part, tensor in layer.parts.items()
    }


def changed(layer: AdapterLayer, module: nn.Module | Slot) -> AdapterLayer | None:
    """Values without those that are the module's own; None where they all are.

    Beside factors a program may write what it found there.
    """
    if layer.kind != "values":
        return layer
    parts = {}
    for part, values in layer.parts.items():
        own: Tensor | None = getattr(module, part, None)
        same = own is not None and own.shape == values.shape
        if not same or not torch.equal(own.detach().to("cpu", values.dtype), values):  # type: ignore[union-attr]
            parts[part] = values
    return replace(layer, parts=parts) if parts else None


def joined(name: str, factors: AdapterLayer, addition: AdapterLayer, where: str) -> AdapterLayer:
    """Factors, and an addition to the same module's bias that a file keeps apart from them.

    Raises:
        MismatchError: If the second is more than that.
    """
    if addition.settings.alpha or factors.settings.bias:
        raise MismatchError(
            f"A module of {where!r} must have factors or a whole weight, but {name!a} has both,"
            " which are no low-rank update. Merge it with the program that wrote it."
        )
    parts = {**factors.parts, "lora_bias": addition.parts["lora_bias"]}
    return replace(factors, config=replace(factors.settings, bias=True), parts=parts)


def _is_transposed(module: nn.Module | Slot) -> bool:
    """Whether a layer of the linear kind stores its matrix (in, out)."""
    weight = peek(module)
    kind = kind_of(module)
    return kind.name == "linear" and kind.matrix(weight) is not weight


def _check_columns(name: str, found: AdapterLayer, module: nn.Module | Slot, where: str) -> None:
    """Refuses lengths of columns where input features are no columns."""
    if found.kind not in ("linear", "conv") or _is_transposed(module) or _groups(module) > 1:
        raise MismatchError(
            f"Lengths of columns must be of a plain linear layer or convolution, but {where!r} has"
            f" them for {name!a}, which is another. Merge it with the program that wrote it."
        )


def _groups(module: nn.Module | Slot) -> int:
    return int(getattr(module, "groups", 1))


def _as_factors(found: AdapterLayer, module: nn.Module | Slot) -> AdapterLayer:
    """A difference, or values in place of the module's, as factors of full rank and a bias."""
    changes = {
        part: p.to(torch.promote_types(p.dtype, torch.float32)) for part, p in found.parts.items()
    }
    if found.kind == "values":
        own: Mapping[str, Any] = {part: getattr(module, part) for part in changes}
        changes = {part: p - own[part].detach().to("cpu", p.dtype) for part, p in changes.items()}
    weight, bias = changes.get("weight"), changes.get("bias")
    parts = _factors(weight, module) if weight is not None else _none(module, bias)
    kind, like = kind_of(module), parts["lora_A"]
    rank = like.shape[kind.rank_dims[0]]
    config = AdapterConfig(
        rank=rank,
        # a bias alone leaves the matrix as it is
        alpha=0.0 if weight is None else float(rank),
        dropout=0.0,
        dtype=like.dtype,
        bias=bias is not None,
    )
    if bias is not None:
        parts["lora_bias"] = bias.to(like.dtype)
    return replace(found, config=config, parts=parts, alpha_from="none: a whole difference")


def _factors(weight: Tensor, module: nn.Module | Slot) -> dict[str, Tensor]:
    kind = kind_of(module)
    matrix = kind.matrix(weight)
    size, out = sizes(module)
    identity = torch.eye(min(size, out), dtype=matrix.dtype).expand(*matrix.shape[:-2], -1, -1)
    lora_A, lora_B = (identity, matrix) if size < out else (matrix, identity)
    return _shaped({"lora_A": lora_A.contiguous(), "lora_B": lora_B.contiguous()}, module)


def _none(module: nn.Module | Slot, like: Tensor | None) -> dict[str, Tensor]:
    """Factors that add nothing."""
    assert like is not None
    size, out = sizes(module)
    return _shaped({"lora_A": like.new_zeros(1, size), "lora_B": like.new_zeros(out, 1)}, module)


def _shaped(parts: dict[str, Tensor], module: nn.Module | Slot) -> dict[str, Tensor]:
    """Matrices in the shapes that the module's own factors have."""
    kind, weight = kind_of(module), peek(module)
    if kind.own_layout:
        like = parts["lora_A"]
        rank = like.shape[0]
        config = AdapterConfig(rank=rank, alpha=float(rank), dropout=0.0, dtype=like.dtype)
        shapes = kind.fitting(tuple(weight.shape), config)
        return {part: kind.laid_out(part, t, shapes[part]) for part, t in parts.items()}
    if kind.name != "conv":
        return parts
    _, size, *kernel = weight.shape
    lora_A, lora_B = parts["lora_A"], parts["lora_B"]
    return {
        "lora_A": lora_A.reshape(-1, size, *kernel),
        "lora_B": lora_B.reshape(*lora_B.shape, *[1] * len(kernel)),
    }
