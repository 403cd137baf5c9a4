"""What the fast forms cost, counted: bytes, operations, FLOPs and graphs."""

import re
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import lora_core
from benchmarks.measure import flops, saved_bytes, work
from lora_core import LoRALinear, explain
from lora_core.functional import fused_lora_linear, fused_plan, lora_linear
from lora_core.kernels import door, forms, linear, ops

# tokens, in, out, rank: low-rank form; many tokens over a small matrix: merged form
SHAPES = {"addmm": (96, 160, 144, 4), "merge": (1024, 48, 56, 4)}
ELEMENTWISE = {"add", "add_", "mul", "mul_", "addcmul_", "sub", "div", "copy_", "_to_copy", "clone"}


def adapted(form: str, dtype: torch.dtype = torch.float32, **options):
    M, K, N, rank = SHAPES[form]
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(K, N, dtype=dtype), rank=rank, alpha=2 * rank, **options)
    with torch.no_grad():
        layer.lora_B_default.normal_()
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    assert explain(layer, x).form == form
    return layer, x, torch.randn(M, N, dtype=dtype)


def backward_of(layer: nn.Module, x: Tensor, dy: Tensor):
    y = layer(x)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("form", list(SHAPES))
def test_nothing_is_kept_but_x_and_one_number_per_token_and_rank(form):
    layer, x, _ = adapted(form)
    kept = saved_bytes(lambda: layer(x), apart=[x, *layer.parameters()])
    M, _, _, rank = SHAPES[form]
    assert kept == (M * rank * 4 if form == "addmm" else 0)


@pytest.mark.parametrize("form", list(SHAPES))
def test_only_what_the_wanted_gradients_are_made_from_is_kept(form):
    layer, x, _ = adapted(form)
    M, K, _, rank = SHAPES[form]
    parameters = list(layer.parameters())
    x.requires_grad_(True)
    layer.lora_A_default.requires_grad_(False)
    layer.lora_B_default.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), apart=parameters) == 0
    layer.lora_B_default.requires_grad_(True)
    frozen = x.detach()
    h, whole = M * rank * 4, M * K * 4
    assert saved_bytes(lambda: layer(frozen), apart=parameters) == (h if form == "addmm" else whole)


def test_adapters_in_a_row_keep_one_h_and_no_stack():
    x, W = torch.randn(96, 160, requires_grad=True), torch.randn(144, 160)
    downs = [torch.randn(r, 160, requires_grad=True) for r in (2, 4)]
    ups = [torch.randn(144, r, requires_grad=True) for r in (2, 4)]
    kept = saved_bytes(
        lambda: fused_lora_linear(x, W, None, downs, ups, 0.5), apart=[x, W, *downs, *ups]
    )
    assert kept == 96 * 6 * 4


def test_three_projections_of_one_x_keep_one_x():
    layers = [adapted("addmm")[0] for _ in range(3)]
    x = torch.randn(96, 160, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    kept = saved_bytes(lambda: [layer(x) for layer in layers], apart=parameters)
    assert kept == x.nbytes + 3 * 96 * 4 * 4


def test_float32_factors_over_a_half_base_keep_no_wide_copy_of_x():
    layer, x, _ = adapted("addmm", torch.bfloat16)
    assert layer.lora_A_default.dtype is torch.float32
    assert saved_bytes(lambda: layer(x), apart=[x, *layer.parameters()]) == 96 * 4 * 2


def test_autocast_keeps_x_as_it_came_and_no_cast_of_the_weight():
    layer, x, dy = adapted("addmm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved_bytes(lambda: layer(x), apart=[x, *layer.parameters()])
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert kept == 96 * 4 * 2
    grads = torch.autograd.grad(y, (x, layer.lora_A_default), dy.bfloat16())
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


def test_dropout_keeps_a_seed_rather_than_a_mask():
    layer, x, _ = adapted("addmm", dropout=0.1)
    layer.train()
    assert saved_bytes(lambda: layer(x), apart=[x, *layer.parameters()]) <= 96 * 4 * 4 + 64


@pytest.mark.parametrize("form", list(SHAPES))
def test_a_forward_makes_the_output_and_a_backward_the_gradient_of_x(form):
    layer, x, dy = adapted(form)
    M, K, N, rank = SHAPES[form]
    small = rank * (2 * M + K + N) * 4 if form == "addmm" else (K * N + rank * (K + M + N)) * 4
    forward, backward = work(lambda: layer(x)), work(backward_of(layer, x, dy))
    assert forward.nbytes <= dy.nbytes + small
    assert backward.nbytes <= x.nbytes + 2 * small
    assert not ELEMENTWISE & {*forward.kernels, *backward.kernels}


def frames(call) -> int:
    """How many functions written in Python a call passes through."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    call()  # what is remembered from call to call
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count - 1  # the call itself


@pytest.mark.parametrize("form", list(SHAPES))
@pytest.mark.parametrize(("gradients", "most"), [(True, 10), (False, 7)])
def test_the_door_passes_through_few_functions(form, gradients, most):
    M, K, N, rank = SHAPES[form]
    x, W, b = torch.randn(M, K, requires_grad=True), torch.randn(N, K), torch.randn(N)
    A, B = torch.randn(rank, K, requires_grad=True), torch.randn(N, rank, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        assert fused_plan(x, W, b, A, B, 2.0).form == form
        assert frames(lambda: fused_lora_linear(x, W, b, A, B, 2.0)) <= most


def test_the_low_rank_form_is_three_products_and_five():
    layer, x, dy = adapted("addmm")
    forward, backward = work(lambda: layer(x)), work(backward_of(layer, x, dy))
    # the gain rides on an accumulation: a product for the rank alone is a plain one
    assert forward.kernels == ("addmm", "mm", "addmm_")
    assert sorted(backward.kernels) == ["addmm", "addmm", "addmm_", "mm", "mm"]


def test_the_arithmetic_is_the_frozen_layers_and_six_skinny_products():
    layer, x, dy = adapted("addmm")
    M, K, N, rank = SHAPES["addmm"]
    both = flops(lambda: layer(x)) + flops(backward_of(layer, x, dy))
    assert both == 2 * (2 * M * K * N) + 6 * M * rank * (K + N)
    layer, x, dy = adapted("merge")
    M, K, N, rank = SHAPES["merge"]
    assert flops(lambda: layer(x)) == 2 * M * K * N + 2 * K * N * rank
    skinny = 2 * M * rank * (2 * K + 2 * N)
    assert flops(backward_of(layer, x, dy)) == 2 * M * K * N + 2 * K * N * rank + skinny


def test_the_products_do_not_grow_with_the_number_of_adapters():
    counts = set()
    for names in (["a"], ["a", "b"], ["a", "b", "c", "d"]):
        M, K, N, rank = SHAPES["addmm"]
        layer = nn.Linear(K, N)
        for i, name in enumerate(names):
            lora_core.inject(layer, rank=rank, alpha=rank + i, targets=nn.Linear, name=name)
        x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
        forward, backward = work(partial(layer, x)), work(backward_of(layer, x, dy))
        counts.add((len(forward.products), len(backward.products)))
        extra = set(forward.kernels) - {"addmm", "addmm_", "mm"}
        assert extra <= {"cat", "mul"}, extra
        assert len(forward.kernels) <= 7
    assert counts == {(3, 5)}


# the CUDA branch, on fake tensors


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(door, "capability", lambda device: (9, 0))


def on_fake_cuda(M, K, N, rank, dtype=torch.bfloat16):
    """The plan, and the operations of a forward and of a backward, on a GPU that isn't there.

    Autograd itself needs the GPU, so the backward is called by hand.
    """
    with FakeTensorMode() as mode, mode, torch.no_grad():
        W = torch.empty(N, K, dtype=dtype, device="cuda")
        b = torch.empty(N, dtype=dtype, device="cuda")
        A, B = torch.empty(rank, K, device="cuda"), torch.empty(N, rank, device="cuda")
        x, dy = (
            torch.empty(M, K, dtype=dtype, device="cuda"),
            W.new_empty(M, N),
        )
        gain = torch.empty((), device="cuda")
        form = door.route(x, W, b, A, B, 0.5, 0.0)
        results = []
        fused = form.form in forms.TRITON
        first = work(
            lambda: results.append(door.run(form, x, W, b, A, B, gain if fused else 0.5, 0.0))
        )
        (y,) = results
        assert (y.device.type, y.dtype, tuple(y.shape)) == ("cuda", dtype, (M, N))
        h = torch.empty(M, rank, dtype=dtype, device="cuda")
        grads = []

        def backward() -> None:
            if fused:
                call = torch.ops.lora_core.linear_backward
                grads.extend(call(dy, x, W, A, B, h, gain, dtype, form.form, 0.0, None, [True] * 3))
            else:
                grads.extend(linear.gradients(dy, x, W, A, B, h, 0.5, dtype, wide=dtype))

        second = work(backward)
        assert [(g.dtype, g.shape) for g in grads] == [(t.dtype, t.shape) for t in (x, A, B)]
    return form.form, first, second


@pytest.mark.parametrize(
    ("sizes", "form"),
    [((4096, 320, 320, 4), "triton1"), ((2048, 4096, 4096, 16), "triton2")],
)
def test_a_fused_call_is_one_operator_each_way_on_cuda(hopper, sizes, form):
    got, forward, backward = on_fake_cuda(*sizes)
    assert got == form
    assert forward.kernels == ("linear",)
    assert backward.kernels == ("linear_backward",)


def test_the_low_rank_form_on_cuda_casts_only_the_factors(monkeypatch):
    monkeypatch.setattr(door, "capability", lambda device: None)
    form, forward, backward = on_fake_cuda(4096, 320, 320, 4)
    assert form == "addmm"
    assert sorted(forward.products) == ["addmm", "addmm_", "mm"]
    assert len(backward.products) == 5
    # lora_A and lora_B down, their gradients up
    assert [k for k in forward.kernels if k in ELEMENTWISE] == ["_to_copy"] * 2
    assert [k for k in backward.kernels if k in ELEMENTWISE] == ["_to_copy"] * 4


# torch.compile


@pytest.mark.slow
# raised by Inductor's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_layer_is_one_graph_without_a_second_output_buffer():
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    M, K, N, _ = SHAPES["addmm"]
    layer, x, dy = adapted("addmm")
    compiled = torch.compile(layer, fullgraph=True)

    def call():
        y = compiled(x)
        return y, torch.autograd.grad(y, (x, layer.lora_A_default, layer.lora_B_default), dy)

    (y, grads), codes = run_and_get_code(call)
    expected = layer(x)
    assert_close(y, expected)
    others = torch.autograd.grad(expected, (x, layer.lora_A_default, layer.lora_B_default), dy)
    for g, e in zip(grads, others, strict=True):
        assert_close(g, e, atol=1e-4, rtol=1e-4)
    made = re.findall(r"empty_strided\w*\(\((\d+), (\d+)\)", "\n".join(codes))
    assert (str(M), str(N)) not in made
    assert (str(M), str(K)) not in made
    assert len(codes) == 2


def test_a_number_is_copied_to_the_device_once():
    door._copied.cache_clear()
    x = torch.ones(2, 4)
    gains = [door._tensor(0.3003, x) for _ in range(3)]
    assert gains[0] is gains[2]
    assert gains[0].dtype is torch.float64
    assert float(gains[0]) == 0.3003


def test_a_compiled_function_takes_a_number_and_many_batches_in_one_graph_each():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    W, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    call = torch.compile(
        lambda x: fused_lora_linear(x, W, None, A, B, 0.7), backend=counter, fullgraph=True
    )
    for tokens in (3, 700, 50, 9):
        x = torch.randn(tokens, 6)
        assert_close(call(x), lora_linear(x, W, None, A, B, 0.7))
    assert counter.frame_count <= 2  # one size, then any


@pytest.mark.slow
def test_layers_of_one_class_share_few_graphs_and_a_new_strength_none():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = nn.ModuleDict({"to_q": nn.Linear(16, 16)})
    lora_core.inject(model, rank=2)
    layer = torch.compile(model["to_q"], backend=counter, fullgraph=True)
    for strength in (1.0, 0.5, -3.0):
        lora_core.scales(model, default=strength)
        layer(torch.randn(3, 16))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["addmm", "triton1", "triton2"])
def test_the_operator_obeys_the_rules_of_operators(form):
    x = torch.randn(7, 6, requires_grad=True)
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    operands = x, torch.randn(5, 6), torch.randn(5), A, B, torch.tensor(0.5), torch.float32, form
    for dropped in ((0.0, None), (0.5, torch.tensor([3]))):
        torch.library.opcheck(torch.ops.lora_core.linear, (*operands, *dropped))
    h = torch.randn(7, 2)
    torch.library.opcheck(
        torch.ops.lora_core.linear_backward,
        (
            *(torch.randn(7, 5), x.detach(), torch.randn(5, 6), A.detach(), B.detach(), h),
            *(torch.tensor(0.5), torch.float32, form, 0.0, None, [True, False, True]),
        ),
    )


def test_the_operator_gives_its_rows_in_the_layout_that_it_promises():
    x, W, A, B = torch.randn(96, 160), torch.randn(9, 160), torch.randn(8, 160), torch.randn(9, 8)
    operands = x, W, None, A, B, torch.tensor(0.5), torch.float32, "operator", 0.0, None
    assert all(out.is_contiguous() for out in torch.ops.lora_core.linear(*operands))


def test_the_operator_answers_in_eager_arithmetic_on_a_cpu():
    x, W, A, B = torch.randn(7, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    got = ops.lora_linear(x, W, None, A, B, torch.tensor(0.5), dtype=torch.float32, form="triton1")
    assert_close(got, linear.low_rank(x, W, None, A, B, 0.5))
