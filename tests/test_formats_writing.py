"""An adapter into any format: the same function when it is read again, or a refusal."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lora_core import ConfigError
from lora_core._config import AdapterConfig
from lora_core._formats import Adapter, AdapterLayer, container, encode, read, write
from lora_core._formats.deltas import bias_delta, dense_delta
from lora_core._formats.naming import Host, resolve

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
SETTINGS = {
    "lora_mid": "tucker",
    "lora_magnitude": "dora",
    "lora_bias": "bias",
}
# what formats.md gives each format a place for, said again
HOLDS: dict[str, frozenset[str]] = {
    "lora_core": frozenset(("embedding", "weight", "tucker", "dora", "columns", "bias", "first")),
    "kohya": frozenset(("dora",)),
    "lycoris": frozenset(("dora", "columns", "tucker")),
    "peft": frozenset(("embedding", "dora", "bias")),
    "diffusers": frozenset(("dora", "bias")),
}
DOTTED = r"`format` must have a place for all of the adapter, but "


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(
    shape: tuple[int, ...] = (6, 5),
    rank: int = 2,
    alpha: float = 3.0,
    *extras: str,
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    component: str = "",
    path: str = "",
    seed: int = 0,
    **more: Any,
) -> AdapterLayer:
    """A layer for a weight of this shape: (out, in, ...), of an embedding (entries, dim)."""
    kind = kind or ("conv" if len(shape) > 2 else "linear")
    out, size, *kernel = shape if kind != "embedding" else shape[::-1]
    inner = [1] * len(kernel) if "tucker" in extras else kernel
    make = {
        "lora_A": (rank, size, *inner),
        "lora_B": (out, rank, *[1] * len(kernel)),
    }
    if "tucker" in extras:
        make["lora_mid"] = (rank, rank, *kernel)
    if "dora" in extras:
        make["lora_magnitude"] = (out,)
    if "columns" in extras:
        make["lora_in_magnitude"] = (size,)
    if "bias" in extras:
        make["lora_bias"] = (out,)
    if "first" in extras:
        make |= {"lora_A0": make["lora_A"], "lora_B0": make["lora_B"]}
    parts = {p: rand(*s, dtype=dtype, seed=seed + n) for n, (p, s) in enumerate(make.items())}
    for part in ("lora_magnitude", "lora_in_magnitude"):
        if part in parts:
            parts[part] = parts[part].abs() + 0.5
    config = AdapterConfig(
        rank,
        alpha,
        more.pop("dropout", 0.0),
        dtype,
        tucker="tucker" in extras,
        dora=bool({"dora", "columns"} & set(extras)),
        dora_in="columns" in extras,
        bias="bias" in extras,
        init="pissa" if "first" in extras else "kaiming",
        **more,
    )
    return AdapterLayer(kind, config, parts, component=component, path=path)


def adapter(layers: Mapping[str, AdapterLayer], **more: Any) -> Adapter:
    return Adapter("style", layers, **more)


def unet(path: str = "mid_block.attentions.0.proj_in", *args: Any, **more: Any) -> AdapterLayer:
    return layer(*args, component="unet", path=path, **more)


def hosts(shapes: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> dict[str, list[Host]]:
    """Modules by component, of (component, path, shape) by name."""
    models: dict[str, list[Host]] = {}
    for component, path, shape in shapes.values():
        models.setdefault(component, []).append(Host(path, "", shape))
    return models


def weight_of(shape: tuple[int, ...]) -> Tensor:
    return rand(*shape, seed=sum(shape)).double()


def deltas(
    layers: Mapping[str, AdapterLayer], shapes: Mapping[str, tuple[str, str, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """What the layers, by the names of `shapes`, add to a base, the biases beside the weights."""
    found = {}
    for name, x in layers.items():
        weight = weight_of(shapes[name][2])
        parts = {p: t.double() for p, t in x.parts.items()}
        wide = replace(x, parts=parts)
        kind = "" if x.kind in ("matrix", "difference", "values") else x.kind
        found[f"{name}.weight"] = dense_delta(name, wide, weight, kind=kind)
        added = bias_delta(wide, None)
        if added is not None:
            found[f"{name}.bias"] = added
    return found


def read_back(
    path: Path, shapes: Mapping[str, tuple[str, str, tuple[int, ...]]]
) -> dict[str, AdapterLayer]:
    """The layers of a file by the names of `shapes`, found as loading finds them."""
    layers = read(path).layers
    found = resolve(layers, hosts(shapes))
    assert not found.missing
    assert not found.elsewhere
    places = {(component, path): name for name, (component, path, _) in shapes.items()}
    return {places[place]: layers[name] for name, place in found.found.items()}


def close(found: Tensor, expected: Tensor, error: float) -> None:
    """Asserts that two updates differ by no more than this part of the larger numbers in them."""
    size = max(1.0, expected.abs().max().item())
    assert_close(found, expected, rtol=0, atol=error * size)


SEGMENTS = st.sampled_from(["a", "b_c", "to_q", "0", "11", "net", "x1", "lora", "unet", "proj_out"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@st.composite
def adapters(
    draw: st.DrawFn, to: str, dtypes: tuple[torch.dtype, ...]
) -> tuple[Adapter, dict[str, tuple[str, str, tuple[int, ...]]]]:
    """An adapter that a format can hold, and where its layers belong."""
    known = {
        "kohya": ("unet", "text_encoder", "text_encoder_2", "transformer", "prior"),
        "lycoris": ("", "unet", "text_encoder", "text_encoder_2"),
        "diffusers": ("unet", "text_encoder", "text_encoder_2", "transformer", "prior"),
    }.get(to, ("",))
    if to == "lycoris" and draw(st.booleans()):
        known = known[:1]
    elif to == "lycoris":
        known = known[1:]
    component = st.sampled_from(known)
    keys = draw(
        st.lists(
            st.tuples(component, PATHS),
            min_size=1,
            max_size=5,
            unique_by=lambda key: (key[0], key[1].replace(".", "_")),
        )
    )
    # a model whose every module is in one called "unet" is taken for a part of a pipeline
    assume(to != "lycoris" or known[0] or not all(path.startswith("unet.") for _, path in keys))
    may = sorted(HOLDS[to])
    apart = to in ("peft", "diffusers")  # which have one setting for all layers
    common = draw(st.sampled_from([(), ("dora",), ("bias",)])) if apart else ()
    layers: dict[str, AdapterLayer] = {}
    shapes = {}
    for n, (part, path) in enumerate(keys):
        name = f"{part}.{path}" if part else path
        extras = set(common)
        if not apart:
            extras = set(draw(st.lists(st.sampled_from(may), max_size=2, unique=True)))
        size = st.integers(1, 7)
        shape = (draw(size), draw(size))
        shape += draw(st.sampled_from([(), (), (1, 1), (3, 3), (2,)]))
        kind = ""
        if {"embedding", "weight"} & extras or (
            apart and "embedding" in may and "bias" not in common and draw(st.booleans())
        ):
            kind = "weight" if "weight" in extras else "embedding"
            shape, extras = shape[:2], extras & {"dora"} if kind == "embedding" else set()
        extras -= {"embedding", "weight"}
        if len(shape) == 2:
            extras -= {"tucker"}
        if {"dora", "columns"} <= extras:
            extras -= {"columns"}
        if "first" in extras:
            extras -= {"tucker", "dora", "columns"}
        top = min(shape[0], math.prod(shape[1:]))
        rank = draw(st.integers(1, top if "tucker" not in extras else 4))
        alpha = draw(st.sampled_from([0.0, 1.0, 2.7, -3.0, float(rank), 70_000.0, 1e-3]))
        layers[name] = layer(
            shape,
            rank,
            alpha,
            *sorted(extras),
            kind=kind,
            dtype=draw(st.sampled_from(dtypes)),
            component=part,
            path=path if part else "",
            seed=10 * n,
            rslora=draw(st.booleans()),
        )
        shapes[name] = (part, path, shape)
    return adapter(layers), shapes


@pytest.mark.parametrize("to", sorted(HOLDS))
@SAME_FOLDER
@given(data=st.data())
def test_what_is_read_again_adds_the_same(to: str, data: st.DataObject, tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    file, shapes = data.draw(adapters(to, dtypes))
    path = tmp_path / ("folder" if to == "peft" else "x.safetensors")
    write(file, path, to)
    found = read_back(path, shapes)
    assert found.keys() == file.layers.keys()
    expected = deltas(file.layers, shapes)
    for key, delta in deltas(found, shapes).items():
        name = key.rpartition(".")[0]
        # alpha is stored in float32 by some, and a bias inside the update in its own dtype
        narrow = key.endswith(".bias") and file.layers[name].settings.dtype.itemsize == 2
        close(delta, expected[key], 1e-2 if narrow else 1e-6)
    for name, x in found.items():
        own = file.layers[name]
        for part in ("lora_A", "lora_B") if own.settings.alpha else ("lora_A",):
            assert torch.equal(x.parts[part].flatten(), own.parts[part].flatten())
            assert x.parts[part].dtype == own.parts[part].dtype


@pytest.mark.parametrize("to", sorted(HOLDS))
@SAME_FOLDER
@given(data=st.data())
def test_a_folded_scale_is_one_and_adds_the_same(
    to: str, data: st.DataObject, tmp_path: Path
) -> None:
    file, shapes = data.draw(adapters(to, (torch.float32, torch.float64)))
    path = tmp_path / ("folder" if to == "peft" else "x.safetensors")
    write(file, path, to, fold=True)
    found = read_back(path, shapes)
    assert all(x.settings.scale == 1 for x in found.values())
    expected = deltas(file.layers, shapes)
    assert found.keys() == file.layers.keys()
    for key, delta in deltas(found, shapes).items():
        close(delta, expected[key], 1e-5)


@pytest.mark.parametrize("to", sorted(HOLDS))
@SAME_FOLDER
@given(data=st.data())
def test_the_bytes_are_the_same_for_every_order_of_the_layers(to: str, data: st.DataObject) -> None:
    file, _ = data.draw(adapters(to, (torch.float32, torch.float16)))
    names = data.draw(st.permutations(list(file.layers)))
    turned = replace(file, layers={name: file.layers[name] for name in names})
    assert encode(file, to).files() == encode(turned, to).files()


def test_several_models_of_a_pipeline_keep_their_parts_in_the_own_format() -> None:
    layers = {
        "unet.a": layer(component="unet", path="a"),
        "text_encoder.a": layer(component="text_encoder", path="a"),
    }
    file = adapter(layers)
    assert set(encode(file).tensors) == {
        f"{part}.a.lora_{half}" for part in ("unet", "text_encoder") for half in "AB"
    }
    one = adapter({"unet.a": layers["unet.a"]})
    assert set(encode(one).tensors) == {"unet.a.lora_A", "unet.a.lora_B"}


def test_a_file_of_several_models_is_split_again(tmp_path: Path) -> None:
    layers = {
        "unet.a": layer(component="unet", path="a"),
        "text_encoder.a": layer(component="text_encoder", path="a"),
    }
    path = tmp_path / "x.safetensors"
    write(adapter(layers), path)
    assert {key.partition(".")[0] for key in encode(read(path), "kohya").tensors} == {
        "lora_unet_a",
        "lora_te_a",
    }


# the scale


def test_folding_rounds_once() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = unet(dtype=dtype, alpha=0.7)
        found = encode(adapter({"x": x}), "kohya", fold=True).tensors
        up = found["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
        assert torch.equal(up, (x.parts["lora_B"].float() * (0.7 / 2)).to(dtype))


def test_a_folded_scale_that_overflows_is_refused() -> None:
    x = unet(dtype=torch.float16, alpha=1e6)
    with pytest.raises(
        ConfigError,
        match=r"^A scale must leave finite numbers where it is folded, but 500000 makes infinities"
        r" of `lora_B` of 'x' in torch.float16. Cast the adapter to torch.float32 first.$",
    ):
        encode(adapter({"x": x}), "kohya", fold=True)


@pytest.mark.parametrize(
    ("alpha", "dtype", "stored"),
    [
        (4.0, torch.float16, torch.float16),
        (2.7, torch.float16, torch.float32),
        (70_000.0, torch.float16, torch.float32),
        (1e-9, torch.float16, torch.float32),
        (257.0, torch.bfloat16, torch.float32),
        (0.1, torch.float64, torch.float64),
        (0.1, torch.float32, torch.float32),
    ],
)
def test_an_alpha_has_the_factors_dtype_or_a_wider_that_holds_it(
    alpha: float, dtype: torch.dtype, stored: torch.dtype
) -> None:
    found = encode(adapter({"x": unet(alpha=alpha, dtype=dtype)}), "kohya").tensors
    (tensor,) = (t for key, t in found.items() if key.endswith(".alpha"))
    assert (tensor.dtype, tensor.shape) == (stored, ())
    assert tensor.item() == pytest.approx(alpha, rel=1e-7)


def test_an_alpha_of_zero_is_zero_to_readers_who_take_it_for_none() -> None:
    found = encode(adapter({"x": unet(alpha=0.0)}), "kohya")
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    assert found.tensors[f"{stem}.alpha"].item() == 2
    assert not found.tensors[f"{stem}.lora_up.weight"].any()
    assert found.notes == ("the scale is multiplied into lora_B: 'x'",)


def test_rslora_is_an_alpha_of_the_plain_rule_where_there_is_no_flag() -> None:
    x = unet(rank=4, alpha=3.0, rslora=True)
    found = encode(adapter({"x": x}), "kohya")
    assert found.tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"].item() == 6
    assert found.notes == (
        "alpha is multiplied by the root of the rank, for there is no rsLoRA: 'x'",
    )


def test_rslora_of_some_layers_is_written_as_that_of_none_for_peft() -> None:
    layers = {"a": layer(rank=4, rslora=True), "b": layer(rank=4, alpha=6.0)}
    config = encode(adapter(layers), "peft").config
    assert config is not None
    assert (config["use_rslora"], config["lora_alpha"], config["alpha_pattern"]) == (False, 6, {})
    config = encode(adapter({"a": layers["a"]}), "peft").config
    assert config is not None
    assert (config["use_rslora"], config["lora_alpha"]) == (True, 3)


def test_dropout_that_has_no_place_is_told() -> None:
    x = unet(dropout=0.1)
    assert encode(adapter({"x": x}), "kohya").notes == (
        "what acts in training alone, as dropout does, is left out: 'x'",
    )
    kept = encode(adapter({"x": x}), "peft")
    assert kept.config is not None
    assert (kept.config["lora_dropout"], kept.notes) == (0.1, ())


# forms


def test_a_tucker_core_becomes_a_part_of_a_larger_kernel_on_request() -> None:
    x = unet("a", (6, 5, 3, 3), 2, 3.0, "tucker")
    shapes = {"x": ("unet", "a", (6, 5, 3, 3))}
    found = encode(adapter({"x": x}), "kohya", fold=True)
    assert found.tensors["lora_unet_a.lora_down.weight"].shape == (2, 5, 3, 3)
    assert_close(deltas(found.layers, shapes), deltas({"x": x}, shapes), rtol=1e-6, atol=1e-6)
    assert "the Tucker core is a part of lora_A: 'x'" in found.notes


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_first_factors_become_a_part_of_twice_the_rank_on_request(shape: tuple[int, ...]) -> None:
    x = unet("a", shape, 2, 3.0, "first", rslora=True)
    shapes = {"x": ("unet", "a", shape)}
    found = encode(adapter({"x": x}), "kohya", fold=True)
    assert found.tensors["lora_unet_a.lora_down.weight"].shape[0] == 4
    assert_close(deltas(found.layers, shapes), deltas({"x": x}, shapes), rtol=1e-6, atol=1e-6)
    assert "the first factors are a part of twice the rank: 'x'" in found.notes
    fresh = replace(x, parts={p: x.parts[p[:6]] for p in x.parts})  # as it began
    found = encode(adapter({"x": fresh}), "kohya", fold=True)
    assert not deltas(found.layers, shapes)["x.weight"].any()


def test_lengths_of_columns_are_those_of_a_layer_here_in_the_own_format(tmp_path: Path) -> None:
    x = layer((6, 5), 2, 3.0, "columns")
    path = tmp_path / "x.safetensors"
    write(adapter({"a": x}), path)
    found = read(path)
    assert found.layers["a"].settings.dora_in
    assert torch.equal(found.layers["a"].parts["lora_in_magnitude"], x.parts["lora_in_magnitude"])
    again = encode(found, "lycoris").tensors["lycoris_a.dora_scale"]
    assert torch.equal(again, x.parts["lora_in_magnitude"][None])


def test_magnitudes_have_the_shapes_of_each_format() -> None:
    linear, conv = unet("a", (6, 5), 2, 3.0, "dora"), unet("b", (6, 5, 3, 3), 2, 3.0, "dora")
    file = adapter({"a": linear, "b": conv})
    for to, key, shapes in (
        ("kohya", "lora_unet_{}.dora_scale", [(6, 1), (6, 1, 1, 1)]),
        ("lycoris", "lora_unet_{}.dora_scale", [(6, 1), (6, 1, 1, 1)]),
        ("peft", "base_model.model.{}.lora_magnitude_vector", [(6,), (1, 6, 1, 1)]),
        ("diffusers", "unet.{}.lora_magnitude_vector", [(6,), (1, 6, 1, 1)]),
    ):
        found = encode(file, to).tensors
        assert [tuple(found[key.format(n)].shape) for n in "ab"] == shapes


def test_differences_and_values_are_written_where_they_can_be_read(tmp_path: Path) -> None:
    parts = {"weight": rand(6, 5), "bias": rand(6)}
    norm = {"weight": rand(6), "bias": rand(6)}
    layers = {
        "a": layer(),
        "b": AdapterLayer("difference", None, parts),
        "c": AdapterLayer("difference", None, norm),
    }
    write(adapter(layers), tmp_path / "x.safetensors", "lycoris")
    tensors, _ = container.read(tmp_path / "x.safetensors")
    assert {"lycoris_b.diff", "lycoris_b.diff_b", "lycoris_c.w_norm", "lycoris_c.b_norm"} < set(
        tensors
    )
    found = read(tmp_path / "x.safetensors").layers
    assert torch.equal(found["lycoris_b"].parts["weight"], parts["weight"])
    assert torch.equal(found["lycoris_c"].parts["bias"], norm["bias"])
    layers = {
        "a": layer(),
        "b": AdapterLayer("values", None, parts),
        "a.bias": AdapterLayer("values", None, {"bias": rand(6)}, path="a"),
    }
    encoded = write(adapter(layers), tmp_path / "folder", "peft")
    assert encoded.config is not None
    assert encoded.config["modules_to_save"] == ["b"]
    assert encoded.config["bias"] == "lora_only"
    assert "base_model.model.a.base_layer.bias" in encoded.tensors
    found = read(tmp_path / "folder").layers
    assert {name: x.kind for name, x in found.items()} == {
        "a": "matrix",
        "b": "values",
        "a.bias": "values",
    }


# what has no place


@pytest.mark.parametrize(
    ("x", "to", "rest"),
    [
        (
            unet("a", (6, 5, 3, 3), 2, 3.0, "tucker"),
            "kohya",
            "'kohya' has none for a Tucker core, which 'x' has. Pass fold=True, or"
            " format='lora_core' or format='lycoris'.",
        ),
        (
            unet("a", (6, 5), 2, 3.0, "first"),
            "peft",
            "'peft' has none for first factors that are subtracted, which 'x' has. Pass fold=True,"
            " or format='lora_core'.",
        ),
        (
            unet("a", (6, 5), 2, 3.0, "columns"),
            "peft",
            "'peft' has none for lengths of columns, which 'x' has. Pass format='lora_core' or"
            " format='lycoris'.",
        ),
        (
            unet("a", (6, 5), 2, 3.0, "bias"),
            "lycoris",
            "'lycoris' has none for a bias, which 'x' has. Pass format='lora_core' or"
            " format='peft' or format='diffusers'.",
        ),
        (
            unet("a", (6, 5), kind="embedding"),
            "diffusers",
            "'diffusers' has none for an embedding, which 'x' has. Pass format='lora_core' or"
            " format='peft'.",
        ),
        (
            unet("a", (6, 5), kind="weight"),
            "peft",
            "'peft' has none for a parameter that is read, which 'x' has. Pass format='lora_core'.",
        ),
        (
            AdapterLayer("difference", None, {"weight": rand(2)}, component="unet", path="a"),
            "kohya",
            "'kohya' has none for a whole difference, which 'x' has. Pass format='lycoris'.",
        ),
        (
            AdapterLayer("values", None, {"weight": rand(2)}),
            "lora_core",
            "'lora_core' has none for values in place of the base's, which 'x' has. Pass"
            " format='peft'.",
        ),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(x: AdapterLayer, to: str, rest: str) -> None:
    with pytest.raises(ConfigError, match=f"^{DOTTED}{re.escape(rest)}$"):
        encode(adapter({"x": x}), to)


def test_all_layers_that_have_no_place_are_named() -> None:
    layers = {f"x{n}": unet(f"a{n}", (6, 5), 2, 3.0, "bias") for n in range(7)}
    with pytest.raises(ConfigError, match=r"a bias, which 'x0', .*, 'x4' and 2 more have. Pass"):
        encode(adapter(layers), "kohya")


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_layers_must_agree_on_what_peft_has_one_setting_for(to: str) -> None:
    layers = {"a": unet("a", (6, 5), 2, 3.0, "dora"), "b": unet("b")}
    with pytest.raises(
        ConfigError,
        match=r"^All layers or none must have lengths of rows \(DoRA\) to be written as"
        rf" '{to}', but 'a' have and 'b' have not. Use format='lycoris', or"
        r" format='lora_core'.$",
    ):
        encode(adapter(layers), to)
    with pytest.raises(ConfigError, match=rf"^{DOTTED}'{to}' has none for a bias beside"):
        encode(adapter({"a": unet("a", (6, 5), 2, 3.0, "dora", "bias")}), to)


def test_a_bias_beside_an_embedding_has_no_place_in_peft() -> None:
    layers = {"a": layer((6, 5), 2, 3.0, "bias"), "b": layer(kind="embedding")}
    with pytest.raises(ConfigError, match=rf"^{DOTTED}'peft' has none for a bias beside an emb"):
        encode(adapter(layers), "peft")


def test_two_modules_with_one_stem_are_refused() -> None:
    layers = {"a.b_c": unet("a.b_c"), "a_b.c": unet("a_b.c")}
    with pytest.raises(
        ConfigError,
        match=r"^Each module must have a name of its own in a file, but 'a.b_c', 'a_b.c' are both"
        r" 'lora_unet_a_b_c' in 'kohya'. Rename one.$",
    ):
        encode(adapter(layers), "kohya")
    assert len(encode(adapter(layers), "diffusers").tensors) == 4


def test_a_name_that_reads_back_as_another_is_refused() -> None:
    for to, path in (
        ("peft", "a.base_layer.b"),
        ("peft", ""),
        ("kohya", ""),
        ("diffusers", ""),
    ):
        component = "" if to == "peft" else "unet"
        layers = {path: layer(component=component, path=path)}
        with pytest.raises(
            ConfigError,
            match=rf"^A module must have a name that the keys of '{to}' can spell, but .*"
            r" has none. Rename it, or use format='lora_core'.$",
        ):
            encode(adapter(layers), to)


def test_a_stem_alone_is_no_dotted_name() -> None:
    x = replace(unet("a_b"), spelling="stem")
    for to in ("lora_core", "peft", "diffusers"):
        with pytest.raises(
            ConfigError,
            match=rf"^A module must be known by its dotted name to be written as '{to}', but"
            r" 'lora_unet_a_b' is known by a stem alone. Load it into its model, and save that.$",
        ):
            encode(adapter({"lora_unet_a_b": x}), to)


def test_a_model_must_be_known_to_be_written_for_a_pipeline() -> None:
    for to in ("kohya", "diffusers"):
        with pytest.raises(
            ConfigError,
            match=r"^A module must be of a known part of a pipeline to be written as"
            rf" '{to}', but 'a' may be of any model. Save the models by their parts, as in"
            r' {"unet": model}, or use format=\'lycoris\' or format=\'peft\'.$',
        ):
            encode(adapter({"a": layer()}), to)


def test_peft_has_a_folder_for_each_model() -> None:
    layers = {"a": unet("a"), "b": layer(component="text_encoder", path="b")}
    with pytest.raises(
        ConfigError,
        match=r"^A folder of PEFT's must be for one model, but this adapter is for 'text_encoder',"
        r" 'unet'. Save each model's part, or use format='diffusers'.$",
    ):
        encode(adapter(layers), "peft")


def test_a_rank_above_the_layers_sizes_is_kept(tmp_path: Path) -> None:
    file = adapter({"a": layer((6, 2), 4)})
    write(file, tmp_path / "x")
    again = read(tmp_path / "x").layers["a"]
    assert again.settings.rank == 4
    assert torch.equal(again.parts["lora_A"], file.layers["a"].parts["lora_A"])


def test_arguments_are_checked() -> None:
    file = adapter({"a": unet("a")})
    for message, call in (
        (r"^`format` must be one of 'lora_core', .*, but is 'x'.$", {"format": "x"}),
        (r"^`fold` must be True or False, but is 1.$", {"fold": 1}),
        (r"^`base` must be one of 'sd_v1', .* but is 'sd9'. Leave it out", {"base": "sd9"}),
        (
            r"^`spelling` must be one of 'diffusers', 'ldm', of 'kohya' and 'lycoris' alone, but"
            r" is 'x' for 'kohya'. Leave",
            {"format": "kohya", "spelling": "x"},
        ),
        (r"^`spelling` .* is 'ldm' for 'peft'.", {"format": "peft", "spelling": "ldm"}),
        (
            r"^`metadata` must leave 'format', .* to the format, but sets 'sshs_model_hash'.",
            {"format": "kohya", "metadata": {"sshs_model_hash": "0"}},
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            encode(file, **call)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^An adapter must have a layer to be written, but has"):
        encode(adapter({}))
    x = unet("a")
    x.parts["lora_A"][0] = math.nan
    with pytest.raises(ConfigError, match=r"^An adapter must be finite to be written, but that of"):
        encode(adapter({"a": x}), "kohya")


# names


def modules(family: str) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...], str, str]]:
    """Component, path, shapes of both factors at rank 1, and both stems, of the real models."""
    for line in (DATA / "names" / f"kohya_keys_{family}.txt").read_text().splitlines():
        if not line.startswith("#"):
            _, path, _, down, up, *stems = line.split("\t")
            prefix = stems[0].partition("_text_model")[0]
            component = {"lora_te": "text_encoder", "lora_te1": "text_encoder"}.get(prefix)
            component = component or ("text_encoder_2" if prefix == "lora_te2" else "unet")
            first, second = (tuple(json.loads(x.replace("r", "1"))) for x in (down, up))
            yield component, path, first, second, stems[0], stems[1]


def real(family: str, *, wrapped: bool = True) -> tuple[Adapter, dict[str, tuple[str, str]]]:
    layers, stems = {}, {}
    zero = torch.zeros(())
    for component, path, down, up, *both in modules(family):
        own = path if wrapped else path.removeprefix("text_model.")
        parts = {"lora_A": zero.expand(down), "lora_B": zero.expand(up)}
        config = AdapterConfig(1, 1.0, 0.0, torch.float32)
        name = f"{component}.{own}"
        kind = "conv" if len(down) > 2 else "linear"
        layers[name] = AdapterLayer(kind, config, parts, component=component, path=own)
        stems[name] = (both[0], both[1])
    return adapter(layers), stems


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("to", ["kohya", "lycoris"])
@pytest.mark.parametrize(("family", "usual"), [("sd15", 0), ("sdxl", 1)])
def test_the_stems_are_those_of_the_real_models(
    family: str, usual: int, to: str, wrapped: bool
) -> None:
    file, stems = real(family, wrapped=wrapped)
    assert len(stems) > 300
    for spelling, place in ((None, usual), ("diffusers", 0), ("ldm", 1)):
        found = encode(file, to, spelling=spelling).tensors
        assert {key.partition(".")[0] for key in found} == {s[place] for s in stems.values()}


@settings(deadline=None, max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize(("family", "base"), [("sd15", "sd_v1"), ("sdxl", "sdxl_base_v1-0")])
def test_a_part_of_the_modules_has_the_same_stems(
    family: str, base: str, data: st.DataObject
) -> None:
    file, stems = real(family)
    names = [n for n, x in file.layers.items() if x.component == "unet"]
    some = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    part = replace(file, layers={name: file.layers[name] for name in some})
    found = encode(part, "kohya", base=base, spelling="ldm").tensors
    assert {key.partition(".")[0] for key in found} == {stems[name][1] for name in some}


def test_ldm_names_are_spelled_as_diffusers_has_them() -> None:
    file, stems = real("sd15")
    by_stem = {other: name for name, (_, other) in stems.items()}
    ldm = encode(file, "kohya", spelling="ldm").tensors
    paths = {"input_blocks.1.1.proj_in": "lora_unet_input_blocks_1_1_proj_in"}
    for path, stem in paths.items():
        assert f"{stem}.alpha" in ldm
        x = replace(file.layers[by_stem[stem]], path=path)
        found = encode(adapter({"x": x}), "diffusers").tensors
        assert set(found) == {f"{by_stem[stem]}.lora_{half}.weight" for half in "AB"}


def test_a_lone_unet_or_text_encoder_is_known_by_its_names() -> None:
    for path, kohya, diffusers in (
        (
            "down_blocks.0.attentions.0.proj_in",
            "lora_unet_down_blocks_0_attentions_0_proj_in",
            "unet.down_blocks.0.attentions.0.proj_in",
        ),
        (
            "encoder.layers.0.mlp.fc1",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
    ):
        file = adapter({path: layer()})
        assert f"{kohya}.alpha" in encode(file, "kohya").tensors
        assert f"{diffusers}.lora_A.weight" in encode(file, "diffusers").tensors


def test_stems_of_a_file_stay_as_they_are() -> None:
    file = read(GOLDEN / "traps" / "te1_prefix_on_sd15.safetensors")
    found = encode(file, "kohya").tensors
    assert {key.partition(".")[0] for key in found} == set(file.layers)
    x = replace(unet("down_blocks_0_x"), spelling="stem")
    with pytest.raises(
        ConfigError,
        match=r"^A module must be known by its dotted name to be spelled otherwise, but"
        r" 'lora_unet_down_blocks_0_x' is known by a stem alone, which is not of 'ldm'. Load",
    ):
        encode(adapter({"lora_unet_down_blocks_0_x": x}), "kohya", spelling="ldm")


# metadata


KOHYA = sorted(path.parent.name for path in (GOLDEN / "kohya").glob("*/lora.safetensors"))


@pytest.mark.parametrize("case", KOHYA)
def test_a_file_of_kohyas_comes_back_with_every_number_and_entry(case: str) -> None:
    path = GOLDEN / "kohya" / case / "lora.safetensors"
    tensors, metadata = container.read(path)
    found = encode(read(path), "kohya")
    assert_close(dict(found.tensors), tensors, rtol=0, atol=0)
    if case == "sdxl_sgm_names":  # whose keys were renamed after the hash was taken
        data = path.read_bytes()
        data = data[8 + int.from_bytes(data[:8], "little") :]
        metadata["sshs_model_hash"] = hashlib.sha256(data).hexdigest()
    assert found.metadata == metadata
    bare = replace(read(path), metadata={})
    again = encode(bare, "kohya").metadata
    made = {key: value for key, value in metadata.items() if key in again}
    made |= {"modelspec.title": "lora"}
    if case == "sdxl_sgm_names":
        made["modelspec.implementation"] = "https://github.com/Stability-AI/generative-models"
        made["modelspec.resolution"] = "1024x1024"
    assert again == made
    assert len(again) >= 12


@pytest.mark.parametrize("case", ["kohya_locon", "wrapper_locon", "wrapper_tucker"])
def test_a_file_of_lycoris_comes_back_with_every_number(case: str) -> None:
    path = GOLDEN / "lycoris" / case / "lycoris.safetensors"
    tensors, metadata = container.read(path)
    found = encode(read(path), "lycoris")
    assert_close(dict(found.tensors), tensors, rtol=0, atol=0)
    assert found.metadata.get("lycoris_config") == metadata.get("lycoris_config")
    assert json.loads(found.metadata["ss_network_args"])["algo"] == "locon"


@pytest.mark.parametrize(
    "case", sorted(path.parent.name for path in (GOLDEN / "peft").glob("*/case.json"))
)
def test_a_folder_of_pefts_comes_back_with_every_number(case: str, tmp_path: Path) -> None:
    path = GOLDEN / "peft" / case
    tensors, _ = container.read(path / "adapter_model.safetensors")
    file = read(path)
    found = write(file, tmp_path / "x", "peft")
    assert_close(dict(found.tensors), tensors, rtol=0, atol=0)
    again = read(tmp_path / "x").layers
    assert {n: x.config for n, x in again.items()} == {n: x.config for n, x in file.layers.items()}


@pytest.mark.parametrize("case", ["sd15_meta", "sd15_nometa"])
def test_a_file_of_diffusers_comes_back_with_every_number(case: str, tmp_path: Path) -> None:
    path = GOLDEN / "diffusers" / case / "pytorch_lora_weights.safetensors"
    tensors, _ = container.read(path)
    file = read(path)
    found = write(file, tmp_path / "x.safetensors", "diffusers")
    unwrapped = {key.replace("text_model.", ""): t for key, t in found.tensors.items()}
    assert_close(unwrapped, tensors, rtol=0, atol=0)
    again = {
        n.replace("text_model.", ""): x for n, x in read(tmp_path / "x.safetensors").layers.items()
    }
    assert {n: x.config for n, x in again.items()} == {n: x.config for n, x in file.layers.items()}


def test_the_hashes_are_those_of_the_file_as_another_writer_lays_it_out(tmp_path: Path) -> None:
    layers = {f"a{n}": unet(f"a{n}", (400, 400), 40, 2.0, seed=n) for n in range(12)}
    path = tmp_path / "x.safetensors"
    found = write(adapter(layers), path, "kohya", metadata={"note": "n", "ss_seed": "1"})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert found.metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    own = {key: value for key, value in found.metadata.items() if key.startswith("ss_")}
    assert own["ss_seed"] == "1"
    theirs = safetensors.torch.save(dict(found.tensors), own)
    assert len(theirs) > 0x110000
    expected = hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8]
    assert found.metadata["sshs_legacy_hash"] == expected != "e3b0c442"


@pytest.mark.parametrize(
    ("layers", "base", "architecture"),
    [
        ({"x": unet("down_blocks.0.attentions.0.norm")}, "sd_v1", "stable-diffusion-v1"),
        ({"x": unet("down_blocks.0.attentions.0.proj_in")}, "sd_v2", "stable-diffusion-v2-512"),
        ({"x": unet("mid_block.x.attn2.to_k", (4, 768))}, "sd_v1", "stable-diffusion-v1"),
        ({"x": unet("mid_block.x.attn2.to_k", (4, 1024))}, "sd_v2", "stable-diffusion-v2-512"),
        (
            {"x": unet("mid_block.x.attn2.to_k", (4, 2048))},
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
        ),
        (
            {"x": unet("mid_block.a"), "y": layer(component="text_encoder_2", path="b")},
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base",
        ),
        ({"x": unet("mid_block.a")}, None, None),
        ({"x": unet("blocks.0.a")}, None, None),
    ],
)
def test_the_family_is_told_by_names_and_widths(
    layers: dict[str, AdapterLayer], base: str | None, architecture: str | None
) -> None:
    found = encode(adapter(layers), "kohya").metadata
    assert found.get("ss_base_model_version") == base
    assert found.get("modelspec.architecture") == (architecture and f"{architecture}/lora")
    given_ = encode(adapter(layers), "kohya", base="sd_v2_v").metadata
    assert given_["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert given_["modelspec.resolution"] == "768x768"
    assert given_["ss_v2"] == "True"


def test_entries_are_kept_but_for_those_that_describe_other_tensors() -> None:
    brought = {
        "ss_tag_frequency": "{}",
        "": "empty",
        "ss_network_dim": "99",
        "sshs_model_hash": "old",
        "modelspec.hash_sha256": "old",
        "lora_adapter_metadata": "{}",
        "unet:0:rank": "4",
        "ss_network_args": "{",
        "modelspec.author": "me",
    }
    file = adapter({"a": unet("a"), "b": unet("b", rank=3)}, metadata=brought)
    for to in HOLDS:
        found = encode(file, to, metadata={"mine": "1", "modelspec.author": "you"}).metadata
        kept = {k: found.get(k) for k in ("ss_tag_frequency", "", "mine", "modelspec.author")}
        assert kept == {
            "ss_tag_frequency": "{}",
            "": "empty",
            "mine": "1",
            "modelspec.author": "you",
        }
        assert "unet:0:rank" not in found
        assert "modelspec.hash_sha256" not in found
        assert "old" not in found.values()
        assert ("lora_adapter_metadata" in found) == (to == "diffusers")
    found = encode(file, "kohya").metadata
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


# folders


def folder_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_folder_never_mixes_the_old_and_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = adapter({"a": layer()}), adapter({"a": layer(rank=3, alpha=9.0)})
    path = tmp_path / "x"
    write(first, path, "peft")
    (path / "README.md").write_text("mine")
    old = folder_of(path)
    write_file = container.write
    for steps in range(2):
        left = steps

        def dies(*args: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            write_file(*args)

        monkeypatch.setattr(container, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            write(second, path, "peft")
        assert "adapter_config.json" not in folder_of(path)
        with pytest.raises(IsADirectoryError):
            read(path)
        monkeypatch.setattr(container, "write", write_file)
        write(first, path, "peft")
        assert folder_of(path) == old
    write(second, path, "peft")
    assert read(path).layers["a"].settings == second.layers["a"].settings


def test_a_folder_with_the_same_settings_gets_new_tensors_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "x"
    write(adapter({"a": layer()}), path, "peft")
    written = []
    write_file = container.write
    monkeypatch.setattr(container, "write", lambda p, d: written.append(p) or write_file(p, d))
    again = adapter({"a": layer(seed=9)})
    write(again, path, "peft")
    assert [p.name for p in written] == ["adapter_model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_a_folder_with_a_read_only_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(adapter({"a": layer()}), path, "peft")
    old = folder_of(path)
    (path / "adapter_model.safetensors").chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        write(adapter({"a": layer(rank=3)}), path, "peft")
    assert folder_of(path) == old


def test_peft_names_paths_that_match_alone() -> None:
    layers = {
        "a.b": layer(rank=1),
        "c.a.b": layer(rank=2),
        "aXb": layer(rank=2, alpha=5.0),
        "layers.1": layer(),
        "layers.11": layer(),
    }
    config = encode(adapter(layers), "peft").config
    assert config is not None
    # a single name may be the end of another module's, which a list would mean too
    pattern = config["target_modules"]
    assert all(re.fullmatch(pattern, name) for name in layers)
    assert not any(re.fullmatch(pattern, name) for name in ("x.aXb", "aab", "layers.10"))
    assert (config["r"], config["rank_pattern"]) == (2, {r"^a\.b": 1})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (3, {"^aXb": 5})
    del layers["aXb"]
    config = encode(adapter(layers), "peft").config
    assert config is not None
    assert config["target_modules"] == sorted(layers)


def test_settings_of_a_text_encoder_mean_it_with_its_wrapper_and_without() -> None:
    path = "encoder.layers.{}.mlp.fc1"
    for wrapper in ("", "text_model."):
        layers = {
            f"te{n}": layer(
                (6, 5), 2, n + 1.0, component="text_encoder", path=wrapper + path.format(n)
            )
            for n in range(3)
        }
        found = encode(adapter(layers), "diffusers")
        about = json.loads(found.metadata["lora_adapter_metadata"])
        assert about["text_encoder.target_modules"] == [path.format(n) for n in range(3)]
        alphas = about["text_encoder.alpha_pattern"]
        both = [rf"^{p}|^text_model\.{p}" for p in map(re.escape, map(path.format, range(2)))]
        assert alphas == {both[0]: 1, both[1]: 2}
        assert all(key.startswith("text_encoder.text_model.encoder") for key in found.tensors)


def test_a_path_that_ends_another_has_its_own_alpha_in_a_text_encoder(tmp_path: Path) -> None:
    alphas = {"to_q": 1.0, "a.to_q": 3.0, "b.a.to_q": 3.0}
    layers = {
        path: layer(alpha=alpha, component="text_encoder", path=path)
        for path, alpha in alphas.items()
    }
    write(adapter(layers), tmp_path / "x.safetensors", "diffusers")
    found = read(tmp_path / "x.safetensors").layers
    assert {x.path: x.settings.alpha for x in found.values()} == alphas


def test_transposed_weights_are_said_to_be_so_where_all_are() -> None:
    turned, plain = replace(layer(), transposed=True), layer()
    for layers, said in (
        ({"a": turned, "b": turned}, True),
        ({"a": turned, "b": plain}, False),
        ({"a": layer((6, 5, 1, 1))}, False),
    ):
        config = encode(adapter(layers), "peft").config
        assert config is not None
        assert config["fan_in_fan_out"] is said


@pytest.mark.parametrize("form", ["kohya", "lycoris"])
def test_entries_that_follow_from_the_adapter_or_a_named_base_are_not_the_callers(
    form: str,
) -> None:
    a = adapter({"x": unet("mid_block.x.attn2.to_k", (4, 768))})
    said = r"^`metadata` must leave 'ss_network_args', 'ss_network_module' to the format, but sets"
    with pytest.raises(ConfigError, match=said):
        encode(a, form, metadata={"ss_network_args": "{}", "ss_network_module": "x.y"})
    own = {"ss_base_model_version": "flux", "modelspec.architecture": "flux/lora", "ss_seed": "1"}
    assert own.items() <= encode(a, form, metadata=own).metadata.items()
    said = (
        r"^`metadata` must leave 'ss_base_model_version', 'modelspec.architecture' to the format"
        r" and to base='sd_v1', but sets them\. Leave them out\.$"
    )
    with pytest.raises(ConfigError, match=said):
        encode(a, form, metadata=own, base="sd_v1")
