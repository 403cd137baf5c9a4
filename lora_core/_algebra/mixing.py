"""One layer of several adapters as one: exactly, at its best in a rank, or by a method."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core import functional
from lora_core._algebra.layers import (
    compatible,
    cut,
    matrices,
    rebuilt,
    refuse_nonlinear,
    refuse_unlike,
    scaled,
    sizes,
    unheard,
    widened,
)
from lora_core._algebra.methods import METHODS
from lora_core._algebra.products import (
    Limit,
    dense_spectrum,
    distance,
    over,
    spectrum,
    subspace_rank,
)
from lora_core._config import check_finite
from lora_core._errors import UnsupportedLayerError
from lora_core._formats import AdapterLayer


class Part(NamedTuple):
    """What one adapter has for a layer, and how much of it is asked for."""

    layer: AdapterLayer
    weight: float


def summed(
    name: str, parts: Sequence[Part], limit: Limit | None, dtype: torch.dtype | None
) -> tuple[AdapterLayer, float]:
    """The weighted sum of what some adapters have for a layer, and its relative error.

    Args:
        name: The layer's name.
        parts: At least one.
        limit: The highest rank; None keeps all.
        dtype: Type of the result; None means the widest there is.

    Raises:
        MismatchError: If they are for different kinds or sizes of a layer.
        UnsupportedLayerError: If one is no product of factors and must be added to, or multiplied,
            unless all are whole differences.
    """
    alive = [part for part in parts if part.weight] or parts[:1]
    if len(alive) == 1 and alive[0].weight == 1 and _fits(alive[0].layer, limit, dtype):
        return alive[0].layer, 0.0
    if all(layer.kind == "difference" for layer, _ in alive):
        return _whole_sum(name, alive, dtype)
    for layer, _ in alive:
        refuse_nonlinear(name, layer, "combined")
    like = compatible(name, [layer for layer, _ in alive])
    dtype = _widest([layer for layer, _ in alive]) if dtype is None else dtype
    among, bias = [layer for layer, _ in alive], _bias(alive)
    if len(alive) == 1 and alive[0].weight and _fits(like, limit, dtype):
        return _multiplied(like, alive[0].weight, bias), 0.0
    most = min(sizes(like)[-2:])
    limit = Limit(rank=most) if limit is None else limit
    rank = sum(matrices(layer)[0].shape[-2] for layer in among)
    if rank <= min(most, limit.rank or most):
        lora_A, lora_B, gain = _stacked(alive)
        made = rebuilt(like, (lora_A, lora_B), gain * rank, dtype, among=among, bias=bias)
        kept = all(
            torch.equal(f, stored.to(f.dtype))
            for f, stored in zip((lora_A, lora_B), matrices(made), strict=True)
        )
        error = 0.0 if kept or dtype.itemsize >= 4 else distance(_asked(alive), scaled(made))
        return made, error
    lora_A, lora_B = _asked(alive)
    silent = unheard(like.kind, lora_A)
    found = spectrum(lora_A, lora_B)
    return cut(found, limit, like, dtype, silent=silent, among=among, bias=bias)


def _fits(layer: AdapterLayer, limit: Limit | None, dtype: torch.dtype | None) -> bool:
    """Whether a layer may stay as it is."""
    if layer.config is None:
        is_value = layer.kind != "difference"  # of the base's own type
        return is_value or all(dtype in (None, part.dtype) for part in layer.parts.values())
    kept = limit is None or layer.config.rank <= (limit.rank or 0)
    return kept and dtype in (None, layer.config.dtype)


def _whole_sum(
    name: str, parts: Sequence[Part], dtype: torch.dtype | None
) -> tuple[AdapterLayer, float]:
    """The weighted sum of whole differences, and its relative error; a part one lacks is zero."""
    first, *others = (layer for layer, _ in parts)
    for layer in others:
        both = first.parts.keys() & layer.parts.keys()
        if any(first.parts[part].shape != layer.parts[part].shape for part in both):
            refuse_unlike(name, first, layer)
    held = [tensor.dtype for layer, _ in parts for tensor in layer.parts.values()]
    dtype = reduce(torch.promote_types, held) if dtype is None else dtype
    made: dict[str, Tensor] = {}
    error = 0.0
    for part in dict.fromkeys(part for layer, _ in parts for part in layer.parts):
        terms = [widened(x.parts[part]) * weight for x, weight in parts if part in x.parts]
        asked = torch.stack(terms).sum(0)
        made[part] = asked.to(dtype)
        if dtype.itemsize < 4:
            gap, norm = (float(t.double().norm()) for t in (asked - made[part], asked))
            longest = max(float(term.double().norm()) for term in terms)
            error = max(error, over(gap, norm, longest, asked.dtype))
    return replace(first, parts=made), error


def _multiplied(layer: AdapterLayer, weight: float, bias: Tensor | None) -> AdapterLayer:
    """The layer at another alpha, which rounds nothing."""
    alpha = check_finite("weights", layer.settings.alpha * weight)
    parts = dict(layer.parts)
    if bias is not None:
        parts["lora_bias"] = bias.to(parts["lora_bias"].dtype)
    return replace(layer, config=replace(layer.settings, alpha=alpha), parts=parts)


def _stacked(parts: Sequence[Part]) -> tuple[Tensor, Tensor, float]:
    """The factors side by side and the scale they share; the largest one's stay as stored."""
    gains = [weight * layer.settings.scale for layer, weight in parts]
    factors = [matrices(layer) for layer, _ in parts]
    common = max(gains, key=abs) or 1.0
    if len(set(gains)) > 1 or not any(gains):
        factors = [
            (A, B if gain == common else widened(B) * (gain / common))
            for (A, B), gain in zip(factors, gains, strict=True)
        ]
    whole_A, whole_B, _ = functional.stack_factors([(A, B, 1.0) for A, B in factors], (-2, -1))
    return whole_A, whole_B, common


def _asked(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The sum as one wide product."""
    lora_A, lora_B, _ = functional.stack_factors(
        [(*scaled(layer, weight), 1.0) for layer, weight in parts], (-2, -1)
    )
    return lora_A, lora_B


def _bias(parts: Sequence[Part]) -> Tensor | None:
    """The weighted sum of the biases, None where there is none: a scale is none of theirs."""
    terms = [
        widened(layer.parts["lora_bias"]) * weight
        for layer, weight in parts
        if "lora_bias" in layer.parts
    ]
    return torch.stack(terms).sum(0) if terms else None


def mixed(
    name: str,
    parts: Sequence[Part],
    limit: Limit,
    dtype: torch.dtype | None,
    method: str,
    density: float,
    generator: torch.Generator,
) -> tuple[AdapterLayer, float]:
    """What a method makes of the dense updates, within a rank, and how far that is from it.

    Args:
        name: The layer's name.
        parts: At least one.
        limit: The highest rank.
        dtype: As in `summed`.
        method: One of `METHODS`.
        density: As there.
        generator: What draws, on the CPU.

    Raises:
        MismatchError: As `summed` does.
        UnsupportedLayerError: If one is no product of factors alone.
    """
    layers = [layer for layer, _ in parts]
    for layer in layers:
        refuse_nonlinear(name, layer, "combined")
        if "lora_bias" in layer.parts:
            raise UnsupportedLayerError(
                f"A layer must be factors alone where `method` is {method!r}, but {name!r} has a"
                " bias as well. Use method='sum'."
            )
    like = compatible(name, layers)
    updates = torch.stack([functional.lora_delta(*scaled(*part)) for part in parts])
    mixture = METHODS[method](updates, density, generator)
    found = dense_spectrum(mixture, subspace_rank(mixture, limit), generator)
    found = found._replace(terms=float(updates.double().norm()))
    silent = unheard(like.kind, torch.cat([matrices(layer)[0] for layer in layers], dim=-2))
    dtype = _widest(layers) if dtype is None else dtype
    return cut(found, limit, like, dtype, silent=silent, among=layers)


def _widest(layers: Sequence[AdapterLayer]) -> torch.dtype:
    widest = layers[0].parts["lora_A"].dtype
    for layer in layers:
        for factor in matrices(layer):
            widest = torch.promote_types(widest, factor.dtype)
    return widest
