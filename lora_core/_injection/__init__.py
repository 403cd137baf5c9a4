"""Choose, then act: `plan` says what `inject` would do, and `eject` takes it back."""

from lora_core._injection.candidates import Candidate, modules_of, walk
from lora_core._injection.dialects import DIALECTS
from lora_core._injection.planner import describe, parameters_of, plan
from lora_core._injection.readers import reasons
from lora_core._injection.surgery import Graft, eject, graft, inject, regraft

__all__ = [
    "DIALECTS",
    "Candidate",
    "Graft",
    "describe",
    "eject",
    "graft",
    "inject",
    "modules_of",
    "parameters_of",
    "plan",
    "reasons",
    "regraft",
    "walk",
]
