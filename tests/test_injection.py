"""Plan, inject, eject: the same layers, all or nothing, and back to the very objects."""

import copy
import gc
import inspect
import re
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import lora_core
from lora_core import (
    AdapterError,
    ConfigError,
    LoRALinear,
    UnsupportedLayerError,
    eject,
    inject,
    parameters,
    plan,
)
from lora_core._config import ASKED, Settings
from lora_core._injection import surgery
from lora_core._layers import LoRAMixin, factors_of, parts_of, state

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def factors(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    tails = (f"lora_A_{name}", f"lora_B_{name}")
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(tails)}


def flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


def mix_flags(model: nn.Module) -> None:
    """Some parameters are frozen already, some carry a gradient."""
    for n, p in enumerate(model.parameters()):
        p.requires_grad_(n % 3 != 0)
        p.grad = torch.ones_like(p) if n % 2 else None


# -- plan and its receipt


def test_plan_says_what_inject_does_and_changes_nothing(net, portrait):
    mix_flags(net)
    before = portrait(net)
    random = torch.get_rng_state()
    wishes = {"rank": 2, "alpha": 3.0, "exclude": "blocks.1.*", "rules": {"to_k": {"rank": 1}}}
    foreseen = plan(net, **wishes)
    assert portrait(net) == before
    assert torch.equal(torch.get_rng_state(), random)
    done = inject(net, **wishes)
    assert done == foreseen
    assert [layer.name for layer in done.layers] == [f"blocks.0.attn.{n}" for n in PROJECTIONS]
    assert [layer.rank for layer in done.layers] == [2, 1, 2, 2]


@pytest.mark.parametrize("freeze", [True, False])
def test_the_report_counts_what_is_there(net, freeze):
    mix_flags(net)
    report = inject(net, rank=2, freeze=freeze)
    everything = list(net.parameters())
    assert report.total == sum(p.numel() for p in everything)
    assert report.trainable == sum(p.numel() for p in everything if p.requires_grad)
    assert report.parameters == sum(p.numel() for p in parameters(net))
    for layer in report.layers:
        A, B = factors_of(net.get_submodule(layer.name), "default")
        assert layer.parameters == A.numel() + B.numel()
        assert layer.nbytes == 4 * layer.parameters
        assert (layer.in_features, layer.out_features) == (A.shape[1], B.shape[0])
    assert len(report.layers) + len(report.left_out) == sum(
        isinstance(m, nn.Linear) for m in net.modules()
    )


def test_the_receipts_print_as_tables(net):
    report = inject(net, rank=2, alpha=1, exclude="blocks.1.*")
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "rank", "alpha", "scale", "parameters"]
    row = ["blocks.0.attn.to_q", "Linear", "8", "->", "8", "2", "1", "0.5", "32"]
    assert lines[2].split() == row
    assert lines[6] == "adapter 'default': 4 layers, 128 parameters; 128 of 1,293 train (9.90%)"
    assert lines[7:] == [
        "left out: 5 (no attention projection)",
        "left out: 4 (excluded by 'blocks.1.*')",
    ]
    gone = eject(net)
    assert str(gone) == (
        "ejected default: 4 layers, 128 parameters; 24 requires_grad flags restored"
    )
    assert gone.restored == len(list(net.parameters()))


# -- what inject changes, and what it does not


@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(1, 8))
def test_a_fresh_adapter_changes_nothing(make_net, dtype, rank):
    model = make_net(dtype=dtype)
    x = torch.randn(3, 4, 8).to(dtype)
    before = model(x)
    inject(model, rank=rank, alpha=0.5)
    assert torch.equal(model(x), before)


def test_inject_keeps_the_very_objects_keys_and_modes(net, perturb, x):
    net.eval()
    net.blocks[0].attn.to_q.train()
    net.blocks[0].attn.to_q.note = "mine"
    modules = dict(net.named_modules())
    host, keys = dict(net.named_parameters()), list(net.state_dict())
    modes = {n: m.training for n, m in modules.items()}
    plain = net(x)
    inject(net, rank=2)
    assert all(net.get_submodule(n) is m for n, m in modules.items())
    assert all(net.get_parameter(n) is p for n, p in host.items())
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert [key for key in net.state_dict() if "lora_" not in key] == keys
    assert net.blocks[0].attn.to_q.note == "mine"
    perturb(net)
    assert (net(x) - plain).abs().max() > 1e-3
    old = {n: p.clone() for n, p in host.items()}
    missing, unexpected = net.load_state_dict(old, strict=False)
    assert unexpected == []
    assert all("lora_" in key for key in missing)


def test_only_the_adapter_trains_and_frozen_gradients_are_dropped(net, x):
    mix_flags(net)
    training = [p for p in net.parameters() if p.requires_grad]
    assert any(p.grad is not None for p in training)
    inject(net)
    assert {n for n, flag in flags(net).items() if flag} == set(factors(net))
    assert all(p.grad is None for p in training)
    net.zero_grad()
    net(x).sum().backward()
    assert all(p.grad is None for n, p in net.named_parameters() if "lora_" not in n)


def test_what_was_frozen_before_drops_its_gradient_too(net, portrait, monkeypatch):
    net.requires_grad_(False)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before, bits = portrait(net), {n: p.clone() for n, p in net.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "attach", failing(surgery.attach, 3, after=True))
        with pytest.raises(PlannedError):
            inject(net)
    assert portrait(net) == before  # the very gradients
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
    inject(net)
    assert all(p.grad is None for p in net.parameters())
    optimiser.step()
    assert all(torch.equal(net.get_parameter(n), p) for n, p in bits.items())
    eject(net)
    assert all(p.grad is None for p in net.parameters())


def test_loading_drops_the_hosts_gradients_and_no_other_adapters(net, make_net, tmp_path):
    inject(net)
    lora_core.save(net, tmp_path / "a")
    model = make_net().requires_grad_(False)
    inject(model, name="mine", targets="head")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    lora_core.load(model, tmp_path / "a")
    mine = {id(p) for p in parameters(model, "mine")}
    assert all((p.grad is not None) == (id(p) in mine) for p in model.parameters())


def test_freeze_false_touches_no_flag_and_no_gradient(net):
    mix_flags(net)
    before = flags(net)
    gradients = {n: p.grad for n, p in net.named_parameters()}
    inject(net, freeze=False)
    after = flags(net)
    assert {n: after[n] for n in before} == before
    assert all(net.get_parameter(n).grad is g for n, g in gradients.items())
    assert all(after[n] for n in factors(net))
    eject(net)
    assert flags(net) == before


def test_the_same_seed_gives_a_layer_the_same_bits_whatever_else_is_targeted(make_net):
    found = []
    for wishes in ({}, {"targets": "blocks.1.*"}, {"targets": ["head", "to_q", "mlp.0"]}):
        model = make_net()
        if not found:
            inject(model, name="earlier", targets="head")
            eject(model)
        torch.manual_seed(11)
        inject(model, rank=3, **wishes)
        found.append(factors(model)["blocks.1.attn.to_q.lora_A_default"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.manual_seed(12)
    model = make_net()
    inject(model, rank=3)
    every = factors(model)
    assert not torch.equal(every["blocks.1.attn.to_q.lora_A_default"], found[0])
    assert not torch.equal(
        every["blocks.1.attn.to_q.lora_A_default"], every["blocks.1.attn.to_k.lora_A_default"]
    )


def test_a_root_that_is_a_linear_is_adapted_itself(portrait):
    model = nn.Linear(4, 6)
    before = portrait(model)
    report = inject(model, rank=2, targets=nn.Linear)
    assert [layer.name for layer in report.layers] == [""]
    assert type(model) is LoRALinear
    assert "(the model)" in str(report)
    eject(model)
    assert type(model) is nn.Linear
    assert portrait(model) == before


def test_a_module_with_two_names_is_adapted_and_counted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleDict({"to_q": shared}), "b": nn.Sequential(shared)})
    report = inject(model, rank=2)
    assert [(layer.name, layer.aliases) for layer in report.layers] == [("a.to_q", ("b.0",))]
    assert model["a"]["to_q"] is model["b"][0] is shared
    assert report.parameters == len(parameters(model)) * 8 == 16
    eject(model)
    # either name finds it, and an exclusion by either takes it out
    assert len(plan(model, targets="b.0").layers) == 1
    with pytest.raises(lora_core.TargetError, match="^`exclude` must leave a layer"):
        plan(model, targets="to_q", exclude="b.*")


def test_tied_parameters_are_frozen_once_and_given_back(portrait):
    model = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4), "e": nn.Linear(4, 4)})
    model["to_k"].weight = model["e"].weight = model["to_q"].weight
    before = portrait(model)
    report = inject(model, rank=2)
    assert report.trainable == 32
    assert model["to_q"].weight is model["to_k"].weight is model["e"].weight
    assert not model["e"].weight.requires_grad
    eject(model)
    assert portrait(model) == before


def test_a_container_that_holds_itself_is_walked_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model._modules["loop"] = model
    assert [layer.name for layer in plan(model, targets="0").layers] == ["0"]


def test_what_torch_compile_adds_to_names_is_not_seen(net, x, perturb):
    plain = plan(net)
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    compiled = torch.compile(net, backend="eager")
    assert plan(compiled) == plain
    report = inject(compiled, targets="blocks.0.attn.to_q")
    assert [layer.name for layer in report.layers] == ["blocks.0.attn.to_q"]
    perturb(compiled)
    assert lora_core.summary(compiled).adapters[0].layers == ("blocks.0.attn.to_q",)
    assert eject(compiled).layers == ("blocks.0.attn.to_q",)


def test_a_model_with_two_thousand_layers_is_adapted_swiftly():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2000)])
    start = time.process_time()
    assert len(inject(model, rank=1, targets="*").layers) == 2000
    # seconds of this process: 0.3 measured on an idle machine; a walk per layer would take minutes
    assert time.process_time() - start < 10


# -- several adapters


def test_a_second_adapter_leaves_the_first_bit_equal(net, x, perturb):
    inject(net, rank=2, name="first")
    perturb(net)
    first, out = factors(net, "first"), net(x)
    report = inject(net, rank=3, name="second", targets="*")
    assert torch.equal(net(x), out)
    assert all(torch.equal(p, first[n]) for n, p in factors(net, "first").items())
    # the newcomer alone trains
    assert {n for n, flag in flags(net).items() if flag} == set(factors(net, "second"))
    assert report.trainable == report.parameters
    assert {layer.kind for layer in report.layers} == {"Linear"}


def test_a_taken_name_is_refused_and_the_trained_factors_stay(net, portrait):
    inject(net, exclude="blocks.1.*")
    before = portrait(net), factors(net)
    names = [f"blocks.0.attn.{n}" for n in PROJECTIONS]
    message = (
        f"`name` must be new to the model, but 'default' is on {', '.join(map(repr, names))}."
        " Choose another name, or `eject(model, 'default')` first; `load` puts a file in its place"
        " with replace=True."
    )
    for wishes in ({}, {"targets": "head"}):
        with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
            inject(net, **wishes)
        with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
            plan(net, **wishes)
    assert portrait(net) == before[0]
    assert all(torch.equal(p, before[1][n]) for n, p in factors(net).items())


def test_an_attribute_of_that_name_is_never_overwritten():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].lora_A_default = "mine"
    message = (
        "`name` must be new to every layer, but '0' has an attribute 'lora_A_default' of its own."
    )
    with pytest.raises(AdapterError, match=f"^{re.escape(message)} "):
        inject(model, targets="0")
    assert model[0].lora_A_default == "mine"


def test_a_merged_layer_takes_no_adapter(net):
    inject(net, name="first", targets="head")
    lora_core.merge(net)
    message = "A layer must be unmerged to take an adapter, but 'head' is merged."
    with pytest.raises(lora_core.MergeError, match=f"^{re.escape(message)} "):
        inject(net, name="second", targets="head")
    message = "An adapter must be unmerged to be ejected, but 'head' is merged."
    with pytest.raises(lora_core.MergeError, match=f"^{re.escape(message)} "):
        eject(net)


@pytest.mark.parametrize("gone", ["a", "b"])
def test_one_of_several_goes_and_the_other_stays_as_it_was(net, x, perturb, gone):
    kept = "b" if gone == "a" else "a"
    original = flags(net)
    inject(net, rank=2, name="a")
    inject(net, rank=3, name="b", targets=["to_q", "head"])
    perturb(net)
    with lora_core.scales(net, **{kept: 1.0}):
        alone = net(x)
    values = factors(net, kept)
    report = eject(net, gone)
    assert report.adapters == (gone,)
    assert len(report.layers) == {"a": 8, "b": 3}[gone]
    assert torch.equal(net(x), alone)
    assert factors(net, gone) == {}
    assert all(torch.equal(p, values[n]) for n, p in factors(net, kept).items())
    # the host stays frozen for the one that stays, which trains
    assert {n for n, flag in flags(net).items() if flag} == set(values)
    eject(net)
    assert flags(net) == original


@pytest.mark.parametrize("freezes", [True, False])
def test_ejecting_the_newcomer_gives_back_the_flags_it_found(net, freezes, portrait):
    mix_flags(net)
    inject(net, name="a", targets=["to_q", "head"], freeze=freezes)
    for p in net.parameters():
        p.grad = None
    before = portrait(net)
    inject(net, name="b")
    eject(net, "b")
    assert portrait(net) == before


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """An adapter file for `host`, by name."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for name, targets in (("a", "*"), ("b", "x"), ("c", "y")):
        model = host(0)
        inject(model, rank=1, targets=targets, name=name)
        paths[name] = Path(lora_core.save(model, folder / name).path)
    return paths


def host(frozen: int) -> nn.Module:
    torch.default_generator.manual_seed(0)
    model = nn.ModuleDict({"x": nn.Linear(2, 2), "n": nn.LayerNorm(2), "y": nn.Linear(2, 2)})
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(not frozen >> i & 1)
    return model


# an adapter's name, and how it comes; one that is there goes
STEPS = st.tuples(
    st.sampled_from("abc"),
    st.one_of(
        st.tuples(st.just("inject"), st.sampled_from(["*", "x"]), st.booleans()),
        st.just(("load",)),
    ),
)


def take(model: nn.Module, files: dict[str, Path], step: tuple[object, ...]) -> None:
    verb, name, *wishes = step
    if verb == "inject":
        inject(model, rank=1, name=name, targets=wishes[0], freeze=wishes[1])
    else:
        lora_core.load(model, files[name], name=name)


@given(st.integers(0, 63), st.lists(STEPS, min_size=3, max_size=9))
@example(0, [(name, ("inject", "*", True)) for name in "abcb"])
@settings(max_examples=150, deadline=None)
def test_after_an_eject_every_flag_is_as_if_that_adapter_had_never_come(files, frozen, steps):
    model, arrivals, replayed = host(frozen), {}, host(frozen)
    for name, (verb, *wishes) in steps:
        if arrivals.pop(name, None):
            eject(model, name)
            replayed = host(frozen)
            for arrival in arrivals.values():
                take(replayed, files, arrival)
        else:
            arrivals[name] = (verb, name, *wishes)
            take(model, files, arrivals[name])
            take(replayed, files, arrivals[name])
        assert flags(model) == flags(replayed)
    if arrivals:
        eject(model)
    assert flags(model) == flags(host(frozen))
    assert not any("lora_frozen" in vars(m) for m in model.modules())


def test_ejecting_the_middle_of_three_leaves_the_first_frozen(net):
    for name in ("a", "b", "c"):
        inject(net, rank=2, name=name, targets="head")
    eject(net, "b")
    assert [n for n, flag in flags(net).items() if flag] == [
        "head.lora_A_c",
        "head.lora_B_c",
    ]
    eject(net, "c")
    assert [n for n, flag in flags(net).items() if flag] == [
        "head.lora_A_a",
        "head.lora_B_a",
    ]


def test_flags_left_by_layers_ejected_one_by_one_are_given_back(net, portrait):
    mix_flags(net)
    for p in net.parameters():
        p.grad = None
    before = portrait(net)
    report = inject(net)
    for layer in report.layers:
        eject(net.get_submodule(layer.name))
    assert not any(isinstance(m, LoRAMixin) for m in net.modules())
    assert not any(flags(net)[n] for n in ("head.weight", "head.bias"))
    assert eject(net).restored > 0
    assert portrait(net) == before


# -- eject


@pytest.mark.parametrize("targets", [None, "*", nn.Linear, "head"])
@pytest.mark.parametrize("mixed", [True, False])
def test_eject_restores_the_very_objects(net, portrait, x, perturb, targets, mixed):
    if mixed:
        mix_flags(net)
    for p in net.parameters():
        p.grad = None
    before, out = portrait(net), net(x)
    bits = {n: t.clone() for n, t in net.state_dict().items()}
    inject(net, targets=targets)
    assert portrait(net) != before
    perturb(net)
    assert not torch.equal(net(x), out)
    eject(net)
    assert portrait(net) == before
    assert torch.equal(net(x), out)
    assert list(net.state_dict()) == list(bits)
    assert all(torch.equal(t, bits[n]) for n, t in net.state_dict().items())
    assert type(net.head) is nn.Linear


def test_eject_keeps_hooks_and_attributes_set_while_adapted(net):
    inject(net, targets="head")
    calls: list[int] = []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    net.head.note = "mine"
    eject(net)
    net(torch.randn(1, 2, 8))
    assert calls == [1]
    assert net.head.note == "mine"


def test_eject_frees_the_factors(net):
    inject(net)
    gone = [weakref.ref(p) for p in parameters(net)]
    assert all(ref() is not None for ref in gone)
    eject(net)
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_eject_of_an_unknown_adapter_says_which_there_are(net, portrait):
    inject(net, name="a")
    inject(net, name="b", targets="head")
    before = portrait(net)
    message = "`name` must be an adapter of the model, but is 'c'; it has 'a', 'b'."
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        eject(net, "c")
    assert portrait(net) == before


def test_eject_from_a_model_without_adapters_is_an_error(net):
    message = (
        "The model must have an adapter, but this Net has none. Call `inject` or `load` first."
    )
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        eject(net)


def test_a_hundred_cycles_leave_nothing_behind(net, portrait):
    before = portrait(net)

    def cycle() -> None:
        inject(net, rank=2, targets="*")
        eject(net)

    for _ in range(3):
        cycle()
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(100):
        cycle()
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert portrait(net) == before


# -- all or nothing


class PlannedError(Exception):
    """A failure put in on purpose."""


def failing(verb: Callable[..., object], k: int, *, after: bool) -> Callable[..., object]:
    calls = 0

    def call(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == k and not after:
            raise PlannedError
        result = verb(*args, **kwargs)
        if calls == k:
            raise PlannedError
        return result

    return call


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("k", range(1, 9))
def test_a_failure_at_any_layer_leaves_the_model_as_it_was(net, portrait, monkeypatch, k, after):
    mix_flags(net)
    before = portrait(net)
    for step in ("fresh_parts", "attach", "freeze_module"):
        with monkeypatch.context() as patch:
            patch.setattr(surgery, step, failing(getattr(surgery, step), k, after=after))
            with pytest.raises(PlannedError):
                inject(net)
        assert portrait(net) == before
    inject(net, name="a")
    inject(net, name="b", targets="*")
    before = portrait(net)
    values = factors(net, "a"), factors(net, "b")
    for name in ("a", "b", None):
        with monkeypatch.context() as patch:
            patch.setattr(surgery, "detach", failing(surgery.detach, k, after=after))
            with pytest.raises(PlannedError):
                eject(net, name)
        assert portrait(net) == before
    for found, expected in zip((factors(net, "a"), factors(net, "b")), values, strict=True):
        assert all(torch.equal(p, expected[n]) for n, p in found.items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 9},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"dtype": torch.int8},
        {"rslora": 1},
        {"name": "a.b"},
        {"rules": {"blocks.1.attn.to_v": {"rank": 0}}},
        {"rules": {"to_q": {"alpha": float("inf")}}},
    ],
    ids=str,
)
def test_a_bad_setting_changes_nothing(net, portrait, wrong):
    before = portrait(net)
    for verb in (plan, inject):
        with pytest.raises(ConfigError):
            verb(net, **wrong)
    assert portrait(net) == before


ROOMS = Path(lora_core.__file__).parent
DENSE = {
    str(path)
    for path in ROOMS.rglob("*.py")
    if path.name == "surgery.py" or "_layers" in str(path.relative_to(ROOMS))
}
SPARSE = {str(path) for path in ROOMS.rglob("*.py")} | {
    sys.modules["contextlib"].__file__,
    nn.Module.__init__.__code__.co_filename,
}


def interrupted_at(call: Callable[[], object], k: int) -> bool:
    """Runs `call`, with a KeyboardInterrupt at its k-th boundary; whether it came that far.

    Boundaries are single instructions where layers are changed, and lines elsewhere.
    """
    left = k

    def trace(frame, event, arg):
        nonlocal left
        file = frame.f_code.co_filename
        if file not in SPARSE:
            return None
        frame.f_trace_opcodes = file in DENSE
        if event == ("opcode" if file in DENSE else "line"):
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
        # no signal comes between the last instruction under a lock and its release: a trace does
        state._renew_lock()
    return False


def tiny() -> nn.Module:
    model = nn.ModuleDict({"to_q": nn.Linear(2, 2, bias=False), "to_k": nn.Linear(2, 2)})
    model["to_k"].weight.requires_grad_(False)
    return model


def grafted(model: nn.Module, name: str) -> Callable[[], object]:
    """The acting half of inject alone, so that no boundary is spent on choosing."""
    chosen = [model["to_q"], model["to_k"]]
    source = copy.deepcopy(model)
    inject(source, rank=1, name=name, targets="*")
    grafts = [
        surgery.Graft(host, twin.lora_state.configs[name], parts_of(twin, name))
        for host, twin in zip(chosen, (source["to_q"], source["to_k"]), strict=True)
    ]
    return lambda: surgery.graft(list(model.modules()), name, grafts)


def ungraft(model: nn.Module, portrait: Callable[[nn.Module], object], before: object) -> None:
    eject(model, "new")
    assert portrait(model) == before


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
def test_an_interrupt_anywhere_in_inject_leaves_the_model_before_or_after(portrait, second):
    model = tiny()
    if second:
        inject(model, rank=2, name="old", targets="to_q")
    before = portrait(model)
    call = grafted(model, "new")
    call()
    after = portrait(model)
    ungraft(model, portrait, before)
    outcomes, k = {"before": 0, "after": 0}, 1
    while interrupted_at(call, k):
        now = portrait(model)
        assert now in (before, after), f"half injected at boundary {k}"
        outcomes["before" if now == before else "after"] += 1
        if now == after:
            ungraft(model, portrait, before)
        k += 1
    ungraft(model, portrait, before)
    assert outcomes["before"] > 300
    assert outcomes["after"] > 0


def test_an_interrupt_on_any_line_of_the_whole_inject_does_so_too(portrait):
    model = tiny()

    def call() -> None:
        inject(model, rank=1, name="new", targets="*")

    before = portrait(model)
    call()
    after = portrait(model)
    ungraft(model, portrait, before)
    k, step = 1, 7
    while interrupted_at(call, k):
        now = portrait(model)
        assert now in (before, after), f"half injected at boundary {k}"
        if now == after:
            ungraft(model, portrait, before)
        k += step
    assert k > 100 * step


@pytest.mark.parametrize("name", ["new", None])
def test_an_interrupt_anywhere_in_eject_leaves_the_model_before_or_after(portrait, name):
    model = tiny()
    inject(model, rank=2, name="old", targets="to_q")
    original = [p for n, p in model.named_parameters() if "lora_" not in n]
    inject(model, rank=1, name="new", targets="*")
    before, bits = portrait(model), factors(model, "new")
    pristine = copy.deepcopy(model)

    twin = copy.deepcopy(model)
    eject(twin, name)
    shape = [(type(m), list(vars(m)), list(m._parameters)) for m in twin.modules()], flags(twin)

    def is_after() -> bool:
        now = [(type(m), list(vars(m)), list(m._parameters)) for m in model.modules()]
        return (now, flags(model)) == shape

    outcomes, k = {"before": 0, "after": 0}, 1
    while interrupted_at(partial(eject, model, name), k):
        if portrait(model) == before:
            outcomes["before"] += 1
            assert all(torch.equal(p, bits[n]) for n, p in factors(model, "new").items())
        else:
            assert is_after(), f"half ejected at boundary {k}"
            outcomes["after"] += 1
            model = copy.deepcopy(pristine)
            before = portrait(model)
        k += 1
    assert outcomes["before"] > 300
    assert outcomes["after"] > 0
    assert len(original) == 3


def test_the_interrupter_does_interrupt():
    done: list[str] = []

    def call() -> None:
        inject(tiny(), rank=1, targets="*")
        done.append("finished")

    assert interrupted_at(call, 50)
    assert done == []
    assert not interrupted_at(call, 10**9)
    assert done == ["finished"]


def test_an_adapted_model_trains_towards_a_target(net, x):
    inject(net, rank=2)
    goal = net(x).detach() + 0.3
    frozen = {n: p.clone() for n, p in net.named_parameters() if "lora_" not in n}
    optimiser = torch.optim.Adam(parameters(net), lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (net(x) - goal).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(net.get_parameter(n), p) for n, p in frozen.items())


def test_a_weight_normed_layer_is_adapted_and_given_back(x):
    from torch.nn.utils import parametrizations

    layer = parametrizations.weight_norm(nn.Linear(8, 5))
    model = nn.Sequential(layer)
    cls, plain = type(layer), model(x)
    inject(model, rank=2, targets="0")
    assert torch.equal(model(x), plain)
    assert isinstance(layer, LoRAMixin)
    with torch.no_grad():
        layer.lora_B_default.fill_(0.5)
    A, B = factors_of(layer, "default")
    assert_close(model(x), plain + x @ A.T @ B.T)
    eject(model)
    assert type(layer) is cls
    assert torch.equal(model(x), plain)


def test_the_name_of_either_factor_is_never_overwritten():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("lora_B_default", torch.zeros(3))
    message = (
        "`name` must be new to every layer, but '0' has an attribute 'lora_B_default' of its own."
        " Choose another name."
    )
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        inject(model, targets="0")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "`rules` must map patterns to settings, but is []."),
        (
            {"to_q": 4},
            "`rules` must map patterns to settings, as in {'*mid*': {'rank': 16}}, but holds"
            " 'to_q': 4.",
        ),
        (
            {3: {"rank": 2}},
            "`rules` must map patterns to settings, as in {'*mid*': {'rank': 16}}, but holds"
            " 3: {'rank': 2}.",
        ),
        (
            {"to_q": {"r": 2}},
            "`rules` must set 'rank', 'alpha', 'dropout', 'dtype', 'rslora', 'dora', 'bias',"
            " 'tucker', 'rank_dropout', 'module_dropout', 'init', 'read', 'reserve_rank', but"
            " 'to_q' sets 'r'.",
        ),
    ],
)
def test_rules_of_another_kind_are_refused(net, rules, message):
    for verb in (plan, inject):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            verb(net, rules=rules)
    assert not parameters_of(net)


def parameters_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("rslora", [1, None, "yes"])
def test_an_rslora_that_is_no_boolean_is_refused(net, portrait, rslora):
    before = portrait(net)
    message = f"`rslora` must be True or False, but is {rslora!r}."
    for verb in (plan, inject):
        for wrong in ({"rslora": rslora}, {"rules": {"to_q": {"rslora": rslora}}}):
            with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
                verb(net, **wrong)
    assert portrait(net) == before


@pytest.mark.parametrize("everywhere", [True, False])
def test_rules_choose_by_pattern_where_the_scale_is_rank_stabilised(net, everywhere):
    wishes = {
        "rank": 4,
        "alpha": 3.0,
        "rslora": everywhere,
        "rules": {"to_q": {"rslora": not everywhere}},
    }
    planned = plan(net, **wishes)
    report = inject(net, **wishes)
    assert report == planned
    scales = {layer.name.rpartition(".")[2]: layer.scale for layer in report.layers}
    flipped = {layer.name for layer in report.layers if layer.rslora is not everywhere}
    assert flipped == {f"blocks.{i}.attn.to_q" for i in range(2)}
    assert scales["to_q"] == (0.75 if everywhere else 1.5)
    assert scales["to_k"] == (1.5 if everywhere else 0.75)
    stabilised = sum(layer.rslora for layer in report.layers)
    assert f"scale: alpha / sqrt(rank) on {stabilised} layers" in str(report).splitlines()
    assert lora_core.summary(net).adapters[0].scales == (0.75, 1.5)
    eject(net)
    assert "sqrt" not in str(inject(net, rank=4))


def test_a_layer_whose_class_changed_since_is_not_ejected(net):
    inject(net, rank=2)
    nn.utils.parametrize.register_parametrization(net.blocks[0].attn.to_q, "weight", nn.Identity())
    message = (
        "A layer must have the class that `inject` gave it, but that of 'blocks.0.attn.to_q' was"
        " changed since (parametrized or sharded). Undo that first, then eject."
    )
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(message)}$"):
        eject(net)
    nn.utils.parametrize.remove_parametrizations(net.blocks[0].attn.to_q, "weight")
    eject(net)
    assert not parameters_of(net)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *(("r", ""), ("lora_alpha", "alpha"), ("dora_in", "dora"), ("target", "targets")),
        ("target_modules", "targets"),
    ],
)
def test_a_keyword_that_is_no_setting_is_an_error_that_shows_those_there_are(net, word, meant):
    message = (
        f"'{word}' must be a setting of an adapter, but is none. Use rank, alpha, dropout, dtype,"
        " rslora, dora, bias, tucker, rank_dropout, module_dropout, init, read, reserve_rank."
    ) + (f" Did you mean {meant!r}?" if meant else "")
    for verb in (plan, inject):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            verb(net, **{word: 4})
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            verb(nn.Sequential(nn.Linear(4, 4)), **{word: 4})  # before it looks for projections


def test_a_second_adapter_says_which_one_stops_training(net):
    assert inject(net, rank=2, name="first").notes == ()
    said = "stops training: 'first'; `trainable` lets several train"
    assert plan(net, rank=2, name="second").notes == (said,)
    assert plan(net, rank=2, name="second", freeze=False).notes == ()
    report = inject(net, rank=2, name="second")
    assert report.notes == (said,)
    assert str(report).endswith(said)
    assert inject(net, rank=2, name="third").notes == (said.replace("first", "second"),)


def test_help_tells_every_setting_with_its_default_and_its_meaning():
    for verb in (plan, inject):
        signature = inspect.signature(verb)
        assert {"rank", "dropout", "rslora", "init", "reserve_rank"} <= set(signature.parameters)
        assert signature.parameters["init"].default == "kaiming"
    for key in ASKED:
        assert f"        {key}: " in str(plan.__doc__)
    assert set(Settings.__annotations__) == set(ASKED) - {"rank", "alpha"}
