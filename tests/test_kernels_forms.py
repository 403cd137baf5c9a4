"""The planner as a table, and its claims about arithmetic counted."""

import pytest
import torch

from lora_core.kernels import choose

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
A100, H100, T4 = (8, 0), (9, 0), (7, 5)

TABLE = [
    # tokens, in, out, rank, dtype, options, form
    (4096, 320, 320, 4, FP32, {}, "merge"),
    (4096, 320, 2560, 4, FP32, {}, "merge"),
    (4096, 320, 320, 4, FP64, {}, "merge"),
    (1024, 320, 320, 4, FP32, {}, "merge"),
    (1024, 640, 640, 4, FP32, {}, "addmm"),
    (256, 1280, 1280, 4, FP32, {}, "addmm"),
    (77, 768, 320, 4, FP32, {}, "addmm"),
    (512, 4096, 4096, 16, FP32, {}, "addmm"),
    (0, 320, 320, 4, FP32, {}, "addmm"),
    # 16 bits would round the update away
    (4096, 320, 320, 4, BF16, {}, "addmm"),
    (4096, 320, 320, 4, FP16, {}, "addmm"),
    # no one matrix to merge into
    (4096, 320, 320, 4, FP32, {"dropout": True}, "addmm"),
    (4096, 320, 320, 4, FP32, {"per_sample": True}, "addmm"),
    # a matrix so small that calls cost more than arithmetic
    (2, 8, 8, 2, FP32, {}, "merge"),
    (2, 8, 8, 2, BF16, {}, "addmm"),
    (1, 128, 128, 4, FP32, {}, "merge"),
    (1, 128, 128, 64, FP32, {}, "addmm"),
    # CUDA
    (4096, 320, 320, 4, BF16, {"device": "cuda", "capability": H100}, "triton1"),
    (4096, 320, 320, 64, BF16, {"device": "cuda", "capability": H100}, "triton2"),
    (2048, 4096, 4096, 16, FP16, {"device": "cuda", "capability": A100}, "triton2"),
    (4096, 320, 320, 128, BF16, {"device": "cuda", "capability": H100}, "addmm"),
    (4096, 320, 320, 4, BF16, {"device": "cuda", "capability": T4}, "addmm"),
    (4096, 320, 320, 4, BF16, {"device": "cuda", "capability": None}, "addmm"),
    (4096, 320, 320, 4, BF16, {"device": "cuda", "capability": H100, "per_sample": True}, "addmm"),
    (77, 768, 320, 4, FP32, {"device": "cuda", "capability": H100}, "addmm"),
    (4096, 320, 320, 4, BF16, {"device": "cuda", "capability": H100, "dropout": True}, "triton2"),
    (4096, 320, 320, 4, FP32, {"device": "cuda", "capability": H100, "dropout": True}, "composed"),
    (4096, 320, 320, 4, BF16, {"device": "cuda", "dropout": True}, "composed"),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_form_is_the_tables(row):
    *sizes, dtype, options, form = row
    chosen = choose(*sizes, dtype=dtype, **options)
    assert chosen.form == form
    assert chosen.why
    assert str(chosen) == f"{form}: {chosen.why}"
