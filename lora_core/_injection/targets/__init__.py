"""Which layers to adapt: the user's patterns, and attention projections in every dialect."""

from lora_core._injection.targets.choosing import choose, no_rule_match
from lora_core._injection.targets.dialects import DIALECTS
from lora_core._injection.targets.patterns import Patterns, matches
from lora_core._injection.targets.walking import Candidate, modules_of, walk

__all__ = [
    "DIALECTS",
    "Candidate",
    "Patterns",
    "choose",
    "matches",
    "modules_of",
    "no_rule_match",
    "walk",
]
