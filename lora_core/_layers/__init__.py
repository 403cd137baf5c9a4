"""Layers that carry adapters."""

from lora_core._layers.attaching import (
    attach,
    detach,
    fresh_factors,
    is_factor,
    layer_config,
    mixin_for,
    sizes,
    why_not,
)
from lora_core._layers.linear import LoRALinear
from lora_core._layers.mixin import FROZEN, LoRAMixin, Merged, Selection, adapted_class

__all__ = [
    "FROZEN",
    "LoRALinear",
    "LoRAMixin",
    "Merged",
    "Selection",
    "adapted_class",
    "attach",
    "detach",
    "fresh_factors",
    "is_factor",
    "layer_config",
    "mixin_for",
    "sizes",
    "why_not",
]
