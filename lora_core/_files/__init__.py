"""Saving an adapter to a file, and loading one into a model: validate everything, then act."""

from lora_core._files.loading import load
from lora_core._files.saving import adapter_of, save

__all__ = ["adapter_of", "load", "save"]
