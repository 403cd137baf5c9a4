"""Layers that carry adapters."""

from lora_core._layers.attaching import (
    attach,
    call_me,
    detach,
    factor_names,
    fresh_parts,
    layer_config,
    mixin_for,
    non_finite,
    part_shapes,
    sizes,
    why_not,
)
from lora_core._layers.calling import PINS, refuse_choice, selection_of
from lora_core._layers.convolution import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_core._layers.embedding import LoRAEmbedding
from lora_core._layers.explaining import explain
from lora_core._layers.linear import LoRALinear
from lora_core._layers.mixin import KINDS, LoRAMixin, adapted_class, refuse_merged, swap
from lora_core._layers.state import FROZEN, Merged, Selection, Strength
from lora_core._layers.weights import (
    CHILD,
    PROJECTIONS,
    LoRAWeight,
    Slot,
    WeightReader,
    host_of,
    slots,
)

__all__ = [
    "CHILD",
    "FROZEN",
    "KINDS",
    "PINS",
    "PROJECTIONS",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMixin",
    "LoRAWeight",
    "Merged",
    "Selection",
    "Slot",
    "Strength",
    "WeightReader",
    "adapted_class",
    "attach",
    "call_me",
    "detach",
    "explain",
    "factor_names",
    "fresh_parts",
    "host_of",
    "layer_config",
    "mixin_for",
    "non_finite",
    "part_shapes",
    "refuse_choice",
    "refuse_merged",
    "selection_of",
    "sizes",
    "slots",
    "swap",
    "why_not",
]
