"""What trains, how fast, and how far it may go."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lora_core import (
    AdapterError,
    ConfigError,
    MergeError,
    eject,
    inject,
    limit_norm,
    merge,
    parameter_groups,
    parameters,
    scales,
    summary,
    trainable,
)
from lora_core._layers import FROZEN, LoRAMixin, factors_of
from lora_core._training import choice
from lora_core.functional import delta_norm, lora_delta
from lora_core.testing.laws import train_pretend


def adapted(*names: str, seed: int = 0, **options: object) -> nn.Sequential:
    """Three linear layers with trained adapters, every factor of which trains."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    for name in names:
        inject(model, **{"rank": 2, "targets": nn.Linear, "name": name, **options})
        train_pretend(model, name)
    for p in parameters(model):
        p.requires_grad_(True)
    return model


# -- parameter groups


def moves(model: nn.Module, groups: object) -> list[torch.Tensor]:
    """How far one step of plain gradient descent moves each factor."""
    before = [p.detach().clone() for p in parameters(model)]
    optimizer = torch.optim.SGD(groups, lr=2.0**-4)
    model(torch.ones(5, 3).double()).square().sum().backward()
    optimizer.step()
    return [p.detach() - b for p, b in zip(parameters(model), before, strict=True)]


@given(st.sampled_from([0.25, 1.0, 3.0, 16.0]), st.integers(0, 9))
def test_a_step_moves_the_up_projection_as_much_further_as_the_ratio_says(ratio, seed):
    model = adapted("a", seed=seed)
    twin = copy.deepcopy(model)
    plain = moves(twin, parameters(twin))
    found = moves(model, parameter_groups(model, lr=2.0**-4, lr_ratio=ratio))
    assert all(move.abs().max() > 1e-6 for move in plain)
    assert_close(found[0::2], plain[0::2])
    assert_close(found[1::2], [ratio * move for move in plain[1::2]])


@given(st.sets(st.integers(0, 11)), st.sampled_from([None, "a", "b"]))
def test_the_groups_hold_what_trains_once_and_nothing_else(frozen, name):
    model = adapted("a", "b")
    for i in frozen:
        parameters(model)[i].requires_grad_(False)
    expected = {id(p) for p in parameters(model, name) if p.requires_grad}
    if not expected:
        return
    groups = parameter_groups(model, name, lr=0.25, weight_decay=0.5)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(expected)
    assert {id(p) for p in held} == expected
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for key, p in model.named_parameters():
        if id(p) in expected:
            assert rates[id(p)] == (0.25 if "lora_A_" in key else 4.0)
    assert all(group["params"] and group["weight_decay"] == 0.5 for group in groups)


def test_an_optimiser_takes_the_groups_as_they_are():
    optimizer = torch.optim.AdamW(parameter_groups(adapted("a"), lr=0.5))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0), (8.0, 0)]


def test_a_factor_that_two_layers_share_comes_once():
    model = adapted("a")
    model[1].lora_B_a = model[0].lora_B_a
    held = [p for group in parameter_groups(model, lr=1.0) for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0}, "`lr` must be above 0, but is 0."),
        ({"lr": -0.5}, "`lr` must be above 0, but is -0.5."),
        ({"lr": float("nan")}, "`lr` must be a finite number, but is nan."),
        ({"lr": "1e-4"}, "`lr` must be a finite number, but is '1e-4'."),
        ({"lr": True}, "`lr` must be a finite number, but is True."),
        ({"lr": 1.0, "lr_ratio": 0.0}, "`lr_ratio` must be above 0, but is 0.0."),
        ({"lr": 1e200, "lr_ratio": 1e200}, "`lr * lr_ratio` must be a finite number, but is inf."),
        ({"lr": 1.0, "weight_decay": -1}, "`weight_decay` must be at least 0, but is -1."),
    ],
)
def test_a_rate_out_of_range_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parameter_groups(adapted("a"), **wrong)


@pytest.mark.parametrize("name", [None, "a"])
def test_an_adapter_that_nowhere_trains_has_no_groups(name):
    model = adapted("a").requires_grad_(False)
    whose = "'a'" if name else "the model"
    message = (
        f"An adapter must train to be optimised, but all 6 factors of {whose} are frozen."
        " Call `trainable(model, ...)` with those that are to train."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parameter_groups(model, name, lr=1.0)


def test_groups_of_an_unknown_adapter_are_an_error():
    with pytest.raises(AdapterError, match="^`name` must be an adapter of the model, but is 'c'"):
        parameter_groups(adapted("a"), "c", lr=1.0)


# -- what trains


def host(frozen: int = 0) -> nn.ModuleDict:
    """Two linear layers and a norm; the bits of `frozen` say which parameters don't train."""
    torch.default_generator.manual_seed(0)
    model = nn.ModuleDict({"x": nn.Linear(2, 2), "n": nn.LayerNorm(2), "y": nn.Linear(2, 2)})
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(not frozen >> i & 1)
    return model


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def state(model: nn.Module) -> object:
    """Every flag and gradient, and what eject is to make of the flags."""
    grads = {n: None if p.grad is None else id(p.grad) for n, p in model.named_parameters()}
    return flags(model), grads, [vars(m).get(FROZEN) for m in model.modules()]


def come(model: nn.Module, name: str, targets: str, freeze: bool) -> None:
    inject(model, rank=1, name=name, targets=targets, freeze=freeze)


def by_hand(model: nn.Module, names: set[str]) -> None:
    """What `trainable` should do to the flags, for any of `names` that are there."""
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.requires_grad_(key.rpartition("_")[2] in names)


NAMES = st.sets(st.sampled_from("abc"), min_size=1)
COMINGS = st.tuples(st.sampled_from(["*", "x", "y"]), st.booleans())
STEPS = st.one_of(st.tuples(st.sampled_from("abc"), COMINGS), st.tuples(st.just("train"), NAMES))


def there(model: nn.Module) -> set[str]:
    return {n for m in model.modules() if isinstance(m, LoRAMixin) for n in m.lora_state.configs}


@given(st.integers(0, 63), st.lists(STEPS, min_size=3, max_size=10))
@settings(max_examples=200, deadline=None)
def test_after_an_eject_every_flag_is_as_if_that_adapter_had_never_come(frozen, steps):
    model, past, replayed = host(frozen), [], host(frozen)
    for what, wish in steps:
        if what == "train":
            names = wish & there(model)
            if not names:
                continue
            trainable(model, *names)
            past.append((what, names))
            left = past[-1:]
        elif what in there(model):
            eject(model, what)
            past = [(w, v - {what}) if w == "train" else (w, v) for w, v in past if w != what]
            replayed, left = host(frozen), past
        else:
            come(model, what, *wish)
            past.append((what, wish))
            left = past[-1:]
        for w, v in left:
            if w == "train":
                by_hand(replayed, v)
            else:
                come(replayed, w, *v)
        assert flags(model) == flags(replayed)
    if there(model):
        eject(model)
    assert flags(model) == flags(host(frozen))
    assert not any(FROZEN in vars(m) for m in model.modules())


ARRIVALS = st.dictionaries(st.sampled_from("abc"), COMINGS, min_size=1)


def arrived(frozen: int, arrivals: dict[str, tuple[str, bool]]) -> nn.Module:
    model = host(frozen)
    for name, wish in arrivals.items():
        come(model, name, *wish)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    return model


@given(st.integers(0, 63), ARRIVALS, st.data())
def test_blocks_restore_what_they_found(frozen, arrivals, data):
    model = arrived(frozen, arrivals)
    before = state(model)
    subsets = st.sets(st.sampled_from(sorted(arrivals)), min_size=1)
    outer, inner, last = (data.draw(subsets) for _ in range(3))

    def chosen() -> set[str]:
        return {n.rpartition("_")[2] for n, flag in flags(model).items() if flag and "lora_" in n}

    with pytest.raises(ZeroDivisionError), trainable(model, *outer):
        assert chosen() == outer
        within = state(model)
        with trainable(model, *inner):
            assert chosen() == inner
            trainable(model, *last)
            assert chosen() == last
            for p in parameters(model):
                p.grad = torch.ones_like(p) if p.requires_grad else None
        assert flags(model) == within[0]
        assert state(model)[2] == within[2]
        raise ZeroDivisionError
    found = state(model)
    assert (found[0], found[2]) == (before[0], before[2])
    # gradients of what was frozen for a while are back, and none is left on what is frozen
    rested = [n for n in before[1] if "lora_" in n and n.rpartition("_")[2] not in outer]
    assert all(found[1][n] == before[1][n] for n in rested)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    eject(model)
    assert flags(model) == flags(host(frozen))


@given(st.integers(0, 63), ARRIVALS, st.data())
def test_adapters_that_leave_inside_a_block_leave_what_they_would_have_left(frozen, arrivals, data):
    model, twin = arrived(frozen, arrivals), arrived(frozen, arrivals)
    some = st.sampled_from(sorted(arrivals))
    leaving = data.draw(st.lists(some, unique=True, min_size=1))
    with trainable(model, *data.draw(st.sets(some, min_size=1))):
        for name in leaving:
            eject(model, name)
    for name in leaving:
        eject(twin, name)
    assert flags(model) == flags(twin)
    if there(model):
        eject(model)
    assert flags(model) == flags(host(frozen))


@given(st.integers(0, 63), ARRIVALS, COMINGS, st.data())
def test_an_adapter_that_comes_inside_a_block_leaves_what_the_block_found(
    frozen, arrivals, coming, data
):
    model = arrived(frozen, arrivals)
    before = flags(model)
    with trainable(model, *data.draw(st.sets(st.sampled_from(sorted(arrivals)), min_size=1))):
        come(model, "new", *coming)
    eject(model, "new")
    assert flags(model) == before
    eject(model)
    assert flags(model) == flags(host(frozen))


def test_active_and_trainable_are_separate_facts():
    model = adapted("a", "b")
    scales(model, a=0.5)
    receipt = trainable(model, "b")
    assert [(a.active, a.trainable) for a in summary(model).adapters] == [
        (True, False),
        (False, True),
    ]
    assert (receipt.adapters, receipt.frozen) == (("b",), ("a",))
    assert receipt.parameters == summary(model).adapters[1].parameters == 2 * (7 + 8 + 6)
    assert repr(receipt) == "trainable 'b': 42 parameters; frozen: 'a'"
    scales(model, a=1.0, b=1.0)
    model(torch.ones(5, 3).double()).sum().backward()
    assert all((p.grad is None) is (p in set(parameters(model, "a"))) for p in parameters(model))


def test_what_stops_training_drops_its_gradient_and_an_optimiser_leaves_it_alone():
    model = adapted("a", "b")
    optimizer = torch.optim.SGD(parameters(model), lr=0.25)
    model(torch.ones(5, 3).double()).sum().backward()
    before = [p.detach().clone() for p in parameters(model, "a")]
    trainable(model, "b")
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters(model, "a"), before, strict=True))
    assert all(p.grad is not None for p in parameters(model, "b"))


def test_unknown_names_are_refused_and_change_nothing():
    model = adapted("a", "b")
    before = state(model)
    message = "`trainable` must name adapters of the model, but got 'c'; it has 'a', 'b'."
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        trainable(model, "a", "c")
    message = (
        "`trainable` must be given an adapter, but got none. Write `trainable(model, 'a')`; where"
        " none is to train, use `model.requires_grad_(False)`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainable(model)
    assert state(model) == before


def test_a_block_is_entered_once():
    block = trainable(adapted("a"), "a")
    with block:
        pass
    message = (
        "A `trainable` block must be entered once, but this one is over and what it found is put"
        " back. Call `trainable(model, ...)` again."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"), block:
        pass


def test_a_failure_at_any_layer_leaves_every_flag_as_it_was(monkeypatch):
    model = adapted("a", "b")
    before, choose, calls = state(model), choice._choose, []

    def failing(layer, names):
        calls.append(layer)
        choose(layer, names)
        if len(calls) == 2:
            raise ZeroDivisionError

    monkeypatch.setattr(choice, "_choose", failing)
    with pytest.raises(ZeroDivisionError):
        trainable(model, "a")
    assert state(model) == before


# -- how far an update may go

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def updates(model: nn.Module, name: str) -> list[torch.Tensor]:
    """Each layer's dense update at strength 1, in float64."""
    return [
        lora_delta(
            *(f.detach().double() for f in factors_of(m, name)), m.lora_state.configs[name].scale
        )
        for m in model
    ]


@given(
    st.sampled_from(DTYPES), st.floats(2**-6, 8), st.sampled_from([-2.0, 0.5, 8.0]), st.booleans()
)
def test_no_update_is_above_the_limit_and_its_direction_stays(dtype, max_norm, alpha, rslora):
    model = adapted("a", alpha=alpha, rslora=rslora, dtype=dtype)
    before = updates(model, "a")
    bits = [p.detach().clone() for p in parameters(model)]
    norms = [d.norm().item() for d in before]
    report = limit_norm(model, max_norm=max_norm)
    eps = torch.finfo(dtype).eps
    assert list(report.before["a"].values()) == pytest.approx(norms, rel=1e-9)
    assert report.limited["a"] == tuple(str(i) for i, n in enumerate(norms) if n > max_norm)
    for i, (old, new, norm) in enumerate(zip(before, updates(model, "a"), norms, strict=True)):
        if norm > max_norm:
            assert (
                delta_norm(*factors_of(model[i], "a"), model[i].lora_state.configs["a"].scale)
                <= max_norm
            )
            assert new.norm() <= max_norm * (1 + 1e-12)
            assert new.norm() >= max_norm * (1 - 8 * eps)
            assert_close(new / new.norm(), old / norm, rtol=0, atol=8 * eps)
            # both factors shrank alike
            for p, b in zip(factors_of(model[i], "a"), bits[2 * i :], strict=False):
                share = (p.detach().norm() / b.norm()).item()
                assert share == pytest.approx((max_norm / norm) ** 0.5, rel=8 * eps)
        else:
            assert all(map(torch.equal, factors_of(model[i], "a"), bits[2 * i : 2 * i + 2]))
    # within the limit now, a second call changes no bit
    bits = [p.detach().clone() for p in parameters(model)]
    assert limit_norm(model, max_norm=max_norm).limited == {"a": ()}
    assert all(map(torch.equal, parameters(model), bits))


def test_only_the_adapter_named_is_limited_and_strengths_do_not_count():
    model = adapted("a", "b")
    scales(model, a=100.0, b=0.0)
    norms = [d.norm().item() for d in updates(model, "b")]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = limit_norm(model, "b", max_norm=0.75 * min(norms))
    assert list(report.before) == ["b"]
    assert report.limited == {"b": ("0", "1", "2")}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith("_b")}
    assert all(p.requires_grad for p in parameters(model))
    both = limit_norm(model, max_norm=2.0**-8)
    assert both.limited == {"a": ("0", "1", "2"), "b": ("0", "1", "2")}
    largest = max(both.before["a"].values())
    assert str(both).splitlines()[0] == (
        f"limited 3 of 3 layers of 'a' to a norm of 0.00390625; the largest was {largest:g}"
    )


def test_a_backward_through_a_forward_before_the_limit_raises():
    model = adapted("a")
    loss = model(torch.ones(5, 3).double()).sum()
    limit_norm(model, max_norm=2.0**-8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_without_a_finite_norm_is_refused_and_no_bit_changes(value):
    model = adapted("a")
    with torch.no_grad():
        model[2].lora_A_a[0, 0] = value
    before = [p.detach().clone() for p in parameters(model)]
    message = (
        "An update must have a finite norm to be limited, but that of '2.a' has none. Go back to"
        " an earlier state; lower the learning rate."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        limit_norm(model, max_norm=2.0**-8)
    assert_close(parameters(model), before, rtol=0, atol=0, equal_nan=True)


def test_a_merged_update_is_not_limited():
    model = adapted("a").eval()
    merge(model)
    message = (
        "A norm must be limited while unmerged, but '0', '1', '2' is merged."
        " Call `unmerge(model)` first."
    )
    with pytest.raises(MergeError, match=f"^{re.escape(message)}$"):
        limit_norm(model, max_norm=1.0)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, "`max_norm` must be above 0, but is 0."),
        (-1.0, "`max_norm` must be above 0, but is -1.0."),
        (float("inf"), "`max_norm` must be a finite number, but is inf."),
    ],
)
def test_a_limit_out_of_range_is_refused(limit, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        limit_norm(adapted("a"), max_norm=limit)
    with pytest.raises(AdapterError, match="^`name` must be an adapter of the model, but is 'c'"):
        limit_norm(adapted("a"), "c", max_norm=1.0)
