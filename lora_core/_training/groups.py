"""Groups of factors for an optimiser."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_core._adapters import by_pattern, layers_with
from lora_core._config import check_finite, check_positive
from lora_core._errors import ConfigError
from lora_core._layers import trained_parts


def parameter_groups(
    model: nn.Module,
    name: str | None = None,
    *,
    lr: float | Mapping[str, float],
    lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for an optimiser in which `lora_B` learns faster than `lora_A`, as LoRA+ has it.

    Only what trains now is in them, each Parameter once. `lora_B` gets the higher rate, all else
    the lower one; what has one dimension, a magnitude or a bias, gets no `weight_decay`.

    Args:
        model: A model with adapters.
        name: The adapter; None means all.
        lr: The learning rate of `lora_A`; by glob, as in ``{"*mid*": 1e-4, "*": 1e-5}``, that of
            the first which matches a layer's name.
        lr_ratio: How many times that `lora_B` gets.
        weight_decay: The decay of all but magnitudes and biases.

    Returns:
        Up to three groups for each rate: `lora_A` (and the core of a Tucker form), `lora_B`, and
        what has one dimension; those in which nothing trains are left out.

    Raises:
        AdapterError: If there is no such adapter, or none at all.
        ConfigError: If a number is out of range, or no factor trains.
        TargetError: If a pattern matches no layer, or a layer no pattern.

    Reference:
        Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.

    Example:
        >>> import torch
        >>> from lora_core import LoRALinear
        >>> groups = parameter_groups(LoRALinear(nn.Linear(3, 5), rank=2), lr=0.25)
        >>> [group["lr"] for group in torch.optim.AdamW(groups).param_groups]
        [0.25, 4.0]
    """
    ratio = check_positive("lr_ratio", lr_ratio)
    if check_finite("weight_decay", weight_decay) < 0:
        raise ConfigError(f"`weight_decay` must be at least 0, but is {weight_decay!r}.")
    layers = layers_with(model, name)
    rates = by_pattern("lr", lr, layers) if isinstance(lr, Mapping) else dict.fromkeys(layers, lr)
    everything: list[nn.Parameter] = []
    kinds: dict[tuple[float, int], list[nn.Parameter]] = {}  # by rate: A, B, and vectors
    for n, layer in layers.items():
        slow = check_positive("lr", rates[n])
        check_positive("lr * lr_ratio", slow * ratio)
        for kind in range(3):
            kinds.setdefault((slow, kind), [])
        for adapter in layer.lora_state.configs:
            for part, p in trained_parts(layer, adapter).items() if name in (None, adapter) else ():
                everything.append(p)
                kinds[slow, 2 if p.ndim == 1 else 1 if part == "lora_B" else 0].append(p)
    groups: list[dict[str, Any]] = []
    for (slow, kind), held in kinds.items():
        training = list(dict.fromkeys(p for p in held if p.requires_grad))
        rate, decay = slow * ratio if kind == 1 else slow, 0.0 if kind == 2 else weight_decay
        if training:
            groups.append({"params": training, "lr": rate, "weight_decay": float(decay)})
    if not groups:
        raise ConfigError(
            f"An adapter must train to be optimised, but all {len(everything)} factors of"
            f" {'the model' if name is None else repr(name)} are frozen."
            " Call `trainable(model, ...)` with those that are to train."
        )
    return groups
