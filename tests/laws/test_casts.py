"""Types of numbers: casts of the host, and autocast."""

import pytest
import torch
from torch.testing import assert_close

from lora_core import parameters
from tests.laws.zoo import adapter_keys, bits, flags, gradients, host_gives, loss_of, moves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_cast_to_half_precision_is_near_its_float32_self(kind, dtype):
    model, x = kind.adapted().eval(), kind.sample()
    expected = model(x)
    wide = gradients(model, x)
    assert moves(model, x)
    model.to(dtype)
    got = model(x.to(dtype) if x.is_floating_point() else x)
    assert got.dtype is dtype
    assert_close(got.float(), expected, atol=0.15, rtol=0.05)
    narrow = gradients(model, x.to(dtype) if x.is_floating_point() else x)
    for mine, theirs in zip(narrow, wide, strict=True):
        scale = theirs.abs().max().item()
        assert_close(mine.float(), theirs, atol=0.1 * scale, rtol=0.1)


def test_adapters_asked_for_in_half_precision_are_cast_with_the_host(kind):
    model = kind.bare()
    options = {**kind.options, "dtype": torch.bfloat16}
    type(kind)(kind.build, options, kind.inputs).inject(model)
    factors = [n for n in adapter_keys(model) if "lora_A_" in n or "lora_B_" in n]
    assert {model.get_parameter(n).dtype for n in factors} == {torch.bfloat16}
    model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}


def test_a_wider_host_takes_its_adapters_along(kind, swapping):
    if swapping:
        kind.excuse("swap")
    model, x = kind.adapted().eval(), kind.sample()
    trains = flags(model)
    with torch.no_grad():  # a graph would hold what is to be swapped
        narrow = model(x)
    optimiser_sees = parameters(model)
    assert model.double() is model
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert flags(model) == trains
    assert all(a is b for a, b in zip(parameters(model), optimiser_sees, strict=True))
    wide = model(x.double() if x.is_floating_point() else x)
    assert wide.dtype is torch.float64
    assert_close(wide.float(), narrow)


def test_a_cast_that_changes_nothing_changes_nothing(kind):
    model, x = kind.adapted().eval(), kind.sample()
    before, output, objects = bits(model), model(x), list(model.parameters())
    for same in (model.float, model.cpu, lambda: model.to("cpu", torch.float32)):
        same()
        assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert torch.equal(model(x), output)


def test_autocast_gives_what_the_host_gives_and_float32_gradients(kind):
    model, bare, x = kind.adapted(), kind.bare(), kind.sample()
    torch.manual_seed(5)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        host, plain = host_gives(bare, x)
        torch.manual_seed(5)
        y, inner = model(x), model.call(x)
    assert y.dtype is host.dtype
    assert inner.dtype is plain.dtype
    assert_close(y.float(), exact, atol=0.1, rtol=0.05)
    loss_of(y).backward()
    for p in parameters(model):
        assert p.grad.dtype is torch.float32
        assert p.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_host_in_8_bits_keeps_its_adapter_whole_and_comes_back(kind):
    model = kind.adapted()
    before = {n: t for n, t in bits(model).items() if n in adapter_keys(model)}
    model.to(torch.float8_e4m3fn)
    stored = {n: p.dtype for n, p in model.named_parameters()}
    assert {d for n, d in stored.items() if n not in before} == {torch.float8_e4m3fn}
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    model.float()
    assert moves(model, kind.sample())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
