"""Fast forms of the linear layer with a low-rank update; they know tensors only.

`functional.lora_linear` is the reference, and each form here is a claim about it.
"""

from lora_core.kernels.door import route, run
from lora_core.kernels.dropout import draw_seed, dropped
from lora_core.kernels.forms import Form, choose
from lora_core.kernels.linear import stacked

__all__ = ["Form", "choose", "draw_seed", "dropped", "route", "run", "stacked"]
