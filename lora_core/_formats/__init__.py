"""LoRA files of every kind, read into one neutral form and written from it."""

from lora_core._formats.encoded import Encoded
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.reading import read
from lora_core._formats.writing import encode, write

__all__ = ["Adapter", "AdapterLayer", "Encoded", "encode", "read", "write"]
