"""An adapter remembers what it was put on, and `save` what else was trained."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_core
from lora_core import AdapterError, ConfigError, MergeError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.attn = nn.MultiheadAttention(4, 1)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.body(self.attn(x, x, x)[0]))


TARGETS = ["embed", "q_proj_weight", "body.0", "body.1", "head"]


def adapted() -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    lora_core.inject(model, targets=TARGETS, rank=2)
    for p in lora_core.parameters(model):
        p.data.normal_()
    return model


@pytest.mark.parametrize("name", ["embed", "attn", "body.1", "head"])
@pytest.mark.parametrize("how", ["as it is", "copied", "pickled", "loaded", "replaced"])
def test_a_layer_that_was_replaced_is_named_and_not_passed_over(
    name: str, how: str, tmp_path: Path
) -> None:
    model, path = adapted(), tmp_path / "a.safetensors"
    if how in ("copied", "pickled"):
        model = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
        assert not lora_core.summary(model).adapters[0].gone  # a copy is known from its first look
    if how in ("loaded", "replaced"):
        lora_core.save(model, path)
        if how == "loaded":
            lora_core.eject(model)
        lora_core.load(model, path, replace=how == "replaced")
        path.unlink()
    owner, _, key = name.rpartition(".")
    fresh = {"attn": nn.MultiheadAttention(4, 1), "embed": nn.Embedding(9, 4)}
    setattr(model.get_submodule(owner), key, fresh.get(name, nn.Linear(4, 4 if owner else 9)))
    lost = "attn.q_proj_weight" if name == "attn" else name
    (found,) = lora_core.summary(model).adapters
    assert found.gone == (lost,)
    assert str(lora_core.summary(model)).endswith(
        f"'default' was on 1 layers more, which are gone or were replaced: {lost!r}"
    )
    said = (
        f"An adapter must be on every layer that it was put on to be saved, but {lost!r} of"
        " 'default' is gone or was replaced, and its factors with it. Resize or replace"
        " layers before `inject`; `save(..., strict=False)` saves the rest."
    )
    for write in (lambda: lora_core.save(model, path), lambda: lora_core.adapter_of(model)):
        with pytest.raises(AdapterError, match=f"^{re.escape(said)}$"):
            write()
    assert not path.exists()
    with pytest.raises(MergeError, match=f"to be merged, but {re.escape(repr(lost))} is gone or"):
        lora_core.merge(model)
    report = lora_core.save(model, path, strict=False)
    assert f"gone or replaced, and so not in the file: {lost!r}" in report.notes
    assert len(report.layers) == 4


def test_what_was_ejected_or_is_another_models_part_is_not_missed(tmp_path: Path) -> None:
    model = adapted()
    lora_core.save(model.body, tmp_path / "part.safetensors")
    lora_core.eject(model.head)
    assert not lora_core.summary(model).adapters[0].gone
    lora_core.save(model, tmp_path / "rest.safetensors")
    lora_core.inject(model, targets="head", name="other", rank=1)
    del model.body[1]
    assert [a.gone for a in lora_core.summary(model).adapters] == [("body.1",), ()]
    with pytest.warns(UserWarning, match="not in the model: 'body.1'"):
        lora_core.load(model, tmp_path / "rest.safetensors", replace=True, strict=False)
    assert lora_core.summary(model).adapters[0].gone == ("body.1",)
    lora_core.eject(model)
    lora_core.inject(model, targets="body.0", rank=1)
    lora_core.merge(model)


@pytest.mark.parametrize(("name", "size"), [("embed", 12), ("head", 12), ("body.0", 5)])
def test_a_layer_that_was_resized_says_so(name: str, size: int) -> None:
    model, ids = adapted(), torch.tensor([[1, 11]])
    layer = model.get_submodule(name)
    layer.weight.data = torch.randn(size, layer.weight.shape[1])
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = torch.randn(size)
    if name == "embed":
        layer.num_embeddings = size
    else:
        layer.out_features, ids = size, torch.tensor([[1, 2]])
    part = "lora_A" if name == "embed" else "lora_B"
    said = rf"A layer must keep its size while it carries an adapter, but .* {part} of 'default'"
    with pytest.raises(AdapterError, match=f"^{said}"):
        model(ids)
    before = model.body[1].weight.clone()
    for reversible in (True, False):
        with pytest.raises(MergeError, match=f"^{said}.*Resize before `inject`; or eject, resize"):
            lora_core.merge(model, reversible=reversible)
    assert torch.equal(model.body[1].weight, before)
    with pytest.raises(ConfigError, match="Resize a layer before it is adapted"):
        lora_core.save(model, "never")


def test_an_error_of_a_layer_that_was_not_resized_stays_its_own() -> None:
    model = adapted()
    with pytest.raises(IndexError, match="index out of range"):
        model(torch.tensor([[99]]))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.head(torch.randn(3, 5))


def test_a_gradient_that_never_arrived_is_named() -> None:
    model = adapted()
    assert lora_core.summary(model).adapters[0].unreached == ()
    model.body(torch.randn(3, 4)).sum().backward()
    (found,) = lora_core.summary(model).adapters
    assert found.unreached == ("embed", "attn.q_proj_weight", "head")
    assert str(lora_core.summary(model)).endswith(
        "'default' got no gradient at 3 of 5 layers, where the others did: 'embed',"
        " 'attn.q_proj_weight', 'head'"
    )
    model(torch.tensor([[1, 2]])).sum().backward()
    assert lora_core.summary(model).adapters[0].unreached == ()


def test_save_lists_what_else_trains_and_refuses_it_if_asked(tmp_path: Path) -> None:
    model, path = adapted(), tmp_path / "a.safetensors"
    assert lora_core.save(model, path, strict=True).notes == ()
    path.unlink()
    model.head.requires_grad_(True)
    model.body[0].lora_A_default.requires_grad_(False)
    said = (
        "All that trains must be in the file where `strict` is True, but 'head.weight', 'head.bias'"
        " trains too. Freeze it, or save it with the model's own state dict."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        lora_core.save(model, path, strict=True)
    assert not path.exists()
    (note,) = lora_core.save(model, path).notes
    assert note == "not in the file, though it trains: 'head.weight', 'head.bias'"
    lora_core.inject(model, targets="body.0", name="other", rank=1, freeze=False)
    assert lora_core.save(model, path, "default").notes == (note,)  # others have files of their own
