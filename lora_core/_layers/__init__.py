"""Layers that carry adapters."""

from lora_core._layers.anatomy import peek
from lora_core._layers.attaching import (
    OWN,
    attach,
    call_me,
    detach,
    exchange,
    factor_names,
    non_finite,
    reserved,
)
from lora_core._layers.calling import BARE, PINS, Pin, at_rest, changing, pin_of, refuse_pinned
from lora_core._layers.convolution import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_core._layers.drawing import drawing, fresh_parts
from lora_core._layers.embedding import LoRAEmbedding
from lora_core._layers.explaining import explain
from lora_core._layers.fitting import (
    checked_settings,
    layer_config,
    mixin_for,
    mixin_of,
    part_shapes,
    sizes,
    why_not,
)
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
    "BARE",
    "CHILD",
    "FROZEN",
    "KINDS",
    "OWN",
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
    "Pin",
    "Selection",
    "Slot",
    "Strength",
    "WeightReader",
    "adapted_class",
    "at_rest",
    "attach",
    "call_me",
    "changing",
    "checked_settings",
    "detach",
    "drawing",
    "exchange",
    "explain",
    "factor_names",
    "fresh_parts",
    "host_of",
    "layer_config",
    "mixin_for",
    "mixin_of",
    "non_finite",
    "part_shapes",
    "peek",
    "pin_of",
    "refuse_merged",
    "refuse_pinned",
    "reserved",
    "sizes",
    "slots",
    "swap",
    "why_not",
]
