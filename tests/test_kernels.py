"""Every fast form against the slow reference: outputs and every gradient, in one table."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from lora_core.functional import (
    dora_linear,
    dora_norm,
    fused_lora_linear,
    fused_plan,
    lora_linear,
    stack_factors,
)
from lora_core.kernels import draw_seed, dropped, linear, ops
from lora_core.kernels.dropout import keep_mask


def through_operator(x, weight, bias, lora_A, lora_B, gain):
    gain = gain if isinstance(gain, Tensor) else torch.tensor(gain, dtype=torch.float64)
    return ops.lora_linear(x, weight, bias, lora_A, lora_B, gain, dtype=x.dtype, form="addmm")


FORMS = {
    "addmm": linear.low_rank,
    "merge": linear.merged,
    "operator": through_operator,
    "chosen": fused_lora_linear,
}
# how far a rounding of the result, or of h, may put two right answers apart
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 6e-2,
    torch.float16: 8e-3,
}
SHAPES = {
    "vector": lambda K: randn(1, K)[0],
    "one row": lambda K: randn(1, K),
    "rows": lambda K: randn(7, K),
    "empty": lambda K: randn(0, K),
    "no samples": lambda K: randn(0, 3, K),
    "three": lambda K: randn(2, 5, K),
    "four": lambda K: randn(2, 3, 1, K),
    "columns": lambda K: randn(K, 7).t(),
    "swapped": lambda K: randn(5, 2, K).transpose(0, 1),
    "channels last": lambda K: randn(2, K, 5).transpose(1, 2),
    "every other": lambda K: randn(2, 6, K)[:, ::2],
    "expanded": lambda K: randn(1, 5, K).expand(3, 5, K),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def leaf(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).detach().requires_grad_()


def gain_of(kind: str, rank: int, batch: int) -> Tensor | float:
    return {
        "one": 1.0,
        "number": 0.7,
        "scalar": torch.tensor(-1.5, dtype=torch.float64),
        "per rank": torch.linspace(-1, 2, rank, dtype=torch.float64),
        "per sample": randn(batch, rank, seed=5),
        "zero": 0.0,
    }[kind]


def answers(form, x, W, b, A, B, gain):
    """The output and the gradients of x, A and B for one cotangent."""
    y = form(x, W, b, A, B, gain)
    dy = randn(*y.shape, seed=9).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("gain_kind", ["one", "number", "scalar", "per rank", "per sample", "zero"])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_form_gives_the_references_output_and_gradients(form, shape, gain_kind, dtype):
    K, N = 20, 12
    x = SHAPES[shape](K)
    if gain_kind == "per sample" and (form == "merge" or x.ndim < 2):
        return  # one matrix can't serve samples of their own
    for rank, bias in ((1, True), (3, False), (12, True)):
        W, b = randn(N, K, seed=1, dtype=dtype), randn(N, seed=2, dtype=dtype) if bias else None
        gain = gain_of(gain_kind, rank, x.shape[0])
        factors = randn(rank, K, seed=3), randn(N, rank, seed=4)
        got = answers(FORMS[form], leaf(x, dtype), W, b, *(leaf(f, dtype) for f in factors), gain)
        wide = [leaf(t.to(dtype), torch.float64) for t in (x, *factors)]
        b64 = None if b is None else b.double()
        expected = answers(lora_linear, wide[0], W.double(), b64, *wide[1:], gain)
        for name, g, e in zip(("y", "dx", "dA", "dB"), got, expected, strict=True):
            assert g.dtype is dtype
            bound = TOLERANCE[dtype] * max(1.0, float(e.abs().max()) if e.numel() else 1.0)
            assert_close(g.double(), e, atol=bound, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("rank", [1, 4, 9, 17, 64])
def test_tails_and_ranks_at_real_sizes_agree_with_the_reference(form, rank):
    x, W, b = randn(77, 96), randn(70, 96, seed=1), randn(70, seed=2)
    factors = randn(rank, 96, seed=3), randn(70, rank, seed=4)
    got = answers(FORMS[form], leaf(x, torch.float64), W, b, *map(torch.nn.Parameter, factors), 0.7)
    wide = [leaf(t, torch.float64) for t in (x, *factors)]
    expected = answers(lora_linear, wide[0], W, b, *wide[1:], 0.7)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("gain_kind", ["number", "per rank", "per sample"])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_gradients_are_right(form, gain_kind, bias):
    if gain_kind == "per sample" and form == "merge":
        return
    x, W, b = randn(2, 3, 4), randn(5, 4, seed=1), randn(5, seed=2) if bias else None
    leaves = [leaf(t, torch.float64) for t in (x, randn(2, 4, seed=3), randn(5, 2, seed=4))]
    gain = gain_of(gain_kind, 2, 2)

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return FORMS[form](x, W, b, A, B, gain)

    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("form", ["addmm", "merge", "operator"])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_the_gradients_asked_for_are_made(form, wanted):
    tensors = randn(3, 4), randn(2, 4, seed=3), randn(5, 2, seed=4)
    leaves = [t.requires_grad_(asked) for t, asked in zip(tensors, wanted, strict=True)]
    x, A, B = leaves
    FORMS[form](x, randn(5, 4, seed=1), None, A, B, 0.5).sum().backward()
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    lora_linear(twins[0], randn(5, 4, seed=1), None, *twins[1:], 0.5).sum().backward()
    for t, twin in zip(leaves, twins, strict=True):
        assert (t.grad is None) == (twin.grad is None)
        if t.grad is not None:
            assert_close(t.grad, twin.grad)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_zero_update_leaves_every_bit_of_the_frozen_layer(shape, dtype, bias):
    x = SHAPES[shape](40).to(dtype)
    W, b = randn(24, 40, seed=1, dtype=dtype), randn(24, seed=2, dtype=dtype) if bias else None
    expected = torch.nn.functional.linear(x, W, b)
    A, B = randn(4, 40, seed=3, dtype=torch.float32), torch.zeros(24, 4)
    for form in (linear.low_rank, fused_lora_linear):
        for grad in (True, False):
            got = form(x, W, b, A.requires_grad_(grad), B, 0.7)
            assert torch.equal(got, expected)
            assert got.shape == expected.shape


def test_float32_factors_are_cast_down_and_their_gradients_come_back_wide():
    x = randn(9, 20, dtype=torch.bfloat16).requires_grad_()
    W = randn(12, 20, seed=1, dtype=torch.bfloat16)
    A, B = (leaf(t, torch.float32) for t in (randn(3, 20, seed=3), randn(12, 3, seed=4)))
    for form in FORMS.values():
        y, dx, dA, dB = answers(form, x, W, None, A, B, 0.5)
        assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (dA.dtype, dB.dtype) == (torch.float32, torch.float32)
        assert dA.abs().max() > 0


def test_a_gain_changed_between_forward_and_backward_raises():
    for form in (linear.low_rank, linear.merged, through_operator):
        A, B = (leaf(t, torch.float64) for t in (randn(2, 4, seed=3), randn(5, 2, seed=4)))
        gain = torch.tensor(1.5, dtype=torch.float64)
        y = form(randn(3, 4), randn(5, 4, seed=1), None, A, B, gain)
        gain.mul_(5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("form", list(FORMS))
def test_a_gain_tensor_is_not_rounded_to_sixteen_bits(form):
    # 0.3003 is 0.1 % off in bfloat16: the same error in every update
    x, W = randn(64, 40, dtype=torch.bfloat16), torch.zeros(32, 40, dtype=torch.bfloat16)
    A, B = randn(4, 40, seed=3, dtype=torch.bfloat16), randn(32, 4, seed=4, dtype=torch.bfloat16)
    for gain in (torch.tensor(0.3003), torch.full((4,), 0.3003)):
        got = FORMS[form](x, W, None, A, B, gain).double()
        asked = x.double() @ A.double().T @ B.double().T
        slope = float((got * asked).sum() / asked.square().sum())
        assert slope == pytest.approx(0.3003, rel=4e-4)


@pytest.mark.parametrize("form", [linear.low_rank, linear.merged, lora_linear, through_operator])
def test_a_backward_inside_autocast_is_the_one_outside(form):
    leaves = [leaf(t, torch.float32) for t in (randn(6, 4), randn(2, 4, seed=3), randn(5, 2))]
    y = form(leaves[0], randn(5, 4, seed=1).float(), None, *leaves[1:], 0.5)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype is torch.float32
        assert_close(g, e, atol=0.05 if form is lora_linear else 1e-6, rtol=0)


def test_autocast_leaves_float64_alone_and_refuses_what_the_frozen_layer_does():
    A, B = randn(2, 4), randn(5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            fused_lora_linear(torch.ones(3, 4, dtype=torch.int64), randn(5, 4).float(), None, A, B)
        with pytest.raises(RuntimeError):
            fused_lora_linear(randn(3, 4), randn(5, 4).float(), None, A, B)
        assert fused_lora_linear(randn(3, 4).float(), randn(5, 4).float(), None, A, B).dtype is (
            torch.bfloat16
        )


@pytest.mark.parametrize("trained", ["weight", "bias", "gain"])
def test_whatever_trains_besides_the_factors_gets_its_gradient(trained):
    tensors = {"weight": randn(5, 4, seed=1), "bias": randn(5), "gain": randn(2, seed=8)}
    tensors[trained].requires_grad_()
    A, B = randn(2, 4, seed=3), randn(5, 2, seed=4)
    x = randn(3, 4)
    y = fused_lora_linear(x, tensors["weight"], tensors["bias"], A, B, tensors["gain"])
    y.square().sum().backward()
    assert tensors[trained].grad.abs().max() > 0
    with torch.no_grad():  # nothing is to be made then, so nothing stands in the way
        plan = fused_plan(x, tensors["weight"], tensors["bias"], A, B, tensors["gain"])
    assert plan.form != "composed"


@pytest.mark.parametrize("wrong", ["x", "bias", "lora_A", "lora_B", "gain"])
def test_shapes_that_do_not_fit_are_an_error_in_every_door(wrong):
    shapes = {"x": (3, 4), "bias": (5,), "lora_A": (2, 4), "lora_B": (5, 2), "gain": (2,)}
    shapes[wrong] = (*shapes[wrong][:-1], 7)
    t = {name: torch.ones(shape) for name, shape in shapes.items()}
    operands = t["x"], torch.ones(5, 4), t["bias"], t["lora_A"], t["lora_B"], t["gain"]
    with pytest.raises(RuntimeError):
        fused_lora_linear(*operands)
    for form in ("addmm", "triton1"):
        with pytest.raises(
            ValueError, match=r"^The operands must have shapes \(M, in\), .*but have"
        ):
            torch.ops.lora_core.linear(*operands, torch.float32, form, 0.0, None)


def test_an_optimiser_step_between_forward_and_backward_raises():
    for form in (linear.low_rank, linear.merged, through_operator):
        x, W = randn(3, 4), randn(5, 4, seed=1)
        A, B = (leaf(t, torch.float64) for t in (randn(2, 4, seed=3), randn(5, 2, seed=4)))
        y = form(x, W, None, A, B, 1.0)
        with torch.no_grad():
            B.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_output_can_be_changed_in_place_afterwards():
    for form, lead in itertools.product(FORMS.values(), [(3,), (2, 3)]):
        A, B = (leaf(t, torch.float64) for t in (randn(2, 4, seed=3), randn(5, 2, seed=4)))
        y = form(randn(*lead, 4), randn(5, 4, seed=1), randn(5), A, B, 1.0)
        y.relu_().sum().backward()
        assert A.grad.abs().max() > 0


# dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share_of_every_lane(p):
    mask, scale = keep_mask(torch.empty(400_001), p, seed=3)
    assert scale == pytest.approx(1 / (1 - p), rel=1e-4)
    for lane in range(4):  # four 16-bit numbers come from one word
        assert float(mask[lane::4].mean()) == pytest.approx(1 - p, abs=0.01)
    neighbours = (mask[1:] * mask[:-1]).mean()
    assert float(neighbours) == pytest.approx((1 - p) ** 2, abs=0.01)


def test_a_seed_decides_the_mask_and_torchs_seed_decides_that():
    x = torch.ones(1000)
    assert torch.equal(dropped(x, 0.3, 5), dropped(x, 0.3, 5))
    assert not torch.equal(dropped(x, 0.3, 5), dropped(x, 0.3, 6))
    torch.manual_seed(0)
    first = draw_seed()
    torch.manual_seed(0)
    assert draw_seed() == first
    assert draw_seed() != first


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dropped_out_call_is_the_references_with_the_same_seed(lead, dtype):
    x, W, b = randn(*lead, 20), randn(12, 20, seed=1, dtype=dtype), randn(12, dtype=dtype)
    leaves = [leaf(t, dtype) for t in (x, randn(3, 20, seed=3), randn(12, 3, seed=4))]
    torch.manual_seed(1)
    seed = draw_seed()
    torch.manual_seed(1)
    got = linear.low_rank(leaves[0], W, b, *leaves[1:], 0.7, dropout=0.4)
    twins = [leaf(t, dtype) for t in leaves]
    expected = lora_linear(twins[0], W, b, *twins[1:], 0.7, dropout=0.4, seed=seed)
    assert_close(got, expected)
    assert not torch.allclose(got, lora_linear(twins[0], W, b, *twins[1:], 0.7))
    dy = randn(*got.shape).to(dtype)
    gradients = zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, twins, dy), strict=True
    )
    for g, e in gradients:
        assert_close(g, e)


def test_second_gradients_are_right_under_dropout():
    leaves = [leaf(t, torch.float64) for t in (randn(3, 4), randn(2, 4, seed=3), randn(5, 2))]

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(4)
        return linear.low_rank(x, randn(5, 4, seed=1), None, A, B, 0.7, dropout=0.3)

    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("p", [1e-7, 7e-6, 0.999_995])
def test_a_probability_at_the_edge_drops_next_to_nothing_or_next_to_all(p):
    mask, scale = keep_mask(torch.empty(400_000), p, seed=3)
    assert float(mask.mean()) == pytest.approx(1 - p, abs=1e-4)
    assert scale == pytest.approx(min(1 / (1 - p), 65_536), rel=1e-4)


def test_the_operator_drops_out_as_the_reference_with_its_seed():
    seed = torch.tensor([11])
    leaves = [leaf(t, torch.float64) for t in (randn(6, 4), randn(2, 4, seed=3), randn(5, 2))]
    W, gain = randn(5, 4, seed=1), torch.tensor(0.7, dtype=torch.float64)

    def operator(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        operands = x, W, None, A, B, gain, torch.float64, "addmm", 0.4, seed
        return torch.ops.lora_core.linear(*operands)[0]

    def reference(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, W, None, A, B, 0.7, dropout=0.4, seed=11)

    assert_close(operator(*leaves), reference(*leaves))
    dy = randn(6, 5)
    for g, e in zip(
        torch.autograd.grad(operator(*leaves), leaves, dy),
        torch.autograd.grad(reference(*leaves), leaves, dy),
        strict=True,
    ):
        assert_close(g, e)
    assert gradgradcheck(operator, leaves)


def test_every_call_of_the_operator_draws_another_mask():
    operands = torch.ones(8, 40), torch.zeros(8, 40), None, torch.ones(1, 40), torch.ones(8, 1)
    call = partial(ops.lora_linear, *operands, torch.tensor(1.0), dtype=torch.float32)
    first, second = (call(form="addmm", dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)


# several adapters


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans())
def test_stacked_adapters_are_the_sum_of_each(ranks, same):
    x, W = randn(3, 6), randn(5, 6, seed=1)
    parts = [
        (randn(r, 6, seed=10 + i), randn(5, r, seed=20 + i), 0.5 if same else 0.5 + i)
        for i, r in enumerate(ranks)
    ]
    expected = x @ W.T + sum(g * x @ A.T @ B.T for A, B, g in parts)
    tensors = [(A, B, g if same else torch.tensor(g, dtype=torch.float64)) for A, B, g in parts]
    assert_close(fused_lora_linear(x, W, None, *stack_factors(tensors)), expected)


def in_a_row(ranks: list[int], dtype: torch.dtype = torch.float64) -> tuple[list, list]:
    """Factors of several adapters, a layer of 6 -> 5."""
    downs = [leaf(randn(r, 6, seed=10 + i), dtype) for i, r in enumerate(ranks)]
    ups = [leaf(randn(5, r, seed=20 + i), dtype) for i, r in enumerate(ranks)]
    return downs, ups


@pytest.mark.parametrize("form", ["addmm", "merge", "chosen"])
@pytest.mark.parametrize("gain_kind", ["one", "number", "per rank", "per sample", "zero"])
@pytest.mark.parametrize("ranks", [[2], [1, 3], [2, 1, 4]], ids=str)
def test_adapters_in_a_row_are_their_stack_and_each_gets_its_gradient(form, gain_kind, ranks):
    if gain_kind == "per sample" and form == "merge":
        return
    x, W, b = leaf(randn(2, 3, 6), torch.float64), randn(5, 6, seed=1), randn(5, seed=2)
    downs, ups = in_a_row(ranks)
    gain = gain_of(gain_kind, sum(ranks), 2)
    got = FORMS[form](x, W, b, downs, ups, gain)
    expected = lora_linear(x, W, b, torch.cat(downs), torch.cat(ups, 1), gain)
    assert_close(got, expected)
    dy, leaves = randn(*got.shape, seed=9), [x, *downs, *ups]
    for g, e in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert_close(g, e)
    with torch.no_grad():
        assert_close(FORMS[form](x, W, b, tuple(downs), tuple(ups), gain), expected)

    def call(x: Tensor, *factors: Tensor) -> Tensor:
        n = len(ranks)
        return FORMS[form](x, W, b, factors[:n], factors[n:], gain)

    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("form", ["addmm", "merge"])
def test_of_adapters_in_a_row_each_keeps_its_own_dtype_and_one_may_be_frozen(form):
    x, W = leaf(randn(3, 6), torch.bfloat16), randn(5, 6, seed=1, dtype=torch.bfloat16)
    downs, ups = in_a_row([2, 3], torch.float32)
    downs[1], ups[0] = downs[1].detach().bfloat16(), leaf(ups[0], torch.bfloat16)
    FORMS[form](x, W, None, downs, ups, 0.5).sum().backward()
    assert [t.grad is None for t in (*downs, *ups)] == [False, True, False, False]
    assert [t.grad.dtype for t in (x, downs[0], *ups)] == [
        *(torch.bfloat16, torch.float32),
        *(torch.bfloat16, torch.float32),
    ]
    twins = [leaf(t, torch.float64) for t in (x, *downs, *ups)]
    stack = torch.cat(twins[1:3]), torch.cat(twins[3:], 1)
    lora_linear(twins[0], W.double(), None, *stack, 0.5).sum().backward()
    for t, twin in zip((x, downs[0], *ups), (*twins[:2], *twins[3:]), strict=True):
        assert_close(t.grad.double(), twin.grad, atol=0.1, rtol=0.05)
        assert t.grad.abs().max() > 0


def test_adapters_in_a_row_are_composed_where_one_would_be():
    x, W = randn(4, 3, 6), randn(5, 6, seed=1)
    downs, ups = in_a_row([2, 1])
    expected = lora_linear(x, W, None, torch.cat(downs), torch.cat(ups, 1), 0.5)
    got = torch.func.vmap(lambda x: fused_lora_linear(x, W, None, downs, ups, 0.5))(x)
    assert_close(got, expected)
    assert fused_plan(x, W, None, downs, [ups[0], torch.nn.Buffer(ups[1])]).form != "composed"

    class Own(Tensor):
        """Not a plain tensor."""

    assert fused_plan(x, W, None, [downs[0], downs[1].as_subclass(Own)], ups).form == "composed"


# the norm of DoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("known", [True, False])
def test_the_factored_norm_is_the_dense_one(dtype, known):
    W = randn(64, 96, dtype=dtype)
    A, B = randn(8, 96, seed=3, dtype=torch.float32), randn(64, 8, seed=4, dtype=torch.float32)
    squared = W.float().square().sum(1) if known else None
    expected = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    got = dora_norm(W, A, B, 0.7, squared=squared)
    assert got.dtype is torch.float32
    assert float(((got.double() - expected) / expected).abs().max()) <= 5e-7


def test_the_norm_of_a_row_that_cancels_keeps_its_digits():
    A, B = randn(3, 40, dtype=torch.float32), randn(8, 3, seed=4, dtype=torch.float32)
    W = -(B @ A)
    W[0] += 1e-3
    W[5] = 1.0
    expected = (W.double() + B.double() @ A.double()).norm(dim=1)
    got = dora_norm(W, A, B).double()
    # row 0 is what float32 W and B A leave of each other
    assert_close(got[[0, 5]], expected[[0, 5]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [1e-6, 1.1e-3, 0.1, 0.39, 0.41, 1.0])
def test_the_norm_keeps_its_digits_whatever_is_left_of_the_row(share):
    torch.manual_seed(0)
    A, direction = torch.randn(4, 96), torch.randn(4)
    row = direction @ A
    W = torch.stack([row, row])
    B = torch.stack([-(1 - share**0.5) * direction, torch.zeros(4)])
    expected = (W.double() + B.double() @ A.double()).norm(dim=1)
    got = dora_norm(W, A, B).double()
    assert float(((got - expected) / expected).abs().max()) <= 1e-6


def test_the_norm_is_float32_under_autocast_too():
    W, A, B = (t.float() for t in (randn(64, 96), randn(8, 96, seed=3), randn(64, 8, seed=4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dora_norm(W, A, B)
        out = dora_linear(randn(3, 96).float(), W, torch.ones(64), A, B, 1.0, torch.ones(64))
    assert torch.equal(got, dora_norm(W, A, B))
    assert out.dtype is torch.bfloat16


def test_a_row_of_zeros_has_no_length_and_finite_gradients():
    W, A = randn(4, 6), randn(2, 6, seed=3).requires_grad_()
    W[1] = 0
    B, magnitude = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True), torch.ones(4)
    norm = dora_norm(W, A, B)
    assert norm[1] == 0
    norm.sum().backward()
    assert A.grad.isfinite().all()
    assert B.grad.isfinite().all()
    out = dora_linear(randn(3, 6), W, None, A, B, 1.0, magnitude.double())
    assert out.isfinite().all()
    assert (out[:, 1] == 0).all()


def test_the_norm_has_the_gradients_of_the_dense_one():
    W, A, B = randn(5, 6), randn(2, 6, seed=3), randn(5, 2, seed=4)
    leaves = [leaf(t, torch.float64) for t in (A, B)]
    assert gradcheck(lambda A, B: dora_norm(W, A, B, 0.7), leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_a_dora_layer_is_the_dense_formula_with_a_constant_norm(bias):
    x, W, b = randn(3, 2, 6), randn(5, 6, seed=1), randn(5, seed=2) if bias else None
    leaves = [leaf(t, torch.float64) for t in (x, randn(2, 6, seed=3), randn(5, 2, seed=4))]
    magnitude = (randn(5, seed=6).abs() + 1).requires_grad_()

    def dense(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        V = W + 0.7 * B @ A
        rows = magnitude / V.detach().norm(dim=1)
        return torch.nn.functional.linear(x, V * rows[:, None], b)

    got, expected = dora_linear(leaves[0], W, b, *leaves[1:], 0.7, magnitude), dense(*leaves)
    assert_close(got, expected)
    dy = randn(*got.shape, seed=9)
    for g, e in zip(
        torch.autograd.grad(got, [*leaves, magnitude], dy),
        torch.autograd.grad(expected, [*leaves, magnitude], dy),
        strict=True,
    ):
        assert_close(g, e)
    known = dora_norm(W, leaves[1].detach(), leaves[2].detach(), 0.7)
    assert_close(dora_linear(leaves[0], W, b, *leaves[1:], 0.7, magnitude, norm=known), got)


# the plan


def test_the_plan_says_why_the_reference_is_taken():
    x, W, A, B = randn(7, 4), randn(5, 4), randn(2, 4), randn(5, 2)

    def why(*args, **options):
        plan = fused_plan(*args, **options)
        assert plan.form == "composed"
        return plan.why

    assert "the base or the gain takes a gradient" in why(x, W.requires_grad_(), None, A, B)
    W = W.detach()
    assert "differ in dtype" in why(x.float(), W, None, A, B)
    assert "do not fit the batch" in why(x, W, None, A, B, torch.ones(3, 2))
    inside = []
    torch.func.vmap(lambda x: inside.append(fused_plan(x, W, None, A, B)) or x)(x)
    assert "torch.func transform" in inside[0].why
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in why(x, W, None, A, B)
    nested = torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged)
    assert "subclass, nested" in why(nested, W, None, A, B)
    assert fused_plan(x, W, None, A, B).form != "composed"
