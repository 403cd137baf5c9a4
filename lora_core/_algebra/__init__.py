"""Adapters outside any model: their sums, lower ranks, differences, and files they go into."""

from lora_core._algebra.checkpoints import open_checkpoint
from lora_core._algebra.combination import combine
from lora_core._algebra.comparison import Comparison, compare
from lora_core._algebra.extraction import extract
from lora_core._algebra.factors import form_of, norm_of
from lora_core._algebra.file_merge import Conv1D, merge_file
from lora_core._algebra.places import hosts_of
from lora_core._algebra.ranks import resize
from lora_core._algebra.spectrum import one_thread

__all__ = [
    "Comparison",
    "Conv1D",
    "combine",
    "compare",
    "extract",
    "form_of",
    "hosts_of",
    "merge_file",
    "norm_of",
    "one_thread",
    "open_checkpoint",
    "resize",
]
