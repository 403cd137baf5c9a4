"""The reference maths against formulas written out in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from lora_core import functional
from lora_core.functional import (
    delta_norm,
    lora_delta,
    lora_linear,
    lora_update,
    merged_weight,
    stack_factors,
)

# unit roundoff allowed per dtype, for values of order one summed over at most 32 terms
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 8e-2,
    torch.float16: 1e-2,
}
DTYPES = st.sampled_from(list(TOLERANCE))
SIZES = st.integers(1, 8)
LEADING = st.lists(st.integers(0, 3), max_size=3).map(tuple)
SCALES = st.floats(-2, 2, width=16)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def written_out(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, gain: Tensor | float
) -> Tensor:
    """The formula as a sum over single entries, in float64."""
    x, W, A, B = x.double(), W.double(), A.double(), B.double()
    base = torch.einsum("...i,oi->...o", x, W)
    if b is not None:
        base = base + b.double()
    if not isinstance(gain, Tensor):
        return base + gain * torch.einsum("...i,ri,or->...o", x, A, B)
    gain = gain.double()
    if gain.ndim == 2:  # a gain per sample
        return base + torch.einsum("b...i,ri,br,or->b...o", x, A, gain, B)
    gain = gain.expand(A.shape[0])
    return base + torch.einsum("...i,ri,r,or->...o", x, A, gain, B)


def factors(
    in_features: int, out_features: int, rank: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    A = randn(rank, in_features, dtype=dtype, seed=3)
    return A, randn(out_features, rank, dtype=dtype, seed=4)


def gain_of(kind: str, scale: float, rank: int, batch: int) -> Tensor | float:
    if kind == "float":
        return scale
    if kind == "scalar":
        return torch.tensor(scale)
    if kind == "rank":
        return scale * torch.arange(1.0, rank + 1)
    return scale * torch.arange(1.0, batch * rank + 1).reshape(batch, rank) / (batch * rank + 1)


@given(LEADING, SIZES, SIZES, st.integers(1, 4), DTYPES, st.booleans(), SCALES)
def test_lora_linear_is_the_written_out_formula(lead, i, o, rank, dtype, bias, scale):
    x, W = randn(*lead, i, dtype=dtype), randn(o, i, dtype=dtype, seed=1)
    b = randn(o, dtype=dtype, seed=2) if bias else None
    A, B = factors(i, o, rank, dtype)
    got = lora_linear(x, W, b, A, B, scale)
    assert got.dtype == dtype
    assert got.shape == (*lead, o)
    expected = written_out(x, W, b, A, B, scale)
    tolerance = TOLERANCE[dtype]
    assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["float", "scalar", "rank", "batch"])
@pytest.mark.parametrize("lead", [(3,), (3, 2), (3, 2, 4), (0,), (3, 0)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gain_is_a_number_a_vector_or_a_row_per_sample(kind, lead, dtype):
    i, o, rank = 5, 4, 3
    x, W, b = randn(*lead, i, dtype=dtype), randn(o, i, dtype=dtype, seed=1), None
    A, B = factors(i, o, rank, dtype)
    gain = gain_of(kind, 0.75, rank, lead[0])
    got = lora_linear(x, W, b, A, B, gain)
    assert got.dtype == dtype
    expected = written_out(x, W, b, A, B, gain)
    tolerance = TOLERANCE[dtype]
    assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_row_of_gains_mixes_each_sample_by_itself():
    x, W = randn(3, 2, 5), randn(4, 5, seed=1)
    A, B = factors(5, 4, 3)
    gain = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [-1.0, 3.0, 0.5]], dtype=torch.float64)
    mixed = lora_linear(x, W, None, A, B, gain)
    alone = torch.stack([lora_linear(x[n], W, None, A, B, gain[n]) for n in range(3)])
    assert_close(mixed, alone)
    assert_close(mixed[1], x[1] @ W.T)


def test_a_token_axis_as_long_as_the_batch_is_not_mistaken_for_it():
    # (batch, R) must line up with the first axis of x, not with the last but one
    x = randn(2, 2, 5)
    A, B = factors(5, 4, 3)
    gain = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    got = lora_update(x, A, B, gain)
    assert_close(got[0], x[0] @ A.T @ B.T)
    assert torch.equal(got[1], torch.zeros(2, 4, dtype=torch.float64))


@given(LEADING, SIZES, SIZES, DTYPES, st.booleans())
def test_a_zero_factor_leaves_the_base_bit_for_bit(lead, i, o, dtype, bias):
    x, W = randn(*lead, i, dtype=dtype), randn(o, i, dtype=dtype, seed=1)
    b = randn(o, dtype=dtype, seed=2) if bias else None
    A, B = factors(i, o, 2, dtype)
    base = torch.nn.functional.linear(x, W, b)
    assert torch.equal(lora_linear(x, W, b, A, torch.zeros_like(B), 1.5), base)
    assert torch.equal(lora_linear(x, W, b, A, B, 0.0), base)


def test_lora_linear_is_the_base_plus_the_update():
    x, W, b = randn(3, 5), randn(4, 5, seed=1), randn(4, seed=2)
    A, B = factors(5, 4, 2)
    update = lora_update(x, A, B, 0.5)
    assert_close(lora_linear(x, W, b, A, B, 0.5), x @ W.T + b + update)
    assert_close(update, x @ lora_delta(A, B, 0.5).T)
    assert update.abs().max() > 0.01


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_base_takes_float32_factors(half):
    x, W, b = randn(3, 5, dtype=half), randn(4, 5, dtype=half, seed=1), randn(4, dtype=half, seed=2)
    A, B = (p.requires_grad_() for p in factors(5, 4, 2, torch.float32))
    out = lora_linear(x, W, b, A, B, torch.tensor([0.5, 2.0]))
    assert out.dtype == half
    expected = written_out(x, W, b, A.detach(), B.detach(), torch.tensor([0.5, 2.0]))
    assert_close(out.double(), expected, atol=TOLERANCE[half], rtol=TOLERANCE[half])
    out.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert A.grad.abs().max() > 0


@pytest.mark.parametrize("gain_kind", ["scalar", "rank", "batch"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 2), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_gradients_are_right(gain_kind, lead, bias):
    if gain_kind == "batch" and not lead:
        pytest.skip("a gain per sample needs samples")
    x, W = randn(*lead, 3), randn(2, 3, seed=1)
    b = randn(2, seed=2) if bias else None
    A, B = factors(3, 2, 2)
    gain = torch.as_tensor(gain_of(gain_kind, 0.7, 2, *lead[:1] or (0,))).double()
    inputs = [t.requires_grad_() if t is not None else None for t in (x, W, b, A, B, gain)]
    assert gradcheck(lora_linear, inputs)
    assert gradgradcheck(lora_linear, inputs)


@given(st.lists(st.integers(0, 3), max_size=2).map(tuple), SIZES, SIZES, st.integers(1, 3), SCALES)
def test_every_gradient_is_the_written_out_formulas(lead, i, o, rank, scale):
    names = ("x", "W", "b", "A", "B")

    def leaves() -> list[Tensor]:
        tensors = (randn(*lead, i), randn(o, i, seed=1), randn(o, seed=2), *factors(i, o, rank))
        return [t.requires_grad_() for t in tensors]

    cotangent = randn(*lead, o, seed=9)
    fast, slow = leaves(), leaves()
    got = torch.autograd.grad(lora_linear(*fast, scale), fast, cotangent)
    expected = torch.autograd.grad(written_out(*slow, scale), slow, cotangent)
    for name, g, e in zip(names, got, expected, strict=True):
        assert_close(g, e, msg=lambda text, name=name: f"gradient of {name}: {text}")


# torch's own forward-mode rules still go through TorchScript
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_agrees_with_the_formula():
    x, W, b = randn(3, 5), randn(4, 5, seed=1), randn(4, seed=2)
    A, B = factors(5, 4, 2)
    tangent = randn(2, 5, seed=8)
    _, got = torch.func.jvp(lambda A: lora_linear(x, W, b, A, B, 0.5), (A,), (tangent,))
    assert_close(got, 0.5 * x @ tangent.T @ B.T)


@pytest.mark.parametrize("dropout", [0.25, 0.9])
def test_dropout_touches_the_update_alone_and_keeps_its_mean(dropout):
    x, W, A = torch.ones(4096, 1), torch.full((1, 1), 10.0), torch.ones(1, 1)
    B = torch.ones(1, 1)
    out = lora_linear(x, W, None, A, B, dropout=dropout)
    kept = torch.tensor(10 + 1 / (1 - dropout))
    dropped = torch.isclose(out, torch.tensor(10.0))
    assert_close(out[~dropped], kept.expand_as(out[~dropped]))
    assert abs(dropped.double().mean().item() - dropout) < 0.05


def test_dropout_repeats_with_its_seed_and_draws_nothing_when_zero():
    x = randn(16, 8)
    A, B = factors(8, 4, 2)
    torch.manual_seed(5)
    first = lora_update(x, A, B, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(lora_update(x, A, B, dropout=0.5), first)
    before = torch.get_rng_state()
    lora_update(x, A, B)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), SIZES, SIZES)
def test_stacked_factors_are_the_sum_of_the_adapters(ranks, i, o):
    parts = [
        (*factors(i, o, rank), torch.tensor(0.5 * n - 0.7, dtype=torch.float64))
        for n, rank in enumerate(ranks)
    ]
    A, B, gain = stack_factors(parts)
    assert A.shape == (sum(ranks), i)
    assert B.shape == (o, sum(ranks))
    total = sum(g * b @ a for a, b, g in parts)
    assert_close(lora_delta(A, B, gain), total)
    x = randn(3, i)
    assert_close(lora_update(x, A, B, gain), sum(lora_update(x, a, b, g) for a, b, g in parts))


def test_stacking_whole_numbers_is_exact():
    # small integers are exact in float32, so the sum must be so too, in every bit
    parts = [
        (
            torch.randint(-4, 5, (rank, 6)).float(),
            torch.randint(-4, 5, (5, rank)).float(),
            torch.tensor(gain),
        )
        for rank, gain in ((2, 1.0), (3, -2.0), (1, 0.5))
    ]
    x = torch.randint(-4, 5, (7, 6)).float()
    together = lora_update(x, *stack_factors(parts))
    assert torch.equal(together, sum(lora_update(x, *part) for part in parts))
    assert together.abs().max() > 0


def test_one_adapter_is_not_copied_by_stacking():
    part = (*factors(3, 2, 2), torch.tensor(1.5))
    assert all(a is b for a, b in zip(stack_factors([part]), part, strict=True))


def test_stacking_different_dtypes_takes_the_wider_one():
    narrow = (*factors(3, 2, 1, torch.bfloat16), torch.tensor(1.0))
    wide = (*factors(3, 2, 2, torch.float32), torch.tensor(2.0))
    for parts in ([narrow, wide], [wide, narrow]):
        A, B, gain = stack_factors(parts)
        assert A.dtype == B.dtype == torch.float32
        assert gain.shape == (3,)
        assert_close(lora_delta(A, B, gain), sum(lora_delta(*part) for part in parts))


def test_gradients_reach_every_stacked_adapter():
    parts = [
        tuple(t.requires_grad_() for t in (*factors(3, 2, r), torch.tensor(1.0).double()))
        for r in (1, 2)
    ]
    lora_update(randn(4, 3), *stack_factors(parts)).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for part in parts for t in part)


@given(SIZES, SIZES, st.integers(1, 4), DTYPES, SCALES)
def test_a_delta_is_the_dense_update_and_of_low_rank(i, o, rank, dtype, scale):
    A, B = factors(i, o, rank, dtype)
    delta = lora_delta(A, B, scale)
    assert delta.dtype == torch.promote_types(dtype, torch.float32)
    expected = scale * B.double() @ A.double()
    assert_close(delta.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= rank
    gains = torch.linspace(-1, 1, rank)
    weighted = B.double() @ torch.diag(gains.double()) @ A.double()
    assert_close(lora_delta(A, B, gains).double(), weighted, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=2), DTYPES, st.floats(1e-4, 10))
def test_a_merged_weight_is_the_correctly_rounded_sum(shape, dtype, size):
    W = randn(*shape, dtype=dtype)
    delta = (randn(*shape, seed=1) * size).to(torch.promote_types(dtype, torch.float32))
    merged = merged_weight(W, delta)
    assert merged.dtype == dtype
    exact = W.double() + delta.double()
    if dtype.itemsize > 2:
        assert torch.equal(merged, exact.to(dtype))
        return
    # half an ulp, and what the sum in float32 may move a tie by
    ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((merged.double() - exact).abs() <= 0.501 * ulp + 1e-7).all()


def test_merging_changes_neither_operand():
    W, delta = randn(3, 4, dtype=torch.bfloat16), randn(3, 4, dtype=torch.float32, seed=1)
    kept = W.clone(), delta.clone()
    merged = merged_weight(W, delta)
    assert torch.equal(W, kept[0])
    assert torch.equal(delta, kept[1])
    assert merged.data_ptr() not in (W.data_ptr(), delta.data_ptr())
    # a delta in float32 must not be rounded to bfloat16 before the sum
    assert not torch.equal(merged, W + delta.bfloat16())


@given(LEADING, SIZES, SIZES, st.integers(1, 3), SCALES)
def test_the_merged_weight_computes_what_the_update_did(lead, i, o, rank, scale):
    x, W, b = randn(*lead, i), randn(o, i, seed=1), randn(o, seed=2)
    A, B = factors(i, o, rank)
    merged = merged_weight(W, lora_delta(A, B, scale))
    got = torch.nn.functional.linear(x, merged, b)
    assert_close(got, lora_linear(x, W, b, A, B, scale), atol=1e-12, rtol=1e-12)


@given(SIZES, SIZES, st.integers(1, 3), SCALES)
def test_the_norm_of_an_update_is_that_of_its_dense_form(i, o, rank, scale):
    A, B = factors(i, o, rank)
    dense = torch.linalg.matrix_norm(lora_delta(A, B, scale))
    assert_close(delta_norm(A, B, scale), dense, atol=1e-7, rtol=1e-12)
    gains = torch.arange(1.0, rank + 1, dtype=torch.float64)
    dense = torch.linalg.matrix_norm(lora_delta(A, B, gains))
    assert_close(delta_norm(A, B, gains), dense, atol=1e-7, rtol=1e-12)


def test_the_norm_of_an_update_is_right_where_its_terms_cancel():
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-12]])
    B = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert delta_norm(A, B).item() == 2**-12
    assert delta_norm(A * float("nan"), B).isnan()


def test_the_norm_has_a_gradient_at_zero_and_elsewhere_the_dense_ones():
    A, B = (f.requires_grad_() for f in factors(4, 5, 2))
    mine = torch.autograd.grad(delta_norm(A, B, 0.5), (A, B))
    dense = torch.autograd.grad(torch.linalg.matrix_norm(lora_delta(A, B, 0.5)), (A, B))
    assert_close(mine, dense)
    zero = torch.zeros_like(B, requires_grad=True)
    grads = torch.autograd.grad(delta_norm(A, zero), (A, zero))
    assert all(not grad.any() for grad in grads)


def test_the_maths_is_what_the_door_shows():
    assert set(functional.__all__) >= {
        "delta_norm",
        "lora_delta",
        "lora_linear",
        "lora_update",
        "merged_weight",
        "stack_factors",
    }
    assert all(callable(getattr(functional, name)) for name in functional.__all__)
