"""minLoRA's keys, ``<path>.parametrizations.<parameter>.<number>.lora_A``: no alpha is stored.

An embedding's factors stand the other way round, ``A @ B`` being the update of its table.
"""

import re

from torch import Tensor

from lora_core._formats.keys import HALVES, Key

_KEY = re.compile(r"(?P<path>.+)\.parametrizations\.weight\.(?P<n>\d{1,3})\.lora_(?P<half>[AB])")
_MASK = re.compile(r".+\.parametrizations\.weight\.\d{1,3}\.lora_dropout_mask")


def parse(key: str) -> Key | None:
    """A key of minLoRA's, None if it is none."""
    if found := _KEY.fullmatch(key):
        return Key("minLoRA", found["path"], HALVES[found["half"]])
    if _MASK.fullmatch(key):
        return Key("minLoRA", "", "ignored")
    return None


def is_embedding(down: Tensor, up: Tensor) -> bool:
    """Whether the factors are (entries, rank) and (rank, dim), not (rank, in) and (out, rank)."""
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] == up.shape[1]:
        return False
    return down.shape[1] == up.shape[0]
