"""Models whose tensors accelerate keeps elsewhere between calls."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_core
from lora_core import ConfigError

accelerate = pytest.importorskip("accelerate")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(6, 5), nn.Linear(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.to_out(self.to_q(x)).mT)


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    model = Block()
    lora_core.inject(model, rank=2, name="ink", targets=["to_q", "to_out", "conv"])
    for p in lora_core.parameters(model):
        p.data.normal_()
    return model.eval()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_adapter_that_is_offloaded_is_saved_byte_for_byte(
    model: Block, where: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 4, 6)
    here, away = tmp_path / "here.safetensors", tmp_path / "away.safetensors"
    expected = model(x)
    lora_core.save(model, here)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "disk", execution_device=torch.device("cpu"))
    assert model.to_q.lora_A_ink.is_meta
    torch.testing.assert_close(model(x), expected)
    lora_core.save(model, away)
    assert away.read_bytes() == here.read_bytes()
    assert model.to_q.lora_A_ink.is_meta


def test_what_is_offloaded_and_can_not_be_read_says_how_to_bring_it_back(
    model: Block, tmp_path: Path
) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.weights_map = None
    said = (
        "An adapter must have its values at hand to be saved, but that of 'to_q', 'to_out',"
        " 'conv' is offloaded to where they can't be read. Take the hooks off first, with"
        " `accelerate.hooks.remove_hook_from_module(model, recurse=True)`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        lora_core.save(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
