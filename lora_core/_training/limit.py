"""Keeping the norm of an update within a limit."""

import math

import torch
from torch import Tensor, nn

from lora_core._adapters import adapter_names, layers_with
from lora_core._config import check_positive
from lora_core._errors import ConfigError, MergeError, listed
from lora_core._layers import LoRAMixin, factors_of, update_norm
from lora_core._reports import NormReport


def limit_norm(model: nn.Module, name: str | None = None, *, max_norm: float) -> NormReport:
    """Scales factors down, in place, until no layer's update has a norm above `max_norm`.

    The norm is that of the whole update at strength 1, ``scale * lora_B @ lora_A``, by Frobenius;
    each adapter counts by itself, frozen or not. Both factors shrink by the same share, so the
    update keeps its direction up to the rounding of the factors; what is within the limit keeps
    its bits. Call it after each step of an optimiser. A call that is refused changes nothing.

    Args:
        model: A model with adapters.
        name: The adapter; None means all.
        max_norm: The limit.

    Raises:
        AdapterError: If there is no such adapter, or none at all.
        ConfigError: If `max_norm` is not above 0, a norm is not finite, or an update is no product
            of factors (DoRA, or first factors subtracted on the fly).
        MergeError: If a layer is merged: its weight holds the update as it was.

    Reference:
        kohya-ss/sd-scripts, option `scale_weight_norms`.

    Example:
        >>> import torch
        >>> from lora_core import LoRALinear
        >>> layer = LoRALinear(nn.Linear(3, 4), rank=2, name="style")
        >>> with torch.no_grad():
        ...     _ = layer.lora_A_style.fill_(1), layer.lora_B_style.fill_(4)
        >>> limit_norm(layer, max_norm=1.0).limited
        {'style': ('',)}
        >>> limit_norm(layer, max_norm=1.0).limited
        {'style': ()}
    """
    limit = check_positive("max_norm", max_norm)
    layers = layers_with(model, name)
    merged = [n for n, m in layers.items() if m.lora_state.merged is not None]
    if merged:
        raise MergeError(
            f"A norm must be limited while unmerged, but {listed(merged)} is merged."
            " Call `unmerge(model)` first."
        )
    names = adapter_names(layers) if name is None else [name]
    found = {
        (adapter, n): layer
        for adapter in names
        for n, layer in layers.items()
        if adapter in layer.lora_state.configs
    }
    odd = [f"{n}.{a}".lstrip(".") for (a, n), m in found.items() if not _is_product(m, a)]
    if odd:
        raise ConfigError(
            f"An update must be a product of factors to be limited, but that of {listed(odd)} is"
            " DoRA's, or has first factors subtracted. Leave these adapters out."
        )
    with torch.no_grad():
        norms = {(a, n): float(update_norm(m, a, *factors_of(m, a))) for (a, n), m in found.items()}
        bad = [f"{n}.{a}".lstrip(".") for (a, n), norm in norms.items() if not math.isfinite(norm)]
        if bad:
            raise ConfigError(
                f"An update must have a finite norm to be limited, but that of {listed(bad)} has"
                " none. Go back to an earlier state; lower the learning rate."
            )
        small = {
            key: _shrunk(found[key], key[0], norm, limit)
            for key, norm in norms.items()
            if norm > limit
        }
        for (adapter, n), factors in small.items():
            for factor, values in zip(factors_of(layers[n], adapter), factors, strict=True):
                factor.copy_(values)
    before = {a: {n: norms[a, n] for n in layers if (a, n) in norms} for a in names}
    return NormReport(limit, before)


def _is_product(layer: LoRAMixin, adapter: str) -> bool:
    config = layer.lora_state.configs[adapter]
    return not config.dora and not config.subtracted


def _shrunk(layer: LoRAMixin, adapter: str, norm: float, limit: float) -> tuple[Tensor, Tensor]:
    """An adapter's factors at the limit, or as little below as their dtype allows."""
    lora_A, lora_B = factors_of(layer, adapter)
    margin = 0.0
    while True:
        root = math.sqrt(limit / norm * (1 - margin))
        small = lora_A * root, lora_B * root
        if update_norm(layer, adapter, *small) <= limit:
            return small
        # rounding left it a trifle above
        margin = min(2 * margin or torch.finfo(lora_A.dtype).eps / 4, 1.0)
