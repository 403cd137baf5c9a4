"""Hosts that are odd: tied, shared, hooked, patched, computed, lazy, packed. Right, or refused."""

import copy
import itertools
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import lora_core
from lora_core import (
    ConfigError,
    LoRALinear,
    MergeError,
    TargetError,
    UnsupportedLayerError,
    inject,
    plan,
)
from lora_core._layers import OWN_NAMES, LoRAMixin, factors_of
from lora_core._layers import linear as adapted_linear
from lora_core.testing import check_lora

Make = Callable[[], nn.Module]


def seeded(make: Make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def perturb(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    """Moves every trained part of the adapters as training might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_core.parameters(model, name):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if "lora_" not in n}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(t, right[n]) for n, t in left.items())


def life(
    make: Make,
    x: Tensor,
    folder: Path,
    look: Callable[[nn.Module], object],
    *,
    still: bool = False,
    **options: Any,
) -> tuple[nn.Module, Tensor, Tensor]:
    """An adapted model with its base's output and its own, after all that must hold but a merge.

    A fresh adapter changes nothing; a moved one shows and gets gradients, and nothing else does;
    a file takes it to a twin bit for bit; eject gives the very model back. A call in training mode
    is left out where the model is to stand `still`.
    """
    model, twin = seeded(make), seeded(make)
    plain, before, held = model(x).detach(), look(model), bits(model)
    assert torch.equal(twin(x), plain)
    inject(model, **{"rank": 2, "alpha": 3.0, **options})
    assert torch.equal(model(x), plain)
    perturb(model)
    moved = model(x)
    assert (moved - plain).abs().max() > 1e-3
    assert still or (model.train()(x) - plain).abs().max() > 1e-3
    model.eval()
    moved.double().square().sum().backward()
    factors = {id(p) for p in lora_core.parameters(model)}
    assert all((p.grad is not None) == (id(p) in factors) for p in model.parameters())
    for p in model.parameters():
        p.grad = None
    with lora_core.disabled(model):
        assert torch.equal(model(x), plain)
    lora_core.save(model, folder / "life.safetensors")
    lora_core.load(twin, folder / "life.safetensors")
    assert torch.equal(twin(x), moved)
    lora_core.eject(twin)
    assert torch.equal(twin(x), plain)
    pristine = copy.deepcopy(model)
    assert torch.equal(pristine(x), moved)
    lora_core.eject(model)
    assert look(model) == before
    assert same(bits(model), held)
    assert torch.equal(model(x), plain)
    return pristine, plain, moved.detach()


def merges(model: nn.Module, x: Tensor, moved: Tensor, **options: Any) -> None:
    """A merge keeps the function, and an unmerge brings every bit back."""
    before = bits(model)
    lora_core.merge(model, **options)
    assert not all(torch.equal(t, before[n]) for n, t in bits_without_marks(model).items())
    assert_close(model(x), moved, atol=1e-4, rtol=1e-4)
    lora_core.unmerge(model)
    assert same(bits(model), before)
    assert torch.equal(model(x), moved)


def bits_without_marks(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in bits(model).items() if not n.endswith("lora_merged")}


def refuses_to_merge(model: nn.Module, x: Tensor, message: str) -> None:
    """Every form of merge is refused in these words, and nothing is changed."""
    before, moved = bits(model), model(x)
    for options in ({}, {"untie": True}, {"reversible": False}):
        with pytest.raises(MergeError, match=f"^{re.escape(message)}$"):
            lora_core.merge(model, **options)
        assert same(bits(model), before)
        assert torch.equal(model(x), moved)
    assert not lora_core.summary(model).adapters[0].merged


# -- tied and shared


class Tied(nn.Module):
    """A language model in miniature, whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(x)))


def two_of_one_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def tokens() -> Tensor:
    return torch.tensor([[1, 2, 3], [8, 0, 1]])


def vectors() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(5))


TIED = {
    "embedding": (Tied, "embed", tokens, ["embed (also head.weight)"]),
    "head": (Tied, "head", tokens, ["head (also embed.weight)"]),
    "both": (
        Tied,
        ["embed", "head"],
        tokens,
        ["embed (also head.weight)", "head (also embed.weight)"],
    ),
    "one of two linears": (two_of_one_weight, "0", vectors, ["0 (also 2.weight)"]),
    "two linears": (
        two_of_one_weight,
        ["0", "2"],
        vectors,
        ["0 (also 2.weight)", "2 (also 0.weight)"],
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_weight_takes_adapters_and_is_untied_to_be_merged(case, tmp_path, portrait):
    make, targets, sample, names = TIED[case]
    x = sample()
    model, _, moved = life(make, x, tmp_path, portrait, targets=targets)
    weights = [m.weight for m in model.modules() if getattr(m, "weight", None) is not None]
    shared = [p for p in weights if sum(p is other for other in weights) == 2]
    assert len(shared) == 2  # the copy is tied as the model was
    said = (
        f"A weight must belong to one module to be merged, but {', '.join(map(repr, names))} is"
        " shared and would change there too. Pass untie=True."
    )
    before = bits(model)
    for options in ({}, {"reversible": False}):
        with pytest.raises(MergeError, match=f"^{re.escape(said)}$"):
            lora_core.merge(model, **options)
        assert same(bits(model), before)
    merges(model, x, moved, untie=True)
    weights = [m.weight for m in model.modules() if getattr(m, "weight", None) is not None]
    assert sum(p is shared[0] for p in weights) == 2


def test_a_tied_weight_is_a_sum_of_its_own_on_either_side():
    model = seeded(Tied)
    inject(model, rank=2, targets="embed", name="a")
    inject(model, rank=2, targets="head", name="b")
    perturb(model)
    A, B = factors_of(model.embed, "a")
    C, D = factors_of(model.head, "b")
    table, x = model.embed.weight, tokens()
    seen = (table + A.T @ B.T)[x]
    assert_close(model(x), model.mid(seen) @ (table + D @ C).T)


def twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize("targets", ["0", "2", nn.Linear])
def test_a_module_that_is_used_twice_has_one_adapter_and_is_merged_once(
    targets, tmp_path, portrait
):
    x = vectors()
    model, _, moved = life(twice, x, tmp_path, portrait, targets=targets)
    assert model[0] is model[2]
    assert len(lora_core.parameters(model)) == 2
    assert len(lora_core.save(model, tmp_path / "one").layers) == 1
    A, B = factors_of(model[0], "default")
    weight, bias = model[0].weight + 1.5 * B @ A, model[0].bias
    linear = partial(nn.functional.linear, weight=weight, bias=bias)
    assert_close(moved, linear(linear(x).tanh()))
    wanted = torch.autograd.grad(linear(linear(x).tanh()).square().sum(), (A, B))
    found = torch.autograd.grad(model(x).square().sum(), (A, B))
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, atol=1e-4, rtol=1e-4)
    merges(model, x, moved)


class Renamed(nn.Module):
    """One block under two names, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"block": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))})
        self.alias = self.encoder["block"]

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(x) + self.encoder["block"][0](x)


@pytest.mark.parametrize(
    "targets", ["alias.1", "encoder.block.1", re.compile(r"alias\.1"), lambda n, m: n == "alias.1"]
)
def test_a_module_under_two_names_answers_to_both(targets, tmp_path, portrait):
    x = vectors()
    model, _, moved = life(Renamed, x, tmp_path, portrait, targets=targets)
    report = lora_core.summary(model)
    assert report.adapters[0].layers == ("encoder.block.1",)
    assert [m for m in model.modules() if isinstance(m, LoRAMixin)] == [model.alias[1]]
    assert plan(seeded(Renamed), targets=targets).layers[0].aliases == ("alias.1",)
    merges(model, x, moved)


# -- containers


class Listed(nn.Module):
    """Layers in plain lists and dicts, which nobody but its own forward knows of."""

    def __init__(self, *, registered: bool = False) -> None:
        super().__init__()
        steps = [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())]
        by_name = {"a-b": nn.Linear(6, 6)}
        self.steps: Any = nn.ModuleList(steps) if registered else steps
        self.by_name: Any = nn.ModuleDict(by_name) if registered else by_name
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.head(self.by_name["a-b"](x))


WHERE = (
    "is held in a plain {}, where torch does not see it: neither `parameters`, nor `.to`, nor"
    " `state_dict`. Use nn.ModuleList or nn.ModuleDict."
)


def test_the_same_layers_in_registered_containers_are_adapted(tmp_path, portrait):
    make, x = partial(Listed, registered=True), vectors()
    report = plan(make(), targets="*")
    names = ["steps.0", "steps.1.0", "by_name.a-b", "head"]
    assert [layer.name for layer in report.layers] == names
    assert not report.left_out
    model, _, moved = life(make, x, tmp_path, portrait, targets="*")
    merges(model, x, moved)


@pytest.mark.parametrize("targets", ["*", nn.Linear, "head", ["head", "*"]])
def test_layers_in_plain_containers_are_reported_where_others_are_adapted(targets):
    model = Listed()
    report = inject(model, rank=2, targets=targets)
    assert [layer.name for layer in report.layers] == ["head"]
    assert report.left_out == {
        "steps.0": WHERE.format("list"),
        "steps.1.0": WHERE.format("list"),
        "by_name.a-b": WHERE.format("dict"),
    }
    assert f"left out: 2 ({WHERE.format('list')})" in str(report)
    assert not isinstance(model.steps[0], LoRAMixin)


@pytest.mark.parametrize("verb", [plan, inject])
@pytest.mark.parametrize(
    ("targets", "name", "kind"),
    [("steps.*", "steps.0", "list"), ("a-b", "by_name.a-b", "dict"), ("0", "steps.0", "list")],
)
def test_a_pattern_that_names_only_such_layers_is_refused(verb, targets, name, kind, portrait):
    model = Listed()
    before = portrait(model)
    said = (
        f"Every layer that `targets` names must be adaptable, but {name!r} (Linear)"
        f" {WHERE.format(kind)}"
    )
    for wanted in (targets, ["head", targets]):
        with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}"):
            verb(model, rank=2, targets=wanted)
    assert portrait(model) == before


def test_attention_in_a_plain_list_is_named_where_there_is_no_other():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.ModuleDict({"to_q": nn.Linear(6, 6), "to_k": nn.Linear(6, 6)})
            self.stages = ([{"blocks": [block]}], "notes", 3)

    said = (
        "The model must have attention projections that `inject` knows by name and place, but none"
        " of its 0 adaptable layers is one. Also 'stages.0.0.blocks.0.to_q'"
    )
    # the stages are a tuple of lists of dicts: deeper than anyone looks
    with pytest.raises(TargetError, match=r"but none of its 0 adaptable layers is one\.$"):
        plan(Deep())
    shallow = Deep()
    shallow.stages = shallow.stages[0]
    said = said.replace("stages.0.0.", "stages.0.")
    with pytest.raises(TargetError, match=f"^{re.escape(said)} {re.escape(WHERE.format('list'))}$"):
        plan(shallow)


def test_a_list_that_only_points_at_the_model_or_its_parts_hides_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    model[1].whole, model[1].peers, model.everything = [model], (model[0],), list(model.modules())
    assert plan(model, targets="*").left_out == {}
    # nor does the part know of layers that are not its own
    assert plan(model[1], targets="*").left_out.keys() == {"peers.0"}


class Mixer(nn.Module):
    """A matrix and a bias of a module that is no kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (Mixer, Mixer),
        (lambda: nn.Sequential(Mixer()), "0"),
        (lambda: nn.Sequential(Pairs(3, 4, 5)), "0"),
        (lambda: nn.Sequential(nn.MultiheadAttention(6, 2)), "0"),
        (lambda: nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6))}), "a"),
        (lambda: nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6))}), nn.ModuleDict),
    ],
    ids=["root", "mixer", "pairs", "attention", "container", "root container"],
)
def test_what_an_error_says_to_write_is_a_target(model, target):
    with pytest.raises(UnsupportedLayerError, match="matches only ") as refused:
        plan(model(), rank=2, targets=target)
    repair = re.search(r"write '(.*)'\.$", str(refused.value))
    assert repair
    assert plan(model(), rank=2, targets=repair[1]).layers


# -- the whole model is a layer


def root_conv1d() -> nn.Module:
    class Conv1D(nn.Module):  # as GPT-2's
        def __init__(self) -> None:
            super().__init__()
            self.nf = 5
            self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    return Conv1D()


ROOTS: dict[str, tuple[Make, Callable[[], Tensor]]] = {
    "linear": (partial(nn.Linear, 6, 5), vectors),
    "gpt2": (root_conv1d, vectors),
    "conv1d": (partial(nn.Conv1d, 3, 5, 2), lambda: vectors().view(1, 3, 6)),
    "conv2d": (partial(nn.Conv2d, 2, 5, 2), lambda: vectors().view(1, 2, 3, 3)),
    "conv3d": (partial(nn.Conv3d, 2, 5, (1, 2, 1)), lambda: vectors().view(1, 2, 1, 3, 3)),
    "embedding": (partial(nn.Embedding, 9, 6), tokens),
    "bilinear, a raw parameter": (
        lambda: Pairs(3, 4, 5),
        lambda: torch.randn(2, 7, generator=torch.Generator().manual_seed(3)),
    ),
}


class Pairs(nn.Module):
    """Takes both of its inputs side by side, and is no kind of layer."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.randn(out, first, second))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x[:, : self.first], x[:, self.first :]
        return nn.functional.bilinear(*inputs, self.weight, self.bias)


@pytest.mark.parametrize("kind", ROOTS)
def test_a_layer_that_is_the_whole_model_lives_as_any_other(kind, tmp_path, portrait):
    make, sample = ROOTS[kind]
    x, raw = sample(), "raw" in kind
    targets: Any = "weight" if raw else (lambda name, _: name == "")
    model, _, moved = life(make, x, tmp_path, portrait, targets=targets)
    assert [layer.name for layer in plan(seeded(make), rank=2, targets=targets).layers] == [
        "weight" if raw else ""
    ]
    merges(model, x, moved)
    check_lora(seeded(make), x, rank=2, targets=targets)


# -- hooks


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", [partial(nn.Linear, 6, 6), partial(nn.Conv1d, 3, 6, 1)], ids=str)
def test_every_hook_is_kept_and_fires_once_and_sees_the_adapted_numbers(make, when):
    layer = seeded(make)
    model = nn.Sequential(layer)
    x = vectors().view(1, 3, 6).requires_grad_()
    calls: list[str] = []
    seen: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            calls.append(name)
            seen[name] = args

        return hook

    def add() -> list[Any]:
        return [
            layer.register_forward_pre_hook(note("pre"), with_kwargs=True),
            layer.register_forward_hook(note("forward")),
            layer.register_forward_hook(note("always"), always_call=True),
            layer.register_full_backward_pre_hook(note("backward pre")),
            layer.register_full_backward_hook(note("backward")),
            layer.register_state_dict_pre_hook(note("state pre")),
            layer.register_state_dict_post_hook(note("state")),
            layer.register_load_state_dict_pre_hook(note("load pre")),
            layer.register_load_state_dict_post_hook(note("load")),
        ]

    handles = add() if when == "before" else []
    inject(model, rank=2, targets="0")
    perturb(model)
    handles = handles or add()
    forwards = ["pre", "forward", "always"]
    states = ["state pre", "state", "load pre", "load"]

    def use(*, merged: bool = False) -> None:
        calls.clear()
        out = model(x)
        assert calls == forwards
        assert seen["pre"][1][0] is x
        assert_close(seen["forward"][2], out, atol=0, rtol=0)
        out.sum().backward()
        assert calls == [*forwards, "backward pre", "backward"]
        assert_close(seen["backward"][1][0], x.grad)
        x.grad = None
        calls.clear()
        if not merged:
            model.load_state_dict(model.state_dict())
            assert calls == states

    use()
    moved = model(x)
    with lora_core.disabled(model):
        base = model(x)
        assert (seen["forward"][2] - moved).abs().max() > 1e-3
    lora_core.merge(model)
    use(merged=True)
    assert_close(seen["forward"][2], moved, atol=1e-4, rtol=1e-4)
    lora_core.unmerge(model)
    use()
    lora_core.eject(model)
    use()
    assert torch.equal(seen["forward"][2], base)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == []


def test_hooks_that_change_input_and_output_do_so_around_the_adapter():
    layer, x = seeded(partial(nn.Linear, 6, 6)), vectors()
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer.register_forward_hook(lambda _, args, out: out + args[0].sum())
    inject(layer, rank=2, targets=nn.Linear)
    perturb(layer)
    A, B = factors_of(layer, "default")
    doubled = 2 * x
    expected = doubled @ (layer.weight + B @ A).T + layer.bias + doubled.sum()
    assert_close(layer(x), expected)
    lora_core.merge(layer)
    assert_close(layer(x), expected)


def test_hooks_of_a_parameter_that_is_read_stay_with_the_one_who_reads_it(perturb):
    model, calls = nn.MultiheadAttention(8, 2).eval(), []
    model.register_forward_hook(lambda *_: calls.append("attention"))
    model.out_proj.register_forward_hook(lambda *_: calls.append("out"))
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        plain, bare_calls = model(x, x, x)[0], list(calls)
        inject(model, rank=2)
        perturb(model)
        calls.clear()
        assert (model(x, x, x)[0] - plain).abs().max() > 1e-3
    assert calls == bare_calls == ["attention"]


# -- patched forwards


@pytest.mark.parametrize(
    "make",
    [partial(nn.Linear, 6, 6), partial(nn.Conv1d, 3, 6, 1), partial(nn.Embedding, 9, 6)],
    ids=str,
)
@pytest.mark.parametrize("verb", [plan, inject])
def test_a_forward_patched_onto_a_layer_is_refused_until_it_is_removed(verb, make, portrait):
    model = nn.Sequential(seeded(make))
    model[0].forward = model[0].forward
    before = portrait(model)
    said = (
        f"Every layer that `targets` names must be adaptable, but '0' ({type(model[0]).__name__})"
        " has a `forward` patched onto the instance (offloading hooks do this), which would bypass"
        " the adapter. Remove that patch, adapt, and put it back."
    )
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}$"):
        verb(model, rank=2, targets="0")
    assert portrait(model) == before
    del model[0].forward
    verb(model, rank=2, targets="0")


def test_a_forward_patched_onto_what_holds_the_layers_or_reads_them_goes_on():
    x = vectors()
    model = seeded(two_of_one_weight)
    held = model.forward
    model.forward = lambda x: 2 * held(x)
    plain = model(x)
    inject(model, rank=2, targets="0")
    assert torch.equal(model(x), plain)
    perturb(model)
    assert (model(x) - plain).abs().max() > 1e-3
    lora_core.eject(model)
    assert torch.equal(model(x), plain)

    attention = seeded(partial(nn.MultiheadAttention, 6, 2))
    called = attention.forward
    attention.forward = lambda x: called(x, x, x)[0]
    plain = attention(x)
    inject(attention, rank=2)
    perturb(attention)
    moved = attention(x)
    assert (moved - plain).abs().max() > 1e-3
    lora_core.merge(attention)
    assert_close(attention(x), moved)


# -- weights that are computed


def old(make: Callable[[nn.Module], nn.Module], host: Make) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(make(host()))


def masked(host: Make) -> nn.Module:
    layer = host()
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer)


def computed(make: Callable[[nn.Module], nn.Module], host: Make) -> nn.Module:
    return nn.Sequential(make(host()))


class Symmetric(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


linear, conv, table = (
    partial(nn.Linear, 6, 6),
    partial(nn.Conv1d, 3, 4, 2),
    partial(nn.Embedding, 9, 6),
)
COMPUTED: dict[str, tuple[Make, Callable[[], Tensor]]] = {
    "weight_norm": (partial(computed, parametrizations.weight_norm, linear), vectors),
    "weight_norm of a convolution": (
        partial(computed, parametrizations.weight_norm, conv),
        lambda: vectors().view(1, 3, 6),
    ),
    "weight_norm of an embedding": (
        partial(computed, parametrizations.weight_norm, table),
        tokens,
    ),
    "spectral_norm": (partial(computed, parametrizations.spectral_norm, linear), vectors),
    "orthogonal": (partial(computed, parametrizations.orthogonal, linear), vectors),
    "parametrized": (partial(computed, symmetric, linear), vectors),
    "old weight_norm": (partial(old, nn.utils.weight_norm, linear), vectors),
    "old spectral_norm": (partial(old, nn.utils.spectral_norm, linear), vectors),
    "pruned": (partial(masked, linear), vectors),
}
NOT_STORED = (
    "A weight must be a plain Parameter to be merged, but that of '0' is computed (parametrized or"
    " quantised). Eject, undo that, and inject again."
)


def fixed(layer: nn.Module) -> None:
    """Undoes what computes the weight; the weight stays what it was."""
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    elif hasattr(layer, "weight_mask"):
        prune.remove(layer, "weight")
    elif hasattr(layer, "weight_u"):
        nn.utils.remove_spectral_norm(layer)
    else:
        nn.utils.remove_weight_norm(layer)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_takes_an_adapter_and_is_merged_once_it_is_stored(
    kind, dora, tmp_path, portrait
):
    make, sample = COMPUTED[kind]
    x = sample()
    still = "spectral" in kind  # each call in training mode is a step of a power iteration
    model, _, moved = life(make, x, tmp_path, portrait, still=still, targets="0", dora=dora)
    refuses_to_merge(model, x, NOT_STORED)
    # the repair that the message states
    lora_core.eject(model)
    fixed(model[0])
    lora_core.load(model, tmp_path / "life.safetensors")
    assert_close(model(x), moved, atol=1e-5, rtol=1e-5)
    merges(model, x, model(x).detach())


@pytest.mark.parametrize("kind", [k for k in COMPUTED if "norm" in k])
def test_what_a_weight_is_computed_from_is_frozen_and_trains_again(kind):
    model = seeded(COMPUTED[kind][0])
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert any(before.values())
    inject(model, rank=2, targets="0")
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    lora_core.eject(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_layer_parametrized_after_it_was_adapted_still_adds_its_update():
    model, x = seeded(two_of_one_weight)[:1], vectors()
    inject(model, rank=2, targets="0")
    perturb(model)
    A, B = factors_of(model[0], "default")
    symmetric(model[0])
    weight, bias = model[0].weight, model[0].bias
    assert_close(model(x), nn.functional.linear(x, weight + B @ A, bias))
    with pytest.raises(MergeError, match=f"^{re.escape(NOT_STORED)}$"):
        lora_core.merge(model)


# -- compiled away

SCRIPTED = "is a TorchScript module, whose class can't change. Adapt it before scripting."


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, vectors())])
def test_a_scripted_layer_is_passed_over_with_a_reason_and_refused_by_name(script, portrait):
    model = nn.Sequential(nn.Linear(6, 6), script(nn.Linear(6, 6)))
    report = plan(model, rank=2, targets=nn.Linear)
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.left_out == {"1": SCRIPTED}
    said = (
        f"Every layer that `targets` names must be adaptable, but '1' ({type(model[1]).__name__})"
    )
    for targets in ("1", "*"):
        with pytest.raises(
            UnsupportedLayerError, match=f"^{re.escape(said)} {re.escape(SCRIPTED)}$"
        ):
            inject(model, rank=2, targets=targets)
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}"):
        inject(model, rank=2, targets="1.weight")
    with pytest.raises(TargetError, match="^`targets` must match a layer, but"):
        inject(model, rank=2, targets="weight")  # which only its own code reads
    assert not any("lora_" in name for name in model.state_dict())
    x = vectors()
    plain = model(x)
    inject(model, rank=2, targets="0", freeze=False)
    perturb(model)
    assert (model(x) - plain).abs().max() > 1e-3
    lora_core.eject(model)
    assert torch.equal(model(x), plain)


# -- lazy


@pytest.mark.parametrize(
    ("lazy", "sample"),
    [
        (partial(nn.LazyLinear, 5), vectors),
        (partial(nn.LazyConv1d, 5, 2), lambda: vectors().view(1, 3, 6)),
    ],
    ids=["linear", "conv1d"],
)
@pytest.mark.parametrize("verb", [plan, inject])
def test_a_lazy_layer_is_refused_until_it_has_a_shape(verb, lazy, sample, tmp_path, portrait):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, x = nn.Sequential(lazy()), sample()
    said = (
        f"Every layer that `targets` names must be adaptable, but '0' ({type(model[0]).__name__})"
        " is lazy and has no shape yet. Run one batch through the model first."
    )
    for targets in ("0", "*", type(model[0]).cls_to_become):
        with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}$"):
            verb(model, rank=2, targets=targets)
    assert isinstance(model[0], nn.modules.lazy.LazyModuleMixin)
    model(x)
    materialised, _, moved = life(lambda: copy.deepcopy(model), x, tmp_path, portrait, targets="0")
    merges(materialised, x, moved)


# -- codes instead of weights


class Packed(nn.Linear):
    """Two 4-bit codes to a byte, multiplied in a dtype of its own, as quantised layers do."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        codes = torch.randint(16, (out_features * in_features,), dtype=torch.uint8)
        packed = (codes[::2] << 4 | codes[1::2])[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("step", torch.rand(out_features, 1) / 10)
        self.compute = torch.bfloat16

    def dense(self) -> Tensor:
        codes = torch.stack([self.weight >> 4, self.weight & 15], dim=-1)
        codes = codes.view(self.out_features, self.in_features)
        return (codes.to(self.compute) - 7.5) * self.step.to(self.compute)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.compute)
        out = nn.functional.linear(wide, self.dense(), self.bias.to(self.compute))
        return out.to(x.dtype)


class Whole(nn.Linear):
    """A code for each weight, in the weight's place and shape."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        codes = torch.randint(-99, 99, (out_features, in_features), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("step", torch.rand(out_features, 1) / 100)

    def dense(self) -> Tensor:
        return self.weight * self.step

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias.to(x.dtype))


class Buffered(Whole):
    """The same, its codes a buffer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        codes = self.weight.data
        del self.weight
        self.register_buffer("weight", codes)


def coded(host: type[nn.Linear]) -> nn.Module:
    return nn.Sequential(host(8, 6), nn.Tanh(), nn.Linear(6, 4))


CODED = (
    "A weight must be of plain floating numbers to be merged, but that of '0' is quantised:"
    " rounding to its levels would lose the update. Merge into the model it was made from, or keep"
    " this one unmerged."
)
eights = partial(torch.randn, 3, 8)


@pytest.mark.parametrize("host", [Packed, Whole, Buffered])
def test_codes_take_an_adapter_that_trains_beside_them_and_are_never_written(
    host, tmp_path, portrait
):
    make, x = partial(coded, host), eights()
    model, _, moved = life(make, x, tmp_path, portrait, targets="0")
    assert [type(m) for m in seeded(make)] == [host, nn.Tanh, nn.Linear]
    layer = model[0]
    A, B = factors_of(layer, "default")
    assert (A.shape, B.shape, A.dtype) == ((2, 8), (6, 2), torch.float32)
    with lora_core.disabled(model):
        base = layer(x)
    assert_close(layer(x), base + 1.5 * x @ A.T @ B.T)
    refuses_to_merge(model, x, NOT_STORED if host is Buffered else CODED)
    before, goal = bits(model), moved + 0.3
    optimiser = torch.optim.Adam(lora_core.parameters(model), lr=0.05)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert same(bits(model), before)


@pytest.mark.parametrize("host", [Packed, Whole])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_keep_their_dtype_and_the_factors_theirs_when_a_model_is_cast(host, dtype):
    model, x = seeded(partial(coded, host)), eights().to(dtype)
    inject(model, rank=2, targets="0")
    perturb(model)
    codes = model[0].weight.clone()
    model.to(dtype)
    assert torch.equal(model[0].weight, codes)
    assert all(p.dtype is torch.float32 for p in lora_core.parameters(model))
    lora_core.scales(model, default=0.5)
    out = model(x)
    assert out.dtype is dtype
    out.float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in lora_core.parameters(model))


@pytest.mark.parametrize("host", [Packed, Whole])
def test_the_laws_hold_of_codes_up_to_the_merge(host, portrait):
    model, x = seeded(partial(coded, host)), eights()
    before, held = portrait(model), bits(model)
    with pytest.raises(MergeError, match=f"^{re.escape(CODED)}$"):
        check_lora(model, x, rank=2, targets="0")
    assert portrait(model) == before
    assert same(bits(model), held)


@pytest.mark.parametrize("setting", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
@pytest.mark.parametrize("host", [Packed, Whole])
def test_codes_refuse_what_needs_the_values_of_a_weight(host, setting, portrait):
    model = seeded(partial(coded, host))
    before = portrait(model)
    said = "`dora=True`" if "dora" in setting else f"`init={setting['init']!r}`"
    message = f"A setting must fit its layer, but {said} needs a weight of plain floating numbers"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}, not .* at '0'\\.$"):
        inject(model, rank=2, targets="0", **setting)
    assert portrait(model) == before


@pytest.mark.parametrize("host", [Packed, Whole])
def test_an_adapter_that_learned_beside_codes_is_merged_into_plain_numbers(host, tmp_path):
    model, x = seeded(partial(coded, host)), eights()
    inject(model, rank=2, targets="0")
    perturb(model)
    lora_core.save(model, tmp_path / "a")
    whole = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    whole[2].load_state_dict(bits(model[2]))
    with torch.no_grad():
        whole[0].weight.copy_(model[0].dense())
        whole[0].bias.copy_(model[0].bias)
    lora_core.load(whole, tmp_path / "a")
    moved = whole(x)
    assert_close(moved, model(x), atol=0.05, rtol=0.05)
    merges(whole, x, moved)


def test_an_integer_weight_without_a_forward_of_its_own_is_refused():
    layer = nn.Linear(4, 4).requires_grad_(False)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    said = "`linear` must be adaptable, but has a weight that is no floating-point tensor. Exclude"
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}"):
        LoRALinear(layer, rank=2)


# -- attention in every form

FORMS: dict[str, dict[str, Any]] = {
    "packed": {},
    "with keys of its own": {"add_bias_kv": True},
    "with a zero to attend to": {"add_zero_attn": True},
    "without biases": {"bias": False},
    "apart": {"kdim": 6, "vdim": 4},
    "batch first": {"batch_first": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "each head's weights": {"average_attn_weights": False},
    "masked": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)},
    "padded": {"key_padding_mask": torch.arange(7).expand(3, 7) > 4},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_attention_in_any_form_gives_what_the_merged_one_gives_and_learns(form, call):
    options = FORMS[form]
    attention = seeded(partial(nn.MultiheadAttention, 8, 2, **options))
    q, kv = torch.randn(5, 3, 8), torch.randn(7, 3, 8)
    given = [q, kv[..., : options.get("kdim", 8)], kv[..., : options.get("vdim", 8)]]
    if "batch_first" in options:
        given = [t.transpose(0, 1) for t in given]
    run = partial(attention, *given, **CALLS[call])
    plain = run()[0]
    inject(attention, rank=2)
    assert_close(run()[0], plain)
    perturb(attention)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            adapted = run()
            assert (adapted[0] - plain).abs().max() > 1e-3
            lora_core.merge(attention)
            merged = run()
            lora_core.unmerge(attention)
            for got, want in zip(adapted, merged, strict=True):
                assert_close(got, want, atol=1e-5, rtol=1e-4)
    run()[0].square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in lora_core.parameters(attention))


# -- what holds whatever the host


def test_the_order_in_which_adapters_are_chosen_changes_at_most_a_rounding():
    layer, x = seeded(partial(nn.Linear, 64, 48)).double(), torch.randn(9, 64).double()
    strengths = {"a": 0.3, "b": -1.0, "c": 0.7}
    for name in strengths:
        inject(layer, rank=4, targets=nn.Linear, name=name)
    perturb(layer)
    weight = layer.weight + sum(
        s * factors_of(layer, name)[1] @ factors_of(layer, name)[0] for name, s in strengths.items()
    )
    expected = nn.functional.linear(x, weight, layer.bias)
    for order in itertools.permutations(strengths):
        lora_core.scales(layer, **{name: strengths[name] for name in order})
        assert_close(layer(x), expected, rtol=1e-13, atol=1e-12)


def test_other_adapters_and_the_new_ones_name_change_no_bit_of_its_first_factors():
    def first(*, earlier: bool, name: str, targets: Any) -> Tensor:
        model = seeded(lambda: nn.ModuleDict({n: nn.Linear(6, 6) for n in "pqr"}))
        if earlier:
            inject(model, rank=3, targets="*", name="earlier")
        torch.manual_seed(9)
        inject(model, rank=2, targets=targets, name=name)
        return factors_of(model["q"], name)[0]

    wanted = first(earlier=False, name="a", targets="q")
    for earlier, name, targets in itertools.product(
        (True, False), ("a", "b"), ("*", ["r", "q"], ["q", "p", "r"])
    ):
        assert torch.equal(first(earlier=earlier, name=name, targets=targets), wanted)


@pytest.mark.parametrize("targets", ["0", "*"])
def test_what_was_merged_is_what_is_taken_back_whatever_the_factors_are_by_then(targets):
    model, x = seeded(twice), vectors()
    inject(model, rank=2, targets=targets)
    perturb(model)
    before = bits(model)
    lora_core.merge(model)
    merged = model(x)
    with torch.no_grad():
        for p in lora_core.parameters(model):
            p.mul_(-3).add_(1)
    assert torch.equal(model(x), merged)
    lora_core.unmerge(model)
    assert same(bits(model), before)
    changed = model(x)
    assert (changed - merged).abs().max() > 1e-3
    merges(model, x, changed)


def test_a_model_in_shared_memory_computes_and_learns_the_same():
    model, x = seeded(twice), vectors()
    inject(model, rank=2, targets="0")
    perturb(model)
    expected = model(x)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in lora_core.parameters(model))
    lora_core.merge(model)
    assert_close(model(x), expected)
    lora_core.unmerge(model)
    lora_core.eject(model)


def test_the_file_that_an_adapter_came_from_may_be_saved_over(tmp_path):
    path = tmp_path / "a.safetensors"
    model, twin = seeded(twice), seeded(twice)
    inject(model, rank=2, targets="0")
    perturb(model)
    lora_core.save(model, path)
    first = path.read_bytes()
    lora_core.load(twin, path)
    lora_core.save(twin, path)
    assert path.read_bytes() == first
    perturb(twin)
    lora_core.save(twin, path)
    lora_core.eject(model)
    lora_core.load(model, path)
    assert torch.equal(model(vectors()), twin(vectors()))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def interrupted_at(call: Callable[[], object], k: int) -> bool:
    """Runs `call`, with a KeyboardInterrupt at its k-th line of the library; whether it hit."""
    left, ours = k, str(Path(lora_core.__file__).parent)

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(ours):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before, training = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(training)  # torch's own `no_grad` may be interrupted as it ends
    return False


def test_an_interrupt_of_a_load_leaves_the_model_before_or_after(tmp_path, portrait):
    path = tmp_path / "a.safetensors"
    model, x = seeded(two_of_one_weight), vectors()
    plain, before = model(x), portrait(model)
    inject(model, rank=1, targets="*")
    perturb(model)
    adapted = model(x)
    lora_core.save(model, path)
    lora_core.eject(model)
    outcomes = {"before": 0, "after": 0}
    for k in range(1, 10**6, 3):
        if not interrupted_at(lambda: lora_core.load(model, path), k):
            break
        if portrait(model) == before:
            outcomes["before"] += 1
            assert torch.equal(model(x), plain)
        else:
            outcomes["after"] += 1
            assert torch.equal(model(x), adapted), f"half loaded at line {k}"
            lora_core.eject(model)
            assert portrait(model) == before
    assert outcomes["before"] > 150
    assert outcomes["after"] > 0
    assert torch.equal(model(x), adapted)  # the load that nothing interrupted


# -- what once was wrong


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_an_adapter_beside_a_scripted_module_comes_and_goes():
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6)))
    x, flags = torch.randn(3, 6), [p.requires_grad for p in model.parameters()]
    y = model(x)
    inject(model, rank=2, targets="0")
    assert not any(p.requires_grad for p in model[1].parameters())
    lora_core.eject(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(x), y)


def test_a_linear_layer_without_a_weight_is_no_obstacle_to_others():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(6, 6, bias=False)
            del self.weight
            self.register_buffer("qweight", torch.randint(0, 255, (6, 3), dtype=torch.uint8))

        def forward(self, x):
            return x

    model = nn.Sequential(nn.Linear(6, 6), Packed())
    inject(model, rank=2, targets="0")
    with pytest.raises(UnsupportedLayerError, match="has a weight that is no floating-point"):
        inject(model, rank=2, targets="1", name="other")


@pytest.mark.parametrize("act", [lora_core.plan, inject])
def test_a_spectral_norm_is_not_moved_by_what_changes_nothing(act, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))).train()
    kept = {n: b.clone() for n, b in model.named_buffers()}
    act(model, rank=2, targets="0")
    if act is inject:
        lora_core.scales(model, default=0.5)
        with lora_core.disabled(model):
            pass
        lora_core.save(model, tmp_path / "a.safetensors")
    assert kept
    assert all(torch.equal(b, kept[n]) for n, b in model.named_buffers())


def test_a_factor_of_another_shape_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6))
    inject(model, rank=2, targets="0")
    model[0].lora_B_default = nn.Parameter(torch.randn(6, 3))
    said = (
        "An adapter must have the shapes of its settings to be saved, but has '0.lora_B (6, 3)"
        " (rank 2 has (6, 2))'. Resize a layer before it is adapted, and inject a rank instead of"
        " replacing tensors."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        lora_core.save(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("name", ["host_class", "plain_attributes", "kind", "change"])
def test_a_host_may_have_any_attribute_that_does_not_begin_with_lora(name):
    model = nn.Sequential(nn.Linear(6, 6))
    setattr(model[0], name, "its own")
    x = torch.randn(3, 6)
    expected = model(x)
    inject(model, rank=2, targets="0")
    assert torch.equal(model(x), expected)
    assert getattr(model[0], name) == "its own"


@pytest.mark.parametrize("name", sorted(OWN_NAMES))
@pytest.mark.parametrize("on_class", [False, True])
def test_a_host_with_an_attribute_of_our_name_is_refused(name, on_class):
    class Host(nn.Linear):
        pass

    model = nn.Sequential(Host(6, 6))
    setattr(Host if on_class else model[0], name, {})
    with pytest.raises(UnsupportedLayerError, match=r"must leave names that begin with 'lora_'"):
        inject(model, rank=2, targets="0")
    assert type(model[0]) is Host


def test_drawing_from_samples_needs_no_values_of_a_packed_weight():
    class Coded(nn.Linear):
        def __init__(self):
            super().__init__(6, 5, bias=False)
            codes = torch.randint(0, 255, (15, 1), dtype=torch.uint8)
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.register_buffer("dense", torch.randn(5, 6))

        def forward(self, x):
            return nn.functional.linear(x, self.dense)

    torch.manual_seed(0)
    model = nn.Sequential(Coded())
    x = torch.randn(32, 6)
    y = model(x)
    inject(model, rank=2, targets="0", init="eva", samples=[x])
    assert torch.equal(model(x), y)
    with pytest.raises(ConfigError, match=r"not a Parameter of torch\.uint8"):
        inject(model, rank=2, targets="0", dora=True, name="other")


def test_a_merged_weight_that_is_computed_since_is_not_unmerged():
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    inject(model, rank=2, targets="0")
    lora_core.merge(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(MergeError, match="^A merged weight must be where it was to be unmerged"):
        lora_core.unmerge(model)
    prune.remove(model[0], "weight")
    lora_core.unmerge(model)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_what_comes_after_an_adapted_layer_in_a_checkpoint_may_work_in_place(kind):
    hosts = {"linear": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 1), "embedding": nn.Embedding(9, 4)}
    inputs = {"linear": (2, 4), "conv": (1, 4, 3, 3), "embedding": (2,)}
    model = nn.Sequential(hosts[kind], nn.ReLU(inplace=True))
    inject(model, rank=2, targets="0")
    for p in lora_core.parameters(model):
        p.data.normal_()
    x = torch.arange(2) if kind == "embedding" else torch.randn(inputs[kind]).requires_grad_()
    outs = [model(x), torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)]
    found = [torch.autograd.grad(out.square().sum(), lora_core.parameters(model)) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_constructor_that_refuses_leaves_its_host_as_it_was():
    host = nn.Linear(8, 8)
    host(torch.randn(2, 8)).sum().backward()
    before = host.weight.grad.clone()
    with pytest.raises(ConfigError, match="must be at most"):
        LoRALinear(host, rank=2, alpha=1e300)
    assert host.weight.requires_grad
    assert torch.equal(host.weight.grad, before)


def test_a_fault_in_a_fused_form_shows_at_once(monkeypatch):
    model, calls = nn.Sequential(nn.Linear(8, 8)), []
    inject(model, rank=2, targets="0")

    def broken(*args, **kwargs):
        calls.append(args)
        raise KeyError("a fault of its own")

    monkeypatch.setattr(adapted_linear, "fused_lora_linear", broken)
    with pytest.raises(KeyError, match="a fault of its own"):
        model(torch.randn(2, 8))
    assert len(calls) == 1
