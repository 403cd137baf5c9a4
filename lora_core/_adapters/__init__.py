"""The adapters on a model: listing them, and choosing which are active and how strongly."""

from lora_core._adapters.names import (
    adapted_layers,
    adapter_names,
    by_pattern,
    check_known,
    clean,
    glob,
    gone,
    layers_with,
    parameters,
    summary,
    without_base,
)
from lora_core._adapters.pins import checkpoint_context, pinned
from lora_core._adapters.scopes import disabled, join, strengths_over
from lora_core._adapters.strengths import scales

__all__ = [
    "adapted_layers",
    "adapter_names",
    "by_pattern",
    "check_known",
    "checkpoint_context",
    "clean",
    "disabled",
    "glob",
    "gone",
    "join",
    "layers_with",
    "parameters",
    "pinned",
    "scales",
    "strengths_over",
    "summary",
    "without_base",
]
