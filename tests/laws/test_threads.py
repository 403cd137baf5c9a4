"""Threads: forwards beside each other, and beside one that switches adapters."""

import copy
import dataclasses
import itertools
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lora_core
from lora_core import AdapterError, disabled, merge, pinned, scales, unmerge
from lora_core._adapters import strengths
from lora_core._layers import attachment, changing, kind, linear, mixin
from lora_core.testing.laws import train_pretend


@pytest.fixture(autouse=True)
def _eager_switches() -> Iterator[None]:
    """Lets threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def while_another_thread(does: Callable[[], None], work: Callable[[], None]) -> None:
    """Runs `work` while another thread does something over and over."""
    done, errors = threading.Event(), []

    def loop():
        try:
            while not done.is_set():
                does()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join(60)
    assert not errors, errors


def test_forwards_in_threads_are_bit_equal_to_serial_ones(kind):
    model = kind.adapted().eval()
    batches = [kind.sample(seed=seed) for seed in range(16)]
    with torch.no_grad():
        serial = [model(x) for x in batches]

    @torch.no_grad()
    def call(x):
        return model(x)

    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(call, batches), serial, strict=True):
            assert torch.equal(got, expected)


def test_gradients_in_threads_are_bit_equal_to_serial_ones(kind):
    model = kind.adapted().eval()
    batches = [kind.sample(seed=seed) for seed in range(16)]
    factors = [p for p in model.parameters() if p.requires_grad]

    def gradients_of(x):
        return torch.autograd.grad(model(x).square().sum(), factors)

    # in one thread of the same kind: each has as many helpers of its own as torch gives it
    with ThreadPoolExecutor(1) as pool:
        serial = list(pool.map(gradients_of, batches))
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(gradients_of, batches), serial, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def two_styles(kind):
    """A model with two adapters, an input, and what it gives with either of them and with none."""
    model, x = kind.inject(kind.bare(), "a").eval(), kind.sample()
    kind.inject(model, "b", seed=17).eval()
    outputs = {}
    with torch.no_grad():
        for name in "ab":
            scales(model, **{name: 1.0})
            outputs[name] = model(x)
        with disabled(model):
            outputs["base"] = model(x)
    for one, other in itertools.combinations(outputs.values(), 2):
        assert (one - other).abs().max() > 0.1
    return model, x, outputs


def which(y, outputs):
    return next((n for n, t in outputs.items() if torch.allclose(y, t, atol=1e-5)), "a mixture")


def test_while_a_thread_switches_adapters_every_output_is_one_selections(kind):
    model, x, outputs = two_styles(kind)
    seen = set()

    def switch():
        scales(model, a=1.0)
        time.sleep(1e-4)
        scales(model, b=1.0)
        time.sleep(1e-4)

    @torch.no_grad()
    def call():
        for _ in range(50):
            with pinned(model) if kind.several else nullcontext():
                seen.add(which(model(x), outputs))

    while_another_thread(switch, call)
    assert seen <= {"a", "b"}


def test_while_a_thread_enters_and_leaves_blocks_every_output_is_one_selections(kind):
    model, x, outputs = two_styles(kind)
    scales(model, a=1.0)
    seen = set()

    def look():
        with disabled(model):
            pass
        with scales(model, b=1.0):
            time.sleep(1e-4)

    @torch.no_grad()
    def call():
        for _ in range(50):
            with pinned(model) if kind.several else nullcontext():
                seen.add(which(model(x), outputs))

    while_another_thread(look, call)
    assert seen <= {"a", "b", "base"}
    with torch.no_grad():
        assert torch.equal(model(x), outputs["a"])


def test_a_switch_between_forward_and_backward_changes_no_gradient(kind):
    model, x, _ = two_styles(kind)  # the one that came last is the one that trains
    scales(model, b=1.0)
    factors = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), factors)
    loss = model(x).square().sum()
    thread = threading.Thread(target=lambda: scales(model, a=1.0))
    thread.start()
    thread.join()
    for mine, theirs in zip(torch.autograd.grad(loss, factors), expected, strict=True):
        assert theirs.abs().max() > 0
        assert torch.equal(mine, theirs)


def test_while_a_thread_merges_and_unmerges_every_output_is_the_adapted_ones(kind):
    kind.excuse("merge")
    model, x, outputs = two_styles(kind)
    scales(model, a=1.0)
    seen = set()

    def turn():
        merge(model)
        unmerge(model)

    @torch.no_grad()
    def call():
        for _ in range(60):
            y = model(x)
            close = torch.allclose(y, outputs["a"], atol=1e-3, rtol=1e-3)
            seen.add("a" if close else which(y, outputs))

    while_another_thread(turn, call)
    assert seen == {"a"}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_a_call_that_a_merge_comes_into_runs_again(kind, verb, monkeypatch):
    layer = nn.Linear(8, 6) if kind == "linear" else nn.Conv1d(8, 6, 1)
    model = nn.ModuleDict({"site": layer}).eval()
    x = torch.randn(3, 8) if kind == "linear" else torch.randn(3, 8, 4)
    lora_core.inject(model, rank=2, targets="site")
    train_pretend(model, "default")
    expected = layer(x)
    if verb == "unmerge":
        lora_core.merge(model)
    came = []

    def between(real):
        def run(*args, **kwargs):
            if not came:  # as another thread would, after the state was read
                came.append(True)
                getattr(lora_core, verb)(model)
            return real(*args, **kwargs)

        return run

    if kind == "linear" and verb == "merge":
        monkeypatch.setattr(linear, "fused_lora_linear", between(linear.fused_lora_linear))
    else:  # a merged layer, and one of another kind, calls its host
        host = type(layer).lora_host_class
        monkeypatch.setattr(host, "forward", between(host.forward))
    torch.testing.assert_close(layer(x), expected)
    assert came


def test_a_choice_beside_an_ejection_names_what_is_gone(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8))
    for name in "ab":
        lora_core.inject(model, rank=2, targets="0", name=name)
    honest, once = strengths.lock, []

    def slow():
        if not once:
            once.append(threading.Thread(target=lambda: lora_core.eject(model, "a")))
            once[0].start()
            once[0].join()
        return honest()

    monkeypatch.setattr(strengths, "lock", slow)
    with pytest.raises(
        AdapterError, match="^`scales` must name adapters of the model, but got 'a'"
    ):
        lora_core.scales(model, a=1.0, b=0.5)
    assert model(torch.ones(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("act", ["inject", "cast"])
def test_a_choice_that_another_thread_makes_meanwhile_is_not_lost(monkeypatch, act):
    model = nn.Sequential(nn.Linear(8, 8))
    lora_core.inject(model, rank=2, targets="0", name="a")
    room = attachment if act == "inject" else mixin
    honest, threads = room.select, []

    def slow(*args):
        found = honest(*args)
        if not threads:
            threads.append(threading.Thread(target=lambda: lora_core.scales(model, a=0.25)))
            threads[0].start()
            threads[0].join(0.2)  # it waits for what goes on here
        return found

    monkeypatch.setattr(room, "select", slow)
    if act == "inject":
        lora_core.inject(model, rank=2, targets="0", name="b")
    else:
        model.double()
    threads[0].join()
    assert model[0].lora_state.strengths == {"a": 0.25}


def test_what_was_ejected_and_injected_again_has_another_stand():
    model = nn.Sequential(nn.Linear(8, 8))
    lora_core.inject(model, rank=2, targets="0")
    before = model[0].lora_state
    lora_core.eject(model)
    lora_core.inject(model, rank=2, targets="0")
    assert model[0].lora_state.change is not before.change


def test_a_block_shows_both_weight_and_bias_of_the_base_or_none(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8))
    lora_core.inject(model, rank=2, targets="0", bias=True)
    for p in lora_core.parameters(model):
        p.data.normal_()
    model.eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        with lora_core.disabled(model):
            plain = model(x)
        lora_core.merge(model)
        merged, seen, put = model(x), [], kind.swap

        def slow(weight, values):
            put(weight, values)
            thread = threading.Thread(target=lambda: seen.append(model(x)), daemon=True)
            thread.start()
            thread.join(0.05)

        monkeypatch.setattr(kind, "swap", slow)
        with lora_core.disabled(model):
            pass
        monkeypatch.setattr(kind, "swap", put)
        deadline = time.monotonic() + 10
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(seen) == 4
    assert all(torch.equal(y, plain) or torch.equal(y, merged) for y in seen)


def test_a_copy_that_is_made_amid_a_change_can_be_called():
    model = nn.Sequential(nn.Linear(8, 8))
    lora_core.inject(model, rank=2, targets="0")
    copies = []
    with changing(model[0]):
        for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            thread = threading.Thread(target=lambda make=make: copies.append(make(model)))
            thread.start()
            thread.join()
    for each in copies:
        called = threading.Thread(target=each, args=(torch.ones(2, 8),), daemon=True)
        called.start()
        called.join(10)
        assert not called.is_alive()


def test_a_value_that_is_replaced_by_one_of_equal_settings_is_missed_by_a_pin():
    model = nn.Sequential(nn.Linear(8, 8))
    lora_core.inject(model, rank=2, targets="0")
    one = lora_core.adapter_of(model)
    layer = one.layers["0"]
    parts = {part: 3 * p.detach() + 1 for part, p in layer.parts.items()}
    other = dataclasses.replace(one, layers={"0": dataclasses.replace(layer, parts=parts)})
    bare = nn.Sequential(nn.Linear(8, 8))
    lora_core.load(bare, one, "x", check_base=False)
    with pinned(bare):
        act = threading.Thread(
            target=lambda: lora_core.load(bare, other, "x", check_base=False, replace=True)
        )
        act.start()
        act.join()
        with pytest.raises(AdapterError, match="must stay while it is pinned, but 'x' was taken"):
            bare(torch.ones(2, 8))
