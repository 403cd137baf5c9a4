"""Which type an adapter is stored in is its own affair, not the host's."""

import pytest
import torch

from lora_core import parameters
from tests.laws.zoo import adapter_keys, bits, flags

HALVES = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to-device-too": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", HALVES.values(), ids=HALVES)
def test_a_half_precision_cast_of_the_host_leaves_float32_adapters_alone(kind, cast, swapping):
    if swapping:
        kind.excuse("swap")
    model = kind.adapted()
    mine, before, trains = set(adapter_keys(model)), bits(model), flags(model)
    for p in parameters(model):
        p.grad = torch.full_like(p, 0.1)
    assert cast(model) is model
    for key, p in model.named_parameters():
        if key in mine:
            assert p.dtype is torch.float32
            assert torch.equal(p, before[key])
            if p.requires_grad:
                assert torch.equal(p.grad, torch.full_like(p, 0.1))
        else:
            assert p.dtype.itemsize == 2
    assert flags(model) == trains
