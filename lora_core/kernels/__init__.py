"""Fast forms of the linear layer with a low-rank update; they know tensors only.

`functional.lora_linear` is the reference, and each form here is a claim about it.
"""

from lora_core.kernels.dropout import draw_seed, dropped
from lora_core.kernels.planning import Plan, choose
from lora_core.kernels.routing import route, run

__all__ = ["Plan", "choose", "draw_seed", "dropped", "route", "run"]
