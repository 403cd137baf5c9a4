"""Weights that are stored in 8 bits and computed in more, by diffusers' layerwise casting."""

import pytest
import torch
from torch import nn

import lora_core
from lora_core import UnsupportedLayerError
from tests.interop.models import MODELS

F8 = torch.float8_e4m3fn


def unet() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, inputs = MODELS["unet"]()
    return model.eval(), dict(inputs)


def test_an_adapted_model_is_stored_in_8_bits_and_its_adapter_is_not() -> None:
    model, inputs = unet()
    lora_core.inject(model, rank=2)
    for p in lora_core.parameters(model):
        p.data.normal_(std=0.3)
    factors = [p.detach().clone() for p in lora_core.parameters(model)]
    model.enable_layerwise_casting(F8, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(lora_core.parameters(model), factors, strict=True))
    with torch.no_grad():  # a backward would meet the weights in 8 bits, of the bare model too
        out = model(**inputs).sample
    # the same model, rounded and not cast
    other, _ = unet()
    other.enable_layerwise_casting(F8, torch.float32)
    state = {n: t.float() for n, t in other.state_dict().items()}
    other, _ = unet()
    other.load_state_dict(state)
    lora_core.inject(other, rank=2)
    for p, factor in zip(lora_core.parameters(other), factors, strict=True):
        p.data.copy_(factor)
    with torch.no_grad():
        torch.testing.assert_close(out, other(**inputs).sample)


def test_what_is_cast_already_is_passed_over_for_its_true_reason() -> None:
    model, _ = unet()
    model.enable_layerwise_casting(F8, torch.float32)
    with pytest.raises(UnsupportedLayerError) as error:
        lora_core.inject(model)
    said = str(error.value)
    assert said.startswith(
        "Every layer that is an attention projection must be adaptable, but 'down_"
    )
    assert "has a `forward` patched onto the instance" in said
    assert said.endswith("The same holds for 31 more.")
