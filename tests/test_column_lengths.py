"""Adapters whose columns have lengths of their own, which older files of LyCORIS hold."""

import copy

import pytest
import torch
from torch import nn

from lora_core import eject, inject, load, merge, parameters, save, scales, unmerge
from lora_core._config import AdapterConfig
from lora_core._formats import Adapter, AdapterLayer, container, native

HOSTS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 3, 6)),
    "unbiased": (lambda: nn.Linear(6, 5, bias=False), lambda: torch.randn(4, 6)),
    "conv": (
        lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect", stride=2),
        lambda: torch.randn(2, 6, 7, 7),
    ),
    "conv1": (lambda: nn.Conv1d(6, 5, 1), lambda: torch.randn(2, 6, 7)),
}
RANK, ALPHA = 2, 3.0


def loaded(host, tmp_path, seed=0):
    """A host on which a file with lengths of columns was loaded, the input, and its factors."""
    torch.manual_seed(seed)
    make, sample = HOSTS[host]
    model = nn.Sequential(make())
    weight = model[0].weight.detach()
    ones = [1] * (weight.ndim - 2)
    parts = {
        "lora_A": torch.randn(RANK, *weight.shape[1:]),
        "lora_B": torch.randn(weight.shape[0], RANK, *ones),
        "lora_in_magnitude": torch.rand(weight.shape[1]) + 0.5,
    }
    config = AdapterConfig(RANK, ALPHA, 0.0, torch.float32, dora=True, dora_in=True)
    kind = "linear" if weight.ndim == 2 else "conv"
    adapter = Adapter("style", {"0": AdapterLayer(kind, config, parts)}, {})
    tensors, entries = native.encode(
        Adapter("style", adapter.layers, {"dtype": "float32", "samples": ""}, {})
    )
    path = tmp_path / "columns.safetensors"
    container.write(path, container.pack(tensors, entries))
    return model, sample(), parts, path


def expected(weight, parts, strength=1.0):
    """The adapted weight by its definition, in float64."""
    W, A, B = weight.double(), parts["lora_A"].double(), parts["lora_B"].double()
    V = W + strength * ALPHA / RANK * (B.flatten(1) @ A.flatten(1)).view(W.shape)
    norm, length = (M.transpose(0, 1).flatten(1).norm(dim=1) for M in (V, W))
    wanted = length + strength * (parts["lora_in_magnitude"].double() - length)
    return V * (wanted / norm).view(1, -1, *[1] * (W.ndim - 2))


def with_weight(model, weight):
    bare = copy.deepcopy(model)
    eject(bare)
    bare.double()
    with torch.no_grad():
        bare[0].weight.copy_(weight)
    return bare


@pytest.mark.parametrize("host", HOSTS)
def test_forward_merge_and_unmerge_are_the_dense_formula(host, tmp_path):
    model, x, parts, path = loaded(host, tmp_path)
    bare = model[0].weight.detach().clone()
    load(model, path, check_base=False)
    for strength in (1.0, 0.4, 0.0, -0.5):
        scales(model, style=strength)
        dense = with_weight(model, expected(bare, parts, strength))
        torch.testing.assert_close(model(x).double(), dense(x.double()), atol=1e-5, rtol=1e-5)
    scales(model, style=0.7)
    model.eval()
    merge(model)
    wanted = expected(bare, parts, 0.7)
    torch.testing.assert_close(model[0].weight.double(), wanted, atol=1e-6, rtol=1e-5)
    unmerge(model)
    assert torch.equal(model[0].weight, bare)


@pytest.mark.parametrize("host", HOSTS)
def test_two_adapters_are_the_sum_of_their_deltas(host, tmp_path):
    model, x, parts, path = loaded(host, tmp_path)
    bare = model[0].weight.detach().clone()
    load(model, path, check_base=False)
    inject(model, 1, targets="0", name="plain")
    with torch.no_grad():
        for p in parameters(model, "plain"):
            p.normal_()
    A, B = (p.detach().double().flatten(1) for p in parameters(model, "plain"))
    dense = with_weight(model, expected(bare, parts) + (B @ A).view(bare.shape))
    torch.testing.assert_close(model(x).double(), dense(x.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_it_trains_and_its_norm_is_a_constant(host, tmp_path):
    model, x, parts, path = loaded(host, tmp_path)
    bare = model[0].weight.detach().clone()
    load(model, path, check_base=False)
    model(x).square().sum().backward()
    leaves = {part: p.double().requires_grad_() for part, p in parts.items()}
    A, B, m = leaves["lora_A"], leaves["lora_B"], leaves["lora_in_magnitude"]
    W = bare.double()
    V = W + ALPHA / RANK * (B.flatten(1) @ A.flatten(1)).view(W.shape)
    norm = V.detach().transpose(0, 1).flatten(1).norm(dim=1)
    dense = with_weight(model, W)
    weight = V * (m / norm).view(1, -1, *[1] * (W.ndim - 2))
    torch.func.functional_call(dense, {"0.weight": weight}, (x.double(),)).square().sum().backward()
    for part, p in leaves.items():
        got = getattr(model[0], f"{part}_style").grad.double()
        torch.testing.assert_close(got, p.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # a step later the remembered norms are made anew
        for part, p in parts.items():
            p.add_(0.1)
            getattr(model[0], f"{part}_style").add_(0.1)
    dense = with_weight(model, expected(bare, parts))
    torch.testing.assert_close(model(x).double(), dense(x.double()), atol=1e-5, rtol=1e-5)


def test_a_file_of_ours_holds_it(tmp_path):
    model, x, _, path = loaded("conv", tmp_path)
    load(model, path, check_base=False)
    again = tmp_path / "again.safetensors"
    save(model, again)
    other, *_ = loaded("conv", tmp_path)
    report = load(other, again)
    assert torch.equal(other(x), model(x))
    assert "DoRA: lengths of columns" in str(report)
