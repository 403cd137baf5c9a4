"""Several adapters as one: their exact sum, its best approximation, or a method's own mixture.

Shape notes of the methods: N = number of updates, the rest is one update's shape.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_core import functional
from lora_core._algebra.comparison import check_names
from lora_core._algebra.factors import (
    check_adapter,
    check_result,
    check_seed,
    compatible,
    matrices,
    rebuilt,
    refuse_nonlinear,
    refuse_unlike,
    scaled,
    sizes,
    widened,
)
from lora_core._algebra.ranks import Limit, check_limit, cut, subspace_rank, unheard
from lora_core._algebra.spectrum import dense_spectrum, distance, over, spectrum
from lora_core._config import check_dtype, check_finite, check_name
from lora_core._errors import ConfigError, MismatchError, UnsupportedLayerError, listed
from lora_core._formats import Adapter, AdapterLayer
from lora_core._layers import kind_named
from lora_core._reports import Teller, Told

T = TypeVar("T")
Method = Literal["sum", "ties", "dare", "magnitude_prune"]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    method: Method = "sum",
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    told: Told | None = None,
) -> Adapter:
    """One adapter whose update is the weighted sum of others', whatever their ranks and alphas.

    Without `rank` the factors are concatenated: exact but for the rounding of `dtype`, with the
    sum of the ranks (cut, without loss, at a layer's smaller side). With it each layer is the best
    approximation of the sum of that rank at most, found by QR of the factors and an SVD of their
    small core. A layer that only one adapter has, at weight 1, is passed on as it is.

    The other methods take the weighted updates as dense matrices, one layer at a time, make one of
    them, and keep the `rank` largest singular values of that:

    - "ties": of each update the largest entries stay; at each entry a sign is elected by the sum,
      and those of that sign are averaged.
    - "dare": entries are dropped at random, the others divided by `density`; then the sum.
    - "magnitude_prune": of each update the largest entries stay; then the sum.

    Biases are summed as the updates are, and so are layers that are whole differences, as LyCORIS
    has them of norms: with method "sum", and whatever `rank` is. DoRA, and values in place of the
    base's, are no sums: such a layer is passed on, or refused.

    Args:
        adapters: Adapters of one model; layers that only some of them have are summed over those.
        weights: A number for each; negative ones subtract. None means 1 for each.
        rank: The highest rank of a layer; None keeps all.
        method: One of the names above.
        density: The share of entries that stays, in (0, 1]; for the methods other than "sum".
        seed: Decides what "dare" drops; each layer draws by its own name.
        dtype: Type of the result; None means the widest that a layer's factors have, or its parts
            where it is a whole difference.
        name: The result's name; None means that of the adapters if they share one, else
            "combined".
        told: Told of each layer's rank and relative error; see `LayerResult`.

    Returns:
        The result, which says in its notes how far from exact its worst layer is.

    Raises:
        ConfigError: If a setting is out of range, or a layer's numbers overflow its type.
        MismatchError: If the adapters are for different kinds or sizes of a layer, or spell the
            modules' names differently.
        UnsupportedLayerError: If a layer has DoRA or values in place of the base's and isn't alone
            at weight 1, is factors in one adapter and a whole difference in another, or is no
            product of factors where `method` is not "sum".

    Reference:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023.
        Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as
        a Free Lunch", 2023 (DARE).

    Example:
        >>> from lora_core._config import AdapterConfig
        >>> from lora_core._formats import AdapterLayer
        >>> config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0, dtype=torch.float32)
        >>> parts = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(5, 2)}
        >>> a = Adapter("a", {"to_q": AdapterLayer("linear", config, parts)})
        >>> combine([a, a], [0.5, 0.5]).layers["to_q"].settings.rank
        4
        >>> combine([a], [1]) == a
        True
    """
    adapters = [check_adapter("adapters", adapter) for adapter in _several("adapters", adapters)]
    if weights is None:
        weights = [1.0] * len(adapters)
    weights = [check_finite("weights", weight) for weight in _several("weights", weights)]
    _check(adapters, weights, rank, method, density)
    limit = None if rank is None else check_limit(rank)
    check_dtype("dtype", dtype)
    check_seed(seed)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.layers))
    tell, layers = Teller(told, len(names)), {}
    with torch.no_grad():
        for key in names:
            parts = [
                Part(adapter.layers[key], weight)
                for adapter, weight in zip(adapters, weights, strict=True)
                if key in adapter.layers
            ]
            if method == "sum":
                layers[key], error = summed(key, parts, limit, dtype)
            else:
                assert limit is not None
                assert density is not None
                draw = torch.Generator("cpu").manual_seed(seed ^ zlib.crc32(key.encode()))
                layers[key], error = mixed(key, parts, limit, dtype, method, density, draw)
            check_result(key, layers[key], error)
            config = layers[key].config
            tell(key, 0 if config is None else config.rank, error)
    notes = _agreed_notes(adapters)
    if tell.worst > 0:
        notes += (f"combined with a relative error of {tell.worst:.2e} at most in a layer",)
    return replace(
        adapters[0],
        name=_name(adapters, name),
        layers=layers,
        base=adapters[0].base if _same_base(adapters) else {},
        metadata={
            key: value
            for key, value in adapters[0].metadata.items()
            if all(adapter.metadata.get(key) == value for adapter in adapters)
        },
        notes=notes,
    )


def _several(what: str, given: Iterable[T]) -> Iterable[T]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(
            f"`{what}` must be a sequence, one for each adapter, but is {type(given).__name__}."
            " Put it in a list."
        )
    return given


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | None,
    method: str,
    density: float | None,
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"`weights` must hold a number for each of at least one adapter, but holds"
            f" {len(weights)} for {len(adapters)}."
        )
    if method != "sum" and method not in METHODS:
        raise ConfigError(
            f"`method` must be one of {listed(['sum', *METHODS])}, but is {method!r}."
        )
    if (method == "sum") != (density is None):
        need = "left out" if method == "sum" else "given"
        raise ConfigError(f"`density` must be {need} where `method` is {method!r}.")
    if density is not None and not 0 < check_finite("density", density) <= 1:
        raise ConfigError(f"`density` must be in (0, 1], but is {density!r}.")
    if method != "sum" and rank is None:
        raise ConfigError(
            f"`rank` must be given where `method` is {method!r}: what it makes has any rank."
        )
    spelt = {
        adapter.name: {layer.spelling for layer in adapter.layers.values()} for adapter in adapters
    }
    if len(set().union(*spelt.values())) > 1:
        shown = [f"{name}: {', '.join(sorted(how))}" for name, how in spelt.items() if how]
        raise MismatchError(
            f"Adapters must spell the names of modules alike to be combined, but do it as"
            f" {listed(shown)}. Load each into the model and save it again."
        )
    check_names(adapters)


def _name(adapters: Sequence[Adapter], name: str | None) -> str:
    if name is not None:
        return check_name(name)
    names = {adapter.name for adapter in adapters}
    return adapters[0].name if len(names) == 1 else "combined"


def _same_base(adapters: Sequence[Adapter]) -> bool:
    """Whether one fingerprint is that of all, and of the layers of the result."""
    first = adapters[0]
    return all(a.base == first.base and a.layers.keys() == first.layers.keys() for a in adapters)


def _agreed_notes(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for adapter in adapters for note in adapter.notes))


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
    silent = unheard(kind_named(like.kind), lora_A)
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
    down = torch.cat([matrices(layer)[0] for layer in layers], dim=-2)
    silent = unheard(kind_named(like.kind), down)
    dtype = _widest(layers) if dtype is None else dtype
    return cut(found, limit, like, dtype, silent=silent, among=layers)


def _widest(layers: Sequence[AdapterLayer]) -> torch.dtype:
    widest = layers[0].parts["lora_A"].dtype
    for layer in layers:
        for factor in matrices(layer):
            widest = torch.promote_types(widest, factor.dtype)
    return widest


def trimmed(update: Tensor, density: float) -> Tensor:
    """The largest entries of an update, zero elsewhere; at least one of them stays.

    Args:
        update: Any tensor.
        density: The share of the entries that stays.

    Example:
        >>> trimmed(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5)
        tensor([ 0., -3.,  2.,  0.])
    """
    flat = update.reshape(-1)
    kept = torch.topk(flat.abs(), max(1, int(density * flat.numel())), sorted=False).indices
    out = torch.zeros_like(flat)
    out[kept] = flat[kept]
    return out.view(update.shape)


def dropped_entries(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries of an update dropped at random, the others made larger: the same on average.

    Args:
        update: Any tensor.
        density: The probability that an entry stays.
        generator: What draws, on the CPU.

    Example:
        >>> dropped_entries(torch.ones(3), 1.0, torch.Generator())
        tensor([1., 1., 1.])
    """
    kept = torch.bernoulli(torch.full(update.shape, float(density)), generator=generator)
    return update * kept.to(update) / density


def elected(updates: Tensor) -> Tensor:
    """The mean, at every entry, of those updates that have the sign of the entry's sum.

    Shape:
        - updates: ``(N, ...)``
        - Output: ``(...)``, zero where no update is of the elected sign

    Reference:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, section 3.

    Example:
        >>> elected(torch.tensor([[1.0, 2.0], [3.0, -6.0]]))
        tensor([ 2., -6.])
    """
    sign = torch.where(updates.sum(0) >= 0, 1, -1)
    agree = updates.sign() == sign
    return (updates * agree).sum(0) / agree.sum(0).clamp(min=1)


def _ties(updates: Tensor, density: float, _: torch.Generator) -> Tensor:
    return elected(torch.stack([trimmed(update, density) for update in updates]))


def _dare(updates: Tensor, density: float, generator: torch.Generator) -> Tensor:
    return torch.stack([dropped_entries(u, density, generator) for u in updates]).sum(0)


def _magnitude_prune(updates: Tensor, density: float, _: torch.Generator) -> Tensor:
    return torch.stack([trimmed(update, density) for update in updates]).sum(0)


METHODS: Mapping[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "ties": _ties,
    "dare": _dare,
    "magnitude_prune": _magnitude_prune,
}
"""By name, what makes one dense update of several weighted ones."""
