"""Several adapters as one: their exact sum, its best approximation, or a method's own mixture."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch

from lora_core._algebra.layers import check_adapter, check_limit, check_result, check_seed
from lora_core._algebra.matching import check_names
from lora_core._algebra.methods import METHODS
from lora_core._algebra.mixing import Part, mixed, summed
from lora_core._algebra.results import Teller, Told
from lora_core._config import check_dtype, check_finite, check_name
from lora_core._errors import ConfigError, MismatchError, listed
from lora_core._formats import Adapter

T = TypeVar("T")
Method = Literal["sum", "ties", "dare", "magnitude_prune"]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
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
        weights: A number for each; negative ones subtract.
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
