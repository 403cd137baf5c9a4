"""LoRA files of every kind, read into one neutral form and written from it."""

from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.reading import read
from lora_core._formats.writing import Encoded, encode, write

__all__ = ["Adapter", "AdapterLayer", "Encoded", "encode", "read", "write"]
