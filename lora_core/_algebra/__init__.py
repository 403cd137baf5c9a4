"""Adapters outside any model: their sums, lower ranks, differences, and files they go into."""

from lora_core._algebra.combining import combine
from lora_core._algebra.extracting import extract
from lora_core._algebra.file_merging import merge_file
from lora_core._algebra.resizing import resize
from lora_core._algebra.results import AlgebraReport, FileMergeReport, LayerResult, Told

__all__ = [
    "AlgebraReport",
    "FileMergeReport",
    "LayerResult",
    "Told",
    "combine",
    "extract",
    "merge_file",
    "resize",
]
