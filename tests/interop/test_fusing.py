"""Attention whose projections diffusers fuses into one, of their bare weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_core
from lora_core import MismatchError, UnsupportedLayerError
from tests.interop.models import MODELS


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), dict(inputs)


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs)[0]
    return out


@pytest.mark.parametrize(("name", "block"), [("unet", "Attention"), ("flux", "FluxAttention")])
def test_adapters_that_a_fused_projection_passes_by_are_an_error(
    name: str, block: str, tmp_path: Path
) -> None:
    model, inputs = made(name)
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    lora_core.inject(model, rank=2)
    for p in lora_core.parameters(model):
        p.data.normal_(std=0.3)
    out = run(model, inputs)
    lora_core.save(model, tmp_path / "a.safetensors")
    model.fuse_qkv_projections()
    said = f"Adapted projections must be called to take effect, but this {block} fused them into '"
    repair = "Call `unfuse_qkv_projections()`; or eject, fuse and adapt again."
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}.*{re.escape(repair)}$"):
        run(model, inputs)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), out)
    lora_core.eject(model)
    assert [dict(m._forward_pre_hooks) for m in model.modules()][: len(hooks)] == hooks
    model.fuse_qkv_projections()
    bare = run(model, inputs)
    with pytest.raises(MismatchError, match="is fused into 'to_.*', which is called in its place"):
        lora_core.load(model, tmp_path / "a.safetensors")
    report = lora_core.inject(model, rank=2)
    called = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert "to_qkv" in called
    assert not called & {"to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    for p in lora_core.parameters(model):
        p.data.normal_(std=0.3)
    assert (run(model, inputs) - bare).abs().max() > 1e-3
    model.requires_grad_(True)
    model(**inputs)[0].sum().backward()
    assert not lora_core.summary(model).adapters[0].unreached


def test_the_look_for_fused_projections_is_compiled_away() -> None:
    model, _ = made("unet")
    lora_core.inject(model, rank=2)
    graphs: list[object] = []

    def backend(graph: Any, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    block = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    x = torch.randn(1, 9, 16)
    out = torch.compile(block, backend=backend, fullgraph=True)(x)
    assert len(graphs) == 1
    torch.testing.assert_close(out, block(x))
