"""An adapter on every layer of every real model is a change of its weight, or refused."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_core
from lora_core import UnsupportedLayerError, functional
from lora_core._adapters import adapted_layers
from tests.interop.models import MODELS

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
KINDS = (*KINDS, nn.Embedding)


# second names of a weight, and the layers that are called with it
UNCALLED = {
    "t5": ("shared", "encoder.embed_tokens"),
    "bart": ("model.shared", "model.encoder.embed_tokens"),
    "m2m_100": ("model.shared", "model.encoder.embed_tokens"),
}


def made(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    if hasattr(model, "set_experts_implementation"):  # the others have no kernel for float64
        model.set_experts_implementation("eager")
    return model.double(), {k: _double(v) for k, v in inputs.items()}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from tensors(value)
    elif isinstance(out, tuple | list):
        for value in out:
            yield from tensors(value)
    elif hasattr(out, "__dict__"):
        yield from tensors(vars(out))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """All that a model gives, as one vector; the same chances and statistics each time."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(1)
    found = [t for t in tensors(model(**inputs)) if t.is_floating_point()]
    for n, b in model.named_buffers():
        b.data.copy_(buffers[n])
    return torch.cat([t.double().flatten() for t in found])


def computed(model: nn.Module) -> list[str]:
    """The layers whose weight is computed, into which nothing is merged."""
    return [n for n, m in model.named_modules() if hasattr(m, "parametrizations")]


def weight_of(layer: nn.Module) -> nn.Parameter:
    kind = layer.lora_kind
    owner, key = kind.home(layer)
    return owner._parameters[key]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_everywhere_are_a_change_of_the_weights(name: str, training: bool) -> None:
    model, inputs = made(name)
    model.train(training)
    with torch.no_grad():  # torch takes other kernels for what trains
        expected = run(model, inputs)
    classes = [k for k in KINDS if any(isinstance(m, k) for m in model.modules())]
    left_out = computed(model)
    if name in UNCALLED:
        alias, called = UNCALLED[name]
        before = list(model.state_dict())
        said = (
            f"is never called, and only lends its weight to {called!r}. Name that one instead, or"
        )
        with pytest.raises(UnsupportedLayerError, match=re.escape(said)) as error:
            lora_core.inject(model, targets=classes, rank=1)
        assert repr(alias) in str(error.value)
        assert list(model.state_dict()) == before
        left_out.append(alias)
    lora_core.inject(model, targets=classes, exclude=left_out, rank=1)
    with torch.no_grad():  # to the bit in tests/laws; some of these differ from run to run
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-12, atol=1e-14)
    layers = adapted_layers(model)
    with torch.no_grad():
        for p in lora_core.parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    out = run(model, inputs)
    assert (out - expected).abs().max() > 1e-6 * expected.abs().max()
    factors = lora_core.parameters(model)
    weights = torch.randn_like(out)
    got = torch.autograd.grad(weights @ out, factors, allow_unused=True)
    for p in factors:
        p.requires_grad_(False)
    lora_core.merge(model, untie=True)
    bases = [weight_of(layer).requires_grad_() for layer in layers.values()]
    again = run(model, inputs)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-8)
    asked = torch.autograd.grad(weights @ again, bases, allow_unused=True)
    gradients = iter(got)
    for (path, layer), change in zip(layers.items(), asked, strict=True):
        mine = [next(gradients) for _ in range(2)]
        wanted = _through(layer, change)
        for grad, want in zip(mine, wanted, strict=True):
            if want is None or not want.any():
                assert grad is None or not grad.any(), path
            else:
                assert grad is not None, f"no gradient arrives at {path}"
                torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-8, msg=path)


def _through(layer: Any, change: Tensor | None) -> list[Tensor | None]:
    """The gradients of the factors that the gradient of the whole weight means."""
    if change is None:
        return [None, None]
    lora_A, lora_B = (
        p.detach().clone().requires_grad_() for p in (layer.lora_A_default, layer.lora_B_default)
    )
    kind, config = layer.lora_kind, layer.lora_state.configs["default"]
    dense = functional.lora_delta(*kind.as_matrices(lora_A, lora_B), config.scale)
    return list(torch.autograd.grad((kind.matrix(change) * dense).sum(), (lora_A, lora_B)))
