"""Listing adapters, and choosing which are active and how strongly."""

import copy
import itertools
import linecache
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lora_core import (
    AdapterError,
    ConfigError,
    LoRALinear,
    MergeError,
    disabled,
    eject,
    inject,
    merge,
    parameters,
    save,
    scales,
    summary,
    unmerge,
)
from lora_core._adapters import scopes
from lora_core._layers import LoRAMixin, change, factors_of

STRENGTHS = st.floats(-4, 4, width=16)


@pytest.fixture
def two(net, perturb):
    """The net with two trained adapters, the second on fewer layers and one more."""
    inject(net, rank=2, alpha=3.0, name="a")
    inject(net, rank=3, name="b", targets=["blocks.0.attn.to_q", "head"])
    perturb(net)
    return net


def selections(model: nn.Module) -> list[object]:
    return [m.lora_state.selection for m in model.modules() if isinstance(m, LoRAMixin)]


def same(left: list[object], right: list[object]) -> bool:
    """Whether the very same selections are in force."""
    return all(a is b for a, b in zip(left, right, strict=True))


def strengths(model: nn.Module) -> dict[str, tuple[float, ...]]:
    return {adapter.name: adapter.strengths for adapter in summary(model).adapters}


# -- parameters and summary


def test_parameters_are_the_factors_once_in_the_order_of_the_model(two):
    for name in ("a", "b"):
        expected = [
            p for n, p in two.named_parameters() if n.endswith((f"_A_{name}", f"_B_{name}"))
        ]
        found = parameters(two, name)
        assert len(found) == len(expected) == {"a": 16, "b": 4}[name]
        assert all(p is q for p, q in zip(found, expected, strict=True))
    both = parameters(two)
    assert len(both) == len({id(p) for p in both}) == 20
    assert {id(p) for p in both} == {id(p) for n, p in two.named_parameters() if "lora_" in n}
    assert [p.shape for p in parameters(two, "b")[:2]] == [(3, 8), (8, 3)]


def test_parameters_of_a_shared_module_come_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    inject(model, rank=2, targets="*")
    assert len(parameters(model)) == 2


def test_summary_says_how_the_adapters_stand(two):
    before = selections(two)
    found = summary(two)
    assert same(selections(two), before)
    a, b = found.adapters
    assert (a.name, len(a.layers), a.ranks, a.parameters) == ("a", 8, (2,), 8 * 32)
    assert (b.name, b.layers, b.ranks) == ("b", ("blocks.0.attn.to_q", "head"), (3,))
    assert (a.scales, b.scales) == ((1.5,), (1.0,))
    assert (b.parameters, b.nbytes) == (3 * (16 + 13), 12 * (16 + 13))
    assert (a.active, b.active) == (True, True)
    assert (a.trainable, b.trainable) == (False, True)
    assert not a.merged
    assert found.total == sum(p.numel() for p in two.parameters())
    assert found.trainable == b.parameters
    scales(two, b=0.5)
    a, b = summary(two).adapters
    assert (a.active, a.strengths) == (False, ())
    assert (b.active, b.strengths) == (True, (0.5,))
    merge(two.eval())
    assert [adapter.merged for adapter in summary(two).adapters] == [False, True]


def test_summary_of_a_plain_model_has_no_adapters(net):
    found = summary(net)
    assert found.adapters == ()
    assert str(found) == "no adapters; 1,165 of 1,165 parameters train (100.00%)"


def test_summary_prints_as_a_table(two):
    scales(two, b=-0.5)
    lines = str(summary(two)).splitlines()
    header = "adapter layers rank scale parameters bytes strength trains merged"
    assert [line.split() for line in lines[:4:3]] == [
        header.split(),
        ["b", "2", "3", "1", "87", "348", "-0.5", "yes", "no"],
    ]
    assert lines[2].split() == ["a", "8", "2", "1.5", "256", "1024", "-", "no", "no"]
    assert lines[4] == "87 of 1,508 parameters train (5.77%)"


@pytest.mark.parametrize("call", [parameters, eject, lambda m: scales(m, a=1.0)])
def test_a_model_without_adapters_is_an_error(net, call):
    message = (
        "The model must have an adapter, but this Net has none. Call `inject` or `load` first."
    )
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        call(net)
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"), disabled(net):
        pass


def test_parameters_of_an_unknown_adapter_is_an_error(two):
    message = "`name` must be an adapter of the model, but is 'c'; it has 'a', 'b'."
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        parameters(two, "c")


# -- what strengths do to the output


def test_scale_zero_is_the_base(net, x, perturb):
    plain = net(x)
    inject(net, name="a")
    perturb(net)
    assert not torch.equal(net(x), plain)
    scales(net, a=0.0)
    assert torch.equal(net(x), plain)


@given(STRENGTHS, STRENGTHS, st.booleans(), st.integers(1, 5), st.integers(1, 5))
def test_two_adapters_are_the_sum_of_their_deltas(s, t, bias, rank_a, rank_b):
    layer = nn.Linear(6, 5, bias=bias).double()
    model = nn.Sequential(layer)
    x = torch.randn(4, 6).double()
    plain = model(x)
    inject(model, rank=rank_a, alpha=3.0, name="a", targets="0")
    inject(model, rank=rank_b, name="b", targets="0")
    with torch.no_grad():
        for p in parameters(model):
            p.normal_()
    scales(model, a=s, b=t)
    a = s * 3.0 / rank_a * layer.lora_B_a @ layer.lora_A_a
    b = t * layer.lora_B_b @ layer.lora_A_b
    both = model(x)
    assert_close(both, plain + x @ (a + b).T, atol=1e-12, rtol=1e-12)
    scales(model, b=t, a=s)  # the order of activation does not matter
    assert_close(model(x), both, atol=1e-12, rtol=1e-12)
    scales(model, a=s)
    assert_close(model(x), plain + x @ a.T, atol=1e-12, rtol=1e-12)


def test_equal_and_opposite_strengths_of_equal_adapters_cancel(net, x):
    plain = net.double()(x.double())
    inject(net, name="a")
    inject(net, name="b")
    with torch.no_grad():
        for p, q in zip(parameters(net, "a"), parameters(net, "b"), strict=True):
            q.copy_(p.normal_())
    scales(net, a=1.5, b=-1.5)
    assert_close(net(x.double()), plain, atol=1e-10, rtol=1e-10)
    scales(net, a=1.5, b=-1.0)
    assert (net(x.double()) - plain).abs().max() > 0.01


def test_adapters_with_different_dropouts_are_both_applied(x):
    model = nn.Sequential(nn.Linear(8, 4))
    inject(model, name="a", targets="0", dropout=0.5)
    inject(model, name="b", targets="0")
    with torch.no_grad():
        for p in parameters(model):
            p.normal_()
    layer = model[0]
    a, b = (factors_of(layer, name)[1] @ factors_of(layer, name)[0] for name in "ab")
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert_close(model.eval()(x), base + x @ (a + b).T)
    model.train()
    torch.manual_seed(2)
    first = model(x)
    torch.manual_seed(2)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)
    # adapter b drops nothing
    scales(model, b=1.0)
    assert_close(model(x), base + x @ b.T)


def test_inactive_adapters_get_no_gradient(two, x):
    for p in parameters(two):
        p.requires_grad_(True)
    scales(two, a=1.0)
    two(x).sum().backward()
    assert all(p.grad is None for p in parameters(two, "b"))
    assert all(p.grad is not None for p in parameters(two, "a"))


# -- choosing, and putting back


def test_scales_acts_at_once_and_makes_the_others_inactive(two):
    receipt = scales(two, b=0.25)
    assert strengths(two) == {"a": (), "b": (0.25,)}
    assert receipt.strengths == {"b": 0.25}
    assert repr(receipt) == "scales(b=0.25)"
    scales(two, a=2, b=-1)
    assert strengths(two) == {"a": (2.0,), "b": (-1.0,)}


def test_leaving_scales_restores_exactly_what_was_there(two, x):
    scales(two, a=0.3, b=0.7)
    before, out = selections(two), two(x)
    with scales(two, b=2.0):
        inner = selections(two)
        assert not torch.equal(two(x), out)
        with scales(two, a=-1.0), disabled(two), scales(two, a=5.0):
            assert strengths(two) == {"a": (5.0,), "b": ()}
        assert same(selections(two), inner)
    assert same(selections(two), before)
    assert torch.equal(two(x), out)


def test_strengths_that_differ_between_layers_come_back_each_to_its_layer(two):
    scales(two.blocks[0], a=0.5)
    before = selections(two)
    assert strengths(two)["a"] == (0.5, 1.0)
    with scales(two, a=3.0):
        assert strengths(two)["a"] == (3.0,)
    assert same(selections(two), before)


def test_disabled_is_the_base_bit_for_bit_and_restores_exactly(net, x, perturb):
    plain = net(x)
    inject(net)
    perturb(net)
    scales(net, default=0.3)
    before, out = selections(net), net(x)
    with disabled(net):
        assert torch.equal(net(x), plain)
        with disabled(net):
            assert torch.equal(net(x), plain)
        assert torch.equal(net(x), plain)
    assert same(selections(net), before)
    assert torch.equal(net(x), out)


def test_disabled_shows_the_base_of_a_merged_model_too(net, x, perturb):
    net.eval()
    plain = net(x)
    inject(net)
    perturb(net)
    weight = net.blocks[0].attn.to_q.weight
    merge(net)
    bits, out = weight.detach().clone(), net(x)
    with disabled(net):
        assert torch.equal(net(x), plain)
        with disabled(net):
            assert torch.equal(net(x), plain)
        assert torch.equal(net(x), plain)
    assert torch.equal(weight, bits)
    assert torch.equal(net(x), out)
    unmerge(net)
    eject(net)
    assert torch.equal(net(x), plain)


@pytest.mark.parametrize(
    "scope", [disabled, lambda m: scales(m, b=2.0)], ids=["disabled", "scales"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("merged", [True, False])
def test_an_exception_inside_restores_and_passes_on(two, x, scope, error, merged):
    if merged:
        merge(two.eval())
        scope = disabled
    before, out = selections(two), two(x)
    with pytest.raises(error, match="^mine$"), scope(two), disabled(two):
        raise error("mine")
    assert same(selections(two), before)
    assert torch.equal(two(x), out)


@pytest.mark.parametrize("scope", [disabled, lambda m: scales(m, b=2.0)])
def test_a_closed_generator_restores(two, scope):
    before = selections(two)

    def steps() -> Iterator[int]:
        with scope(two):
            yield 1
            yield 2

    running = steps()
    assert next(running) == 1
    assert not same(selections(two), before)
    running.close()
    assert same(selections(two), before)


def test_an_adapter_ejected_inside_does_not_come_back(two, x):
    with disabled(two):
        eject(two, "a")
        base = two(x)
    assert strengths(two) == {"b": (1.0,)}
    assert not torch.equal(two(x), base)
    with scales(two, b=0.5):
        eject(two)
    assert summary(two).adapters == ()
    assert torch.equal(two(x), base)


def test_a_dtype_changed_inside_is_kept(two, x):
    with disabled(two):
        two.double()
    assert strengths(two) == {"a": (1.0,), "b": (1.0,)}
    assert two(x.double()).dtype == torch.float64


def interrupted_at_line(call: Callable[[], object], k: int) -> bool:
    left = k

    def trace(frame, event, arg):
        nonlocal left
        if Path(frame.f_code.co_filename).parent != Path(scopes.__file__).parent:
            return None
        # no signal comes between the last line under a lock and its release, only a trace does
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and "with lock()" not in source:
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_on_any_line_of_scales_changes_all_layers_or_none(two):
    everywhere = [m for m in two.modules() if isinstance(m, LoRAMixin)]
    before, k = selections(two), 1
    while interrupted_at_line(lambda: scales(two, b=2.0), k):
        if not same(selections(two), before):
            assert strengths(two) == {"a": (), "b": (2.0,)}, f"half chosen at line {k}"
            for layer, selection in zip(everywhere, before, strict=True):
                change(layer, selection=selection)
        k += 1
    assert k > 30
    assert strengths(two) == {"a": (), "b": (2.0,)}


# -- blocks that end in another order than nested ones


@pytest.mark.parametrize("merged", [False, True])
def test_overlapping_disabled_blocks_each_show_the_base_to_their_end(two, x, merged):
    with disabled(two):
        plain = two(x)
    if merged:
        merge(two.eval())
    before, out = selections(two), two(x)
    first, second = disabled(two), disabled(two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(two(x), plain)
    second.__exit__(None, None, None)
    assert same(selections(two), before)
    assert torch.equal(two(x), out)


@pytest.mark.parametrize("merged", [False, True])
def test_two_threads_inside_disabled_leave_the_model_as_it_was(two, x, merged):
    if merged:
        merge(two.eval())
    before, out = selections(two), two(x)
    both_in, first_out = threading.Barrier(2), threading.Event()

    def first() -> None:
        with disabled(two):
            both_in.wait(10)
        first_out.set()

    def second() -> None:
        with disabled(two):
            both_in.wait(10)
            assert first_out.wait(10)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()
    assert same(selections(two), before)
    assert torch.equal(two(x), out)


def test_a_generator_suspended_inside_disabled_ends_when_it_likes(two):
    before = selections(two)

    def steps() -> Iterator[int]:
        with disabled(two):
            yield 1

    running = steps()
    with disabled(two):
        assert next(running) == 1
    assert strengths(two) == {"a": (), "b": ()}
    running.close()
    assert same(selections(two), before)


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_blocks_that_end_in_any_order_end_where_they_began(two, order):
    scales(two, a=0.3, b=0.7)
    before = selections(two)
    blocks = []
    for make in (lambda: scales(two, b=2.0), lambda: disabled(two)) * 2:
        blocks.append(make())
        blocks[-1].__enter__()
    standing = list(range(4))
    for i in order:
        blocks[i].__exit__(None, None, None)
        standing.remove(i)
        shown = [] if not standing or standing[-1] % 2 else [2.0]
        expected = {"a": (0.3,), "b": (0.7,)} if not standing else {"a": (), "b": tuple(shown)}
        assert strengths(two) == expected
    assert same(selections(two), before)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_receipts_undone_in_any_order_end_where_they_began(two, order):
    before = selections(two)
    receipts = [scales(two, a=float(i)) for i in range(3)]
    for i in order:
        receipts[i].undo()
    assert same(selections(two), before)


def test_a_receipt_kept_from_inside_a_block_outlives_it_without_effect(two):
    before = selections(two)
    with disabled(two):
        receipt = scales(two, a=2.0)
        assert strengths(two) == {"a": (2.0,), "b": ()}
    assert same(selections(two), before)
    receipt.undo()
    assert same(selections(two), before)
    with pytest.raises(ConfigError, match=r"^A `scales` block must be entered once, but this"):
        receipt.__enter__()


def test_a_scale_chosen_inside_for_some_layers_leaves_the_others(two):
    before = selections(two)
    inner = scales(two.blocks[0], a=0.5)
    outer = disabled(two)
    outer.__enter__()
    inner.undo()
    assert strengths(two) == {"a": (), "b": ()}
    outer.__exit__(None, None, None)
    assert same(selections(two), before)


def test_an_adapter_that_comes_between_overlapping_blocks_stays_active(two):
    first, second = disabled(two), disabled(two)
    first.__enter__()
    inject(two, name="c")
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert strengths(two) == {"a": (1.0,), "b": (1.0,), "c": (1.0,)}


def test_dropped_receipts_are_not_remembered(two):
    for _ in range(50):
        scales(two, a=0.5)
    assert max(len(refs) for refs in scopes.SCOPES.values()) <= 1
    with disabled(two):
        pass
    assert not [m for m in two.modules() if m in scopes.SCOPES]


# -- refusals


def test_an_unknown_name_changes_nothing(two):
    before = selections(two)
    message = "`scales` must name adapters of the model, but got 'c', 'd'; it has 'a', 'b'."
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        scales(two, a=0.5, c=1.0, d=1.0)
    assert same(selections(two), before)


def test_no_strength_at_all_is_an_error(two):
    message = "`scales` must be given a strength for an adapter, but got none."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)} Write `scales"):
        scales(two)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True])
def test_a_strength_must_be_finite(two, value):
    before = selections(two)
    message = f"`b` must be a finite number, but is {value!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        scales(two, a=0.5, b=value)
    assert same(selections(two), before)


def test_a_finite_strength_that_makes_an_infinite_gain_is_refused(two):
    before = selections(two)
    message = "`strength * scale` must be at most 3.4e+38, but is 4.5e+38 for 'a'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)} Choose smaller values.$"):
        scales(two, b=1.0, a=3e38)
    assert same(selections(two), before)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"^`strength \* scale` must be at most 3.4e\+38"):
        inject(model, rank=1, alpha=1e39, targets="0")
    assert type(model[0]) is nn.Linear


def test_strengths_of_a_merged_model_are_refused(two):
    scales(two, b=1.0)
    merge(two.eval())
    before = selections(two)
    rule = "Strengths must be chosen while unmerged, but 'blocks.0.attn.to_q', 'head' is merged."
    with pytest.raises(MergeError, match=f"^{re.escape(rule)} "):
        scales(two, b=0.5)
    assert same(selections(two), before)


def test_an_irreversible_merge_cannot_be_hidden(net):
    inject(net, targets="head")
    merge(net, reversible=False)
    message = (
        "`disabled` must have the original weights, but 'head' was merged with reversible=False."
    )
    with pytest.raises(MergeError, match=f"^{re.escape(message)} "), disabled(net):
        pass


def test_any_legal_name_can_be_given_a_strength():
    layer = LoRALinear(nn.Linear(4, 4), name="style-2")
    scales(layer, **{"style-2": 0.5})
    assert layer.lora_state.selection.strengths == (0.5,)
    other = LoRALinear(nn.Linear(4, 4), name="model")
    scales(other, model=0.5)
    assert other.lora_state.selection.strengths == (0.5,)


def two_layers(**options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, rank=2, targets=nn.Linear, **options)
    for factor in parameters(model):
        nn.init.normal_(factor)
    return model


def test_an_adapter_replaced_under_its_name_inside_a_block_is_another():
    model, x = two_layers(alpha=2).eval(), torch.randn(4, 8)
    with disabled(model):
        eject(model)
        inject(model, rank=2, alpha=16, targets=nn.Linear)
    for factor in parameters(model):
        nn.init.normal_(factor)
    assert float(model[0].lora_state.selection.bank[0].gain) == 8
    apart = model(x)
    merge(model)
    assert_close(model(x), apart, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block", [disabled, lambda model: scales(model, default=0.5)])
def test_a_change_of_dtype_inside_a_block_widens_the_gains(block):
    model, x = two_layers().eval(), torch.randn(4, 8, dtype=torch.float64)
    scales(model, default=0.3)
    with block(model):
        model.double()
    assert model[0].lora_state.selection.bank[0].gain.dtype is torch.float64
    apart = model(x)
    merge(model)
    assert_close(model(x), apart, rtol=1e-12, atol=1e-12)


def test_a_block_that_ends_between_a_receipt_and_its_block_does_not_spoil_it():
    model = two_layers()
    first = scales(model, default=0.5)
    first.__enter__()
    second = scales(model, default=0.25)
    first.__exit__(None, None, None)
    with second:
        assert model[0].lora_state.selection.strengths == (0.25,)
    assert model[0].lora_state.selection.strengths == (1.0,)
    with pytest.raises(ConfigError, match=r"^A `scales` block must be entered once, but"), second:
        pass


def test_threads_in_blocks_of_their_own_leave_the_strength_they_found():
    model, errors = two_layers(), []

    def work(strength: float) -> None:
        for _ in range(200):
            try:
                with scales(model, default=strength):
                    pass
            except Exception as error:
                errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(s,)) for s in (0.25, 0.5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert model[0].lora_state.selection.strengths == (1.0,)


def test_a_receipt_is_not_copied():
    receipt = scales(two_layers(), default=0.5)
    with pytest.raises(ConfigError, match=r"^What `scales` returns must stay with the model"):
        copy.deepcopy(receipt)


FORKED = """
import os, signal, sys, threading
import torch
from torch import nn
import lora_core
from lora_core._layers import lock

torch.set_num_threads(1)
model = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
lora_core.inject(model, rank=2)
held, done = threading.Event(), threading.Event()

def hold():
    with lock():
        held.set()
        done.wait(60)

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    with lora_core.disabled(model):
        pass
    os._exit(0)
status = os.waitpid(child, 0)[1]
done.set()
thread.join()
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_thread_switches_adapters_is_not_stuck():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [disabled, lambda model: scales(model, default=0.25)])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_at_the_end_of_a_block_comes_after_it(monkeypatch, block, merged, after):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))).eval()
    inject(model, rank=2, targets=nn.Linear)
    for p in parameters(model):
        p.data.normal_()
    if merged and block is not disabled:
        return  # strengths are chosen while unmerged
    if merged:
        merge(model)
    x = torch.randn(2, 6)
    expected, honest, once = model(x), scopes.change, []

    def interrupted(*args, **changes):
        if after or once:
            honest(*args, **changes)
        if not once:
            once.append(True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), block(model):
        monkeypatch.setattr(scopes, "change", interrupted)
    assert torch.equal(model(x), expected)
    with disabled(model), disabled(model):
        pass
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"dora": True}, {"bias": True}, {"init": "pissa"}, {"init": "olora"}]
)
def test_layers_that_never_trained_are_named(tmp_path, settings):
    model = nn.ModuleDict({n: nn.Linear(6, 5) for n in ("to_q", "to_k", "to_v")})
    inject(model, rank=2, name="ink", **settings)
    said = "'ink' adds nothing yet: it is as it began on all 3 layers"
    assert summary(model).adapters[0].idle == ("to_q", "to_k", "to_v")
    assert str(summary(model)).splitlines()[-1] == said
    assert save(model, tmp_path / "a.safetensors").notes == (said,)
    parts = {"dora": "lora_magnitude_ink", "bias": "lora_bias_ink"}
    part = parts.get(next(iter(settings), ""), "lora_B_ink")
    with torch.no_grad():
        for name in ("to_q", "to_v"):
            getattr(model[name], part)[0] += 1e-30  # of which the square is zero
            getattr(model[name], part)[1] += 1e-3
    said = "'ink' adds nothing on 1 of 3 layers, where it is as it began: 'to_k'"
    assert str(summary(model)).splitlines()[-1] == said
    assert save(model, tmp_path / "a.safetensors").notes == (said,)
    with torch.no_grad():
        getattr(model["to_k"], part)[1] += 1e-3
    assert summary(model).adapters[0].idle == ()
    assert save(model, tmp_path / "a.safetensors").notes == ()


def test_the_smallest_number_is_something():
    model = nn.ModuleDict({"to_q": nn.Linear(6, 5)})
    inject(model, rank=2)
    with torch.no_grad():
        model["to_q"].lora_B_default[0, 0] = 1e-40
    assert summary(model).adapters[0].idle == ()
