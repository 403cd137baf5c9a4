"""Adapters as values: sums are sums, lower ranks are the nearest, files merge as models do."""

import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_core
from lora_core import (
    Adapter,
    ConfigError,
    CorruptFileError,
    MergeError,
    MismatchError,
    UnsupportedLayerError,
    combine,
    extract,
    merge_file,
    resize,
)
from lora_core._algebra import AlgebraReport, LayerResult
from lora_core._algebra.methods import METHODS, dropped_entries
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer, container, native
from lora_core._layers import LoRAMixin
from lora_core.testing.laws import train_pretend

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FORMS = ["linear", "matrix", "conv", "tucker", "embedding", "weight", "experts", "subtracted"]
SIZE = (7, 6)  # out, in of the layers that are made below
KERNEL = (3, 2)


# --- adapters, and what they are by the book --------------------------------------------------


def make_layer(
    form: str = "linear",
    rank: int = 2,
    alpha: float = 3.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    **settings: Any,
) -> AdapterLayer:
    out, width = size
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, width), "lora_B": (out, rank)}
    if form in ("conv", "tucker"):
        kernel = (1, 1) if form == "tucker" else KERNEL
        shapes = {"lora_A": (rank, width, *kernel), "lora_B": (out, rank, 1, 1)}
    if form == "tucker":
        shapes["lora_mid"] = (rank, rank, *KERNEL)
    if form == "experts":
        shapes = {"lora_A": (3, rank, width), "lora_B": (3, out, rank)}
    if form == "subtracted":
        shapes |= {f"{part}0": shape for part, shape in shapes.items()}
        settings["init"] = "pissa"
    if settings.get("bias"):
        shapes["lora_bias"] = (out,)
    if settings.get("dora"):
        shapes["lora_magnitude"] = (out,)
    draw = torch.Generator().manual_seed(seed)
    parts = {part: torch.randn(shape, generator=draw).to(dtype) for part, shape in shapes.items()}
    kind = {"tucker": "conv", "experts": "weight", "subtracted": "linear"}.get(form, form)
    config = AdapterConfig(
        rank, alpha, settings.pop("dropout", 0.0), dtype, tucker=form == "tucker", **settings
    )
    return AdapterLayer(kind, config, parts)


def delta(layer: AdapterLayer) -> Tensor:
    """The update as (..., out, in), by the formulas of the formats and nothing of the library."""
    assert layer.config is not None
    p = {part: value.double() for part, value in layer.parts.items()}
    scale = layer.config.alpha / (
        math.sqrt(layer.config.rank) if layer.config.rslora else layer.config.rank
    )
    if layer.config.tucker:
        A, B = p["lora_A"].flatten(1), p["lora_B"].flatten(1)
        return scale * torch.einsum("abhw,oa,bi->oihw", p["lora_mid"], B, A).flatten(1)
    if layer.kind == "conv":
        return scale * (p["lora_B"].flatten(1) @ p["lora_A"].flatten(1))
    found = p["lora_B"] @ p["lora_A"]
    if "lora_A0" in p:
        found = found - p["lora_B0"] @ p["lora_A0"]
    return scale * found


def adapter(name: str = "a", **layers: AdapterLayer) -> Adapter:
    return Adapter(name, layers, {"dtype": "float32"}, {"note": name})


def relative(found: Tensor, asked: Tensor) -> float:
    norm = float(asked.norm())
    return float((found - asked).norm()) / norm if norm else float(found.norm())


def tail(asked: Tensor, rank: int) -> float:
    """The relative error of the best approximation, by Eckart and Young."""
    values = torch.linalg.svdvals(asked)
    return float(values[..., rank:].norm() / values.norm())


@st.composite
def one_layer(draw: Any, form: str, dtype: torch.dtype = torch.float32) -> AdapterLayer:
    return make_layer(
        form,
        draw(st.integers(1, 4)),
        draw(st.floats(0.5, 4)) * draw(st.sampled_from([1, -1])),
        dtype,
        draw(st.integers(0, 2**16)),
        rslora=draw(st.booleans()),
    )


@st.composite
def families(draw: Any, most: int = 3) -> tuple[list[Adapter], list[float]]:
    """Some adapters of one model, not every one on every layer, and a weight for each."""
    count = draw(st.integers(1, most))
    forms = draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=3, unique=True))
    found = []
    for i in range(count):
        mine = {f: draw(one_layer(f)) for f in forms if i == 0 or draw(st.booleans())}
        found.append(adapter(f"a{i}", **mine))
    weights = [draw(st.sampled_from([0.0, 1.0, -0.5, 0.7, 2.0])) for _ in range(count)]
    return found, weights


def asked_of(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> Tensor:
    terms = [
        weight * delta(a.layers[name])
        for a, weight in zip(adapters, weights, strict=True)
        if name in a.layers
    ]
    return torch.stack(terms).sum(0)


# --- combine: laws ----------------------------------------------------------------------------


@given(st.sampled_from([*FORMS, "dora", "bias"]), st.sampled_from(DTYPES))
def test_an_adapter_combined_with_nothing_is_itself(form: str, dtype: torch.dtype) -> None:
    special = {"dora": {"dora": True}, "bias": {"bias": True}}.get(form, {})
    a = adapter(x=make_layer("linear" if special else form, dtype=dtype, **special))
    assert combine([a], [1]) == a
    assert combine([a], [1.0], rank=2) == a
    assert combine([a], [1.0], rank=9).layers["x"] is a.layers["x"]


@given(families())
def test_a_combination_is_the_weighted_sum_of_the_deltas(
    family: tuple[list[Adapter], list[float]],
) -> None:
    adapters, weights = family
    told: list[LayerResult] = []
    found = combine(adapters, weights, told=told.append)
    assert list(found.layers) == list(dict.fromkeys(n for a in adapters for n in a.layers))
    for name, layer in found.layers.items():
        asked = asked_of(adapters, weights, name)
        size = max(float(delta(a.layers[name]).norm()) for a in adapters if name in a.layers)
        assert float((delta(layer) - asked).norm()) <= 1e-5 * (size + 1)
        assert layer.kind == adapters[0].layers[name].kind
    assert [t.done for t in told] == list(range(1, len(found.layers) + 1))


@given(families(), st.integers(1, 6))
def test_a_combination_of_a_rank_is_the_best_there_is_and_says_its_error(
    family: tuple[list[Adapter], list[float]], rank: int
) -> None:
    adapters, weights = family
    told: list[LayerResult] = []
    found = combine(adapters, weights, rank, told=told.append)
    for said in told:
        layer, asked = found.layers[said.name], asked_of(adapters, weights, said.name)
        if not asked.norm() > 1e-3:  # what cancels is all rounding
            continue
        if layer not in [a.layers.get(said.name) for a in adapters]:
            assert layer.settings.rank == said.rank <= rank
            best = tail(asked, said.rank)
            assert relative(delta(layer), asked) == pytest.approx(best, abs=1e-5)
            assert said.error == pytest.approx(best, abs=1e-5)


@given(families(), st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_does_not_matter(
    family: tuple[list[Adapter], list[float]], random: Any
) -> None:
    adapters, weights = family
    order = list(range(len(adapters)))
    random.shuffle(order)
    one = combine(adapters, weights)
    other = combine([adapters[i] for i in order], [weights[i] for i in order])
    assert one.layers.keys() == other.layers.keys()
    for name in one.layers:
        assert_close(delta(one.layers[name]), delta(other.layers[name]), rtol=1e-4, atol=1e-4)


@given(st.sampled_from(FORMS), st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 99))
def test_combining_is_linear(form: str, s: float, t: float, seed: int) -> None:
    a, b = adapter(x=make_layer(form, seed=seed)), adapter(x=make_layer(form, 3, seed=seed + 1))
    both = combine([combine([a, b], [s, t]), a], [2.0, -1.0])
    expected = (2 * s - 1) * delta(a.layers["x"]) + 2 * t * delta(b.layers["x"])
    assert_close(delta(both.layers["x"]), expected, rtol=1e-4, atol=1e-4)


@given(st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 99), st.booleans())
def test_the_rounding_of_narrow_factors_is_part_of_the_error(
    dtype: torch.dtype, seed: int, cut: bool
) -> None:
    a = adapter(x=make_layer(alpha=3.0, dtype=dtype, seed=seed))
    b = adapter(x=make_layer(alpha=1.0, dtype=dtype, seed=seed + 1))
    told: list[LayerResult] = []
    found = combine([a, b], [1.0, 0.3], 3 if cut else None, told=told.append)
    layer = found.layers["x"]
    assert layer.parts["lora_B"].dtype == layer.settings.dtype == dtype
    measured = relative(delta(layer), asked_of([a, b], [1.0, 0.3], "x"))
    assert told[0].error == pytest.approx(measured, rel=0.05, abs=1e-6)
    assert told[0].error > 0
    assert f"{told[0].error:.2e}" in found.notes[-1]


def test_equal_scales_and_single_adapters_round_nothing_in_half_precision() -> None:
    a, b = (adapter(x=make_layer(dtype=torch.bfloat16, seed=i)) for i in range(2))
    for found, asked in [
        (combine([a, b], [0.3, 0.3]), 0.3 * (delta(a.layers["x"]) + delta(b.layers["x"]))),
        (combine([a], [0.3]), 0.3 * delta(a.layers["x"])),
    ]:
        assert_close(delta(found.layers["x"]), asked, rtol=1e-12, atol=1e-12)
        assert not found.notes


def test_more_ranks_than_a_layer_has_are_cut_without_loss_and_any_reader_takes_the_file() -> None:
    family = [adapter(x=make_layer(rank=4, seed=i)) for i in range(3)]
    told: list[LayerResult] = []
    found = combine(family, [1, 1, 1], told=told.append)
    assert found.layers["x"].settings.rank == min(SIZE)
    assert told[0].error < 1e-6
    tensors, entries = native.encode(found)
    about = json.loads(entries["lora_core"])
    again = native.decode(tensors, entries, about, "here")
    assert_close(delta(again.layers["x"]), asked_of(family, [1, 1, 1], "x"), rtol=1e-4, atol=1e-4)


def test_what_all_adapters_agree_on_is_carried_over() -> None:
    a = replace(adapter("style", x=make_layer(dropout=0.1)), format="kohya", notes=("n",))
    b = replace(a, metadata={"note": "style", "mine": "1"})
    found = combine([a, b], [1, 1])
    assert (found.name, found.format, found.metadata) == ("style", "kohya", {"note": "style"})
    assert found.layers["x"].settings.dropout == 0.1
    assert found.base == a.base
    assert found.notes == ("n",)
    other = combine([a, adapter("b", y=make_layer())], [1, 1])
    assert (other.name, other.base) == ("combined", {})
    assert combine([a, b], [1, 1], name="mine").name == "mine"


def test_biases_are_summed_by_weight_alone() -> None:
    a, b = (adapter(x=make_layer(bias=True, seed=i, alpha=1.0 + i)) for i in range(2))
    biases = [x.layers["x"].parts["lora_bias"] for x in (a, b)]
    for rank in (None, 2):
        layer = combine([a, b], [2.0, -1.0], rank).layers["x"]
        assert_close(layer.parts["lora_bias"], 2 * biases[0] - biases[1])
        assert layer.settings.bias
    assert_close(combine([a], [3.0]).layers["x"].parts["lora_bias"], 3 * biases[0])
    assert torch.equal(resize(a, rank=1).layers["x"].parts["lora_bias"], biases[0])
    mixed = combine([a, adapter(x=make_layer())], [1.0, 1.0]).layers["x"]
    assert_close(mixed.parts["lora_bias"], biases[0])


def test_an_entry_that_no_update_changes_stays_without_one() -> None:
    layers = [make_layer("embedding", 3, seed=i) for i in range(2)]
    for layer in layers:
        layer.parts["lora_A"][:, 2] = 0  # an embedding's padding
    family = [adapter(x=layer) for layer in layers]
    made = [
        combine(family, [1, 1], 2),
        resize(family[0], rank=1),
        combine(family, [1, 1], 3, method="ties", density=0.9),
    ]
    for found in made:
        assert not found.layers["x"].parts["lora_A"][:, 2].any()
        assert found.layers["x"].parts["lora_A"].any()


# --- combine: refusals ------------------------------------------------------------------------


def test_dora_is_passed_on_or_refused() -> None:
    dora, plain = adapter("d", x=make_layer(dora=True)), adapter("p", y=make_layer())
    assert combine([dora, plain], [1, 2]).layers["x"] is dora.layers["x"]
    message = (
        r"^A layer must be a plain product of factors to be combined, but 'x' has DoRA's lengths of"
        r" rows, with which a part of the update is no part of the change\. Merge the adapter into"
        r" its base, and `extract` a plain one from that\.$"
    )
    for act in (
        lambda: combine([dora], [0.5]),
        lambda: combine([dora, dora], [0.5, 0.5]),
        lambda: combine([dora], [1], rank=1),
    ):
        with pytest.raises(UnsupportedLayerError, match=message):
            act()
    with pytest.raises(UnsupportedLayerError, match="^A layer must be .* to be resized, but 'x'"):
        resize(dora, error=0.1)
    assert resize(dora, rank=2) == dora


def test_differences_are_passed_on_or_refused() -> None:
    layer = AdapterLayer("difference", None, {"weight": torch.ones(3)})
    a = adapter(x=layer)
    assert combine([a], [1]) == a
    assert resize(a, rank=1) == a
    with pytest.raises(UnsupportedLayerError, match="but 'x' is of the kind 'difference'"):
        combine([a, a], [1, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, r"^`weights` must hold a number for each of at least one adapter, but holds 0 for 0\.$"),
        ((["a"], [1, 2]), {}, r"^`weights` must hold .* but holds 2 for 1\.$"),
        ((["a"], [math.nan]), {}, r"^`weights` must be a finite number, but is nan\.$"),
        ((["a"], [1]), {"rank": 0}, r"^`rank` must be a whole number of at least 1, but is 0\.$"),
        ((["a"], [1]), {"method": "mean"}, r"^`method` must be one of 'sum', 'ties', 'dare', 'magnitude_prune', but is 'mean'\.$"),
        ((["a"], [1]), {"density": 0.5}, r"^`density` must be left out where `method` is 'sum'\.$"),
        ((["a"], [1]), {"method": "ties", "rank": 2}, r"^`density` must be given where `method` is 'ties'\.$"),
        ((["a"], [1]), {"method": "ties", "density": 0.5}, r"^`rank` must be given where `method` is 'ties': what it makes has any rank\.$"),
        ((["a"], [1]), {"method": "dare", "rank": 2, "density": 1.5}, r"^`density` must be in \(0, 1\], but is 1\.5\.$"),
        ((["a"], [1]), {"dtype": torch.int8}, r"^`dtype` must be a floating type"),
        ((["a"], [2]), {"name": "a/b"}, r"^`name` must be 1 to 64 letters"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(
    arguments: tuple[list[str], list[float]], options: dict[str, Any], message: str
) -> None:
    names, weights = arguments
    with pytest.raises(ConfigError, match=message):
        combine([adapter(x=make_layer()) for _ in names], weights, **options)


def test_adapters_of_different_models_are_not_combined() -> None:
    a = adapter(x=make_layer())
    for layer, shown in [
        (make_layer(size=(7, 5)), "kind 'linear' with lora_A (2, 5), lora_B (7, 2)"),
        (make_layer("conv"), "kind 'conv' with lora_A (2, 6, 3, 2), lora_B (7, 2, 1, 1)"),
        (make_layer("embedding"), "kind 'embedding' with lora_A (2, 6), lora_B (7, 2)"),
    ]:
        with pytest.raises(MismatchError) as caught:
            combine([a, adapter(x=layer)], [1, 1])
        assert str(caught.value) == (
            "Adapters must be for the same layers, but 'x' is of the kind 'linear' with lora_A"
            f" (2, 6), lora_B (7, 2) in one and of the {shown} in another. Combine adapters of one"
            " model."
        )
    wide = make_layer("conv", size=(7, 6))
    tall = replace(wide, parts={**wide.parts, "lora_A": wide.parts["lora_A"].mT.contiguous()})
    with pytest.raises(MismatchError, match="^Adapters must be for the same layers"):
        combine([adapter(x=wide), adapter(x=tall)], [1, 1])
    stem = adapter("b", lora_unet_x=replace(make_layer(), spelling="stem"))
    with pytest.raises(MismatchError) as caught:
        combine([a, stem], [1, 1])
    assert str(caught.value) == (
        "Adapters must spell the names of modules alike to be combined, but do it as 'a: dotted',"
        " 'b: stem'. Load each into the model and save it again."
    )


def test_a_plain_matrix_is_whatever_the_other_adapter_says() -> None:
    for form in ("linear", "weight"):
        a, b = adapter(x=make_layer("matrix")), adapter(x=make_layer(form, seed=1))
        found = combine([a, b], [1, 1]).layers["x"]
        assert found.kind == form
        assert_close(delta(found), asked_of([a, b], [1, 1], "x"), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_or_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^`adapters` must be an Adapter, .* but is str\.$"):
        combine(["a.safetensors"], [1])  # type: ignore[list-item]
    bad = adapter("bad", x=make_layer())
    bad.layers["x"].parts["lora_A"][0, 0] = math.inf
    with pytest.raises(ConfigError, match="^`adapter` must be finite, but 'x' of 'bad' holds NaN"):
        resize(bad, rank=1)


# --- combine: methods -------------------------------------------------------------------------


def family_of(count: int = 3, form: str = "linear", rank: int = 2) -> list[Adapter]:
    return [adapter(f"a{i}", x=make_layer(form, rank, seed=i)) for i in range(count)]


FULL = min(SIZE)


def test_ties_trims_elects_and_averages() -> None:
    family, weights, density = family_of(), [1.0, 0.5, -2.0], 0.4
    stack = torch.stack([w * delta(a.layers["x"]) for a, w in zip(family, weights, strict=True)])
    for update in stack:  # by sorting, entry by entry
        order = update.abs().flatten().argsort(descending=True)
        update.view(-1)[order[int(density * update.numel()) :]] = 0
    expected = torch.zeros(SIZE, dtype=torch.float64)
    for i in range(SIZE[0]):
        for j in range(SIZE[1]):
            total = stack[:, i, j].sum()
            mine = [v for v in stack[:, i, j] if v * total > 0]
            expected[i, j] = sum(mine) / len(mine) if mine else 0
    told: list[LayerResult] = []
    options: dict[str, Any] = {"method": "ties", "density": density}
    found = combine(family, weights, FULL, told=told.append, **options)
    assert_close(delta(found.layers["x"]), expected, rtol=1e-4, atol=1e-4)
    assert told[0].error < 1e-6
    best = combine(family, weights, 2, told=told.append, **options)
    assert relative(delta(best.layers["x"]), expected) == pytest.approx(tail(expected, 2), abs=1e-5)
    assert told[1].error == pytest.approx(tail(expected, 2), abs=1e-5)


def test_magnitude_prune_sums_what_is_left_of_each() -> None:
    family, weights = family_of(2), [1.0, -0.5]
    found = combine(family, weights, FULL, method="magnitude_prune", density=0.5)
    expected = torch.zeros(SIZE, dtype=torch.float64)
    for a, w in zip(family, weights, strict=True):
        update = w * delta(a.layers["x"])
        bound = update.abs().flatten().sort(descending=True).values[update.numel() // 2 - 1]
        expected += torch.where(update.abs() >= bound, update, 0)
    assert_close(delta(found.layers["x"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["linear", "tucker", "experts", "embedding"])
def test_a_method_that_drops_nothing_of_one_adapter_is_the_sum(method: str, form: str) -> None:
    a = family_of(1, form)
    found = combine(a, [0.7], FULL, method=method, density=1.0)  # type: ignore[arg-type]
    assert_close(delta(found.layers["x"]), 0.7 * delta(a[0].layers["x"]), rtol=1e-4, atol=1e-4)


def test_dare_is_decided_by_the_seed_and_the_layers_name_and_right_on_average() -> None:
    family = family_of(2)

    def at(seed: int, layers: str = "xy") -> Adapter:
        named = [replace(a, layers=dict.fromkeys(layers, a.layers["x"])) for a in family]
        return combine(named, [1, 1], FULL, method="dare", density=0.6, seed=seed)

    first = at(1)
    assert torch.equal(delta(first.layers["x"]), delta(at(1).layers["x"]))
    assert torch.equal(delta(first.layers["x"]), delta(at(1, "zx").layers["x"]))
    assert not torch.equal(delta(first.layers["x"]), delta(at(2).layers["x"]))
    assert not torch.equal(delta(first.layers["x"]), delta(first.layers["y"]))
    draw = torch.Generator().manual_seed(0)
    kept = dropped_entries(torch.full((100, 100), 2.0), 0.25, draw)
    assert set(kept.unique().tolist()) == {0.0, 8.0}
    assert float(kept.mean()) == pytest.approx(2.0, rel=0.1)


def test_a_method_refuses_a_bias() -> None:
    a = adapter(x=make_layer(bias=True))
    message = (
        r"^A layer must be factors alone where `method` is 'ties', but 'x' has a bias as well\. Use"
        r" method='sum'\.$"
    )
    with pytest.raises(UnsupportedLayerError, match=message):
        combine([a], [1], 2, method="ties", density=0.5)


# --- resize -----------------------------------------------------------------------------------


@given(st.sampled_from(FORMS), st.integers(1, 4), st.integers(0, 99))
def test_a_lower_rank_is_the_best_approximation(form: str, rank: int, seed: int) -> None:
    a, told = adapter(x=make_layer(form, 4, seed=seed)), list[LayerResult]()
    found = resize(a, rank=rank, told=told.append).layers["x"]
    asked = delta(a.layers["x"])
    best = 0.0 if found is a.layers["x"] else tail(asked, rank)
    assert found.settings.rank <= max(rank, 4)
    assert relative(delta(found), asked) == pytest.approx(best, abs=1e-5)
    assert told == [LayerResult("x", found.settings.rank, told[0].error, 1, 1)]
    assert told[0].error == pytest.approx(best, abs=1e-5)


@given(st.sampled_from(FORMS), st.floats(0.3, 1.0), st.integers(0, 99))
def test_a_share_takes_the_lowest_rank_that_keeps_it(form: str, energy: float, seed: int) -> None:
    a = adapter(x=make_layer(form, 4, seed=seed))
    asked, error = delta(a.layers["x"]), math.sqrt(1 - energy)
    by_energy, by_error = resize(a, energy=energy), resize(a, error=error)
    rank = by_energy.layers["x"].settings.rank
    assert relative(delta(by_energy.layers["x"]), asked) <= error + 1e-5
    assert rank == 1 or tail(asked, rank - 1) > error - 1e-5
    assert abs(by_error.layers["x"].settings.rank - rank) <= (abs(tail(asked, rank) - error) < 1e-5)


@given(st.sampled_from(FORMS), st.integers(0, 99))
def test_the_full_rank_is_exact_and_ranks_that_add_nothing_go(form: str, seed: int) -> None:
    a = adapter(x=make_layer(form, 2, seed=seed))
    twice = combine([a, a, a], [0.5, 0.25, 0.25])
    assert twice.layers["x"].settings.rank > 2
    once, told = resize(twice, energy=1.0), list[LayerResult]()
    rank = int(torch.linalg.matrix_rank(delta(a.layers["x"])).max())
    assert once.layers["x"].settings.rank == rank <= 4
    assert relative(delta(once.layers["x"]), delta(a.layers["x"])) < 1e-5
    assert resize(twice, error=0.0, told=told.append).layers["x"].settings.rank == rank
    assert told[0].error == 0


def test_a_zero_update_is_resized_to_rank_one() -> None:
    layer = make_layer(rank=3)
    layer.parts["lora_B"].zero_()
    found = resize(adapter(x=layer), energy=0.9)
    assert found.layers["x"].settings.rank == 1
    assert not delta(found.layers["x"]).any()
    assert not found.notes


def test_a_resized_layer_keeps_its_settings_and_may_change_its_type() -> None:
    a = adapter(x=make_layer(rank=4, dropout=0.1, dtype=torch.bfloat16))
    found, told = resize(a, rank=3, dtype=torch.float32), list[LayerResult]()
    assert found.layers["x"].settings == AdapterConfig(3, 3.0, 0.1, torch.float32)
    assert resize(a, rank=8, dtype=torch.float32).layers["x"].parts["lora_A"].dtype == torch.float32
    narrow = resize(a, rank=3, told=told.append)
    measured = relative(delta(narrow.layers["x"]), delta(a.layers["x"]))
    assert told[0].error == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^Exactly one of `rank`, `energy` and `error` must be given, but 0 are\. Give a rank, for example\.$"),
        ({"rank": 1, "error": 0.1}, r"^Exactly one of .* but 2 are: rank=1, error=0\.1\.$"),
        ({"rank": True}, r"^`rank` must be a whole number of at least 1, but is True\.$"),
        ({"energy": 0}, r"^`energy` must be in \(0, 1\], but is 0\.$"),
        ({"energy": math.nan}, r"^`energy` must be in \(0, 1\], but is nan\.$"),
        ({"error": 1.0}, r"^`error` must be in \[0, 1\), but is 1\.0\.$"),
        ({"error": "small"}, r"^`error` must be in \[0, 1\), but is 'small'\.$"),
    ],
)  # fmt: skip
def test_exactly_one_limit_is_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resize(adapter(x=make_layer()), **options)


# --- no dense matrix --------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that comes into being."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *made])
        return result


@pytest.mark.parametrize(
    "act",
    [
        lambda a, b: combine([a, b], [0.3, 0.7]),
        lambda a, b: combine([a, b], [0.3, 0.7], 4),
        lambda a, b: resize(a, rank=4),
        lambda a, b: resize(a, energy=0.5),
    ],
)
def test_nothing_of_the_size_of_a_weight_is_ever_made(
    act: Callable[[Adapter, Adapter], Adapter],
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (
            adapter(x=make_layer(rank=8, seed=i, size=(512, 512), dtype=dtype)) for i in range(2)
        )
        with Largest() as seen:
            act(a, b)
        # both pairs of factors side by side, and the two things that are compared
        assert 0 < seen.numbers <= 512 * 8 * 4
