"""An adapter at another rank."""

from dataclasses import replace

import torch

from lora_core._algebra.layers import (
    check_adapter,
    check_limit,
    check_result,
    cut,
    refuse_nonlinear,
    scaled,
    unheard,
    widened,
)
from lora_core._algebra.products import Limit, spectrum
from lora_core._algebra.results import Teller, Told
from lora_core._config import check_dtype
from lora_core._formats import Adapter, AdapterLayer


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
        silent=unheard(layer.kind, lora_A),
        bias=None if bias is None else widened(bias),
    )
