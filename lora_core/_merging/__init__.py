"""Adding the active updates to the weights, and handing the originals back bit for bit."""

from lora_core._merging.finite import is_finite
from lora_core._merging.residue import Residue
from lora_core._merging.verbs import merge, unmerge

__all__ = ["Residue", "is_finite", "merge", "unmerge"]
