"""Layers that carry adapters."""

from lora_core._layers.attaching import (
    attach,
    call_me,
    detach,
    factor_names,
    fresh_factors,
    layer_config,
    mixin_for,
    non_finite,
    sizes,
    why_not,
)
from lora_core._layers.explaining import explain
from lora_core._layers.linear import LoRALinear
from lora_core._layers.mixin import (
    FROZEN,
    LoRAMixin,
    Merged,
    Selection,
    adapted_class,
    refuse_merged,
)

__all__ = [
    "FROZEN",
    "LoRALinear",
    "LoRAMixin",
    "Merged",
    "Selection",
    "adapted_class",
    "attach",
    "call_me",
    "detach",
    "explain",
    "factor_names",
    "fresh_factors",
    "layer_config",
    "mixin_for",
    "non_finite",
    "refuse_merged",
    "sizes",
    "why_not",
]
