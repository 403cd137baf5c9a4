"""The low-rank update of a bilinear layer against the bilinear map with its product."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lora_core import functional


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,)])
def test_the_update_is_the_bilinear_map_with_its_product(shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([0.5, -2.0], dtype=torch.float64)
    dense = torch.einsum("or,r,rij->oij", B, gain, A)
    expected = F.bilinear(x, z, dense)
    got = functional.bilinear_update(x, z, A, B, gain)
    assert_close(got, expected)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((got * weights).sum(), (x, z, A, B))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, z, A, B))
    assert_close(ours, theirs)


def test_each_sample_may_have_gains_of_its_own():
    torch.manual_seed(0)
    x, z, A, B = torch.randn(2, 6, 3), torch.randn(2, 6, 4), torch.randn(2, 3, 4), torch.randn(5, 2)
    gain = torch.tensor([[0.5, -2.0], [1.0, 0.0]])
    got = functional.bilinear_update(x, z, A, B, gain)
    alone = [functional.bilinear_update(x[i], z[i], A, B, gain[i]) for i in range(2)]
    assert_close(got, torch.stack(alone))


def test_dropout_scales_what_it_keeps_of_the_first_input():
    x, z, A, B = torch.ones(1, 3), torch.ones(1, 4), torch.ones(2, 3, 4), torch.ones(5, 2)
    whole = functional.bilinear_update(x, z, A, B)
    torch.manual_seed(0)
    seen = {
        round(float(functional.bilinear_update(x, z, A, B, dropout=0.5)[0, 0]), 3)
        for _ in range(50)
    }
    assert seen <= {0.0, *(round(float(whole[0, 0]) * k * 2 / 3, 3) for k in (1, 2, 3))}
    assert len(seen) > 1
