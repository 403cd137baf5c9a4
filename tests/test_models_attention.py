"""Cross-attention against the formula written out, values and every gradient."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lora_core.models import CrossAttention
from lora_core.models.attention import masked_attention


def written_out(
    attention: CrossAttention, x: Tensor, context: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Per sample, head and query: softmax over the keys it may attend to."""
    context = x if context is None else context
    q, k = x @ attention.to_q.weight.T, context @ attention.to_k.weight.T
    v = context @ attention.to_v.weight.T
    width = q.shape[-1] // attention.heads
    samples = []
    for b in range(len(x)):
        heads = []
        for h in range(attention.heads):
            part = slice(h * width, (h + 1) * width)
            rows = []
            for i in range(x.shape[1]):
                allowed = torch.ones(context.shape[1], dtype=torch.bool)
                if mask is not None:
                    allowed = mask[b, h, i]
                scores = k[b, allowed][:, part] @ q[b, i, part] / math.sqrt(width)
                # over no keys at all this is an empty sum: zeros
                rows.append(torch.softmax(scores, dim=0) @ v[b, allowed][:, part])
            heads.append(torch.stack(rows))
        samples.append(torch.cat(heads, dim=-1))
    out = attention.to_out[0]
    return torch.stack(samples) @ out.weight.T + out.bias


def gradients(out: Tensor, attention: CrossAttention, *inputs: Tensor | None) -> list[Tensor]:
    leaves = [*attention.parameters(), *(x for x in inputs if x is not None)]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True))


@st.composite
def masks(draw: st.DrawFn, full: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """A mask in any accepted shape, and the same mask over (b, h, n, m)."""
    b, h, n, m = full
    leading = draw(st.sampled_from([(b,), (b, n), (b, h, n)]))
    leading = tuple(draw(st.sampled_from([1, size])) for size in leading)
    seed = draw(st.integers(0, 999))
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    shape = (*leading, m)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    missing = (1,) * (4 - mask.ndim)
    return mask, mask.reshape(mask.shape[0], *missing, *mask.shape[1:]).expand(full)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), masked=st.booleans(), crossed=st.booleans())
def test_values_and_gradients_are_those_of_the_formula(
    data: st.DataObject, masked: bool, crossed: bool
) -> None:
    size = st.integers(1, 3)
    b, h, n, m, d = (data.draw(size, label=name) for name in "bhnmd")
    m = m if crossed else n
    torch.manual_seed(data.draw(st.integers(0, 999)))
    attention = CrossAttention(5, 3 if crossed else None, heads=h, dim_head=d).double()
    x = torch.randn(b, n, 5, dtype=torch.float64, requires_grad=True)
    context = torch.randn(b, m, 3, dtype=torch.float64, requires_grad=True) if crossed else None
    mask, full = data.draw(masks((b, h, n, m))) if masked else (None, None)

    out, expected = attention(x, context, mask), written_out(attention, x, context, full)

    assert_close(out, expected)
    assert_close(gradients(out, attention, x, context), gradients(expected, attention, x, context))


def test_the_output_is_neither_zero_nor_blind_to_its_inputs() -> None:
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    out = attention(x, context) - attention.to_out[0].bias
    assert out.abs().min() > 0
    for changed in (attention(x + 1, context), attention(x, context * 2)):
        assert not torch.allclose(changed, attention(x, context))
    assert all(g.abs().sum() > 0 for g in gradients(attention(x, context), attention))


def test_a_query_with_nothing_to_attend_to_gets_zeros_and_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for n in (2, 3, 3))
    mask = torch.tensor([[False] * 3, [True] * 3])[None, None]
    out = masked_attention(q, k, v, mask)
    assert_close(out[0, 0, 0], torch.zeros(4))
    assert out[0, 0, 1].abs().min() > 0
    blind, *_ = torch.autograd.grad(out.sum(), q)
    assert_close(blind[0, 0, 0], torch.zeros(4))
    assert_close(
        torch.autograd.grad(masked_attention(q, k, v, mask).square().sum(), (q, k, v)),
        torch.autograd.grad(masked_attention(q[:, :, 1:], k, v).square().sum(), (q, k, v)),
    )


def test_a_context_without_tokens_leaves_only_the_output_bias() -> None:
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    out = attention(torch.randn(2, 3, 8), torch.randn(2, 0, 6))
    assert_close(out, attention.to_out[0].bias.expand(2, 3, 8))


def test_masked_tokens_might_as_well_not_be_there() -> None:
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, True, False, False]])
    assert_close(attention(x, context, mask), attention(x, context[:, :3]))


def test_without_a_context_it_attends_to_itself() -> None:
    attention = CrossAttention(8, heads=2, dim_head=4)
    x = torch.randn(2, 3, 8)
    assert_close(attention(x), attention(x, x))


def test_the_order_of_the_context_does_not_matter() -> None:
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    assert_close(attention(x, context), attention(x, context.flip(1)))


def test_projections_carry_the_usual_names() -> None:
    names = [name for name, _ in CrossAttention(8).named_parameters()]
    assert names == [
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
        "to_out.0.bias",
    ]


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (2, 4, 5), (2, 3, 3, 5), (5,), (1, 1, 1, 1, 5)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    message = re.escape(
        "`mask` must have shape (batch, m) = (2, 5), (batch, n, m) = (2, 3, 5) or "
        f"(batch, heads, n, m) = (2, 2, 3, 5), but has {shape}."
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        attention(torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.ones(shape, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^`mask` must be boolean \(True = attend\), but has dtype"
    ):
        CrossAttention(8)(torch.randn(2, 3, 8), mask=torch.ones(2, 3))


def test_widths_that_do_not_fit_are_refused() -> None:
    attention = CrossAttention(8, 6, heads=2, dim_head=4)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"^`x` must have shape \(batch, tokens, 8\), but has"):
        attention(context, context)
    with pytest.raises(ValueError, match=r"^`context` must have shape \(batch, tokens, 6\), but"):
        attention(x, x)
    with pytest.raises(ValueError, match=r"^`context` must have the batch size of `x` = 2, but"):
        attention(x, context[:1])
    with pytest.raises(ValueError, match=r"^`context` must be given when"):
        attention(x)


@pytest.mark.parametrize("name", ["query_dim", "context_dim", "heads", "dim_head"])
def test_a_size_below_one_is_refused(name: str) -> None:
    settings = {"query_dim": 8, "context_dim": 6, "heads": 2, "dim_head": 4, name: 0}
    with pytest.raises(ValueError, match=rf"^`{name}` must be at least 1, but is 0\.$"):
        CrossAttention(**settings)
