"""DoRA's ratio and norm: what each is exactly, and that every tracer takes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from lora_core.functional import dora_linear, dora_norm, dora_ratio

LENGTHS = st.lists(st.floats(2**-20, 1e6, width=32), min_size=1, max_size=6)
STRENGTHS = st.floats(-2, 2, width=16)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def factors(out: int = 5, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return randn(out, width), randn(2, width, seed=1), randn(out, 2, seed=2)


@given(LENGTHS, STRENGTHS, st.booleans())
def test_a_ratio_is_exactly_one_where_nothing_was_trained(lengths, strength, as_tensor):
    length = torch.tensor(lengths)
    strength = torch.tensor(strength, dtype=torch.float64) if as_tensor else strength
    assert torch.equal(dora_ratio(length, length, length, strength), torch.ones_like(length))


@given(LENGTHS, st.floats(0, 1e3, width=32), st.booleans())
def test_at_strength_zero_the_magnitude_counts_for_nothing(lengths, magnitude, as_tensor):
    length = torch.tensor(lengths)
    trained, off = torch.full_like(length, magnitude), torch.tensor(0.0) if as_tensor else 0.0
    assert torch.equal(dora_ratio(trained, length, length, off), torch.ones_like(length))


@given(LENGTHS, STRENGTHS)
def test_a_row_is_given_the_length_between_its_own_and_the_trained_one(lengths, strength):
    length, norm = torch.tensor(lengths).double(), torch.tensor(lengths).double() * 3
    magnitude = length.flip(0) + 1
    got = dora_ratio(magnitude, length, norm, strength) * norm
    assert_close(got, (1 - strength) * length + strength * magnitude)
    assert torch.equal(dora_ratio(magnitude, length, norm), magnitude / norm)


def test_a_row_of_zeros_keeps_its_base_and_a_cancelled_one_gets_nothing():
    magnitude, length = torch.tensor([0.0, 2.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    norm = torch.tensor([0.0, 0.0, 0.0, float("nan")])
    got = dora_ratio(magnitude.requires_grad_(), length, norm)
    assert got[:3].tolist() == [1.0, 1.0, 0.0]
    assert got[3].isnan()
    got.sum().backward()
    assert not magnitude.grad[:3].any()


@pytest.mark.parametrize("strength", [0.7, torch.tensor(0.7)])
def test_the_ratio_has_the_gradient_of_the_magnitude(strength):
    length, norm = randn(4).double().abs(), randn(4, seed=1).double().abs()
    magnitude = randn(4, seed=2).double().requires_grad_()
    assert gradcheck(lambda m: dora_ratio(m, length, norm, strength), (magnitude,))
    (grad,) = torch.autograd.grad(dora_ratio(magnitude, length, norm, strength).sum(), magnitude)
    assert_close(grad, float(strength) / norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("known", [True, False])
def test_the_norm_of_a_transposed_view_is_that_of_its_copy(dtype, known):
    W, A, B = factors()
    W = W.T.to(dtype).contiguous().T
    assert not W.is_contiguous()
    squared = W.float().square().sum(1) if known else None
    got = dora_norm(W, A, B, 0.7, squared=squared)
    assert got.dtype is torch.promote_types(dtype, torch.float32)
    assert_close(got, (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1).to(got.dtype))


def cancelling() -> tuple[Tensor, Tensor, Tensor]:
    W, A, B = factors()
    W[1] = -(B @ A)[1]
    W[2], B[2] = 0, 0
    return W, A, B


@pytest.mark.parametrize("gain", [1.0, torch.tensor(1.0)])
def test_the_norm_is_one_graph_and_the_eager_answer(gain):
    W, A, B = cancelling()
    A.requires_grad_(), B.requires_grad_()
    compiled = torch.compile(dora_norm, fullgraph=True, backend="aot_eager")
    got = compiled(W, A, B, gain)
    assert torch.equal(got, dora_norm(W, A, B, gain))
    assert not got.requires_grad
    squared = W.square().sum(1)
    assert torch.equal(compiled(W, A, B, gain, squared=squared), got)


def test_a_dora_layer_is_one_graph_with_the_eager_gradients():
    W, A, B = factors()
    x, magnitude = randn(3, 6, seed=4), W.norm(dim=1) + 1
    leaves = [t.requires_grad_() for t in (x, A, B, magnitude)]

    def layer(x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
        return dora_linear(x, W, None, A, B, 0.5, magnitude)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
    eager = layer(*leaves)
    assert_close(compiled, eager)
    for got, expected in zip(
        torch.autograd.grad(compiled.square().sum(), leaves),
        torch.autograd.grad(eager.square().sum(), leaves),
        strict=True,
    ):
        assert_close(got, expected)


class Norm(torch.nn.Module):
    def forward(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return dora_norm(W, A, B, 0.5)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_norm_has_plain_operations(strict):
    program = torch.export.export(Norm(), factors(), strict=strict)
    assert "lora_core" not in program.graph_module.code
    W, A, B = factors()
    W[1] = -0.5 * (B @ A)[1]
    assert_close(program.module()(W, A, B), dora_norm(W, A, B, 0.5), atol=1e-6, rtol=1e-5)


def test_tracers_and_transforms_get_the_plain_sum():
    W, A, B = factors()
    many = torch.func.vmap(dora_norm, in_dims=(None, 0, 0))(W, A[None], B[None])
    assert_close(many[0], dora_norm(W, A, B))
    graph = torch.fx.experimental.proxy_tensor.make_fx(Norm())(W, A, B)
    assert_close(graph(W, A, B), dora_norm(W, A, B, 0.5))
    meta = dora_norm(*(t.to("meta") for t in (W, A, B)))
    assert meta.shape == (5,)


def test_the_operator_keeps_its_promises():
    W, A, B = cancelling()
    dora_norm_op = torch.compile(dora_norm, backend="eager")
    dora_norm_op(W, A, B)  # registers the operator
    torch.library.opcheck(torch.ops.lora_core.dora_norm, (W, A, B, torch.tensor(0.5), None))
