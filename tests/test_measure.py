"""The measuring tools: known bytes, operations, FLOPs and clocks, and leaks that are found."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Spread, Work, flops, inliers, saved_bytes, timed_rounds, work

FLOAT = 4


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Input (5, 3), weight (7, 3) and bias (7,)."""
    return torch.randn(5, 3, requires_grad=True), torch.randn(7, 3), torch.randn(7)


class Keeping(torch.autograd.Function):
    """Doubles, and keeps a copy of its input behind autograd's back."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.leak = [x.clone()]  # type: ignore[attr-defined]
        return x * 2

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy * 2


@pytest.mark.parametrize("leading", [(5,), (1, 5)])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_linear_layer_is_one_operation_and_its_output(
    operands: tuple[Tensor, Tensor, Tensor],
    leading: tuple[int, ...],
    mode: Callable[[], torch.autograd.grad_mode.no_grad],
) -> None:
    x, weight, bias = operands
    with mode():
        done = work(lambda: F.linear(x.view(*leading, 3), weight, bias))
    assert done == Work(("addmm",), 5 * 7 * FLOAT)


def test_a_backward_is_counted_with_its_gradient(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    y, dy = F.linear(*operands), torch.randn(5, 7)
    assert work(lambda: y.backward(dy)) == Work(("mm",), 5 * 3 * FLOAT)
    assert operands[0].grad is not None


def test_views_and_bare_memory_are_no_operations_but_memory_has_bytes() -> None:
    x = torch.randn(4, 6)
    assert work(lambda: x.t()[1:].unsqueeze(0).expand(3, 5, 4).detach()) == Work((), 0)
    assert work(lambda: x.new_empty(2, 3)) == Work((), 6 * FLOAT)
    assert work(lambda: torch.empty(2, 3).zero_()) == Work(("zero_",), 6 * FLOAT)


def test_work_in_place_makes_no_bytes() -> None:
    x = torch.randn(4, 4)
    assert work(lambda: x.addmm_(x, x).mul_(2)) == Work(("addmm_", "mul_"), 0)
    assert work(lambda: torch.mm(x, x.clone(), out=x)) == Work(("clone", "mm"), 16 * FLOAT)


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(4, 4)
    done = work(lambda: [(made := x + 1)[0], made.t(), made.add_(1)])
    assert done == Work(("add", "add_"), 16 * FLOAT)


def test_temporaries_that_are_freed_and_reused_count_each_time() -> None:
    x = torch.randn(64, 64)

    def thrice() -> None:
        for _ in range(3):
            x + 1

    assert work(thrice) == Work(("add",) * 3, 3 * 64 * 64 * FLOAT)


def test_reading_a_value_is_an_operation() -> None:
    x = torch.randn(4)
    assert work(lambda: x.sum().item()).kernels == ("sum", "_local_scalar_dense")


def test_fake_tensors_of_no_memory_have_bytes_too() -> None:
    x = torch.empty(4, 8, device="meta")
    assert work(lambda: x + x) == Work(("add",), 32 * FLOAT)


def test_a_leaked_copy_is_found_in_bytes_and_operations(
    operands: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, weight, bias = operands
    lean = work(lambda: F.linear(x, weight, bias))
    leaky = work(lambda: F.linear(x.clone(), weight, bias))
    assert leaky.nbytes - lean.nbytes == x.numel() * FLOAT
    assert set(leaky.kernels) - set(lean.kernels) == {"clone"}


def test_counting_holds_no_tensor_so_gradients_are_not_copied() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    y = x * 3
    done = work(lambda: y.backward(torch.ones(8, 8)))
    assert done.kernels == ("ones", "mul")  # a held gradient would be cloned into `x.grad`


def test_products_are_the_matrix_products() -> None:
    a = torch.randn(3, 3)
    done = work(lambda: (a @ a).addmm_(a, a).relu() + torch.bmm(a[None], a[None]))
    assert done.products == ("mm", "addmm_", "bmm")


def test_saved_bytes_of_known_functions(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = operands
    assert saved_bytes(lambda: F.linear(x, weight, bias), apart=[weight]) == 0
    assert saved_bytes(lambda: F.linear(x, weight, bias)) == weight.numel() * FLOAT
    assert saved_bytes(lambda: x.exp().sum()) == x.numel() * FLOAT
    assert saved_bytes(lambda: x.detach().exp()) == 0


def test_saved_storages_count_once_and_views_as_their_whole(
    operands: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, _, _ = operands

    def twice() -> Tensor:
        h = x.exp()
        return h[:2] * h[3:]

    assert saved_bytes(twice) == x.numel() * FLOAT
    assert saved_bytes(lambda: x * x, apart=[x[1:]]) == 0


def test_a_tensor_kept_on_the_context_is_found(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, _ = operands
    assert saved_bytes(lambda: Keeping.apply(x).sum(), apart=[x]) == x.numel() * FLOAT


def test_saved_bytes_leave_the_backward_right(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, _ = operands
    kept: list[Tensor] = []
    saved_bytes(lambda: kept.append(x.exp().sum()))
    kept[0].backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


def test_flops_of_products_in_and_out_of_place() -> None:
    a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
    assert flops(lambda: a @ b) == flops(lambda: c.addmm_(a, b)) == 2 * 2 * 3 * 5
    many = torch.ones(4, 2, 3), torch.ones(4, 3, 5)
    by_hand = 2 * 4 * 2 * 3 * 5
    assert flops(lambda: torch.bmm(*many)) == by_hand
    assert flops(lambda: torch.zeros(4, 2, 5).baddbmm_(*many)) == by_hand
    assert flops(lambda: torch.zeros(2).addmv_(a, torch.ones(3))) == 2 * 2 * 3
    assert flops(lambda: a + a) == 0


def test_quartiles_are_those_of_the_values() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high, spread.width) == (2.0, 3.0, 4.0, 2 / 3)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_far_value_is_no_inlier_on_either_side() -> None:
    assert inliers([1.0, 1.1, 0.9, 1.05, 3.0, 0.95, 0.1]) == [0, 1, 2, 3, 5]
    assert inliers([2.0, 2.0, 2.0]) == [0, 1, 2]


def test_rounds_are_interleaved_shuffled_and_complete() -> None:
    order: list[str] = []

    def clock(fn: Callable[[], object], calls: int) -> float:
        fn()
        return 1.0

    names = "abc"
    candidates = {name: (lambda name=name: order.append(name)) for name in names}
    timed_rounds(candidates, 20, baseline="a", clock=clock)
    rounds = [tuple(order[i : i + 3]) for i in range(len(order) - 60, len(order), 3)]
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) > 3


def test_noisy_rounds_are_rejected_for_every_candidate_and_ratios_stay_within_rounds() -> None:
    speed = {"frozen": 1.0, "ours": 1.5}
    ticks = itertools.count()

    def clock(fn: Callable[[], object], calls: int) -> float:
        step = next(ticks) - 3  # after one warm-up each and the choice of calls
        drift = 1 + step // 2 * 0.01  # the machine slows down from round to round
        noise = 40.0 if step // 2 == 4 else 1.0
        return speed[fn()] * drift * noise  # type: ignore[index]

    rounds = timed_rounds(
        {"frozen": lambda: "frozen", "ours": lambda: "ours"}, 10, baseline="frozen", clock=clock
    )
    assert rounds.rejected == 1
    assert [len(times) for times in rounds.seconds.values()] == [9, 9]
    ratio = rounds.ratio("ours", "frozen")
    assert ratio.low == pytest.approx(1.5) == ratio.high
    assert rounds.noise > 0.01
    assert rounds.excess("ours", "frozen").median > 0.4


def test_the_clock_is_this_threads_cpu_time() -> None:
    from time import sleep

    rounds = timed_rounds(
        {"asleep": lambda: sleep(0.02), "busy": lambda: sum(range(200_000))},
        3,
        baseline="busy",
        at_least=1e-3,
    )
    assert rounds.ratio("asleep", "busy").median < 0.5


def test_fast_candidates_are_called_often_enough_to_be_measured() -> None:
    calls: list[int] = []

    def clock(fn: Callable[[], object], times: int) -> float:
        calls.append(times)
        return 1e-5

    timed_rounds({"frozen": lambda: None, "ours": lambda: None}, 2, baseline="frozen", clock=clock)
    assert calls[-4:] == [2000] * 4
