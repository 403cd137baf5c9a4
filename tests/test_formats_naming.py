"""Names of files find their modules in live models: every spelling, no guess, no silent loss."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core import MismatchError
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer
from lora_core._formats.ldm import other_names
from lora_core._formats.naming import Host, Table, resolve

NAMES = Path(__file__).parent / "data" / "names"


def lines(family: str) -> list[list[str]]:
    text = (NAMES / f"kohya_keys_{family}.txt").read_text()
    return [line.split("\t") for line in text.splitlines() if not line.startswith("#")]


def part_of(stem: str) -> str:
    return "unet" if stem.startswith("lora_unet") else stem.partition("_text_model")[0]


def hosts(family: str, part: str) -> list[Host]:
    """The modules of the real model, in its order."""
    found = []
    for _, path, kind, down, up, stem, _ in lines(family):
        if part_of(stem) == part:
            out, seen = json.loads(up.replace("r", "0"))[0], json.loads(down.replace("r", "0"))[1:]
            found.append(Host(path, kind.lower().removesuffix("2d"), (out, *seen)))
    return found


def layer(
    path: str = "",
    component: str = "",
    spelling: str = "dotted",
    shape: tuple[int, ...] = (4, 4),
) -> AdapterLayer:
    parts = {
        "lora_A": torch.zeros(1, *shape[1:]),
        "lora_B": torch.zeros(shape[0], 1, *[1] * (len(shape) - 2)),
    }
    config = AdapterConfig(1, 1.0, 0.0, torch.float32)
    return AdapterLayer("matrix", config, parts, (), component, path, spelling)


def plain(*paths: str) -> list[Host]:
    return [Host(path, "linear", (4, 4)) for path in paths]


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("sd15", "unet"),
        ("sdxl", "unet"),
        ("sd15", "lora_te"),
        ("sdxl", "lora_te1"),
        ("sdxl", "lora_te2"),
    ],
)
def test_the_stems_are_those_of_the_real_model_in_both_spellings(family: str, part: str) -> None:
    prefix = "lora_unet" if part == "unet" else part
    expected = {}
    for _, path, _, _, _, *stems in lines(family):
        if part_of(stems[0]) == part:
            expected |= {stem.removeprefix(f"{prefix}_"): path for stem in stems}
    table = Table.of(hosts(family, part))
    assert not table.collisions
    if part != "unet":  # and without the wrapper that newer models lack
        expected |= {stem.removeprefix("text_model_"): path for stem, path in expected.items()}
    assert table.stems == expected
    assert len(expected) >= 140


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_spelling_of_a_unet_gives_the_other(family: str) -> None:
    paths = [host.path for host in hosts(family, "unet")]
    there = other_names(paths)
    assert list(there) == paths
    back = other_names(list(there.values()))
    assert [back[there[path]] for path in paths] == paths
    stems = {name.replace(".", "_") for name in there.values()}
    assert stems == {x[6].removeprefix("lora_unet_") for x in lines(family) if "unet" in x[5]}


def test_norms_have_names_too() -> None:
    there = other_names(
        ["down_blocks.0.resnets.1.norm2", "conv_norm_out", "mid_block.resnets.1.norm1"]
    )
    assert list(there.values()) == [
        "input_blocks.2.0.out_layers.0",
        "out.0",
        "middle_block.2.in_layers.0",
    ]


def test_a_model_that_is_no_unet_has_one_spelling() -> None:
    assert other_names(["conv_in", "blocks.0.fc"]) == {}


@pytest.mark.parametrize(("count", "table"), [(144, "unet_default"), (224, "unet_extended")])
def test_numbers_mean_the_modules_in_their_order(count: int, table: str) -> None:
    order = json.loads((NAMES / "cloneofsimo_order_sd15.json").read_text())[table]
    assert len(order) == count
    shapes = {host.path: host.shape for host in hosts("sd15", "unet")}
    layers = {
        f"unet:{n}": layer(str(n), "unet", "index", shapes[path]) for n, path in enumerate(order)
    }
    there = resolve(layers, {"unet": hosts("sd15", "unet")})
    assert [there.found[f"unet:{n}"] for n in range(count)] == [("unet", path) for path in order]


def test_numbers_of_later_files_have_the_feed_forward_last() -> None:
    live = hosts("sd15", "unet")
    order = [h for h in live if re.search(r"\.attn[12]\.|ff\.net\.0\.proj", h.path)]
    layers = {
        f"unet:{n}": layer(str(n), "unet", "index", host.shape) for n, host in enumerate(order)
    }
    there = resolve(layers, {"": live})
    assert [path for _, path in there.found.values()] == [host.path for host in order]


def test_numbers_of_a_text_encoder_are_its_attention() -> None:
    order = json.loads((NAMES / "cloneofsimo_order_sd15.json").read_text())["text_encoder"]
    layers = {
        f"text_encoder:{n}": layer(str(n), "text_encoder", "index", (768, 768))
        for n in range(len(order))
    }
    there = resolve(layers, {"text_encoder": hosts("sd15", "lora_te")})
    assert [path for _, path in there.found.values()] == order


def test_numbers_that_fit_no_order_are_refused() -> None:
    layers = {"unet:0": layer("0", "unet", "index", (320, 77))}
    said = r"^The modules that 'x\.st' means by numbers must have the sizes of its factors, but"
    with pytest.raises(MismatchError, match=said):
        resolve(layers, {"unet": hosts("sd15", "unet")}, "x.st")
    layers = {"unet:224": layer("224", "unet", "index", (320, 320))}
    with pytest.raises(MismatchError, match=r"which have 144, 224 modules"):
        resolve(layers, {"unet": hosts("sd15", "unet")}, "x.st")


def test_a_stem_of_two_modules_is_in_no_table_and_refused_where_it_is_used() -> None:
    live = plain("a.b_c", "a_b.c", "d")
    table = Table.of(live)
    assert table.stems == {"d": "d"}
    assert table.collisions == {"a_b_c": ("a.b_c", "a_b.c")}
    assert resolve({"lycoris_d": layer("d", "", "stem")}, {"": live}).found
    said = r"must mean one module, but 'a_b_c' is the spelling of 'a\.b_c', 'a_b\.c'\. Rename it"
    with pytest.raises(MismatchError, match=said):
        resolve({"lycoris_a_b_c": layer("a_b_c", "", "stem")}, {"": live})
    # with dots it is clear
    assert resolve({"a.b_c": layer(), "a_b.c": layer()}, {"": live}).found == {
        "a.b_c": ("", "a.b_c"),
        "a_b.c": ("", "a_b.c"),
    }


def test_a_name_of_its_own_is_no_collision_with_another_modules_stem() -> None:
    live = plain("a_b", "a.b")
    assert resolve({"a_b": layer()}, {"": live}).found == {"a_b": ("", "a_b")}


def test_one_module_under_two_names_is_refused() -> None:
    layers = {
        "lora_te_encoder_layers_0_mlp_fc1": layer(
            "encoder_layers_0_mlp_fc1", "text_encoder", "stem"
        ),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": layer(
            "text_model.encoder.layers.0.mlp.fc1", "text_encoder"
        ),
    }
    live = {"text_encoder": plain("encoder.layers.0.mlp.fc1")}
    said = (
        r"must have one name in 'x', but 'encoder\.layers\.0\.mlp\.fc1' has .*Keep one of the two"
    )
    with pytest.raises(MismatchError, match=said):
        resolve(layers, live, "x")


def test_two_encoders_for_one_model_ask_which_it_is() -> None:
    fc = "text_model.encoder.layers.0.mlp.fc1"
    layers = {f"{c}.{fc}": layer(fc, c) for c in ("text_encoder", "text_encoder_2")}
    with pytest.raises(MismatchError, match=re.escape('Say which part the model is, as in {"text')):
        resolve(layers, {"": plain(fc)}, "x")
    there = resolve(layers, {"text_encoder_2": plain(fc)}, "x")
    assert there.found == {f"text_encoder_2.{fc}": ("text_encoder_2", fc)}
    assert there.elsewhere == {"text_encoder": [f"text_encoder.{fc}"]}


def test_what_a_model_lacks_is_told_with_the_nearest_name() -> None:
    layers = {
        "unet.down.to_qq": layer("down.to_qq", "unet"),
        "unet.down.to_k": layer("down.to_k", "unet"),
        "text_encoder.fc": layer("fc", "text_encoder"),
    }
    there = resolve(layers, {"unet": plain("down.to_q", "down.to_k")})
    assert there.missing == {"unet.down.to_qq": "down.to_q"}
    assert there.elsewhere == {"text_encoder": ["text_encoder.fc"]}
    assert there.found == {"unet.down.to_k": ("unet", "down.to_k")}


def test_a_model_of_no_name_takes_its_part_of_a_pipelines_file() -> None:
    layers = {
        "lora_unet_down_to_k": layer("down_to_k", "unet", "stem"),
        "lora_unet_down_to_v": layer("down_to_v", "unet", "stem"),
        "lora_te_fc": layer("fc", "text_encoder", "stem"),
    }
    there = resolve(layers, {"": plain("down.to_k")})
    assert there.found == {"lora_unet_down_to_k": ("", "down.to_k")}
    assert list(there.missing) == ["lora_unet_down_to_v"]
    assert there.elsewhere == {"text_encoder": ["lora_te_fc"]}


def test_where_nothing_fits_all_is_missing() -> None:
    there = resolve({"lora_te_fc": layer("fc", "text_encoder", "stem")}, {"": plain("down.to_k")})
    assert list(there.missing) == ["lora_te_fc"]
    assert not there.elsewhere


def test_a_module_called_like_a_component_is_found_by_its_whole_name() -> None:
    layers = {"unet.fc": layer("fc", "unet")}
    assert resolve(layers, {"": plain("unet.fc")}).found == {"unet.fc": ("", "unet.fc")}


def test_a_name_without_a_component_that_two_models_have_is_refused() -> None:
    live = {"unet": plain("fc"), "text_encoder": plain("fc", "head")}
    said = r"must mean one module, but 'lycoris_fc' of 'x' is in 'unet', 'text_encoder'\. Load it"
    with pytest.raises(MismatchError, match=said):
        resolve({"lycoris_fc": layer("fc", "", "stem")}, live, "x")
    there = resolve({"lycoris_head": layer("head", "", "stem")}, live, "x")
    assert there.found == {"lycoris_head": ("text_encoder", "head")}


def test_an_attention_means_the_matrix_of_its_three_projections() -> None:
    live = plain("block.attn.in_proj_weight", "block.attn.out_proj")
    there = resolve({"block.attn": layer(), "block.attn.out_proj": layer()}, {"": live})
    assert [path for _, path in there.found.values()] == [host.path for host in live]


def test_a_transformer_goes_by_the_name_of_a_unet() -> None:
    layers = {"lora_unet_fc": layer("fc", "unet", "stem")}
    assert resolve(layers, {"transformer": plain("fc")}).found == {
        "lora_unet_fc": ("transformer", "fc")
    }


def test_values_may_stand_beside_factors_of_one_module() -> None:
    bias = AdapterLayer("values", None, {"bias": torch.zeros(4)}, path="fc")
    assert len(resolve({"fc": layer(), "fc.bias": bias}, {"": plain("fc")}).found) == 2


segments = st.lists(
    st.from_regex(r"[a-z0-9]{1,3}(_[a-z0-9]{1,3})?", fullmatch=True), min_size=1, max_size=4
)


@given(st.lists(segments.map(".".join), min_size=1, max_size=8, unique=True))
def test_every_stem_finds_its_module_or_is_refused(paths: list[str]) -> None:
    table = Table.of(plain(*paths))
    for path in paths:
        stem = path.replace(".", "_")
        alike = [other for other in paths if other.replace(".", "_") == stem]
        assert table.find(path, "dotted") == path
        if len(alike) == 1:
            assert table.find(stem, "stem") == path
        else:
            with pytest.raises(MismatchError):
                table.find(stem, "stem")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_both_spellings_of_every_module_resolve(family: str) -> None:
    live = {"unet": hosts(family, "unet")}
    for spelling in (5, 6):
        stems = [x[spelling] for x in lines(family) if x[5].startswith("lora_unet")]
        layers = {s: layer(s.removeprefix("lora_unet_"), "unet", "stem") for s in stems}
        there = resolve(layers, live)
        assert not there.missing
        assert {path for _, path in there.found.values()} == {h.path for h in live["unet"]}
