"""Tables and heads that transformers makes larger under an adapter."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_core
from lora_core import AdapterError, MergeError
from tests.interop.models import MODELS


def resized(targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model, _ = MODELS["llama"]()
    lora_core.inject(model, targets=targets, rank=2)
    for p in lora_core.parameters(model):
        p.data.normal_()
    model.resize_token_embeddings(80)
    return model.eval()


def test_a_head_that_is_made_anew_is_named(tmp_path: Path) -> None:
    model = resized(["lm_head", "q_proj"])
    assert lora_core.summary(model).adapters[0].gone == ("lm_head",)
    with pytest.raises(AdapterError, match="to be saved, but 'lm_head' of 'default' is gone"):
        lora_core.save(model, tmp_path / "a.safetensors")
    with pytest.raises(MergeError, match="to be merged, but 'lm_head' is gone"):
        lora_core.merge(model)


def test_a_table_that_grew_says_so() -> None:
    model = resized(["embed_tokens", "q_proj"])
    with pytest.raises(
        AdapterError, match="must keep its size while it carries an adapter, but in"
    ):
        model(torch.tensor([[1, 79]]))
    with pytest.raises(
        MergeError, match="must keep its size while it carries an adapter, but at 'mo"
    ):
        lora_core.merge(model)


def test_after_a_resize_all_is_as_ever(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = MODELS["llama"]()
    model.resize_token_embeddings(80)
    lora_core.inject(model, targets=["lm_head", "embed_tokens"], rank=2)
    lora_core.save(model, tmp_path / "a.safetensors", strict=True)
