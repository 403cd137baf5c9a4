"""Choose, then act: `plan` says what `inject` would do, and `eject` takes it back."""

from lora_core._injection.exchanging import regraft
from lora_core._injection.planning import plan
from lora_core._injection.surgery import Graft, eject, graft, inject
from lora_core._injection.targets import DIALECTS, Candidate, modules_of, walk

__all__ = [
    "DIALECTS",
    "Candidate",
    "Graft",
    "eject",
    "graft",
    "inject",
    "modules_of",
    "plan",
    "regraft",
    "walk",
]
