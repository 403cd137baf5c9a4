"""Low-rank updates of embeddings against the dense table and against one-hot rows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from lora_core.functional import embedding_update, lora_delta, lora_embedding, lora_update

ENTRIES, DIM, RANK = 7, 5, 3


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    A = randn(RANK, ENTRIES, dtype=dtype, seed=1)
    return A, randn(DIM, RANK, dtype=dtype, seed=2)


def indices(*shape: int) -> Tensor:
    return torch.randint(ENTRIES, shape, generator=torch.Generator().manual_seed(4))


@given(
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["number", "scalar", "rank", "batch"]),
    st.floats(-2, 2, width=16),
)
def test_an_update_is_that_of_one_hot_rows(shape, kind, scale):
    index, (A, B) = indices(*shape), factors()
    gain: Tensor | float = scale
    if kind == "scalar":
        gain = torch.tensor(scale)
    elif kind == "rank" or (kind == "batch" and not shape):
        gain = scale * torch.arange(1.0, RANK + 1)
    elif kind == "batch":
        gain = scale * randn(shape[0], RANK, seed=5)
    got = embedding_update(index, A, B, gain)
    assert got.shape == (*shape, DIM)
    assert_close(got, lora_update(F.one_hot(index, ENTRIES).double(), A, B, gain))


@given(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.floats(-2, 2, width=16))
def test_the_whole_is_the_lookup_in_the_dense_table(shape, gain):
    index, W, (A, B) = indices(*shape), randn(ENTRIES, DIM), factors()
    table = W + lora_delta(A, B, gain).T
    assert_close(lora_embedding(index, W, A, B, gain), table[index])


def test_a_zero_factor_leaves_the_base_bit_for_bit():
    index, W, (A, B) = indices(2, 4), randn(ENTRIES, DIM, dtype=torch.bfloat16), factors()
    base = F.embedding(index, W)
    assert torch.equal(lora_embedding(index, W, A, torch.zeros_like(B)), base)
    assert torch.equal(lora_embedding(index, W, A, B, 0.0), base)
    assert not torch.equal(lora_embedding(index, W, A, B), base)


@pytest.mark.parametrize("gain_shape", [(), (RANK,), (2, RANK)])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_first_and_second_gradients_are_right(gain_shape, padding_idx):
    index = torch.tensor([[3, 1, 3], [2, 6, 1]])  # without the padding, whose gradient is left out
    leaves = [t.requires_grad_() for t in (*factors(), randn(*gain_shape, seed=5))]

    def update(*operands: Tensor) -> Tensor:
        return embedding_update(index, *operands, padding_idx=padding_idx)

    assert gradcheck(update, leaves)
    assert gradgradcheck(update, leaves)


def gradients(index: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    A, B = (f.requires_grad_() for f in factors())
    out = embedding_update(index, A, B, 0.5, **settings)
    return torch.autograd.grad(out, (A, B), randn(*out.shape, seed=6))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_padding_entry_is_looked_up_but_gets_no_gradient(sparse):
    index, (A, B) = torch.tensor([3, 0, 3, 1]), factors()
    got = embedding_update(index, A, B, padding_idx=0, sparse=sparse)
    assert_close(got, embedding_update(index, A, B))
    padded, plain = (gradients(index, sparse=sparse, padding_idx=p)[0] for p in (0, None))
    padded, plain = padded.to_dense(), plain.to_dense()
    assert plain[:, 0].any()
    plain[:, 0] = 0
    assert_close(padded, plain)


def test_a_gradient_is_divided_by_how_often_its_entry_was_looked_up():
    index = torch.tensor([3, 1, 3, 3])
    shared, (plain, _) = gradients(index, scale_grad_by_freq=True)[0], gradients(index)
    assert_close(shared[:, 3], plain[:, 3] / 3)
    assert_close(shared[:, 1], plain[:, 1])


@given(st.lists(st.integers(0, 4), max_size=3).map(tuple))
def test_a_sparse_gradient_is_the_dense_one(shape):
    (down, up), dense = gradients(indices(*shape), sparse=True), gradients(indices(*shape))
    assert down.is_sparse
    assert down._nnz() == indices(*shape).numel() * RANK
    assert_close(down.to_dense(), dense[0])
    assert_close(up, dense[1])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam])
def test_optimisers_take_the_sparse_gradient(make):
    index, (A, B) = torch.tensor([3, 1, 3]), factors()
    before = A.clone()
    optimiser = make([A.requires_grad_()], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        for _ in range(2):  # accumulates
            embedding_update(index, A, B, sparse=True).square().sum().backward()
        assert A.grad.is_sparse
        optimiser.step()
    looked_up = torch.isin(torch.arange(ENTRIES), index)
    assert (before != A)[:, looked_up].all()
    assert torch.equal(A[:, ~looked_up], before[:, ~looked_up])


def test_the_sparse_form_takes_a_dense_gradient_too():
    index, (A, B) = torch.tensor([3, 1, 3]), factors()
    A.requires_grad_()
    (embedding_update(index, A, B, sparse=True).sum() + (A**2).sum()).backward()
    assert not A.grad.is_sparse
    dense = torch.autograd.grad(embedding_update(index, A, B).sum() + (A**2).sum(), A)[0]
    assert_close(A.grad, dense)


def test_a_compiled_gradient_is_dense_and_the_same():
    index, leaves = indices(2, 4), [f.requires_grad_() for f in factors()]
    compiled = torch.compile(embedding_update, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(index, *leaves, sparse=True).square().sum(), leaves)
    expected = torch.autograd.grad(embedding_update(index, *leaves).square().sum(), leaves)
    assert_close(got, expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_base_takes_float32_factors(half):
    index, W = indices(2, 4), randn(ENTRIES, DIM, dtype=half)
    A, B = (f.requires_grad_() for f in factors(torch.float32))
    out = lora_embedding(index, W, A, B, torch.tensor([0.5, 2.0, -1.0]).double())
    assert out.dtype == half
    table = W.double() + lora_delta(A, B, torch.tensor([0.5, 2.0, -1.0])).T
    assert_close(out.double(), table[index], atol=2e-2, rtol=2e-2)
    out.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert A.grad.any()


def test_dropout_drops_the_whole_update_of_an_entry_and_keeps_its_mean():
    index, (A, B) = torch.full((4096,), 3), factors()
    whole = embedding_update(index[:1], A, B)
    out = embedding_update(index, A, B, dropout=0.25)
    dropped = (out == 0).all(dim=1)
    assert_close(out[~dropped], (whole / 0.75).expand(int((~dropped).sum()), -1))
    assert abs(dropped.double().mean().item() - 0.25) < 0.05
