"""Adapters as values: sums are sums, lower ranks are the nearest, files merge as models do."""

import copy
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
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
from lora_core._adapters import layers_with
from lora_core._algebra import extraction, ranks
from lora_core._algebra.combination import METHODS, dropped_entries
from lora_core._algebra.comparison import difference_of
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer, container, native, read
from lora_core._layers import stored_parts
from lora_core._reports import AlgebraReport, LayerResult
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
        inside = settings.get("dora_in")
        shapes["lora_in_magnitude" if inside else "lora_magnitude"] = (width if inside else out,)
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
    p = {part: value.detach().double() for part, value in layer.parts.items()}
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
        assert layer.settings.rank == said.rank
        measured = relative(delta(layer), asked)
        assert said.error == pytest.approx(measured, abs=1e-5)
        # one that is passed on, or multiplied, may have more ranks than it says
        best = tail(asked, rank)
        if not any(a.layers.get(said.name) is layer for a in adapters):
            assert measured <= best + 1e-5
        if said.rank == rank and not layer.settings.subtracted:
            assert measured == pytest.approx(best, abs=1e-5)


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


def test_an_adapter_of_weight_zero_adds_no_rank_and_none_is_a_layer_of_zeros() -> None:
    a, b = adapter(x=make_layer(dora=True)), adapter(x=make_layer(seed=1))
    assert combine([a, b], [0, 1]).layers["x"] is b.layers["x"]
    assert combine([b, b], [0, 2.0]).layers["x"].settings.rank == 2
    none = combine([b, b], [0, 0]).layers["x"]
    assert not none.parts["lora_B"].any()
    assert none.parts["lora_A"].any()
    assert none.settings.alpha != 0  # which other programs take for a missing one


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


def difference(dtype: torch.dtype = torch.float32, seed: int = 0, **shapes: Any) -> AdapterLayer:
    draw = torch.Generator().manual_seed(seed)
    shapes = shapes or {"weight": (7,), "bias": (7,)}
    parts = {part: torch.randn(s, generator=draw).to(dtype) for part, s in shapes.items()}
    return AdapterLayer("difference", None, parts)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_differences_are_summed(rank: int | None, dtype: torch.dtype) -> None:
    a, b = adapter(x=difference(dtype)), adapter(x=difference(seed=1, weight=(7,)))
    c = adapter(x=make_layer())
    told: list[LayerResult] = []
    found = combine([a, b], [0.5, -2], rank, told=told.append).layers["x"]
    wide = torch.promote_types(dtype, torch.float32)
    p, q = a.layers["x"].parts, b.layers["x"].parts
    assert (found.kind, found.config) == ("difference", None)
    assert torch.equal(found.parts["weight"], p["weight"].to(wide) * 0.5 + q["weight"] * -2)
    assert torch.equal(found.parts["bias"], p["bias"].to(wide) * 0.5)
    assert (told[0].rank, told[0].error) == (0, 0)
    half = combine([a], [0.5], rank).layers["x"].parts  # a half of any type is exact
    assert {part: (t.dtype, (t * 2).tolist()) for part, t in half.items()} == {
        part: (dtype, t.tolist()) for part, t in p.items()
    }
    assert combine([a, c], [1, 0], rank).layers == a.layers
    assert combine([a], [1], rank, dtype=wide).layers["x"].parts["bias"].dtype == wide
    assert not combine([a, a], [1, -1], rank).layers["x"].parts["weight"].any()
    assert not combine([a], [0], rank).layers["x"].parts["weight"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_narrow_differences_is_part_of_the_error(dtype: torch.dtype) -> None:
    a, b = (adapter(x=difference(seed=seed, weight=(50, 40))) for seed in (0, 1))
    p, q = (x.layers["x"].parts["weight"].double() for x in (a, b))
    told: list[LayerResult] = []
    made = combine([a, b], [0.3, 0.7], dtype=dtype, told=told.append).layers["x"].parts["weight"]
    asked = 0.3 * p + 0.7 * q
    assert made.dtype == dtype
    assert told[0].error == pytest.approx(relative(made.double(), asked), rel=1e-2)
    assert told[0].error > 0
    combine([a, a, a], [0.3, 0.7, -1], dtype=dtype, told=told.append)
    assert told[1].error < 1e-6


def test_what_is_no_difference_alone_is_passed_on_or_refused() -> None:
    a, plain = adapter(x=difference()), adapter(x=make_layer())
    values = adapter(x=replace(difference(), kind="values"))
    assert combine([values], [1], dtype=torch.float16) == values
    assert resize(a, rank=1) == a
    for act, kind in (
        (lambda: combine([values], [0.5]), "values"),
        (lambda: combine([values, a], [1, 1]), "values"),
        (lambda: combine([a, plain], [1, 1]), "difference"),
        (lambda: combine([plain, a], [1, 1]), "difference"),
        (lambda: combine([a], [1], 1, method="ties", density=0.5), "difference"),
    ):
        message = f"^A layer must be a plain product .* but 'x' is of the kind '{kind}'. Merge the"
        with pytest.raises(UnsupportedLayerError, match=message):
            act()
    with pytest.raises(MismatchError, match=(
        r"^Adapters must be for the same layers, but 'x' is of the kind 'difference' with weight"
        r" \(7,\), bias \(7,\) in one and of the kind 'difference' with weight \(6,\) in another\."
        r" Combine adapters of one model\.$"
    )):  # fmt: skip
        combine([a, adapter(x=difference(weight=(6,)))], [1, 1])
    with pytest.raises(ConfigError, match="^`dtype` must hold .* 'x' overflows torch.float16. Cho"):
        combine([a], [1e6], dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, r"^`weights` must hold a number for each .* but holds 0 for 0\.$"),
        ((["a"], [1, 2]), {}, r"^`weights` must hold .* but holds 2 for 1\.$"),
        ((["a"], [math.nan]), {}, r"^`weights` must be a finite number, but is nan\.$"),
        ((["a"], [1]), {"rank": 0}, r"^`rank` must be a whole number of at least 1, but is 0\.$"),
        ((["a"], [1]), {"method": "mean"}, r"^`method` must be one of 'sum', .* but is 'mean'\.$"),
        ((["a"], [1]), {"density": 0.5}, r"^`density` must be left out where `method` is 'sum'\.$"),
        ((["a"], [1]), {"method": "ties", "rank": 2}, r"^`density` must be given .* 'ties'"),
        ((["a"], [1]), {"method": "ties", "density": 0.5}, r"^`rank` must be given .* any rank"),
        ((["a"], [1]), {"method": "dare", "rank": 2, "density": 2}, "^`density` must be in"),
        ((["a"], [1]), {"dtype": torch.int8}, r"^`dtype` must be a floating type"),
        ((["a"], [2]), {"name": "a/b"}, r"^`name` must be 1 to 64 letters"),
        ((["a"], 1), {}, r"^`weights` must be a sequence, .* but is int\. Put it in a list\.$"),
        ((["a"], [1]), {"seed": 2**64}, r"^`seed` must be .* 1, but is 18446744073709551616\.$"),
        ((["a"], [1]), {"seed": -(2**64)}, r"^`seed` must be a whole number from -2\*\*63 to 2"),
        ((["a"], [1]), {"seed": "a"}, r"^`seed` must be a whole number .* 1, but is 'a'\.$"),
        ((["a"], [1]), {"seed": True}, r"^`seed` must be a whole number .* 1, but is True\.$"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(
    arguments: tuple[list[str], list[float]], options: dict[str, Any], message: str
) -> None:
    names, weights = arguments
    with pytest.raises(ConfigError, match=message):
        combine([adapter(x=make_layer()) for _ in names], weights, **options)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.Conv2d(3, 4, (2, 3)), nn.Conv2d(3, 4, (3, 2))),
        (nn.ConvTranspose2d(3, 4, (2, 3)), nn.ConvTranspose2d(3, 4, (3, 2))),
        (nn.ConvTranspose1d(3, 4, 3), nn.ConvTranspose1d(3, 6, 2)),
        (nn.Bilinear(2, 6, 4), nn.Bilinear(3, 4, 4)),
    ],
    ids=["conv", "conv_transpose", "channels", "bilinear"],
)
def test_layers_whose_matrices_alone_agree_are_not_combined(
    one: nn.Module, other: nn.Module
) -> None:
    layers = []
    for host in (one, other):
        model = nn.Sequential(copy.deepcopy(host))
        lora_core.inject(model, rank=2, targets=type(host))
        layers.append(lora_core.adapter_of(model, "default"))
    with pytest.raises(MismatchError, match=r"^Adapters must be for the same layers, but '0' is"):
        combine(layers, [1, 1])
    gap, why = difference_of(*(each.layers["0"] for each in layers))
    assert gap == math.inf
    assert why.startswith("for a kernel (")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_with_a_bias_of_its_own_is_merged_into_its_file(
    tmp_path: Path, groups: int
) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, (2, 3), groups=groups)).eval()
    bare, x = copy.deepcopy(model), torch.randn(1, 8, 3, 3)
    lora_core.inject(model, rank=2, targets=nn.ConvTranspose2d, bias=True)
    for p in lora_core.parameters(model):
        p.data.normal_()
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    safetensors.torch.save_file(bare.state_dict(), base)
    merge_file(base, lora_core.adapter_of(model), out)
    bare.load_state_dict(safetensors.torch.load_file(out))
    assert_close(bare(x), model(x), rtol=1e-5, atol=1e-4)


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
    unlike = (math.inf, "for a kernel (3, 2) in one, (2, 3) in the other")
    assert difference_of(wide, tall) == unlike
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
    with pytest.raises(
        ConfigError, match=r"^`adapters` must be an Adapter, but is str\. Read the file first\.$"
    ):
        combine(["a.safetensors"], [1])  # type: ignore[list-item]
    for one in (adapter(x=make_layer()), "a.safetensors"):
        with pytest.raises(ConfigError, match=(
            rf"^`adapters` must be a sequence, one for each adapter, but is {type(one).__name__}\."
            r" Put it in a list\.$"
        )):  # fmt: skip
            combine(one, [1])  # type: ignore[arg-type]
    bad = adapter("bad", x=make_layer())
    bad.layers["x"].parts["lora_A"][0, 0] = math.inf
    with pytest.raises(ConfigError, match="^`adapter` must be finite, but 'x' of 'bad' holds NaN"):
        resize(bad, rank=1)


@pytest.mark.parametrize(
    "act",
    [
        lambda a: combine([replace(a, layers={"x": with_bias(a.layers["x"])})], [1e300]),
        lambda a: combine([a, a], [1e39, 1e39], rank=2),
        lambda a: combine([a, a], [1e39, 1e39], 2, method="ties", density=0.5),
        lambda a: combine([a, a], [1e39, 1e39], 2, method="dare", density=0.5),
        lambda a: combine([a, a], [1e39, 1e39], 2, method="magnitude_prune", density=0.5),
        lambda a: resize(combine([a], [1e39]), energy=0.9),
        lambda a: resize(combine([a], [1e39]), rank=1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_overflow_are_refused(
    act: Callable[[Adapter], Adapter], dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    a, wide = adapter(x=make_layer(dtype=dtype)), dtype == torch.float64
    repair = "Choose torch.bfloat16 or torch.float32, or smaller" if dtype.itemsize == 2 else "Use"
    repair = "Use smaller" if dtype != torch.float16 else repair
    if wide:  # which holds them
        assert all(t.isfinite().all() for t in act(a).layers["x"].parts.values())
        return
    message = (
        f"`dtype` must hold all numbers of the result, but 'x' overflows {dtype}. {repair} weights."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        act(a)
    assert capfd.readouterr().out == ""  # where the linear algebra beneath complains


def with_bias(layer: AdapterLayer) -> AdapterLayer:
    bias = {"lora_bias": torch.ones(SIZE[0], dtype=layer.parts["lora_A"].dtype)}
    return replace(layer, config=replace(layer.settings, bias=True), parts={**layer.parts, **bias})


def test_factors_too_large_for_the_type_asked_for_are_refused() -> None:
    a = adapter(x=make_layer(alpha=1e12))
    message = (
        r"^`dtype` must hold all numbers of the result, but 'x' overflows torch\.float16\. Choose"
        r" torch\.bfloat16 or torch\.float32, or smaller weights\.$"
    )
    for act in (
        lambda dtype: resize(a, rank=2, dtype=dtype),
        lambda dtype: resize(a, rank=1, dtype=dtype),
        lambda dtype: combine([a, a], [1, 0.5], rank=1, dtype=dtype),
        lambda dtype: combine([a, a], [1, 0.5], 1, method="ties", density=0.5, dtype=dtype),
    ):
        with pytest.raises(ConfigError, match=message):
            act(torch.float16)
        assert act(torch.bfloat16).layers["x"].parts["lora_A"].isfinite().all()


def test_squares_that_overflow_are_refused_and_not_taken_for_zero() -> None:
    a = adapter(x=make_layer(alpha=1e300, dtype=torch.float64))
    for limit in ({"rank": 1}, {"energy": 0.5}):
        with pytest.raises(ConfigError, match="^`dtype` must hold all .* overflows torch.float64"):
            resize(a, **limit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, 0.7, -1.0)])
def test_terms_that_cancel_ask_for_zero(
    form: str, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    a = adapter(x=make_layer(form, dtype=dtype))
    parts = [a] * len(weights)
    told: list[LayerResult] = []
    for options in (
        {"rank": 1},
        {"rank": 1, "dtype": torch.float16},
        {"rank": 1, "method": "magnitude_prune", "density": 1},
        {},
    ):
        found = combine(parts, weights, told=told.append, **options)  # type: ignore[arg-type]
        size = delta(a.layers["x"]).norm()
        eps = torch.finfo(found.layers["x"].settings.dtype).eps
        assert delta(found.layers["x"]).norm() < 8 * eps * size
    assert [result.error for result in told[:3]] == [0, 0, 0]
    # what a narrow type rounds off is measured by the terms
    assert told[3].error < 8 * torch.finfo(dtype).eps
    if form == "subtracted":
        return
    fresh = make_layer("subtracted", dtype=dtype)
    parts_ = {**fresh.parts, "lora_A0": fresh.parts["lora_A"], "lora_B0": fresh.parts["lora_B"]}
    resized = resize(adapter(x=replace(fresh, parts=parts_)), energy=0.9, told=told.append)
    assert (resized.layers["x"].settings.rank, told[-1].error) == (1, 0)


def test_a_small_sum_of_large_terms_is_no_zero() -> None:
    a = make_layer()
    b = replace(
        a, parts={**a.parts, "lora_B": a.parts["lora_B"].flip(0) * 1e-4 + a.parts["lora_B"]}
    )
    adapters, told = [adapter(x=b), adapter(x=a)], list[LayerResult]()
    combine(adapters, [1, -1], rank=1, told=told.append)
    assert told[0].error == pytest.approx(tail(asked_of(adapters, [1, -1], "x"), 1), rel=0.01)
    assert told[0].error > 0.1


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
    found = combine(a, [0.7], FULL, method=method, density=1)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_method_repeats_itself_bit_for_bit(
    method: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:  # the random subspace that larger layers get
        monkeypatch.setattr(ranks, "_EXACT", 2)
    options: dict[str, Any] = {"method": method, "density": 0.5, "seed": 3}

    def run() -> Mapping[str, Tensor]:
        torch.randn(5)  # no draw of anybody else's matters
        return combine(family_of(), [1.0, 0.5, -2.0], 1, **options).layers["x"].parts

    first = run()
    assert all(torch.equal(t, run()[part]) for part, t in first.items())


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
        ({}, r"^Exactly one of `rank`, .* must be given, but 0 are\. Give a rank, for"),
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


# --- extract ----------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6, padding_idx=0)
        self.lin = nn.Linear(6, 7)
        self.square = nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.point = nn.Conv1d(4, 5, 1)
        self.attn = nn.MultiheadAttention(6, 2)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))


SETTINGS: dict[str, Any] = {
    "targets": [nn.Embedding, nn.Linear, nn.Conv2d, nn.Conv1d, "*_proj_weight", "experts"],
    "name": "style",
}


def zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Zoo().to(dtype)


def adapted_zoo(dtype: torch.dtype = torch.float32, **options: Any) -> Zoo:
    model = zoo(dtype)
    lora_core.inject(model, **{"rank": 2, "alpha": 3.0, **SETTINGS, **options})
    train_pretend(model, "style")
    return model


def adapter_of(model: nn.Module, name: str = "style") -> Adapter:
    layers = {
        n: AdapterLayer(m.lora_kind.name, m.lora_state.configs[name], stored_parts(m, name))
        for n, m in layers_with(model, name).items()
    }
    return Adapter(name, layers)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The host's own tensors."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        n: p.detach().clone()
        for n, p in own.items()
        if not n.rpartition(".")[2].startswith("lora_")
    }


def saved(model: nn.Module, path: Path, **more: Tensor) -> Path:
    safetensors.torch.save_file({**state(model), **more}, path, {"format": "pt", "note": "mine"})
    return path


def shards(tensors: dict[str, Tensor], folder: Path, count: int = 2) -> Path:
    """A checkpoint of several files with an index, as transformers writes it."""
    folder.mkdir()
    where = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        mine = {n: t for j, (n, t) in enumerate(sorted(tensors.items())) if j % count == i}
        safetensors.torch.save_file(mine, folder / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def merged_zoo() -> tuple[Zoo, Zoo, Adapter]:
    """The base, the base with an adapter merged, and that adapter."""
    model = adapted_zoo()
    a = adapter_of(model)
    lora_core.merge(model)
    return zoo(), model, a


@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 1 - 1e-10}, {"error": 1e-5}])
def test_the_difference_of_a_merge_is_the_adapter(
    merged_zoo: tuple[Zoo, Zoo, Adapter], limit: dict[str, Any]
) -> None:
    base, tuned, a = merged_zoo
    told: list[LayerResult] = []
    found = extract(base, tuned, told=told.append, name="style", **limit)
    assert found.layers.keys() == a.layers.keys()
    for name, layer in found.layers.items():
        assert layer.kind == a.layers[name].kind
        assert relative(delta(layer), delta(a.layers[name])) < 1e-5
        assert {p: t.shape for p, t in layer.parts.items()} == {
            p: t.shape for p, t in a.layers[name].parts.items()
        }
    assert max(t.error for t in told) < 1e-5
    assert not found.layers["emb"].parts["lora_A"][:, 0].any()
    assert (found.name, found.format) == ("style", "lora_core")


def test_an_extracted_adapter_makes_the_tuned_model_of_the_base(
    merged_zoo: tuple[Zoo, Zoo, Adapter], tmp_path: Path
) -> None:
    base, tuned, _ = merged_zoo
    tensors, entries = native.encode(extract(base, tuned, rank=2))
    container.write(tmp_path / "x.safetensors", container.pack(tensors, entries))
    lora_core.load(base, tmp_path / "x.safetensors", check_base=False)
    lora_core.merge(base)
    assert_close(state(base), state(tuned), rtol=1e-5, atol=1e-5)


def test_files_and_shards_give_what_models_give(
    merged_zoo: tuple[Zoo, Zoo, Adapter], tmp_path: Path
) -> None:
    base, tuned, _ = merged_zoo
    expected = extract(base, tuned, rank=2)
    one = saved(base, tmp_path / "one.safetensors")
    two = shards(state(tuned), tmp_path / "two")
    index = two / "model.safetensors.index.json"
    for sides in [(base, two), (one, tuned)]:
        found = extract(*sides, rank=2)
        assert found.layers.keys() == expected.layers.keys()
        for name, layer in found.layers.items():
            assert torch.equal(delta(layer), delta(expected.layers[name]))
    with pytest.warns(UserWarning, match="^left out are 2 tensors that differ, .* 'attn.in_proj"):
        alone = extract(one, index, rank=2)  # by the shapes alone
    assert alone.notes[-1].endswith("matrix or kernel: 'attn.in_proj_weight', 'experts'")
    kinds = {name: layer.kind for name, layer in alone.layers.items()}
    assert kinds == {
        "attn.out_proj": "linear", "conv": "conv", "emb": "linear",
        "lin": "linear", "point": "conv", "square": "linear",
    }  # fmt: skip
    for name in ("lin", "conv"):
        assert torch.equal(delta(alone.layers[name]), delta(expected.layers[name]))


def test_a_lower_rank_extracts_the_best_approximation() -> None:
    base, tuned = nn.Linear(6, 7), nn.Linear(6, 7)
    tuned.bias = base.bias
    told: list[LayerResult] = []
    asked = (tuned.weight.double() - base.weight.double()).detach()
    wholes = nn.Sequential(base), nn.Sequential(tuned)
    for rank in range(1, 7):
        found = extract(*wholes, rank=rank, dtype=torch.float64, told=told.append)
        measured = relative(delta(found.layers["0"]), asked)
        assert measured == pytest.approx(tail(asked, rank), abs=1e-5)
        assert told[-1].error == pytest.approx(measured, abs=1e-5)
    half = extract(*wholes, energy=0.5).layers["0"].settings.rank
    assert tail(asked, half) ** 2 <= 0.5 < tail(asked, half - 1) ** 2


def test_a_random_subspace_is_seeded_near_the_best_and_says_its_error() -> None:
    torch.manual_seed(0)
    base, tuned = (nn.Linear(300, 200, bias=False) for _ in range(2))
    with torch.no_grad():
        tuned.weight.copy_(base.weight + torch.randn(200, 90) @ torch.randn(90, 300))
    told: list[LayerResult] = []
    wholes = nn.Sequential(base), nn.Sequential(tuned)

    def at(seed: int, rank: int) -> Tensor:
        options: dict[str, Any] = {"svd": "randomised", "seed": seed, "told": told.append}
        return delta(extract(*wholes, rank=rank, **options).layers["0"])

    asked = (tuned.weight.double() - base.weight.double()).detach()
    assert torch.equal(at(1, 5), at(1, 5))
    assert not torch.equal(at(1, 5), at(2, 5))
    for rank, slack in ((5, 3e-3), (90, 1e-5)):
        measured, best = relative(at(1, rank), asked), tail(asked, rank)
        assert best - 1e-5 <= measured <= best + slack
        assert told[-1].error == pytest.approx(measured, rel=1e-4, abs=1e-5)


def test_what_is_left_out_is_warned_of_and_noted() -> None:
    base, tuned = zoo(), zoo()
    with torch.no_grad():
        tuned.lin.weight.add_(torch.ones(7, 6))
        tuned.lin.bias.add_(1)
        tuned.norm.weight.add_(1)
    tuned.register_buffer("extra", torch.zeros(2, dtype=torch.int64))
    message = (
        "left out are 3 tensors that differ, being no layer's matrix or kernel: 'lin.bias',"
        " 'norm.weight', 'extra'"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        found = extract(base, tuned, rank=1)
    assert list(found.layers) == ["lin"]
    assert found.notes[-1] == message


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_their_side(
    bad: float, svd: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sound, broken = zoo(), zoo()
    with torch.no_grad():
        broken.attn.in_proj_weight[7, 0] = bad  # the keys'
    file = saved(broken, tmp_path / "x.safetensors")
    for sides, side in (
        ((sound, broken), "tuned"),
        ((broken, sound), "base"),
        ((sound, file), "tuned"),
    ):
        with pytest.raises(ConfigError, match=(
            rf"^`{side}` must be finite, but 'attn\.k_proj_weight' holds NaN or infinity\. Go back"
            r" to an earlier state\.$"
        )):  # fmt: skip
            extract(*sides, rank=1, svd=svd)
    assert capfd.readouterr().out == ""


def test_a_difference_too_large_for_its_type_is_refused() -> None:
    base, tuned = (nn.Sequential(nn.Linear(6, 5, bias=False)) for _ in range(2))
    for size, dtype, repair in (
        (2e9, torch.float16, "Choose torch.bfloat16 or torch.float32, or smaller weights."),
        (3e38, torch.float32, "Use smaller weights."),
    ):
        with torch.no_grad():
            base[0].weight.fill_(-size)
            tuned[0].weight.fill_(size)
        message = f"`dtype` must hold all numbers of the result, but '0' overflows {dtype}. "
        with pytest.raises(ConfigError, match=f"^{re.escape(message + repair)}$"):
            extract(base, tuned, rank=1, dtype=dtype)


def test_equal_models_different_shapes_and_unmerged_adapters_are_refused(
    merged_zoo: tuple[Zoo, Zoo, Adapter], tmp_path: Path
) -> None:
    base, tuned, _ = merged_zoo
    with pytest.raises(MismatchError, match=(
        r"^`tuned` must differ from `base` in a weight, but all 10 that can have an update are"
        r" equal\. Give two states of one model\.$"
    )):  # fmt: skip
        extract(base, zoo(), rank=1)
    other = zoo()
    other.lin = nn.Linear(6, 8)
    with pytest.raises(MismatchError, match=(
        r"^`base` and `tuned` must be of one shape, but 'lin\.bias \(base \(7,\), tuned \(8,\)\)',"
        r" 'lin\.weight \(base \(7, 6\), tuned \(8, 6\)\)' differ\. Give two states of one model\.$"
    )):  # fmt: skip
        extract(base, other, rank=1)
    with pytest.raises(MismatchError, match="^`base` and `tuned` must share a weight that can"):
        extract(nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"q": nn.Linear(2, 2)}), rank=1)
    lora_core.unmerge(tuned)
    with pytest.raises(ConfigError, match=(
        r"^`tuned` must have its adapters in its weights, but one on 'emb', .* is active beside"
        r" them\. Call `merge\(model\)` first\.$"
    )):  # fmt: skip
        extract(base, tuned, rank=1)
    with pytest.raises(ConfigError, match=r"^`base` must have values, but 'weight', 'bias' is on"):
        extract(nn.Linear(2, 2, device="meta"), base, rank=1)
    with pytest.raises(ConfigError, match=r"^`base` must be an nn\.Module or the path of a check"):
        extract({}, base, rank=1)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"^`svd` must be one of 'auto', 'exact', 'randomised', b"
    ):
        extract(base, base, rank=1, svd="fast")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="^`svd` must be 'exact' or 'auto' where no rank is given"
    ):
        extract(base, base, energy=0.5, svd="randomised")
    with pytest.raises(ConfigError, match="^Exactly one of"):
        extract(base, base)
    for seed in (2**70, "a", True):
        with pytest.raises(ConfigError, match="^`seed` must be a whole number from "):
            extract(base, base, rank=1, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        extract(tmp_path / "none.safetensors", base, rank=1)


class Conv1D(nn.Module):
    """As transformers has it, which GPT-2 is made of."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_model_says_how_a_matrix_is_stored() -> None:
    base, tuned = nn.Sequential(Conv1D(5, 6)), nn.Sequential(Conv1D(5, 6))
    asked = (tuned[0].weight - base[0].weight).detach().double()
    found = extract(base, tuned, rank=5).layers["0"]
    assert_close(delta(found), asked.T, rtol=1e-4, atol=1e-4)
    assert found.parts["lora_A"].shape == (5, 6)


def test_a_weight_becomes_one_layer_whatever_offers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Linear(6, 5))
    (layer,) = (c for c in extraction.walk(base) if c.name == "0")
    parameter = replace(layer, names=("0.weight",))
    for offered in ([layer, parameter], [parameter, layer]):
        monkeypatch.setattr(extraction, "walk", lambda _, offered=offered: offered)
        with pytest.warns(UserWarning, match=r"^left out are 1 tensors .* '0\.bias'$"):
            assert list(extract(base, tuned, rank=1).layers) == ["0"]


# --- merge_file -------------------------------------------------------------------------------


def file_state(path: Path) -> dict[str, Tensor]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {n: t for file in files for n, t in safetensors.torch.load_file(file).items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("strength", [1.0, -0.37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_file_is_the_merged_model_bit_for_bit(
    dtype: torch.dtype, strength: float, reversible: bool, sharded: bool, tmp_path: Path
) -> None:
    model, out = adapted_zoo(dtype), tmp_path / "out.safetensors"
    a, before = adapter_of(model), state(model)
    base = (
        shards(before, tmp_path / "base") if sharded else saved(model, tmp_path / "b.safetensors")
    )
    told: list[LayerResult] = []
    there: list[bool] = []

    def note(result: LayerResult) -> None:
        told.append(result)
        there.append(out.exists())

    report = merge_file(base, a, out, strength=strength, told=note)
    assert not any(there)  # nothing is seen before all is done
    lora_core.scales(model, style=strength)
    merged = lora_core.merge(model, reversible=reversible)
    after = file_state(out)
    assert_same_bits(after, state(model))
    differ = {n for n in before if not torch.equal(before[n], after[n])}
    assert differ == {
        "attn.in_proj_weight", "attn.out_proj.weight", "conv.weight", "emb.weight", "experts",
        "lin.weight", "point.weight", "square.weight",
    }  # fmt: skip
    assert report.layers == pytest.approx(dict(merged.loss))
    assert report.layers == {t.name: t.error for t in told}
    assert (report.changed, report.untouched) == (8, len(before) - 8)
    files = out.glob("*.safetensors") if sharded else [out]
    assert report.nbytes == sum(file.stat().st_size for file in files)
    assert str(report).startswith(f"merged style x {strength:g} into {out}: 8 tensors changed, ")


@pytest.mark.parametrize(
    "options", [{"dora": True}, {"bias": True}, {"dora": True, "bias": True}, {"rslora": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_plain_product_merges_as_in_a_model(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted_zoo(dtype, targets=["lin", "conv"], **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name or "lora_bias" in name:
                p.add_(torch.rand_like(p))
    merge_file(
        saved(model, tmp_path / "b.safetensors"), adapter_of(model), tmp_path / "out", strength=0.6
    )
    lora_core.scales(model, style=0.6)
    lora_core.merge(model)
    assert_same_bits(file_state(tmp_path / "out"), state(model))


def test_tucker_and_subtracted_factors_merge_as_in_a_model(tmp_path: Path) -> None:
    model = zoo()
    lora_core.inject(model, rank=2, targets="conv", tucker=True, name="style")
    lora_core.inject(model, rank=2, targets="lin", init="pissa", name="pissa")
    for name in ("style", "pissa"):
        train_pretend(model, name)
    layers = {**adapter_of(model).layers, **adapter_of(model, "pissa").layers}
    merge_file(saved(model, tmp_path / "b.safetensors"), Adapter("both", layers), tmp_path / "out")
    lora_core.merge(model)
    assert_same_bits(file_state(tmp_path / "out"), state(model))


def tensor_hashes(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return {
        name: hashlib.sha256(data[8 + size :][slice(*about["data_offsets"])]).hexdigest()
        for name, about in json.loads(data[8 : 8 + size]).items()
        if name != "__metadata__"
    }


def test_the_header_and_all_other_tensors_are_the_bases_byte_for_byte(tmp_path: Path) -> None:
    model, out = adapted_zoo(targets="lin"), tmp_path / "out.safetensors"
    odd = {
        "codes": torch.arange(6, dtype=torch.uint8),
        "small": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(3),
        "broken": torch.tensor([math.nan, math.inf]),
    }
    base = saved(model, tmp_path / "b.safetensors", **odd)
    merge_file(base, adapter_of(model), out)
    one, other = tensor_hashes(base), tensor_hashes(out)
    assert {n for n in one if one[n] != other[n]} == {"lin.weight"}
    size = 8 + int.from_bytes(base.read_bytes()[:8], "little")
    assert out.read_bytes()[:size] == base.read_bytes()[:size]
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}


def test_a_plain_matrix_goes_on_what_is_there(tmp_path: Path) -> None:
    weights = {"lin.weight": torch.randn(7, 6), "point.weight": torch.randn(7, 6, 1, 1)}
    safetensors.torch.save_file(weights, tmp_path / "b.safetensors")
    a = adapter(lin=make_layer("matrix"), point=make_layer("matrix", seed=1))
    merge_file(tmp_path / "b.safetensors", a, tmp_path / "out", check_base=False)
    for name, value in file_state(tmp_path / "out").items():
        asked = weights[name].flatten(1) + delta(a.layers[name.removesuffix(".weight")]).float()
        assert_close(value.flatten(1), asked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_is_not_the_adapters_base_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        parts = {
            "lin": nn.Linear(6, 7),
            "conv": nn.Conv2d(3, 4, 3),
            "attn": nn.MultiheadAttention(8, 2),
        }
        return nn.ModuleDict(parts).to(dtype)

    model = net(0)
    lora_core.inject(model, rank=2, targets=["lin", "conv", "q_proj_weight", "v_proj_weight"])
    train_pretend(model, "default")
    a = lora_core.adapter_of(model)
    for seed in (0, 1):
        safetensors.torch.save_file(net(seed).state_dict(), tmp_path / f"{seed}.safetensors")
    merge_file(tmp_path / "0.safetensors", a, tmp_path / "once.safetensors")
    rounded = {n: t.to(torch.float16) for n, t in net(0).state_dict().items()}
    safetensors.torch.save_file(rounded, tmp_path / "half.safetensors")
    merge_file(tmp_path / "half.safetensors", a, tmp_path / "half_out.safetensors")
    for other in ("1", "once"):  # another model, and one that has the adapter already
        with pytest.raises(MismatchError, match=(
            r"^The checkpoint must be the one that adapter 'default' was trained on, but the"
            rf" weights of '.*{other}.safetensors' differ at 4 of 4 layers: .*\(file .*, model .*"
            r"Name that base, or pass check_base=False\.$"
        )):  # fmt: skip
            merge_file(tmp_path / f"{other}.safetensors", a, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
    merge_file(tmp_path / "1.safetensors", a, tmp_path / "out.safetensors", check_base=False)
    with pytest.raises(
        CorruptFileError, match="^Adapter 'default' must describe its base, but the b"
    ):
        merge_file(tmp_path / "0.safetensors", replace(a, base={"samples": "x"}), tmp_path / "n")


def gpt2(tmp_path: Path, **more: Tensor) -> tuple[Path, nn.Module]:
    model = nn.ModuleDict({"wide": Conv1D(9, 6), "square": Conv1D(6, 6)})
    lora_core.inject(model, rank=2, targets=["wide", "square"], name="style")
    train_pretend(model, "style")
    return saved(model, tmp_path / "gpt2.safetensors", **more), model


def test_matrices_stored_the_other_way_are_told_by_their_shape_or_by_the_user(
    tmp_path: Path,
) -> None:
    base, model = gpt2(tmp_path, **{"head.weight": torch.randn(9, 6)})
    a, out = adapter_of(model), tmp_path / "out"
    square = replace(a, layers={"square": a.layers["square"]})
    head = make_layer(size=(9, 6))
    merge_file(base, a, out)
    merge_file(base, square, tmp_path / "square", transposed=True)
    merge_file(base, square, tmp_path / "wrong")
    said = {"square": replace(a.layers["square"], transposed=True)}
    merge_file(base, replace(a, layers=said), tmp_path / "said")
    assert (tmp_path / "said").read_bytes() == (tmp_path / "square").read_bytes()
    with pytest.raises(MismatchError, match=(
        r"^Square matrices must be stored as all others are, but some of '.*' are stored \(in,"
        r" out\), as 'wide', and some \(out, in\), as 'head'\. Pass transposed=True or"
        r" transposed=False for 'square'\.$"
    )):  # fmt: skip
        merge_file(base, replace(a, layers={**a.layers, "head": head}), tmp_path / "none")
    lora_core.merge(model)
    assert_same_bits({n: t for n, t in file_state(out).items() if n != "head.weight"}, state(model))
    right = file_state(tmp_path / "square")["square.weight"]
    assert torch.equal(right, state(model)["square.weight"])
    assert not torch.equal(file_state(tmp_path / "wrong")["square.weight"], right)


def test_names_are_found_as_load_finds_them(tmp_path: Path) -> None:
    weights = {
        "down_blocks.0.to_q.weight": torch.randn(7, 6),
        "mid.conv.weight": torch.randn(7, 6, 1, 1),
    }
    safetensors.torch.save_file(weights, tmp_path / "b.safetensors")
    unet: dict[str, Any] = {"component": "unet", "spelling": "stem"}
    layers = {
        "lora_unet_down_blocks_0_to_q": replace(
            make_layer("matrix"), path="down_blocks_0_to_q", **unet
        ),
        "lora_unet_mid_conv": replace(make_layer("matrix", seed=1), path="mid_conv", **unet),
    }
    text = replace(make_layer("matrix"), component="text_encoder", spelling="stem", path="q")
    merge_file(tmp_path / "b.safetensors", Adapter("k", layers), tmp_path / "out")
    after = file_state(tmp_path / "out")
    for (name, before), layer in zip(weights.items(), layers.values(), strict=True):
        asked = before + delta(layer).reshape(before.shape).float()
        assert_close(after[name], asked, rtol=1e-5, atol=1e-5)
    both = Adapter("k", {**layers, "lora_te_q": text})
    with pytest.raises(MismatchError, match=(
        r"^The checkpoint must have all 3 layers of adapter 'k', but 1 are not in '.*': 'lora_te_q'"
        r"; it has 2: .*\. Pass only='unet' for that part alone\.$"
    )):  # fmt: skip
        merge_file(tmp_path / "b.safetensors", both, tmp_path / "again")
    merge_file(tmp_path / "b.safetensors", both, tmp_path / "again", only="unet")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "out").read_bytes()
    with pytest.raises(ConfigError, match=(
        r"^`only` must name a part of adapter 'k', but is 'vae'; it has 'text_encoder', 'unet'\.$"
    )):  # fmt: skip
        merge_file(tmp_path / "b.safetensors", both, tmp_path / "none", only="vae")
    counted = Adapter("k", {"unet:3": replace(make_layer(), spelling="index", path="3")})
    with pytest.raises(MismatchError, match=(
        r"^Modules must have names to be found in a checkpoint, but 'unet:3' of adapter 'k' have"
        r" numbers\. Load it into the model, and save it from there\.$"
    )):  # fmt: skip
        merge_file(tmp_path / "b.safetensors", counted, tmp_path / "none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_what_is_more_than_factors_merges_into_a_file_as_into_the_model(
    dtype: torch.dtype, strength: float, tmp_path: Path
) -> None:
    model = nn.ModuleDict(
        {
            "whole": nn.Linear(6, 7),
            "value": nn.Linear(6, 7),
            "beside": nn.Linear(6, 7),
            "bias": nn.Linear(6, 7),
            "conv": nn.Conv2d(6, 7, KERNEL),
            "table": nn.Embedding(9, 6),
            "turned": Conv1D(7, 6),
            "columns": nn.Linear(6, 7),
            "kernels": nn.Conv2d(6, 7, KERNEL),
            "norm": nn.LayerNorm(6),
            "norm_2": nn.GroupNorm(2, 6),
        }
    ).to(dtype)
    columns: dict[str, Any] = {"dora": True, "dora_in": True}

    def whole(parts: dict[str, Tensor], path: str) -> AdapterLayer:
        return AdapterLayer("difference", None, parts, path=path)

    layers = {
        "whole": whole({"weight": torch.randn(7, 6), "bias": torch.randn(7)}, path="whole"),
        "value": AdapterLayer(
            "values", None, {"weight": torch.randn(7, 6), "bias": torch.randn(7)}, path="value"
        ),
        "beside": make_layer(dtype=torch.float16),
        "beside.bias": AdapterLayer("values", None, {"bias": torch.randn(7)}, path="beside"),
        "bias": whole({"bias": torch.randn(7)}, path="bias"),
        "conv": whole({"weight": torch.randn(7, 6, *KERNEL)}, path="conv"),
        "table": whole({"weight": torch.randn(9, 6)}, path="table"),
        "turned": whole({"weight": torch.randn(6, 7)}, path="turned"),
        "columns": make_layer(**columns),
        "kernels": make_layer("conv", **columns),
        "norm": whole({"weight": torch.randn(6), "bias": torch.randn(6)}, path="norm"),
        "lora_unet_norm_2": replace(
            AdapterLayer("values", None, {"bias": torch.randn(6)}),
            path="norm_2",
            spelling="stem",
        ),
    }
    base, out = saved(model, tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    a, told = Adapter("style", layers), list[LayerResult]()
    merge_file(base, a, out, strength=strength, told=told.append)
    lora_core.load(model, a, scale=strength)
    lora_core.merge(model)
    assert_same_bits(file_state(out), state(model))
    before = file_state(base)
    changed = {n for n, t in file_state(out).items() if not torch.equal(t, before[n])}
    same = {"bias.weight", "conv.bias", "turned.bias", "columns.bias", "kernels.bias"}
    assert before.keys() - changed == same | {"norm_2.weight"}
    ranks = {"whole": 6, "value": 6, "bias": 0, "conv": 7, "table": 6, "turned": 6}
    ranks |= {"beside": 2, "columns": 2, "kernels": 2}
    ranks |= {"norm.weight": 1, "norm.bias": 1, "norm_2.bias": 1}
    assert {r.name: r.rank for r in told} == ranks


GOLDEN = Path(__file__).parent / "data" / "golden"
PARTS = {"unet": "unet", "te1": "text_encoder"}


@pytest.mark.parametrize(
    "case",
    [
        *("kohya/sd15_linear", "kohya/sd15_locon_fp16", "kohya/sdxl_sgm_names"),
        *("lycoris/kohya_locon", "lycoris/wrapper_tucker", "diffusers/sd15_nometa"),
        *("peft/conv", "peft/dora", "peft/embedding", "peft/patterns_rslora"),
    ],
)
def test_files_of_other_programs_merge_as_their_authors_merged_them(
    case: str, tmp_path: Path
) -> None:
    folder = GOLDEN / case
    about = json.loads((folder / "case.json").read_text())
    names = ("lora.safetensors", "lycoris.safetensors", "pytorch_lora_weights.safetensors")
    a = read(next((folder / n for n in names if (folder / n).exists()), folder))
    plain = {n: layer for n, layer in a.layers.items() if not layer.settings.dora}
    parts = [replace(a, layers=plain)] * 2
    halves = combine(parts, [0.25, 0.75], dtype=torch.float32).layers
    deltas = safetensors.torch.load_file(folder / "delta.safetensors")
    checked = 0
    for file in about.get("base", [f"{case}/base.safetensors"]):
        base = {n: t.float() for n, t in safetensors.torch.load_file(GOLDEN / file).items()}
        safetensors.torch.save_file(base, tmp_path / "base.safetensors")
        part = Path(file).stem.rpartition("_")[2] if "base" in about else ""
        if part not in ("", *PARTS):
            continue
        merge_file(
            tmp_path / "base.safetensors",
            replace(a, layers={**a.layers, **halves}),
            tmp_path / f"out{part}",
            only=PARTS.get(part),
        )
        after = file_state(tmp_path / f"out{part}")
        for key, asked in deltas.items():
            name = key.removeprefix(f"{part}.") if part == "unet" else key
            name = name if name in base else key.removeprefix("te1.").removeprefix("text_model.")
            if name in base and (part == "unet") == key.startswith("unet."):
                assert relative(after[name] - base[name], asked) < about["tolerance"]
                checked += 1
    assert checked >= len(deltas) * 2 // 3


# --- merge_file: refusals ---------------------------------------------------------------------


@pytest.fixture
def lin(tmp_path: Path) -> tuple[Path, Adapter]:
    """A checkpoint and an adapter for one of its layers."""
    model = adapted_zoo(targets="lin")
    return saved(model, tmp_path / "base.safetensors"), adapter_of(model)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_adapter_of_another_model_is_refused_with_both_sides(
    lin: tuple[Path, Adapter], tmp_path: Path
) -> None:
    (base, a), before = lin, listing(tmp_path)
    partly = replace(a, layers={**a.layers, "to_q": a.layers["lin"]})
    for wrong, missing in [(replace(a, layers={"to_q": a.layers["lin"]}), 1), (partly, 2)]:
        with pytest.raises(MismatchError) as caught:
            merge_file(base, wrong, tmp_path / "out")
        assert str(caught.value) == (
            f"The checkpoint must have all {missing} layers of adapter 'style', but 1 are not in"
            f" {str(base)!r}: 'to_q'; it has 7: 'attn.out_proj', 'conv', 'emb', 'lin', 'norm' and 2"
            " more. Take the checkpoint that it was made for."
        )
    with pytest.raises(MismatchError, match="^The checkpoint must have all 0 layers"):
        merge_file(base, replace(a, layers={}), tmp_path / "out")
    for layer, has in [
        (make_layer(size=(8, 6)), "lora_A (2, 6), lora_B (8, 2)"),
        (make_layer("conv"), "lora_A (2, 6, 3, 2), lora_B (7, 2, 1, 1)"),
        (make_layer("embedding"), "lora_A (2, 6), lora_B (7, 2)"),
    ]:
        with pytest.raises(MismatchError) as caught:
            merge_file(base, replace(a, layers={"lin": layer}), tmp_path / "out")
        kind = "embedding" if layer.kind == "embedding" else "linear"
        assert str(caught.value) == (
            f"The adapter of 'lin' must fit a weight of kind '{kind}' of shape (7, 6), but has"
            f" {has}. Load it into the model it was made for."
        )
    square = make_layer(size=(6, 6), bias=True)
    with pytest.raises(MismatchError, match=(
        r"^The checkpoint must have the biases that the adapter changes, but 'square\.bias' is not"
    )):  # fmt: skip
        merge_file(base, replace(a, layers={"square": square}), tmp_path / "out")
    both = {"lin": a.layers["lin"], "lin.weight": a.layers["lin"]}
    with pytest.raises(MismatchError, match=(
        r"^Each layer must have a tensor of its own, but 'lin', 'lin\.weight' share"
        r" 'lin\.weight' of"
    )):  # fmt: skip
        merge_file(base, replace(a, layers=both), tmp_path / "out")
    assert listing(tmp_path) == before


def test_what_is_no_plain_number_is_refused(lin: tuple[Path, Adapter], tmp_path: Path) -> None:
    _, a = lin
    codes = {"lin.weight": torch.zeros(7, 6, dtype=torch.int8)}
    safetensors.torch.save_file(codes, tmp_path / "codes.safetensors")
    with pytest.raises(UnsupportedLayerError, match=(
        r"^A tensor must be of 16-bit floating numbers or wider to be merged into, but"
        r" 'lin\.weight' is I8\. Merge into the checkpoint that it was made from\.$"
    )):  # fmt: skip
        merge_file(tmp_path / "codes.safetensors", a, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_overflows_leaves_what_was_there(tmp_path: Path) -> None:
    model = adapted_zoo(torch.float16, targets=["lin", "conv"])
    base, out = saved(model, tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    before = listing(tmp_path)
    with pytest.raises(
        MergeError, match=r"^A merged weight must be finite, but that of '(lin|conv)'"
    ):
        merge_file(base, adapter_of(model), out, strength=1e6, force=True)
    folder = shards(state(model), tmp_path / "folder")
    with pytest.raises(MergeError, match="^A merged weight must be finite"):
        merge_file(folder, adapter_of(model), tmp_path / "new", strength=1e6)
    assert {k: v for k, v in listing(tmp_path).items() if "folder" not in k} == before


def test_nothing_is_overwritten_unasked(lin: tuple[Path, Adapter], tmp_path: Path) -> None:
    (base, a), out = lin, tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(ConfigError) as caught:
        merge_file(base, a, out)
    assert str(caught.value) == (
        f"`out` must be a new file, but {str(out)!r} is there. Pass force=True to replace it."
    )
    assert out.read_bytes() == b"old"
    out.chmod(0o640)
    merge_file(base, a, out, force=True)
    assert out.stat().st_mode & 0o777 == 0o640
    expected = out.read_bytes()
    (tmp_path / "again").write_bytes(base.read_bytes())
    merge_file(base, a, base, force=True)  # its own base
    assert base.read_bytes() == expected
    (tmp_path / "link").symlink_to("out.safetensors")
    out.write_bytes(b"old")
    merge_file(tmp_path / "again", a, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert out.read_bytes() == expected
    out.chmod(0o444)
    with pytest.raises(PermissionError, match="the file there is read-only"):
        merge_file(base, a, out, force=True)
    with pytest.raises(FileNotFoundError):
        merge_file(base, a, tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(
        ConfigError, match=r"^`out` must be a file, but '.*' is a folder\. Name a fi"
    ):
        merge_file(base, a, tmp_path, force=True)
    folder = shards({"lin.weight": torch.ones(7, 6), "x": torch.ones(2)}, tmp_path / "folder")
    with pytest.raises(ConfigError) as caught:
        merge_file(folder, a, out, force=True)
    assert str(caught.value) == (
        f"`out` must be a new folder for a checkpoint of shards, but {str(out)!r} is there. Choose"
        " another name: several files can't be replaced at once."
    )


def test_a_tensor_in_two_shards_is_refused(lin: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, a = lin
    folder = shards(safetensors.torch.load_file(base), tmp_path / "shards")
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = max(where, key=where.__getitem__)  # of the last shard
    for other in sorted(set(where.values())):
        held = safetensors.torch.load_file(folder / other)
        safetensors.torch.save_file({**held, name: torch.zeros(1)}, folder / other)
    with pytest.raises(CorruptFileError, match=(
        r"^'.*\.index\.json' must map exactly the tensors of its 2 files, but differs at"
        rf" '{re.escape(name)}'\. Fetch or save it again\.$"
    )):  # fmt: skip
        merge_file(folder, a, tmp_path / "out")


def test_a_file_that_is_no_checkpoint_is_refused(lin: tuple[Path, Adapter], tmp_path: Path) -> None:
    base, a = lin
    out, bad = tmp_path / "out", tmp_path / "bad.safetensors"
    data = base.read_bytes()
    for content, said in [
        (data[:-1], r"Fetch or save it again\.$"),
        (data + b"\0", r"Fetch or save it again\.$"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"It looks like a git-lfs pointer"),
        (b"", r"Fetch or save it again\.$"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(CorruptFileError, match=rf"^'.*' must be a whole safetensors .*{said}"):
            merge_file(bad, a, out)
    with pytest.raises(OSError, match="device or pipe"):
        merge_file("/dev/null", a, out)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        ConfigError, match=r"^A folder must hold one checkpoint, but '.*' holds none\."
    ):
        merge_file(empty, a, out)
    folder = shards({"lin.weight": torch.ones(7, 6), "x": torch.ones(2)}, tmp_path / "folder")
    index = folder / "model.safetensors.index.json"
    about = json.loads(index.read_text())
    surplus = {**about["weight_map"], "y": next(iter(about["weight_map"].values()))}
    for where, said in [
        (surplus, r"must map exactly the tensors of its 2 files, but differs at 'y'\."),
        ({"lin.weight": "../base.safetensors"}, "must map tensors to files beside it, but does no"),
    ]:  # fmt: skip
        index.write_text(json.dumps({"weight_map": where}))
        with pytest.raises(CorruptFileError, match=rf"^'.*index\.json' {said}"):
            merge_file(folder, a, out)
    index.write_text("[1]")
    with pytest.raises(CorruptFileError, match="must map tensors to files beside it, but does not"):
        merge_file(folder, a, out)
    assert not out.exists()


# --- merge_file: memory and kills -------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
import torch, safetensors.torch
from lora_core import Adapter, extract, merge_file
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer

folder, layers, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0, dtype=torch.float32)

def adapter(layers, width):
    layer = lambda: AdapterLayer("linear", config, {
        "lora_A": torch.ones(2, width), "lora_B": torch.ones(width, 2)})
    return Adapter("a", {f"l{i}": layer() for i in range(layers)})
"""


def peak_of(
    call: str, folder: Path, layers: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """How far memory grew in a process of its own, in tensors: at most, and at the end."""
    script = _SCRIPT + textwrap.dedent(f"""
        def memory(what):  # of this process alone: getrusage counts what the parent had before it
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(what))

        def act(name, layers, width):
            {call}

        act("small", 1, 64)
        before = memory("VmRSS")
        kept = act("large", layers, width)
        print(memory("VmHWM") - before, memory("VmRSS") - before)
    """)
    for name, count, size in (("small", 1, 64), ("large", layers, width)):
        # a file after another: this process need not hold them either
        for side, value in (("", 0.0), ("-tuned", 0.5)):
            some = torch.full((size, size), value, dtype=dtype)
            some[:2] = torch.randn(2, size).to(dtype)
            weights = {f"l{i}.weight": some.clone() for i in range(count)}
            safetensors.torch.save_file(weights, folder / f"{name}{side}.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(layers), str(width)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    most, last = map(int, ran.stdout.split())
    return most / (some.nbytes), last / some.nbytes


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's own account"
)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_a_file_takes_the_memory_of_one_tensor(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    call = 'merge_file(folder / f"{name}.safetensors", adapter(layers, width), folder / f"{name}2")'
    most, _ = peak_of(call, tmp_path, 6, 4096, dtype)  # of 64 or 32 MiB each
    assert 0.95 <= most < 1.5  # a page or two may have been there before
    merged = file_state(tmp_path / "large2")
    base = safetensors.torch.load_file(tmp_path / "large.safetensors")
    assert torch.equal(merged["l5.weight"], base["l5.weight"] + 2)


@needs_proc
@pytest.mark.slow
def test_what_extract_needs_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    files = 'folder / f"{name}.safetensors", folder / f"{name}-tuned.safetensors"'
    call = f"return extract({files}, rank=4, svd='randomised')"
    most, last = peak_of(call, tmp_path, 40, 2048)  # of 16 MiB each
    assert 2 <= most < 7
    assert last < 5


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path, sharded: bool) -> None:
    layers, width = 6, 256
    weights = {f"l{i}.weight": torch.zeros(width, width) for i in range(layers)}
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    if sharded:
        shards(weights, base)
    else:
        safetensors.torch.save_file(weights, base)
        out.write_bytes(b"old")
    script = _SCRIPT + textwrap.dedent("""
        a = adapter(layers, width)
        print("ready", flush=True)
        while True:
            new = folder / "out"
            merge_file(folder / "base.safetensors", a, new, force=True, check_base=False)
            if (folder / "out").is_dir():
                (folder / "out").rename(folder / "old")
                __import__("shutil").rmtree(folder / "old")
    """)
    for i in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(layers), str(width)],
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.004 + 0.017 * i)
            process.send_signal(signal.SIGKILL)
        if out.is_file() and out.read_bytes() == b"old":
            continue
        if out.exists():
            assert file_state(out).keys() == weights.keys()
            assert all(bool((t == 2).all()) for t in file_state(out).values())
    left = {p.name for p in tmp_path.iterdir()} - {"base.safetensors", "out", "old"}
    assert all(name.startswith(".out.") for name in left)
    assert sharded or not left
    # what a dead process left goes with the next merge
    for old in (out, tmp_path / "old"):
        if old.is_dir():
            subprocess.run(["rm", "-r", str(old)], check=True)
    a = adapter(**{f"l{i}": make_layer(size=(width, width)) for i in range(layers)})
    merge_file(base, a, out, force=True, check_base=False)
    assert {p.name for p in tmp_path.iterdir()} == {"base.safetensors", "out"}


def test_a_report_is_a_table() -> None:
    report = AlgebraReport([LayerResult("to_q", 4, 0.25, 1, 2), LayerResult("to_k", 2, 0.0, 2, 2)])
    assert report.worst_error == 0.25
    assert AlgebraReport([]).worst_error == 0
    assert str(report).splitlines()[2].split() == ["to_q", "4", "2.50e-01"]
