"""Saving an adapter to a file, and loading one into a model: validate everything, then act."""

from lora_core._files.loader import load
from lora_core._files.saver import adapter_of, save

__all__ = ["adapter_of", "load", "save"]
