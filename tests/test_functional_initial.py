"""What fresh factors promise: their law, their seed, and a layer that starts from its base."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from lora_core import functional
from lora_core.functional import conv_update, initial, initial_factors, lora_update, subtracted

DRAWN = ["kaiming", "gaussian", "orthogonal"]
FROM_WEIGHT = ["pissa", "olora"]
SIZES = st.integers(1, 8)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("init", DRAWN)
def test_a_seed_decides_every_bit_whatever_the_weight(init):
    A, B = initial_factors(init, (5, 6), 3, generator=seeded())
    assert A.shape == (3, 6)
    assert torch.equal(B, torch.zeros(5, 3))
    for weight in (randn(5, 6).bfloat16(), torch.empty(5, 6, device="meta"), randn(5, 6).double()):
        again, _ = initial_factors(init, weight, 3, 0.5, generator=seeded())
        assert torch.equal(again, A)
    assert not torch.equal(initial_factors(init, (5, 6), 3, generator=seeded(2))[0], A)
    torch.manual_seed(1)  # the same engine as a generator's
    assert torch.equal(initial_factors(init, (5, 6), 3)[0], A)


def test_random_rows_have_the_spread_they_promise():
    A, _ = initial_factors("kaiming", (2, 4096), 4, generator=seeded())
    assert_close(A.abs().max().item(), 1 / 64, rtol=1e-2, atol=0)
    assert_close(A.std().item(), 1 / 64 / 3**0.5, rtol=2e-2, atol=0)
    A, _ = initial_factors("kaiming", (2, 4096), 4, generator=seeded(), fan_in=4)
    assert_close(A.abs().max().item(), 0.5, rtol=1e-2, atol=0)
    A, _ = initial_factors("gaussian", (2, 4096), 4, generator=seeded())
    assert_close(A.std().item(), 0.25, rtol=2e-2, atol=0)


@given(SIZES, SIZES, st.data())
def test_orthogonal_rows_are_orthonormal(width, out, data):
    rank = data.draw(st.integers(1, width))
    A, B = initial_factors("orthogonal", (out, width), rank, generator=seeded())
    assert_close(A @ A.T, torch.eye(rank))
    assert not B.any()


@given(SIZES, SIZES, st.floats(0.125, 8), st.data())
def test_pissa_is_the_best_approximation_of_its_rank(out, width, scale, data):
    rank = data.draw(st.integers(1, min(out, width)))
    W = randn(out, width)
    A, B = initial_factors("pissa", W, rank, scale)
    left = W - scale * B @ A
    singular = torch.linalg.svdvals(W)
    assert_close(left.norm(), singular[rank:].norm(), atol=1e-4, rtol=1e-4)
    assert_close(A @ A.T, B.T @ B, atol=1e-4, rtol=1e-4)  # the two share it evenly


def test_a_large_matrix_is_decomposed_as_well_as_a_small_one(monkeypatch):
    W = randn(120, 90)
    exact = initial_factors("pissa", W, 4, 2.0)
    monkeypatch.setattr(initial, "_EXACT", 50)
    A, B = initial_factors("pissa", W, 4, 2.0, generator=seeded())
    again = initial_factors("pissa", W, 4, 2.0, generator=seeded())
    assert torch.equal(A, again[0])
    assert A.shape == (4, 90)
    assert_close(B @ A, exact[1] @ exact[0], atol=1e-3, rtol=1e-3)


@given(SIZES, SIZES, st.data())
def test_olora_is_the_head_of_a_qr_decomposition(out, width, data):
    rank = data.draw(st.integers(1, min(out, width)))
    W = randn(out, width, dtype=torch.float64)
    A, B = initial_factors("olora", W, rank)
    Q, R = torch.linalg.qr(W)
    assert_close(B, Q[:, :rank].float(), atol=1e-5, rtol=1e-5)
    assert_close(A, R[:rank].float(), atol=1e-5, rtol=1e-5)


def test_eva_takes_the_directions_in_which_the_inputs_vary_most():
    directions, _ = torch.linalg.qr(randn(6, 6, dtype=torch.float64))
    variance = torch.tensor([1.0, 9.0, 0.1, 4.0, 0.2, 0.3]).double()
    A, B = initial_factors("eva", (5, 6), 2, covariance=directions * variance @ directions.T)
    alike = A.double() @ directions[:, [1, 3]]
    assert_close(alike.abs(), torch.eye(2).double(), atol=1e-6, rtol=0)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
    assert not B.any()


@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_starts_from_the_weight_still_starts_from_the_base(init, dtype):
    A, B = (t.to(dtype) for t in initial_factors(init, randn(5, 6), 3, 0.7))
    x = randn(4, 6, dtype=dtype)
    assert lora_update(x, A, B).any()
    down, up = subtracted(A, B, A.clone(), B.clone())
    assert not lora_update(x, down, up, 0.7).any()
    assert not (up @ down).any()


@given(SIZES, SIZES, st.integers(1, 3))
def test_a_subtracted_update_is_the_difference_of_the_two(out, width, rank):
    A, B = randn(rank, width, dtype=torch.float64), randn(out, rank, dtype=torch.float64, seed=1)
    A0, B0 = A + randn(*A.shape, seed=2), B + randn(*B.shape, seed=3)
    down, up = subtracted(A, B, A0, B0)
    assert down.shape == (2 * rank, width)
    assert_close(up @ down, B @ A - B0 @ A0)


def test_a_subtracted_convolution_is_the_difference_of_the_two():
    A, B = randn(2, 3, 3, 3).double(), randn(4, 2, 1, 1, seed=1).double()
    A0, B0, x = A + 1, B - 0.5, randn(1, 3, 5, 5, seed=2).double()
    got = conv_update(x, *subtracted(A, B, A0, B0), padding=1)
    assert_close(got, conv_update(x, A, B, padding=1) - conv_update(x, A0, B0, padding=1))
    leaves = [t[:, :2, :1].contiguous().requires_grad_() for t in (A, B)]
    constants = [t[:, :2, :1] for t in (A0, B0)]
    assert gradcheck(lambda A, B: subtracted(A, B, *constants), leaves)


def test_an_untrained_subtraction_gives_both_factors_a_gradient():
    A, B = (t.requires_grad_() for t in initial_factors("pissa", randn(5, 6), 3))
    lora_update(randn(4, 6), *subtracted(A, B, A.detach(), B.detach())).sum().backward()
    assert A.grad.any()
    assert B.grad.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("he", (5, 6), 2), r"^`init` must be one of eva, gaussian, .*, but is 'he'\.$"),
        (("pissa", (5, 6), 2), r"^`weight` must have values where `init` is 'pissa', but is a"),
        (("olora", torch.ones(5, 6), 6), r"^`rank` must be at most min\(out, in\) = 5 where"),
        (("orthogonal", (9, 6), 7), r"^`rank` must be at most in = 6 where .*, but is 7\.$"),
        (("pissa", torch.ones(5, 6), 2, 0.0), r"^`scale` must be above 0 where .*, but is 0\.$"),
        (("eva", (5, 6), 2), r"^`covariance` must be \(in, in\) = \(6, 6\) where .* is None\."),
    ],
)
def test_what_cannot_be_started_from_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        initial_factors(*settings)


def test_the_door_is_in_order():
    assert functional.__all__ == sorted(functional.__all__)
