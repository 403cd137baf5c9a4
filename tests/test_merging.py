"""Merging keeps the function; un-merging gives every bit back."""

import copy
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_core
from benchmarks.measure import peak_bytes
from lora_core import ConfigError, LoRALinear, MergeError, UnsupportedLayerError
from lora_core._layers import LoRAMixin, delta_of, factors_of
from lora_core._merging import sums, verbs
from lora_core._merging.contact import site_of, sum_of
from lora_core._merging.sums import Sum
from lora_core.testing.laws import train_pretend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sum_on(layer: LoRAMixin) -> Sum:
    """What a merge would write into this layer."""
    with torch.no_grad():
        found = sum_of(site_of(layer))
    assert found is not None
    return found


def pieces_of(layer: LoRAMixin) -> list[tuple[torch.Tensor, ...]]:
    found = sum_on(layer)
    return list(found.pieces(sums.cuts(found.weight), found.weight))


def net(dtype: torch.dtype = torch.float32, layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6, dtype=dtype) for _ in range(layers)]).eval()


def adapted(dtype: torch.dtype = torch.float32, layers: int = 3) -> nn.Sequential:
    model = net(dtype, layers)
    lora_core.inject(model, rank=2, targets=nn.Linear)
    train_pretend(model, "default")
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_bits(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.floats(-8, 8, allow_nan=False).filter(bool),
    st.integers(0, 2**16),
)
def test_merging_keeps_the_function_and_unmerging_every_bit(
    dtype: torch.dtype, inside: int, outside: int, bias: bool, alpha: float, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(inside, outside, bias=bias, dtype=dtype)
    layer = LoRALinear(linear, rank=1, alpha=alpha).eval()
    train_pretend(layer, "default")
    before, x = weights(layer), torch.randn(5, inside, dtype=dtype)
    expected = layer(x)
    lora_core.merge(layer)
    eps = torch.finfo(dtype).eps
    scale = 1 + abs(alpha) * float(x.double().norm())
    torch.testing.assert_close(layer(x), expected, rtol=32 * eps, atol=32 * eps * scale)
    lora_core.unmerge(layer)
    assert_bits(layer, before)
    assert torch.equal(layer(x), expected)


def test_float64_merged_equals_unmerged_to_twelve_digits() -> None:
    model, x = adapted(torch.float64), torch.randn(4, 6, dtype=torch.float64)
    lora_core.scales(model, default=0.7)
    expected = model(x)
    lora_core.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_merged_weight_is_rounded_once() -> None:
    layer = LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), rank=8)
    train_pretend(layer, "default")
    lora_A, lora_B = (f.double() for f in factors_of(layer, "default"))
    exact = (layer.weight.double() + lora_B @ lora_A).to(torch.bfloat16)
    lora_core.merge(layer)
    wrong = (layer.weight != exact).double().mean()
    assert wrong <= 0.001


def test_a_thousand_cycles_change_no_bit() -> None:
    model = adapted(torch.bfloat16, layers=1)
    before = weights(model)
    for cycle in range(1000):
        with torch.no_grad():
            model[0].lora_B_default.add_(cycle / 1000)
        before["0.lora_B_default"] = model[0].lora_B_default.detach().clone()
        lora_core.merge(model)
        lora_core.unmerge(model)
    assert_bits(model, before)


def test_unmerging_gives_the_very_parameter_and_memory_back() -> None:
    model = adapted()
    before = [(m.weight, m.weight.data_ptr()) for m in model]
    lora_core.merge(model)
    assert [m.weight is w for m, (w, _) in zip(model, before, strict=True)] == [True] * 3
    lora_core.unmerge(model)
    assert [(m.weight, m.weight.data_ptr()) for m in model] == before


def test_keep_moves_the_originals_and_still_restores_them() -> None:
    model = adapted()
    before = weights(model)
    lora_core.merge(model, keep="cpu")
    lora_core.unmerge(model)
    assert_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_weights_are_merged_to_the_same_bits_and_each_has_its_own_storage(dtype):
    torch.manual_seed(0)
    sizes = [(900, 700), (5, 3), (1, 7), (700, 900), (900, 700)]
    model = nn.Sequential(*[nn.Linear(i, o, dtype=dtype) for i, o in sizes]).eval()
    lora_core.inject(model, rank=1, targets=nn.Linear, name="style")
    train_pretend(model, "style")
    plain, whole = weights(model), copy.deepcopy(model)
    lost = lora_core.merge(model).loss
    assert lora_core.merge(whole, reversible=False).loss == pytest.approx(lost, rel=1e-6, abs=1e-12)
    assert_bits(model, weights(whole))
    storages = [layer.weight.untyped_storage() for layer in model]
    assert len({s.data_ptr() for s in storages}) == len(model)
    assert [s.nbytes() for s in storages] == [layer.weight.nbytes for layer in model]
    twin = pickle.loads(pickle.dumps(model))
    assert_bits(twin, weights(model))
    layer = model[0]
    merged = layer.weight.detach()
    before = merged.clone()
    lora_core.unmerge(model)
    assert_bits(model, plain)
    assert torch.equal(merged, before)  # whoever holds one keeps it


def test_only_active_adapters_are_merged_at_their_strengths() -> None:
    model, x = adapted(torch.float64), torch.randn(4, 6, dtype=torch.float64)
    lora_core.inject(model, rank=1, targets=nn.Linear, name="other")
    train_pretend(model, "other")
    lora_core.scales(model, other=-0.5)
    expected = model(x)
    report = lora_core.merge(model)
    assert report.adapters == {"other": -0.5}
    torch.testing.assert_close(model(x), expected)


def test_the_receipt_says_what_rounding_lost() -> None:
    small, exact = adapted(torch.bfloat16), adapted(torch.float64)
    for layer in small:
        with torch.no_grad():
            layer.lora_B_default.mul_(1e-4)
    lossy = lora_core.merge(small)
    assert lossy.worst_loss > 0.2
    assert lora_core.merge(exact).worst_loss < 1e-12
    assert "originals kept; rounding lost at most" in str(lossy)


def test_merging_twice_is_refused_and_applies_nothing() -> None:
    model = adapted()
    lora_core.merge(model)
    merged = weights(model)
    with pytest.raises(MergeError, match=re.escape("A layer must be unmerged to be merged, but")):
        lora_core.merge(model)
    assert_bits(model, merged)


def test_unmerging_what_is_not_merged_is_refused() -> None:
    with pytest.raises(
        MergeError, match="^The model must be merged to be unmerged, but no layer is"
    ):
        lora_core.unmerge(adapted())


def test_nothing_active_is_refused() -> None:
    model = adapted()
    with (
        lora_core.disabled(model),
        pytest.raises(
            MergeError, match="^An adapter must be active to be merged, but none is on 3"
        ),
    ):
        lora_core.merge(model)


@pytest.mark.parametrize("reversible", [True, False])
def test_a_non_finite_adapter_changes_nothing(reversible: bool) -> None:
    model = adapted()
    with torch.no_grad():
        model[2].lora_A_default[0, 0] = float("nan")
    before = {n: w for n, w in weights(model).items() if "lora" not in n}
    with pytest.raises(
        MergeError, match="^An adapter must be finite to be merged, but '2.default'"
    ):
        lora_core.merge(model, reversible=reversible)
    assert all(torch.equal(model.get_parameter(n), w) for n, w in before.items())
    assert all(layer.lora_state.merged is None for layer in model)


@pytest.mark.parametrize("reversible", [True, False])
def test_an_overflow_in_the_last_layer_changes_no_layer(reversible: bool) -> None:
    model = adapted(torch.float16)
    with torch.no_grad():
        model[2].lora_B_default.fill_(3e4)
        model[2].lora_A_default.fill_(30.0)
    before = weights(model)
    with pytest.raises(
        MergeError, match="^A merged weight must be finite, but that of '2' overflows"
    ):
        lora_core.merge(model, reversible=reversible)
    assert_bits(model, before)


@pytest.mark.parametrize("reversible", [True, False])
def test_finite_weights_are_merged_though_their_sum_overflows(reversible: bool) -> None:
    model = adapted()
    with torch.no_grad():
        model[1].weight.fill_(1e38)
    lora_core.merge(model, reversible=reversible)
    assert all(layer.lora_state.merged is not None for layer in model)
    assert model[1].weight.isfinite().all()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Conv1D(nn.Module):
    """As transformers' own: a linear layer that stores its matrix (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


LARGE = {
    "linear": lambda: nn.Linear(900, 1300),
    "fewer rows than a piece": lambda: nn.Linear(9000, 100),
    "conv": lambda: nn.Conv2d(100, 1100, 3),
    "depthwise": lambda: nn.Conv2d(60000, 60000, 3, groups=60000),
    "embedding": lambda: nn.Embedding(1300, 900),
    "conv1d": lambda: Conv1D(900, 1300),
}


def large(kind: str, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(LARGE[kind]()).to(dtype)
    lora_core.inject(model, rank=1 if kind == "depthwise" else 3, targets="0")
    train_pretend(model, "default")
    return model.eval()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LARGE)
def test_a_weight_that_is_merged_in_pieces_is_as_by_one_product(
    kind: str, dtype: torch.dtype
) -> None:
    model, twin = large(kind, dtype), large(kind, dtype)
    assert len(pieces_of(model[0])) > 1 or kind == "fewer rows than a piece"
    whole = model[0].weight.double() + delta_of(model[0]).double()
    lora_core.merge(model)
    few_ulps = 4 * torch.finfo(dtype).eps
    found = model[0].weight.detach().double()
    torch.testing.assert_close(found, whole.detach(), rtol=few_ulps, atol=few_ulps)
    lora_core.merge(twin, reversible=False)
    assert torch.equal(twin[0].weight, model[0].weight)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in LARGE if kind != "fewer rows than a piece"])
def test_a_large_weight_is_merged_in_place_in_less_than_another_of_it(
    kind: str, dtype: torch.dtype
) -> None:
    model = large(kind, dtype)
    peak = peak_bytes(lambda: lora_core.merge(model, reversible=False))
    assert 0 < peak < model[0].weight.nbytes


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", [0, 500, 999])
def test_what_is_not_finite_is_found_in_every_piece(at: int) -> None:
    layer = LoRALinear(nn.Linear(900, 1000), rank=1).eval()
    train_pretend(layer, "default")
    with torch.no_grad():
        layer.weight[at, 0], layer.weight[at, 1] = torch.inf, -torch.inf
    before = layer.weight.detach().clone()
    with pytest.raises(MergeError, match="^A merged weight must be finite, but that of"):
        lora_core.merge(layer)
    assert torch.equal(layer.weight, before)


def test_without_copies_the_update_stays_and_unmerge_refuses() -> None:
    model, x = adapted(torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected, pointers = model(x), [m.weight.data_ptr() for m in model]
    lora_core.merge(model, reversible=False)
    assert [m.weight.data_ptr() for m in model] == pointers
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(MergeError, match="^`unmerge` must have the original weights, but"):
        lora_core.unmerge(model)
    with pytest.raises(MergeError, match="^`disabled` must have the original weights, but"):
        lora_core.disabled(model).__enter__()
    lora_core.eject(model)
    assert all(type(m) is nn.Linear for m in model)
    torch.testing.assert_close(model(x), expected)


def test_disabled_shows_the_base_of_a_merged_model_and_merges_back() -> None:
    model, x = adapted(), torch.randn(4, 6)
    base = net()(x)
    lora_core.merge(model)
    merged, bits = model(x), weights(model)
    with pytest.raises(RuntimeError, match="midway"), lora_core.disabled(model):
        assert torch.equal(model(x), base)
        with lora_core.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        with pytest.raises(MergeError, match="^`unmerge` must stand outside"):
            lora_core.unmerge(model)
        raise RuntimeError("midway")
    assert torch.equal(model(x), merged)
    assert_bits(model, bits)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: lora_core.scales(m, default=0.5),
        lora_core.eject,
        lambda m: lora_core.inject(m, rank=1, targets=nn.Linear, name="b"),
    ],
)
def test_a_merged_model_refuses_other_changes(change: Callable[[nn.Module], object]) -> None:
    model = adapted()
    lora_core.merge(model)
    bits = weights(model)
    with pytest.raises(MergeError, match=r"Call `unmerge\(model\)` first"):
        change(model)
    assert_bits(model, bits)


def test_a_weight_without_values_is_not_merged() -> None:
    model = adapted().to("meta")
    with pytest.raises(MergeError, match="^A weight must have values to be merged, but '0', '1'"):
        lora_core.merge(model)
    assert all(layer.lora_state.merged is None for layer in model)


def test_training_while_merged_is_refused_at_the_forward() -> None:
    model = adapted().train()
    lora_core.merge(model)
    with pytest.raises(
        MergeError, match="^A layer in training mode must be unmerged, but 'default'"
    ):
        model(torch.randn(2, 6))
    with torch.no_grad():
        model(torch.randn(2, 6))
    model.eval()(torch.randn(2, 6))


def test_a_merge_between_forward_and_backward_raises() -> None:
    model = adapted()
    loss = model(torch.randn(2, 6)).sum()
    lora_core.merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tied_weight_is_refused_unless_untied() -> None:
    model = adapted(layers=2)
    head = nn.Linear(6, 6)
    head.weight = model[0].weight
    whole = nn.ModuleDict({"body": model, "head": head})
    shared, bits = head.weight, head.weight.detach().clone()
    with pytest.raises(MergeError, match=re.escape("but 'body.0 (also head.weight)' is shared")):
        lora_core.merge(whole)
    x = torch.randn(3, 6)
    expected = model(x)
    lora_core.merge(whole, untie=True)
    assert head.weight is shared
    assert torch.equal(head.weight, bits)
    torch.testing.assert_close(model(x), expected)
    lora_core.unmerge(whole)
    assert model[0].weight is shared
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("reversible", [True, False, "compact"])
def test_an_untied_merge_in_every_form_and_what_ties_it_again(reversible: Any) -> None:
    model = adapted(layers=2)
    whole = nn.ModuleDict({"body": model, "head": nn.Linear(6, 6)})
    shared = whole["head"].weight = model[0].weight
    bits, x = shared.detach().clone(), torch.randn(3, 6)
    expected = model(x)
    lora_core.merge(whole, reversible=reversible, untie=True)
    assert whole["head"].weight is shared
    assert torch.equal(shared, bits)
    torch.testing.assert_close(model(x), expected)
    model[0].weight = shared  # as `tie_weights` does
    repair = "Call `unmerge(model)`" if reversible else "Eject it and load it again"
    said = (
        "A weight that was untied for a merge must stay so, but that of this Linear was tied again,"
        f" as `tie_weights` does, and 'default' is not in it. {repair}, and merge after tying."
    )
    with pytest.raises(MergeError, match=f"^{re.escape(said)}$"):
        model(x)
    if reversible:
        with lora_core.disabled(model):
            model(x)
        lora_core.unmerge(whole)
        assert model[0].weight is shared
        assert torch.equal(model(x), expected)


def test_weights_that_share_memory_under_two_parameters_count_as_tied() -> None:
    model = adapted(layers=1)
    head = nn.Linear(6, 6)
    head.weight = nn.Parameter(model[0].weight.data)
    whole = nn.ModuleDict({"body": model, "head": head})
    with pytest.raises(MergeError, match="^A weight must belong to one module to be merged"):
        lora_core.merge(whole, reversible=False)


def test_a_merged_state_dict_says_so_and_cannot_be_applied_twice() -> None:
    model, fresh = adapted(), adapted()
    lora_core.merge(model)
    state = model.state_dict()
    assert "0.lora_merged" in state
    with pytest.raises(
        MergeError, match="^A state dict must be saved and loaded unmerged, but the s"
    ):
        fresh.load_state_dict(state)
    with pytest.raises(
        MergeError, match="^A state dict must be saved and loaded unmerged, but the m"
    ):
        model.load_state_dict(fresh.state_dict())


def test_a_copy_of_a_merged_model_unmerges_on_its_own() -> None:
    model = adapted()
    before = weights(model)
    lora_core.merge(model)
    twin = copy.deepcopy(model)
    lora_core.unmerge(twin)
    assert_bits(twin, before)
    assert model[0].lora_state.merged is not None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_made_while_disabled_is_the_unmerged_base(
    duplicate: Callable[[nn.Module], nn.Module], tied: bool
) -> None:
    body, x = adapted(layers=2), torch.randn(4, 6)
    model = nn.Sequential(*body, nn.Linear(6, 6))
    if tied:
        model[2].weight = model[0].weight
    expected = model(x)
    lora_core.merge(model, untie=True)
    merged = weights(model)
    with lora_core.disabled(model):
        base, twin = model(x), duplicate(model)
    assert_bits(model, merged)
    assert torch.equal(twin(x), base)
    assert [layer.lora_state.merged for layer in twin[:2]] == [None, None]
    assert (twin[2].weight is twin[0].weight) == tied
    lora_core.scales(twin, default=1.0)
    assert torch.equal(twin(x), expected)
    lora_core.merge(twin, untie=True)
    lora_core.unmerge(twin)
    lora_core.eject(twin)
    assert torch.equal(twin(x), base)
    assert [type(m) for m in twin] == [nn.Linear] * 3


def test_moving_a_merged_model_to_another_dtype_unmerges_to_that_dtype() -> None:
    model = adapted()
    before = weights(model)
    lora_core.merge(model)
    model.to(torch.bfloat16)
    lora_core.unmerge(model)
    assert torch.equal(model[0].weight, before["0.weight"].to(torch.bfloat16))


def test_merging_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = adapted()
    with torch.inference_mode():
        lora_core.merge(model)
        lora_core.unmerge(model)
        lora_core.merge(model)
    lora_core.unmerge(model)
    model.train()(torch.randn(2, 6)).sum().backward()
    assert model[0].lora_B_default.grad is not None


class Stop(BaseException):
    """Raised where a signal could arrive."""


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Runs `call` and raises at the `at`-th line of the library it passes; says whether it did."""
    seen = 0

    def trace(frame: object, event: str, arg: object) -> object:
        nonlocal seen
        if "lora_core" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == at:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Stop:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_at_any_line_leaves_the_whole_model_before_or_after(verb: str) -> None:
    at, hit, rolled_back = 0, True, 0
    while hit:
        at += 1
        model = adapted(layers=2)
        plain = weights(model)
        lora_core.merge(model)
        merged = weights(model)
        if verb == "merge":
            lora_core.unmerge(model)
        hit = interrupted(lambda m=model: getattr(lora_core, verb)(m), at)
        states = {layer.lora_state.merged is not None for layer in model}
        assert len(states) == 1, f"half merged at line {at}"
        (is_merged,) = states
        assert_bits(model, merged if is_merged else plain)
        rolled_back += hit and is_merged == (verb == "unmerge")
        if is_merged:
            lora_core.unmerge(model)
        assert_bits(model, plain)
    assert rolled_back > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [1, 3])
def test_an_interrupt_of_an_in_place_merge_applies_no_layer_twice(
    dtype: torch.dtype, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces > 1:
        for name, value in {"_PIECE": 1, "_WHOLE": 1, "_ROWS": 2}.items():
            monkeypatch.setattr(sums, name, value)
    assert len(pieces_of(adapted(dtype, layers=1)[0])) == pieces
    at, hit = 0, True
    while hit:
        at += 1
        model = adapted(dtype, layers=2)
        plain = weights(model)
        lora_core.merge(model)
        merged = weights(model)
        lora_core.unmerge(model)
        hit = interrupted(lambda m=model: lora_core.merge(m, reversible=False), at)
        for i, layer in enumerate(model):
            expected = merged if layer.lora_state.merged is not None else plain
            assert torch.equal(layer.weight, expected[f"{i}.weight"]), f"line {at}"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_in_place_asks_for_no_memory_once_it_writes(dtype: torch.dtype) -> None:
    model = large("linear", dtype)
    product = sum_on(model[0])
    room = product.room()
    pieces = len(pieces_of(model[0]))
    # the products of pieces may take some of their own inside of the library that makes them
    with torch.no_grad():
        assert peak_bytes(lambda: product.put_in(room)) == 0
    assert pieces > 1


SIGNALLED = """
import copy, random, signal, sys, tempfile, time
import torch
from torch import nn
import lora_core
from lora_core.testing.laws import train_pretend

torch.set_num_threads(1)
torch.manual_seed(0)
random.seed(0)


def look(model):
    return [
        (n, type(m), sorted(vars(m)), getattr(m, "lora_merged", None) is None,
         [(k, p.requires_grad, 0 if "lora" in k else p.tolist()) for k, p in m._parameters.items()])
        for n, m in model.named_modules()
    ]


armed = False


def strike(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt


signal.signal(signal.SIGALRM, strike)
bare = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]).eval()
one = copy.deepcopy(bare)
lora_core.inject(one, rank=2, targets="*", name="one")
train_pretend(one, "one")
merged = copy.deepcopy(one)
lora_core.merge(merged)
file = tempfile.mkdtemp() + "/one"
lora_core.save(one, file)
cases = {
    "inject": (bare, lambda m: lora_core.inject(m, rank=1, targets="*")),
    "load": (one, lambda m: lora_core.load(m, file, name="two")),
    "merge": (one, lora_core.merge),
    "unmerge": (merged, lora_core.unmerge),
    "scales": (one, lambda m: lora_core.scales(m, one=0.5)),
    "eject": (one, lora_core.eject),
}
struck = undone = 0
for name, (pristine, verb) in cases.items():
    before, twin = look(pristine), copy.deepcopy(pristine)
    start = time.perf_counter()
    verb(twin)
    length, after = time.perf_counter() - start, look(twin)
    for _ in range(17):
        model = copy.deepcopy(pristine)
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, length))
            verb(model)
            armed = False
        except KeyboardInterrupt:
            struck += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        now = look(model)
        if now not in (before, after):
            sys.exit(f"half done: {name}")
        undone += now == before
print(struck, undone)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_real_signals_at_random_moments_leave_the_model_before_or_after() -> None:
    # in a process of its own, which is killed if a signal should ever make it hang
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    struck, undone = map(int, done.stdout.split())
    assert struck > 30
    assert undone > 10


def test_concurrent_forwards_of_one_model_agree() -> None:
    model, x = adapted(), torch.randn(4, 6)
    expected, wrong = model(x), []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(model(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forward_patched_after_injection_is_refused_by_merge_and_eject() -> None:
    model, x = adapted(), torch.randn(2, 6)
    before, expected, layer = weights(model), model(x), model[1]
    layer.forward = layer.forward  # as an offloading hook puts it there
    said = "A layer must have its class's forward to be {}, but '1' has one patched onto the"
    with pytest.raises(MergeError, match=f"^{re.escape(said.format('merged'))} instance"):
        lora_core.merge(model)
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said.format('ejected'))} inst"):
        lora_core.eject(model)
    assert_bits(model, before)
    assert torch.equal(model(x), expected)
    del layer.forward
    lora_core.merge(model, reversible=False)
    lora_core.eject(model)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["its own", "another's"])
def test_a_buffer_in_the_weights_memory_is_not_written_through(own: bool, reversible: bool) -> None:
    model = adapted()
    model[0 if own else 2].register_buffer("held", model[0].weight.detach()[1:])
    before, held = weights(model), model[0 if own else 2].held.clone()
    label = f"{0 if own else 2}.held"
    said = (
        "A weight must belong to one module to be merged, but '0 (also "
        f"{label})' is shared and would change there too."
    )
    with pytest.raises(MergeError, match=f"^{re.escape(said)} "):
        lora_core.merge(model, reversible=reversible)
    assert_bits(model, before)
    lora_core.merge(model, untie=True)
    assert torch.equal(model[0 if own else 2].held, held)
    lora_core.unmerge(model)
    assert_bits(model, before)


def test_a_state_dict_made_inside_disabled_holds_the_base_and_can_be_loaded() -> None:
    model, other = adapted(), adapted()
    before = weights(model)
    lora_core.merge(model)
    with lora_core.disabled(model):
        state = {name: t.clone() for name, t in model.state_dict().items()}
    assert state.keys() == before.keys()
    with torch.no_grad():
        other[0].weight.zero_()
    other.load_state_dict(state)
    assert_bits(other, before)
    assert "0.lora_merged" in model.state_dict()


def test_the_reported_loss_is_the_share_of_the_update_that_did_not_arrive() -> None:
    layer = LoRALinear(nn.Linear(6, 6, dtype=torch.bfloat16), rank=2).eval()
    train_pretend(layer, "default")
    with torch.no_grad():
        layer.lora_B_default.mul_(1e-3)
    old, asked = layer.weight.detach().double(), delta_of(layer).double()
    report = lora_core.merge(layer)
    arrived = layer.weight.detach().double() - old
    share = float((asked - arrived).norm() / asked.norm())
    assert share > 0.1
    assert report.worst_loss == pytest.approx(share, rel=1e-6)


FORMS = pytest.mark.parametrize("reversible", [True, False, "compact"])


@FORMS
@pytest.mark.parametrize("size", [6, 300, 900])
@pytest.mark.parametrize("dora", [False, True])
def test_autocast_narrows_no_merge(size: int, dora: bool, reversible: bool | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size)).eval()
    lora_core.inject(model, rank=2, targets="0", dora=dora)
    train_pretend(model, "default")
    twin = copy.deepcopy(model)
    lora_core.merge(model, reversible=reversible)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora_core.merge(twin, reversible=reversible)
    assert_bits(twin, weights(model))


def counted(act: Callable[[], object]) -> dict[str, int]:
    """How many functions of Python's are called, and with those of C."""
    seen = {"call": 0, "c_call": 0}

    def count(frame: object, event: str, arg: object) -> None:
        if event in seen:
            seen[event] += 1

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return {"Python": seen["call"], "all": sum(seen.values())}


@pytest.mark.parametrize(
    ("reversible", "most"),
    [(True, 79), ("compact", 85), (False, 93)],
    ids=["copy", "compact", "no"],
)
def test_a_merge_of_small_layers_calls_few_functions_for_each(
    reversible: bool | str, most: int
) -> None:
    layers = 500
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(layers)]).eval()
    lora_core.inject(model, rank=4, targets=nn.Linear)
    lora_core.merge(model)
    lora_core.unmerge(model)
    calls = counted(lambda: lora_core.merge(model, reversible=reversible))
    assert calls["all"] / layers <= most
    assert calls["Python"] / layers <= 40
    if reversible:
        calls = counted(lambda: lora_core.unmerge(model))
        assert calls["all"] / layers <= 40


@pytest.mark.usefixtures("one_thread")
def test_a_merge_in_place_is_two_passes_over_a_weight_and_few_operations_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(800, 800) for _ in range(20)]).eval()
    lora_core.inject(model, rank=4, targets=nn.Linear)
    train_pretend(model, "default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        lora_core.merge(model, reversible=False)
    counts = {each.key: each.count for each in seen.key_averages()}
    assert counts["aten::addmm_"] == len(model)
    assert "aten::aminmax" not in counts
    # the norms that bound the sum: of each weight and of its two factors
    assert counts["aten::linalg_vector_norm"] <= 3 * len(model) + 8
    assert "aten::add_" not in counts


@pytest.mark.parametrize("reversible", [True, "compact", False])
def test_two_threads_that_merge_one_model_merge_it_once(
    monkeypatch: pytest.MonkeyPatch, reversible: Any
) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    lora_core.inject(model, rank=2, targets="0")
    for p in lora_core.parameters(model):
        p.data.normal_(0, 0.01)
    before, honest, once = model[0].weight.clone(), verbs.check_factors, []

    def slow(sites: Any) -> Any:
        if not once:
            once.append(threading.Thread(target=lambda: lora_core.merge(model)))
            once[0].start()
            once[0].join()
        return honest(sites)

    monkeypatch.setattr(verbs, "check_factors", slow)
    said = "A layer must be unmerged to be merged, but '0' was merged by another thread meanwhile."
    with pytest.raises(MergeError, match=f"^{re.escape(said)}"):
        lora_core.merge(model, reversible=reversible)
    lora_core.unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_nothing_is_kept_anywhere_by_a_merge_that_keeps_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    lora_core.inject(model, rank=2, targets="0")
    said = "`keep` must go with a merge that keeps something, but `reversible` is False and `keep`"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)} is 'cpu'"):
        lora_core.merge(model, reversible=False, keep="cpu")
    assert model[0].lora_state.merged is None
