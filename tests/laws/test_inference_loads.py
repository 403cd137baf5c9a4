"""A file may be loaded while serving: the adapter must train later."""

import torch

from lora_core import load, save
from tests.laws.zoo import gradients


def test_what_is_loaded_in_inference_mode_trains(kind, tmp_path):
    source, model, x = kind.adapted(), kind.bare(), kind.sample()
    with torch.inference_mode():
        save(source, tmp_path / "a.safetensors")
        load(model, tmp_path / "a.safetensors")
        model(x)
    assert not any(p.is_inference() for p in model.parameters())
    for mine, theirs in zip(gradients(model, x), gradients(source, x), strict=True):
        assert theirs.abs().max() > 0
        assert torch.equal(mine, theirs)
