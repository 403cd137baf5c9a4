"""Low-rank updates of convolutions against PyTorch's own modules with the dense weight."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from lora_core import functional
from lora_core.functional import conv_update, lora_conv, tucker_down

MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KERNELS = {1: [(1,), (2,), (3,)], 2: [(3, 3), (1, 2)], 3: [(1, 2, 3)]}
PADDINGS = {
    1: [0, 1, (2,), "same", "valid"],
    2: [0, 1, (2, 1), "same", "valid"],
    3: [1, (0, 1, 2), "same"],
}
MODES = ["zeros", "reflect", "replicate", "circular"]
IN, OUT, RANK = 4, 8, 3
pads_a_copy = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def factors(
    kernel: tuple[int, ...], groups: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    A = randn(RANK, IN // groups, *kernel, dtype=dtype, seed=1)
    return A, randn(OUT, RANK, *[1] * len(kernel), dtype=dtype, seed=2)


def dense(A: Tensor, B: Tensor, gain: Tensor | float) -> Tensor:
    return ((B.flatten(1) * gain) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])


def convolved(x: Tensor, weight: Tensor, groups: int, **geometry: object) -> Tensor:
    """What PyTorch's own module makes of this weight."""
    module = MODULES[weight.ndim - 2](
        IN, OUT, tuple(weight.shape[2:]), groups=groups, bias=False, device="meta", **geometry
    )
    return torch.func.functional_call(module, {"weight": weight}, (x,))


@pads_a_copy
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_update_is_the_convolution_with_its_dense_weight(dims, mode):
    x, gain = randn(2, IN, *(7, 6, 5)[:dims]), torch.tensor([0.5, -1.0, 2.0]).double()
    cases = itertools.product(KERNELS[dims], PADDINGS[dims], [1, 2], [1, 2], [1, 2, IN])
    for kernel, padding, stride, dilation, groups in cases:
        if padding == "same" and stride != 1:
            continue
        A, B = factors(kernel, groups)
        geometry = {
            "padding": padding,
            "stride": stride,
            "dilation": dilation,
            "padding_mode": mode,
        }
        got = conv_update(x, A, B, gain, groups=groups, **geometry)
        expected = convolved(x, dense(A, B, gain), groups, **geometry)
        assert_close(got, expected, msg=lambda m, g=(kernel, groups, geometry): f"{g}: {m}")
        W, b = randn(OUT, *A.shape[1:], seed=5), randn(OUT, seed=6)
        whole = lora_conv(x, W, b, A, B, gain, groups=groups, **geometry)
        base = convolved(x, W, groups, **geometry) + b.view(-1, *[1] * dims)
        assert_close(
            whole, base + expected, msg=lambda m, g=(kernel, groups, geometry): f"{g}: {m}"
        )


@pytest.mark.parametrize("stride", [(1, 2), (3, 1)])
@pytest.mark.parametrize("dilation", [(1, 2), (2, 1)])
def test_every_axis_has_a_geometry_of_its_own(stride, dilation):
    x, (A, B) = randn(2, IN, 9, 7), factors((3, 2), 2)
    geometry = {
        "stride": stride,
        "dilation": dilation,
        "padding": (2, 1),
        "padding_mode": "reflect",
    }
    got = conv_update(x, A, B, groups=2, **geometry)
    assert_close(got, convolved(x, dense(A, B, 1.0), 2, **geometry))


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(0, 3),
    st.sampled_from([1, 2, IN]),
    st.floats(-2, 2, width=16),
    st.booleans(),
)
def test_any_batch_and_gain_gives_the_dense_answer(dims, batch, groups, gain, per_rank):
    x, (A, B) = randn(batch, IN, *[4] * dims), factors((3, 2, 1)[:dims], groups)
    scale = gain * torch.arange(1.0, RANK + 1).double() if per_rank else gain
    got = conv_update(x, A, B, scale, padding=1, groups=groups)
    assert_close(got, convolved(x, dense(A, B, scale), groups, padding=1))


@pytest.mark.parametrize("groups", [1, 2, IN])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_row_of_gains_mixes_each_sample_by_itself(dims, groups):
    # a batch as large as the rank and as the axes, so that nothing lines up by its size alone
    x, (A, B) = randn(RANK, IN, *[RANK] * dims), factors((2,) * dims, groups)
    gain = randn(RANK, RANK, seed=4)
    gain[1] = 0
    mixed = conv_update(x, A, B, gain, padding=1, groups=groups)
    alone = [conv_update(x[n], A, B, gain[n], padding=1, groups=groups) for n in range(RANK)]
    assert_close(mixed, torch.stack(alone))
    assert not mixed[1].any()
    assert mixed[0].any()


@pytest.mark.parametrize("gain_shape", [(), (RANK,), (2, RANK)])
@pytest.mark.parametrize(("groups", "mode"), [(1, "zeros"), (2, "circular"), (IN, "reflect")])
def test_first_and_second_gradients_are_right(gain_shape, groups, mode):
    A, B = factors((2,), groups)
    leaves = [t.requires_grad_() for t in (randn(2, IN, 3), A, B[: 2 * groups], randn(*gain_shape))]

    def update(*operands: Tensor) -> Tensor:
        return conv_update(*operands, padding=1, groups=groups, padding_mode=mode)

    assert gradcheck(update, leaves, fast_mode=True)
    assert gradgradcheck(update, leaves, fast_mode=True)


def test_gradients_of_a_picture_are_right():
    A, B = factors((2, 3), 2)
    leaves = [t.requires_grad_() for t in (randn(1, IN, 3, 3), A, B)]
    assert gradcheck(lambda *t: conv_update(*t, 0.7, padding="same", groups=2), leaves)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_half_input_takes_float32_factors(half, groups):
    x, (A, B) = randn(2, IN, 5, dtype=half), factors((3,), groups, torch.float32)
    A.requires_grad_(), B.requires_grad_()
    W, gain = randn(OUT, *A.shape[1:], dtype=half, seed=5), torch.tensor([0.5, 2.0, -1.0])
    out = lora_conv(x, W, None, A, B, gain, padding=1, groups=groups)
    assert out.dtype == half
    whole = W.double() + dense(A.double(), B.double(), gain)
    expected = convolved(x.double(), whole, groups, padding=1)
    assert_close(out.double(), expected, atol=0.1, rtol=0.1)
    out.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert A.grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_factor_leaves_the_base_bit_for_bit(mode):
    x, (A, B) = randn(2, IN, 6, 5, dtype=torch.float32), factors((3, 3), 1, torch.float32)
    W, b = randn(OUT, IN, 3, 3, dtype=torch.float32, seed=5), randn(OUT, dtype=torch.float32)
    base = lora_conv(x, W, b, A, B, 0.0, padding=1, padding_mode=mode)
    assert torch.equal(
        base, lora_conv(x, W, b, A, torch.zeros_like(B), padding=1, padding_mode=mode)
    )
    assert_close(base, convolved(x, W, 1, padding=1, padding_mode=mode) + b.view(-1, 1, 1))


def test_dropout_is_decided_by_its_seed_and_drops_the_input():
    x, (A, B) = torch.ones(2, IN, 6, 5).double(), factors((3, 3))
    first = conv_update(x, A, B, padding=1, dropout=0.5, seed=7)
    assert torch.equal(first, conv_update(x, A, B, padding=1, dropout=0.5, seed=7))
    assert not torch.equal(first, conv_update(x, A, B, padding=1, dropout=0.5, seed=8))
    torch.manual_seed(3)
    drawn = conv_update(x, A, B, dropout=0.5)
    torch.manual_seed(3)
    assert_close(drawn, conv_update(F.dropout(x, 0.5), A, B))


def test_same_needs_a_stride_of_one():
    x, (A, B) = randn(2, IN, 6), factors((3,))
    with pytest.raises(
        ValueError, match=r"^`stride` must be 1 where `padding` is 'same', but is 2"
    ):
        conv_update(x, A, B, stride=2, padding="same")
    with pytest.raises(ValueError, match=r"^`padding` must be a number, .* but is 'full'\.$"):
        conv_update(x, A, B, padding="full")


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 3)])
def test_a_tucker_pair_is_one_kernel(kernel):
    ones = [1] * len(kernel)
    A, mid = randn(2, IN, *ones, seed=1), randn(RANK, 2, *kernel, seed=2)
    B, x = randn(OUT, RANK, *ones, seed=3), randn(2, IN, *[5] * len(kernel))
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    apart = conv(conv(conv(x, A), mid, stride=2, padding=1), B)
    down = tucker_down(A, mid)
    assert down.shape == (RANK, IN, *kernel)
    assert_close(conv_update(x, down, B, stride=2, padding=1), apart)
    assert gradcheck(tucker_down, (A.requires_grad_(), mid.requires_grad_()))


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("stride", "padding", "output_padding", "dilation"), [(1, 0, 0, 1), (2, 1, 1, 1), (3, 2, 2, 2)]
)
def test_a_transposed_update_is_the_transposed_convolution_with_its_product(
    places, groups, stride, padding, output_padding, dilation
):
    torch.manual_seed(0)
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[places]
    kernel, options = [3, 2, 3][:places], (stride, padding, output_padding, groups, dilation)
    x = torch.randn(2, 4, *[5] * places, dtype=torch.float64, requires_grad=True)
    A = torch.randn(3, 4, *[1] * places, dtype=torch.float64, requires_grad=True)
    B = torch.randn(3, 6 // groups, *kernel, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    product = A.flatten(1).T @ (gain[:, None] * B.flatten(1))
    dense = product.view(4, 6 // groups, *kernel)
    expected = conv(x, dense, None, *options)
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    got = functional.conv_transpose_update(x, A, B, gain, **dict(zip(names, options, strict=True)))
    assert_close(got, expected)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((got * weights).sum(), (x, A, B))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, A, B))
    assert_close(ours, theirs)
    each = torch.stack([gain, -gain])
    mixed = functional.conv_transpose_update(
        x, A, B, each, **dict(zip(names, options, strict=True))
    )
    assert_close(mixed, torch.stack([expected[0], -expected[1]]))
