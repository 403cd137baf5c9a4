"""The numerics of the Triton kernels in Triton's interpreter; run by `test_triton_interpreter`.

Needs a process of its own, with TRITON_INTERPRET=1 set before triton is imported.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from lora_core import functional
from lora_core.kernels import forms, ops
from lora_core.kernels.triton import calls, launch
from lora_core.kernels.triton.calls import multiply_expand, project

PATHS = {
    "one": (launch.one_kernel_forward, launch.one_kernel_backward),
    "two": (launch.two_kernel_forward, launch.two_kernel_backward),
}
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
GUARD = 64  # elements of poison on either side of every result


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results start as NaN, amid NaN that must still be there when the test ends."""
    buffers = []

    def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype or like.dtype)
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(calls, "empty", empty)
    monkeypatch.setattr(launch, "empty", empty)
    yield
    assert buffers
    for buffer, size in buffers:
        assert buffer[:GUARD].isnan().all()
        assert buffer[GUARD + size :].isnan().all()


def poisoned(*shape: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Random numbers inside a larger matrix of NaN, so that its strides are odd."""
    if transposed:
        return poisoned(*shape[::-1], dtype=dtype).t()
    room = torch.full([size + 7 for size in shape], math.nan, dtype=dtype)
    inside = room[tuple(slice(3, 3 + size) for size in shape)]
    return inside.copy_(torch.randn(shape))


class Case(NamedTuple):
    """What a call is given."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    gain: Tensor
    dy: Tensor


def case(
    tokens: int,
    inputs: int,
    outputs: int,
    rank: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    scalar: bool = False,
    bias: bool = True,
) -> Case:
    torch.manual_seed(tokens + 100 * rank)
    sizes = (tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), (tokens, outputs)
    x, W, A, B, dy = (poisoned(*size, dtype=dtype, transposed=transposed) for size in sizes)
    gain = torch.tensor(0.75) if scalar else 0.5 + torch.rand(2 * rank)[::2]
    return Case(x, W, poisoned(outputs, dtype=dtype) if bias else None, A, B, gain, dy)


def exact(given: Case, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The same in float64, by autograd; `mask` is what dropout multiplies by."""
    x, W, b, A, B, gain, dy = (t if t is None else t.double() for t in given)
    # of a scalar too for each rank: their sum cancels, which is no kernel's doing
    gain = gain.expand(A.shape[0])
    x, A, B, gain = (t.clone().requires_grad_() for t in (x, A, B, gain))
    h = F.linear(x if mask is None else x * mask.double(), A)
    y = F.linear(x, W, b) + F.linear(h * gain, B)
    dx, dA, dB, dgain = torch.autograd.grad(y, (x, A, B, gain), dy)
    found = {"y": y, "h": h, "dx": dx, "dA": dA, "dB": dB, "q": dy @ B, "dgain": dgain}
    return {name: value.detach() for name, value in found.items()}


def fused(given: Case, path: str, **dropout: object) -> dict[str, Tensor]:
    """All that the kernels of a path return, and in float32 the gain's gradient made of it."""
    forward, backward = PATHS[path]
    x, W, b, A, B, gain, dy = given
    y, h = forward(x, W, b, A, B, gain, **dropout)
    dx, dA, dB, q = backward(dy, x, W, A, B, gain, h, **dropout)
    found = {"y": y, "h": h, "dx": dx, "dA": dA, "dB": dB, "q": q}
    if x.dtype == SINGLE:  # in 16 bits its sum cancels, which is no kernel's doing
        found["dgain"] = (h.double() * q.double()).sum(0)
    return found


def eager(given: Case) -> dict[str, Tensor]:
    """The same in PyTorch's own products, accumulated in place, every one rounded."""
    x, W, b, A, B, gain, dy = given
    y = F.linear(x, W, b)
    h = x @ A.t()
    scaled = (h * gain).to(h.dtype)
    y.addmm_(scaled, B.t())
    q = dy @ B
    scaled_q = (q * gain).to(q.dtype)
    dx = (dy @ W).addmm_(scaled_q, A)
    return {"y": y, "h": h, "dx": dx, "dA": scaled_q.t() @ x, "dB": dy.t() @ scaled, "q": q}


def error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN anywhere makes it NaN."""
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


def check(
    given: Case, path: str, limit: float, mask: Tensor | None = None, **dropout: object
) -> None:
    truth = exact(given, mask)
    for name, found in fused(given, path, **dropout).items():
        assert error(found, truth[name]) <= limit, name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [1, 3, 4, 16, 17, 64])
@pytest.mark.parametrize("tokens", [1, 15, 17, 77])
def test_float32_agrees_with_float64_at_every_tail(tokens, rank, path):
    check(case(tokens, 70, 83, rank, SINGLE), path, 5e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "rank"), [(77, 3), (17, 17), (77, 64)])
def test_float16_agrees_with_float64(tokens, rank, path):
    check(case(tokens, 70, 83, rank, HALF), path, 5e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [4, 17, 64])
def test_bfloat16_errs_no_more_than_eager_products_do(rank, path):
    given = case(77, 70, 83, rank, BRAIN)
    truth, other = exact(given), eager(given)
    found = fused(given, path)
    for name in other:
        assert error(found[name], truth[name]) <= error(other[name], truth[name]), name


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("path", PATHS)
def test_strides_a_scalar_gain_and_a_missing_bias_change_nothing(path, dtype):
    given = case(33, 70, 83, 5, dtype, transposed=True, scalar=True, bias=False)
    check(given, path, 5e-7 if dtype == SINGLE else 5e-4)


@pytest.mark.parametrize("path", PATHS)
def test_more_tiles_than_one_group_and_long_sums_come_out(path):
    check(case(520, 20, 70, 3, HALF), path, 5e-4)


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_give_no_rows_and_zero_gradients(path):
    found = fused(case(0, 20, 24, 3, SINGLE), path)
    assert found["y"].shape == (0, 24)
    assert found["dx"].shape == (0, 20)
    assert not found["dA"].any()
    assert not found["dB"].any()


@pytest.mark.parametrize("path", PATHS)
def test_the_same_call_gives_the_same_bits(path):
    given = case(520, 20, 24, 3, BRAIN)
    once, again = fused(given, path), fused(given, path)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_gradients_come_in_the_dtype_asked_for():
    given = case(33, 70, 83, 5, BRAIN)
    x, W, b, A, B, gain, dy = given
    truth = exact(given)
    for forward, backward in PATHS.values():
        _, h = forward(x, W, b, A, B, gain)
        _, dA, dB, _ = backward(dy, x, W, A, B, gain, h, grad_dtype=torch.float32)
        assert dA.dtype == dB.dtype == torch.float32
        # no second rounding: nearer than bfloat16 could be
        assert error(dA, truth["dA"]) < 2e-3
        assert not torch.equal(dA, dA.bfloat16().float())


def test_h_need_not_be_kept():
    x, W, b, A, B, gain, _ = case(17, 70, 83, 5, SINGLE)
    y, h = launch.one_kernel_forward(x, W, b, A, B, gain, keep_h=False)
    assert h.shape == (0, 5)
    assert torch.equal(y, launch.one_kernel_forward(x, W, b, A, B, gain)[0])


def test_a_matrix_without_rows_still_gives_h():
    x, W, _, A, B, gain, _ = case(17, 20, 0, 3, SINGLE, bias=False)
    _, h = launch.one_kernel_forward(x, W, None, A, B, gain)
    assert error(h, x.double() @ A.double().t()) <= 5e-7


def test_factor_gradients_are_those_of_the_backward_pass():
    given = case(33, 70, 83, 5, HALF)
    found = fused(given, "two")
    dA, dB, q = launch.factor_gradients(given.dy, given.x, given.lora_B, given.gain, found["h"])
    assert torch.equal(dA, found["dA"])
    assert torch.equal(dB, found["dB"])
    assert torch.equal(q, found["q"])


def mask_of(tokens: int, features: int, dropout: float, seed: Tensor) -> Tensor:
    """The mask that the kernel of the input's gradient applies, made visible."""
    ones = torch.ones(tokens, 1), torch.ones(features, 1)
    base = torch.zeros(tokens, 1), torch.zeros(features, 1)
    return multiply_expand(*base, None, *ones, torch.tensor(1.0), dropout, seed)


SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


@pytest.mark.parametrize(
    ("tokens", "features", "dtype", "limit"),
    [(17, 150, SINGLE, 5e-7), (77, 70, SINGLE, 5e-7), (520, 20, HALF, 5e-4)],
)
def test_dropout_is_the_same_mask_in_all_three_places(tokens, features, dtype, limit):
    given = case(tokens, features, 24, 5, dtype)
    mask = mask_of(tokens, features, 0.4, SEED)
    check(given, "two", limit, mask, dropout=0.4, seed=SEED)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_it_should_and_its_mean(dropout):
    mask = mask_of(128, 256, dropout, SEED)
    kept = (mask != 0).double().mean()
    spread = math.sqrt(dropout * (1 - dropout) / mask.numel())
    assert abs(kept - (1 - dropout)) < 5 * spread
    assert mask.max() == pytest.approx(1 / (1 - dropout))
    # neither rows nor columns are alike
    for axis in (0, 1):
        share = (mask != 0).double().mean(axis)
        assert (share - kept).abs().max() < 6 * math.sqrt(0.25 / mask.shape[axis])


def test_masks_of_different_seeds_have_nothing_to_do_with_each_other():
    masks = [mask_of(128, 128, 0.5, SEED + step) != 0 for step in (0, 1, 1 << 40)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[first] == masks[second]).double().mean() - 0.5) < 0.02


def test_dropout_of_nothing_changes_nothing():
    given = case(17, 70, 83, 5, SINGLE)
    plain, dropped = fused(given, "two"), fused(given, "two", dropout=0.0, seed=SEED)
    assert torch.equal(plain["h"], dropped["h"])
    assert error(dropped["dx"], plain["dx"].double()) <= 1e-7


def test_a_projection_alone_is_a_product():
    x, a = poisoned(33, 300, dtype=SINGLE), poisoned(7, 300, dtype=SINGLE)
    assert error(project(x, a), x.double() @ a.double().t()) <= 5e-7


@pytest.fixture
def glued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's operators call the kernels, as they do for CUDA tensors."""
    monkeypatch.setattr(ops, "by_triton", lambda x, form: form in forms.TRITON)


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 20), torch.randn(12, 20), torch.randn(12)
    factors = torch.randn(3, 20), torch.randn(12, 3)  # float32 over a base of any dtype
    leaves = [t.detach().requires_grad_() for t in (x.to(dtype), *factors)]
    return leaves[0], weight.to(dtype), bias.to(dtype), *leaves[1:]


@pytest.mark.usefixtures("glued")
@pytest.mark.parametrize("form", sorted(forms.TRITON))
@pytest.mark.parametrize("gain", [torch.tensor(-0.7), torch.tensor([0.5, 2.0, -1.0])])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (1, 2), (0,)])
def test_the_operators_hand_the_kernels_what_they_ask_for(form, gain, wanted):
    given = operands(HALF)
    x, *_, lora_A, lora_B = given
    leaves = [(x, lora_A, lora_B)[i] for i in wanted]
    for leaf in (x, lora_A, lora_B):
        leaf.requires_grad_(any(leaf is asked for asked in leaves))
    y = ops.lora_linear(*given, gain, dtype=HALF, form=form)
    wide = [t.detach().double() for t in given]
    twins = [wide[0], wide[3], wide[4]]
    for twin in twins:
        twin.requires_grad_()
    truth = functional.lora_linear(*wide, gain)
    dy = torch.randn(9, 12)
    found = torch.autograd.grad(y, leaves, dy.half())
    expected = torch.autograd.grad(truth, [twins[i] for i in wanted], dy.half().double())
    assert error(y.detach(), truth.detach()) < 2e-3
    for leaf, got, right in zip(leaves, found, expected, strict=True):
        assert got.dtype is leaf.dtype
        assert error(got, right) < 2e-3


@pytest.mark.usefixtures("glued")
def test_the_operators_drop_out_by_one_mask_in_all_places():
    given = operands(SINGLE)
    x, weight, bias, lora_A, lora_B = given
    torch.manual_seed(1)
    y = ops.lora_linear(*given, torch.tensor(0.7), dtype=SINGLE, form="triton2", dropout=0.5)
    dy = torch.randn(9, 12)
    _, dA, dB = torch.autograd.grad(y, (x, lora_A, lora_B), dy, retain_graph=True)
    update = (y - F.linear(x, weight, bias)).detach()
    whole = functional.lora_update(x, lora_A, lora_B, 0.7)
    assert error(update, whole.detach()) > 0.1
    # the update is linear in either factor, so each gradient gives it back
    by_dy = float((dy * update).sum())
    assert float((dA * lora_A.detach()).sum()) == pytest.approx(by_dy, rel=1e-4)
    assert float((dB * lora_B.detach()).sum()) == pytest.approx(by_dy, rel=1e-4)
    with pytest.raises(
        NotImplementedError, match=r"^Second derivatives must be taken without dropout .* is 0\.5\."
    ):
        torch.autograd.grad(y, x, dy, create_graph=True)


@pytest.mark.usefixtures("glued")
def test_second_derivatives_through_the_operators_are_plain_operations():
    given = operands(SINGLE)
    y = ops.lora_linear(*given, torch.tensor(0.7), dtype=SINGLE, form="triton1")
    truth = functional.lora_linear(*given, 0.7)
    found, right = (
        torch.autograd.grad(
            torch.autograd.grad(out.square().sum(), given[0], create_graph=True)[0].sum(), given[3]
        )[0]
        for out in (y, truth)
    )
    assert error(found, right) < 1e-5


@pytest.mark.parametrize(("path", "forward", "backward"), [("one", 1, 2), ("two", 2, 3)])
def test_the_launches_are_counted(path, forward, backward, monkeypatch):
    launches = []
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        launches.append(self.fn.__name__)
        run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    given = case(17, 40, 24, 4, SINGLE)
    ahead, back = PATHS[path]
    operands = given.x, given.weight, given.bias, given.lora_A, given.lora_B, given.gain
    _, h = ahead(*operands)
    assert len(launches) == forward, launches
    launches.clear()
    back(given.dy, given.x, given.weight, given.lora_A, given.lora_B, given.gain, h)
    assert len(launches) == backward, launches


class TestRefusals:
    """Nothing is launched."""

    @pytest.fixture(autouse=True)
    def guarded(self) -> None:
        """There are no results to guard."""

    @pytest.mark.parametrize("forward", [pair[0] for pair in PATHS.values()])
    def test_a_rank_beyond_the_tile_is_refused(self, forward: Callable[..., object]):
        message = (
            r"^`rank` must be within 1 \.\. 64 for the Triton kernels, but is 65\. "
            r"Use the path of plain products for it\.$"
        )
        with pytest.raises(ValueError, match=message):
            forward(*case(4, 70, 83, 65, SINGLE)[:6])

    @pytest.mark.parametrize("forward", [pair[0] for pair in PATHS.values()])
    def test_mixed_dtypes_are_refused(self, forward: Callable[..., object]):
        given = case(4, 20, 24, 3, HALF)
        message = (
            r"^The matrices must share one dtype, but have float16, float32\. "
            r"Cast the factors to the dtype of the input\.$"
        )
        with pytest.raises(ValueError, match=message):
            forward(*given._replace(lora_A=given.lora_A.float())[:6])
