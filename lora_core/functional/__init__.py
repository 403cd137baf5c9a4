"""The maths of LoRA as pure functions of tensors.

`lora_linear` is the reference: slow, obvious and right. Every faster path is a claim about it, and
`fused_lora_linear` is the door to them.

Letters in the shape notes: in = in_features, out = out_features, R = rank (the sum of the ranks
where several adapters are stacked).
"""

from lora_core.functional.bilinear import bilinear_update
from lora_core.functional.conv import (
    conv_transpose_update,
    conv_update,
    lora_conv,
    tucker_down,
)
from lora_core.functional.deltas import (
    delta_norm,
    lora_delta,
    merged_weight,
    stack_factors,
)
from lora_core.functional.dora import (
    dora_linear,
    dora_norm,
    dora_ratio,
)
from lora_core.functional.embedding import (
    embedding_update,
    lora_embedding,
)
from lora_core.functional.initial import (
    initial_factors,
    subtracted,
)
from lora_core.functional.linear import (
    fused_lora_linear,
    fused_plan,
    lora_linear,
    lora_update,
)

__all__ = [
    "bilinear_update",
    "conv_transpose_update",
    "conv_update",
    "delta_norm",
    "dora_linear",
    "dora_norm",
    "dora_ratio",
    "embedding_update",
    "fused_lora_linear",
    "fused_plan",
    "initial_factors",
    "lora_conv",
    "lora_delta",
    "lora_embedding",
    "lora_linear",
    "lora_update",
    "merged_weight",
    "stack_factors",
    "subtracted",
    "tucker_down",
]
