"""How many ranks of an update to keep, and an adapter at fewer of them."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core._algebra.factors import (
    check_adapter,
    check_result,
    rebuilt,
    refuse_nonlinear,
    scaled,
    widened,
)
from lora_core._algebra.spectrum import Spectrum, distance, spectrum
from lora_core._config import check_dtype
from lora_core._errors import ConfigError
from lora_core._formats import Adapter, AdapterLayer
from lora_core._layers import Kind, kind_named
from lora_core._reports import Teller, Told

_EXACT = 1024  # a larger matrix takes seconds to decompose whole


class Limit(NamedTuple):
    """How much of a matrix to keep: exactly one of these is not None.

    Attributes:
        rank: This rank at most.
        energy: The smallest rank that keeps this share of the squared norm.
        error: The smallest rank whose relative error is at most this.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def chosen(self, found: Spectrum) -> int:
        """The rank for a matrix, at least 1 and at most its number of singular values."""
        most = max(found.S.shape[-1], 1)
        if self.rank is not None:
            return min(self.rank, most)
        tails = found.tails()
        share = 1 - self.energy if self.energy is not None else float(self.error or 0) ** 2
        enough = (rank for rank, tail in enumerate(tails) if tail <= share * tails[0])
        return min(max(next(enough, most), 1), most)


def check_limit(
    rank: int | None = None, energy: float | None = None, error: float | None = None
) -> Limit:
    """Exactly one of the three, in its range."""
    given = {"rank": rank, "energy": energy, "error": error}
    set_ = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    if len(set_) != 1:
        raise ConfigError(
            f"Exactly one of `rank`, `energy` and `error` must be given, but {len(set_)} are"
            + (f": {', '.join(set_)}." if set_ else ". Give a rank, for example.")
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"`rank` must be a whole number of at least 1, but is {rank!r}.")
    for what, share, top in (("energy", energy, 1), ("error", error, None)):
        if share is None:
            continue
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not (0 < share <= 1 if top else 0 <= share < 1):
            bounds = "(0, 1]" if top else "[0, 1)"
            raise ConfigError(f"`{what}` must be in {bounds}, but is {share!r}.")
    return Limit(rank, energy, error)


def subspace_rank(matrix: Tensor, limit: Limit, svd: str = "auto") -> int | None:
    """How many singular values a random subspace should find; None for an exact SVD.

    "auto" is exact where the smaller side is at most 1024 or the rank asked for is over a quarter
    of it, and wherever `limit` asks for a share: that takes all the values.

    Shape:
        - matrix: ``(..., out, in)``
    """
    if svd == "exact" or limit.rank is None:
        return None
    small = min(matrix.shape[-2:])
    whole = small <= _EXACT or 4 * limit.rank > small
    return None if svd == "auto" and whole else limit.rank


def cut(
    found: Spectrum,
    limit: Limit,
    like: AdapterLayer,
    dtype: torch.dtype,
    *,
    silent: Tensor | None = None,
    **rest: Any,
) -> tuple[AdapterLayer, float]:
    """The nearest layer within a limit, and its relative error.

    Args:
        found: What it approximates.
        limit: How much of that to keep.
        like: As in `rebuilt`.
        dtype: As in `rebuilt`; of a type narrower than float32 the error counts the rounding.
        silent: Which inputs, as ``(in,)``, the update must not hear; see `unheard`.
        rest: As in `rebuilt`.
    """
    rank = limit.chosen(found)
    lora_A, lora_B = found.factors(rank)
    if silent is not None:
        lora_A = lora_A.masked_fill(silent, 0)
    made = rebuilt(like, (lora_A, lora_B), float(rank), dtype, **rest)
    error = found.error(rank)
    if dtype.itemsize < 4 and found.tails()[0]:
        # at right angles to what was cut off, but for its own randomness
        rounding = distance((lora_A, lora_B), scaled(made))
        error = (error**2 + rounding**2 * (1 - error**2)) ** 0.5
    return made, error


def unheard(kind: Kind, lora_A: Tensor) -> Tensor | None:
    """Which entries of an embedding an update has nothing but zeros for, ``(in,)``.

    Its padding must stay among them, whatever rounding makes of zeros. None for other layers.
    """
    return (lora_A == 0).all(0) if kind.takes_indices else None


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    dtype: torch.dtype | None = None,
    told: Told | None = None,
) -> Adapter:
    """The nearest adapter of a lower rank, chosen for each layer.

    By QR of the factors and an SVD of their small core: the best approximation there is, in the
    Frobenius norm. A layer whose rank is `rank` or less already is passed on as it is.

    Args:
        adapter: The adapter.
        rank: The highest rank of a layer.
        energy: The share of each update's squared norm to keep, in (0, 1]; 1 drops only ranks that
            add nothing.
        error: The highest relative error of an update, in [0, 1): ``sqrt(1 - energy)``.
        dtype: Type of the factors; None means that of each layer.
        told: Told of each layer's rank and relative error; see `LayerResult`.

    Returns:
        The result, which says in its notes how far from the original its worst layer is.

    Raises:
        ConfigError: If not exactly one of `rank`, `energy` and `error` is given, or a setting is
            out of range, or a layer's numbers overflow its type.
        UnsupportedLayerError: If a layer that must change has DoRA or is no product of factors.

    Reference:
        Eckart and Young, "The Approximation of One Matrix by Another of Lower Rank", 1936.

    Example:
        >>> from lora_core._config import AdapterConfig
        >>> config = AdapterConfig(rank=4, alpha=4.0, dropout=0.0, dtype=torch.float32)
        >>> parts = {"lora_A": torch.ones(4, 6), "lora_B": torch.ones(5, 4)}
        >>> adapter = Adapter("style", {"to_q": AdapterLayer("linear", config, parts)})
        >>> resize(adapter, energy=1.0).layers["to_q"].settings.rank
        1
    """
    adapter = check_adapter("adapter", adapter)
    limit = check_limit(rank, energy, error)
    check_dtype("dtype", dtype)
    tell, layers = Teller(told, len(adapter.layers)), {}
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            layers[name], lost = _resized(name, layer, limit, dtype)
            check_result(name, layers[name], lost)
            config = layers[name].config
            tell(name, 0 if config is None else config.rank, lost)
    notes = adapter.notes
    if tell.worst > 0:
        notes += (f"resized with a relative error of {tell.worst:.2e} at most in a layer",)
    return replace(adapter, layers=layers, notes=notes)


def _resized(
    name: str, layer: AdapterLayer, limit: Limit, dtype: torch.dtype | None
) -> tuple[AdapterLayer, float]:
    kept = layer.config is None or (limit.rank is not None and layer.config.rank <= limit.rank)
    if kept and (layer.config is None or dtype in (None, layer.config.dtype)):
        return layer, 0.0
    refuse_nonlinear(name, layer, "resized")
    lora_A, lora_B = scaled(layer)
    bias = layer.parts.get("lora_bias")
    return cut(
        spectrum(lora_A, lora_B),
        limit,
        layer,
        layer.settings.dtype if dtype is None else dtype,
        silent=unheard(kind_named(layer.kind), lora_A),
        bias=None if bias is None else widened(bias),
    )
