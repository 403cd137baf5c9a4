"""One layer of an adapter as a product of matrices, and such a product as a layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._algebra.spectrum import is_finite
from lora_core._config import DROPOUTS, AdapterConfig
from lora_core._errors import ConfigError, MismatchError, UnsupportedLayerError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._layers import kind_named, may_be_one, non_finite


def check_adapter(what: str, adapter: object) -> Adapter:
    """Returns `adapter` if it is one outside any model, of finite numbers."""
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"`{what}` must be an Adapter, but is {type(adapter).__name__}. Read the file first."
        )
    held = {name: list(layer.parts.values()) for name, layer in adapter.layers.items()}
    with torch.no_grad():
        norm = nn.utils.get_total_norm([t for parts in held.values() for t in parts])
    # one pass without a copy; it may overflow where no number does
    bad = [] if bool(norm.isfinite()) else non_finite(held)
    if bad:
        raise ConfigError(
            f"`{what}` must be finite, but {listed(bad)} of {adapter.name!r} holds NaN or infinity."
            " Go back to an earlier state."
        )
    return adapter


def check_seed(seed: object) -> int:
    """Returns `seed` if torch's generators take it."""
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if not whole or not -(2**63) <= seed < 2**64:  # type: ignore[operator]
        raise ConfigError(
            f"`seed` must be a whole number from -2**63 to 2**64 - 1, but is {seed!r}."
        )
    return seed  # type: ignore[return-value]


def check_result(name: str, layer: AdapterLayer, error: float) -> None:
    """Refuses a new layer with numbers that its type, or the work on it, can't hold."""
    over = [part.dtype for part in layer.parts.values() if not is_finite(part)]
    if not over and math.isfinite(error):
        return
    dtype = over[0] if over else next(iter(layer.parts.values())).dtype
    repair = (
        "Choose torch.bfloat16 or torch.float32, or smaller weights."
        if dtype == torch.float16
        else "Use smaller weights."
    )
    raise ConfigError(
        f"`dtype` must hold all numbers of the result, but {name!r} overflows {dtype}. {repair}"
    )


def is_factored(layer: AdapterLayer) -> bool:
    """Whether a layer is factors, and no plain difference or value."""
    return layer.config is not None


def is_read(layer: AdapterLayer) -> bool:
    """Whether a layer is factors of a parameter that is read."""
    return is_factored(layer) and kind_named(layer.kind).is_read


def may_be_turned(layer: AdapterLayer) -> bool:
    """Whether a layer is factors of a matrix that some models store ``(in, out)``."""
    return is_factored(layer) and kind_named(layer.kind).may_be_turned


def is_linear(layer: AdapterLayer) -> bool:
    """Whether twice the adapter is twice the change: a product of factors, and perhaps a bias."""
    magnitudes = any(part.startswith("lora_magnitude") for part in layer.parts)
    return is_factored(layer) and not layer.settings.dora and not magnitudes


def refuse_nonlinear(name: str, layer: AdapterLayer, what: str) -> None:
    """Raises unless a layer is a product of factors, and perhaps a bias."""
    if is_linear(layer):
        return
    found = (
        "has DoRA's lengths of rows, with which a part of the update is no part of the change"
        if is_factored(layer)
        else f"is of the kind {layer.kind!r}"
    )
    raise UnsupportedLayerError(
        f"A layer must be a plain product of factors to be {what}, but {name!r} {found}. Merge the"
        " adapter into its base, and `extract` a plain one from that."
    )


def matrices(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """The factors without the scale, as matrices; plain ones as they are stored.

    A Tucker core is expanded and first factors are subtracted, in float32 or wider.

    Shape:
        - Output: ``(..., R, in)`` and ``(..., out, R)``
    """
    kind = kind_named(layer.kind)
    config, parts = layer.settings, layer.parts
    lora_A, lora_B = parts["lora_A"], parts["lora_B"]
    if config.tucker:
        lora_A = functional.tucker_down(widened(lora_A), widened(parts["lora_mid"]))
    if config.subtracted:
        lora_A, lora_B = kind.subtracted(
            *(widened(f) for f in (lora_A, lora_B, parts["lora_A0"], parts["lora_B0"]))
        )
    return kind.as_matrices(lora_A, lora_B)


def scaled(layer: AdapterLayer, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """The factors as wide matrices whose product is `weight` times the update."""
    lora_A, lora_B = map(widened, matrices(layer))
    return lora_A, lora_B * (weight * layer.settings.scale)


def widened(values: Tensor) -> Tensor:
    """Values in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def norm_of(layer: AdapterLayer) -> float | None:
    """The norm of a layer's update, from its factors alone; None where it replaces the weight."""
    if layer.config is not None:
        lora_A, lora_B = (factor.double() for factor in scaled(layer))
        # ``tr(A A' B' B)``: a sum of squares, so that nothing cancels
        return float((lora_A @ lora_A.mT * (lora_B.mT @ lora_B).mT).sum().clamp(min=0).sqrt())
    if layer.kind == "values":
        return None
    return math.hypot(*(float(widened(part).double().norm()) for part in layer.parts.values()))


def form_of(layer: AdapterLayer) -> str:
    """What kind of update a layer is, in words."""
    return layer.kind if layer.config is None else layer.config.form


def parts_of(layer: AdapterLayer) -> Mapping[str, Tensor]:
    """The tensors of a layer that are no factors."""
    factors = ("lora_A", "lora_B", "lora_mid", "lora_A0", "lora_B0")
    return {part: tensor for part, tensor in layer.parts.items() if part not in factors}


def sizes(layer: AdapterLayer) -> tuple[int, ...]:
    """``(..., out, in)`` of the update as a matrix."""
    lora_A, lora_B = matrices(layer)
    return (*lora_A.shape[:-2], lora_B.shape[-2], lora_A.shape[-1])


def compatible(name: str, layers: Sequence[AdapterLayer]) -> AdapterLayer:
    """The layer that says the most of what all of these, of one name, are for.

    Raises:
        MismatchError: If they are for layers of different kinds or sizes.
    """
    first, *others = sorted(layers, key=lambda layer: layer.kind == "matrix")
    for layer in others:
        alike = may_be_one(first.kind, layer.kind) and sizes(first) == sizes(layer)
        if not alike or kernel_of(first) != kernel_of(layer):
            refuse_unlike(name, first, layer)
    return first


def refuse_unlike(name: str, one: AdapterLayer, other: AdapterLayer) -> NoReturn:
    """Raises, of two layers of one name that can't be for the same."""
    raise MismatchError(
        f"Adapters must be for the same layers, but {name!r} is {_described(one)} in one and"
        f" {_described(other)} in another. Combine adapters of one model."
    )


def _described(layer: AdapterLayer) -> str:
    shapes = ", ".join(f"{part} {tuple(p.shape)}" for part, p in list(layer.parts.items())[:2])
    return f"of the kind {layer.kind!r} with {shapes}"


def kernel_of(layer: AdapterLayer) -> tuple[int, ...]:
    """The sizes in which layers of equal `sizes` differ, as of 3x1 and 1x3; () where none do."""
    return kind_named(layer.kind).kernel(layer.parts)


def rebuilt(
    like: AdapterLayer,
    factors: tuple[Tensor, Tensor],
    alpha: float,
    dtype: torch.dtype,
    *,
    among: Sequence[AdapterLayer] = (),
    bias: Tensor | None = None,
) -> AdapterLayer:
    """A layer of plain factors, in the layout of another.

    Args:
        like: Gives the kind, the shapes and all that has nothing to do with the numbers.
        factors: ``(lora_A, lora_B)`` as matrices.
        alpha: The scale times the rank.
        dtype: Type to store them in.
        among: Settings of the training are kept where these layers agree on them.
        bias: What is added to the layer's bias.
    """
    rank = factors[0].shape[-2]
    parts = {
        part: _laid_out(like, part, matrix, rank).to(dtype).contiguous()
        for part, matrix in zip(("lora_A", "lora_B"), factors, strict=True)
    }
    if bias is not None:
        parts["lora_bias"] = bias.to(dtype)
    config = AdapterConfig(
        rank=rank, alpha=alpha, dtype=dtype, bias=bias is not None, **_agreed(among or (like,))
    )
    return replace(like, config=config, parts=parts)


def _laid_out(like: AdapterLayer, part: str, matrix: Tensor, rank: int) -> Tensor:
    """A plain factor of this rank that is a matrix, in the layout of another layer's."""
    kind = kind_named(like.kind)
    shape = list(like.parts[part].shape)
    if part == "lora_A" and like.settings.tucker:
        shape[2:] = like.parts["lora_mid"].shape[2:]  # the core and it become one
    for dim in kind.ranks_of(part):
        shape[dim] = rank
    return kind.laid_out(part, matrix, tuple(shape))


def _agreed(layers: Sequence[AdapterLayer]) -> dict[str, Any]:
    every = [{key: getattr(layer.settings, key) for key in DROPOUTS} for layer in layers]
    return {
        key: value if all(each[key] == value for each in every) else 0.0
        for key, value in every[0].items()
    }
