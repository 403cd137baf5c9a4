"""Layers that carry adapters; a kind of layer is a file here and a line below."""

from lora_core._layers import bilinear as bilinear
from lora_core._layers import transposed as transposed
from lora_core._layers.attachment import attach, call_me, detach, exchange
from lora_core._layers.context import BARE, PINS, at_rest, changing, pin_of, refuse_pinned
from lora_core._layers.convolution import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_core._layers.embedding import LoRAEmbedding
from lora_core._layers.explanation import explain
from lora_core._layers.fit import kind_for, kind_of, layer_config, sizes, why_not
from lora_core._layers.kind import LINEAR, Kind, filed_kinds, kind_named, peek, runs_as_torch, swap
from lora_core._layers.linear import LoRALinear
from lora_core._layers.mixin import LoRAMixin, adapted_class, refuse_merged
from lora_core._layers.parts import (
    drawing,
    factor_names,
    factors_of,
    fresh_parts,
    non_finite,
    parts_of,
    reserved_parts,
    stored_parts,
    trained_parts,
)
from lora_core._layers.state import (
    FROZEN,
    STATE,
    Merged,
    Selection,
    State,
    Strength,
    change,
    lock,
    select,
    set_merged,
    state_of,
    undone_by,
)
from lora_core._layers.updates import addition, bias_delta, delta_of, stacked, update_norm
from lora_core._layers.weight import (
    CHILD,
    PROJECTIONS,
    WEIGHT,
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
    "LINEAR",
    "PINS",
    "PROJECTIONS",
    "STATE",
    "WEIGHT",
    "Kind",
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
    "State",
    "Strength",
    "WeightReader",
    "adapted_class",
    "addition",
    "at_rest",
    "attach",
    "bias_delta",
    "call_me",
    "change",
    "changing",
    "delta_of",
    "detach",
    "drawing",
    "exchange",
    "explain",
    "factor_names",
    "factors_of",
    "filed_kinds",
    "fresh_parts",
    "host_of",
    "kind_for",
    "kind_named",
    "kind_of",
    "layer_config",
    "lock",
    "non_finite",
    "parts_of",
    "peek",
    "pin_of",
    "refuse_merged",
    "refuse_pinned",
    "reserved_parts",
    "runs_as_torch",
    "select",
    "set_merged",
    "sizes",
    "slots",
    "stacked",
    "state_of",
    "stored_parts",
    "swap",
    "trained_parts",
    "undone_by",
    "update_norm",
    "why_not",
]
