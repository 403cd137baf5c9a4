"""Saving an adapter to a file, and loading one into a model: validate everything, then act."""

from lora_core._files.loading import load
from lora_core._files.saving import save

__all__ = ["load", "save"]
