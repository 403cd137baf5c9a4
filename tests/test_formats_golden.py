"""Files that other programs wrote, read without any model, give the weights they computed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.testing import assert_close

from lora_core import CorruptFileError, MismatchError
from lora_core._errors import ConfigError, UnsupportedFileError
from lora_core._formats import Adapter, read
from lora_core._formats.deltas import dense_delta
from lora_core._formats.naming import Host, Resolution, resolve
from tests.golden import COMPONENTS, GOLDEN, cases, file_of, weights_of

TRAPS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "traps" / "traps.json").read_text())
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"


def tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def hosts(weights: dict[str, Tensor]) -> list[Host]:
    kinds = {2: "linear", 4: "conv"}
    return [
        Host(name.removesuffix(".weight"), kinds.get(w.ndim, ""), tuple(w.shape))
        for name, w in weights.items()
        if name.endswith(".weight") and w.ndim > 1
    ]


def resolved(adapter: Adapter, weights: dict[str, dict[str, Tensor]]) -> Resolution:
    return resolve(adapter.layers, {part: hosts(w) for part, w in weights.items()}, "x")


def read_case(case: Path, about: dict[str, Any]) -> Adapter:
    """The case's adapter, with what its format doesn't store."""
    path = file_of(case, about)
    if about["peer"] != "loralib":
        return read(path)
    alphas = about["r_alpha_of_each_layer (not in the file!)"]
    return read(
        path,
        allow_pickle=True,
        alpha={name: alpha for name, (_, alpha) in alphas.items()},
        enable_lora=about["enable_lora"],
    )


def deltas(
    adapter: Adapter, weights: dict[str, dict[str, Tensor]], about: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """What each module's weight gains, by the names that the peer's deltas have."""
    there = resolved(adapter, weights)
    assert not there.missing
    assert not there.elsewhere
    for name, (part, path) in there.found.items():
        prefix = {v: k for k, v in COMPONENTS.items()}.get(part, part)
        delta = dense_delta(
            name,
            adapter.layers[name],
            weights[part][f"{path}.weight"].float(),
            kind="embedding" if path == "emb" else "",
            transposed=path in about.get("fan_in_fan_out", ()),
        )
        yield f"{prefix}.{path}.weight".lstrip("."), delta


@pytest.mark.parametrize("name", cases())
def test_a_peers_file_gives_the_deltas_that_the_peer_computed(name: str) -> None:
    case = GOLDEN / name
    about = json.loads((case / "case.json").read_text())
    adapter = read_case(case, about)
    ours = dict(deltas(adapter, weights_of(case, about), about))
    # with older names of the same modules
    theirs = {
        k.replace("te1.text_model.", "te1."): t
        for k, t in tensors(case / "delta.safetensors").items()
    }
    assert set(theirs) <= set(ours)
    assert "base" in about or set(theirs) == set(ours)  # of large models a sample is kept
    for key, delta in theirs.items():
        assert delta.any(), "a peer's delta of nothing says nothing"
        bound = about["tolerance"] * delta.abs().max().item()
        assert_close(ours[key], delta, rtol=0, atol=bound, msg=lambda said, k=key: f"{k}: {said}")


@pytest.mark.parametrize(
    ("name", "algorithm"), [("lycoris/refuse_loha", "LoHa"), ("lycoris/refuse_oft", "OFT")]
)
def test_another_algorithms_file_is_refused_by_its_name(name: str, algorithm: str) -> None:
    with pytest.raises(
        UnsupportedFileError, match=rf"^'.*' must hold LoRA, but holds {algorithm}:"
    ):
        read(GOLDEN / name / "lycoris.safetensors")


# -- traps: odd and hostile files, each with what is to become of it

SCALES = {
    "alpha_bf16_0d_rounded": {STEM: 2.703125 / 4},
    "alpha_int64": {STEM: 0.5},
    "alpha_missing_some": {STEM: 0.25, STEM.replace("attn1_to_q", "attn2_to_k"): 1.0},
    "alpha_negative": {STEM: -0.5},
    "alpha_shape_1": {STEM: 0.5},
    "alpha_zero": {STEM: 0.0},
    "comfy_diffusion_model": {
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q": 0.5,
    },
    "float64": {STEM: 0.5},
    "fp16_product_overflow": {STEM: 0.5},
    "fp8_e5m2": {STEM: 0.5},
    "linear_with_4d_weights": {STEM: 0.5},
    "magnitude_with_weight": {f"unet.{UNET}": 1.0},
    "metadata_contradicts": {STEM: 0.5},
    "metadata_odd": {STEM: 0.5},
    "mixed_rank": {
        "lora_unet_down_blocks_1_resnets_0_conv1": 0.5,
        "lora_unet_mid_block_attentions_0_proj_in": 1.0,
        STEM: 1.0,
        STEM.replace("attn1_to_q", "attn2_to_k"): 1.0,
    },
    "te1_prefix_on_sd15": {f"lora_te1_text_model_{TEXT.replace('.', '_')}": 0.5},
    "te_only": {f"lora_te_text_model_{TEXT.replace('.', '_')}": 0.5},
}
REFUSED = {
    "is_git_lfs_pointer": (UnsupportedFileError, "It looks like a git-lfs pointer"),
    "is_pickle_named": (UnsupportedFileError, "It looks like a zip archive, as torch.save writes"),
    "missing_up": (CorruptFileError, f"must have both factors, but '{STEM}' has only the down"),
    "peft_default_in_key": (ConfigError, f"is missing for '{UNET}': this kind of file"),
    "rank_mismatch": (CorruptFileError, f"'{STEM}' in '.*' must be .* down (4, 16) and up (16, 3)"),
    "st_duplicate_key": (CorruptFileError, "its header is not valid: a key stands twice"),
    "st_header_deep_nesting": (CorruptFileError, "is not valid: it is nested too deeply"),
    "st_header_len_99MB_short_file": (CorruptFileError, "it has no header"),
    "st_header_not_json": (CorruptFileError, "its header is not valid: Expecting value"),
    "st_header_not_utf8": (CorruptFileError, "its header is not valid: 'utf-8' codec"),
    "st_leading_spaces": (UnsupportedFileError, "must hold LoRA, .* it has none"),
    "st_negative_offset": (CorruptFileError, "invalid value: integer `-16`"),
    "st_scalar": (UnsupportedFileError, "its keys are of no format that is known: 's'"),
    "st_shape_size_mismatch": (CorruptFileError, "invalid shape, data type, or offset"),
    "st_truncated": (CorruptFileError, "file not fully covered"),
    "st_unknown_dtype": (CorruptFileError, "unknown variant `Q4_K`"),
    "transposed_factors": (
        CorruptFileError,
        "down (12, 4) and up (4, 16). They look transposed",
    ),
    "weights_inf_fp16": (CorruptFileError, f"a factor of '{STEM}' holds NaN or infinity"),
    "zero_size_1d": (CorruptFileError, f"'{STEM}' has down (0,) and up (0,): shards"),
}
UNFIT = {
    "both_spellings_same_module": (
        f"'{UNET}' has '{STEM}', 'lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q'"
    ),
    "conv3x3_with_1x1_down": (
        "'down_blocks.1.resnets.0.conv1' must fit a weight of kind 'conv' of shape (12, 8, 3, 3),"
        " but has lora_A (4, 8, 1, 1), lora_B (12, 4, 1, 1). A 1x1 down-projection needs"
    ),
    "wrong_in_features": f"'{UNET}' must fit a weight of kind 'linear' of shape (16, 16), but has"
    " lora_A (4, 12), lora_B (16, 4)",
}
SD15 = {"base": [f"diffusers_base/sd15_tiny_{part}.safetensors" for part in ("unet", "te1")]}


def spoken(said: str) -> str:
    """A message as a pattern, its ``.*`` kept."""
    return re.escape(said).replace(re.escape(".*"), ".*")


def test_every_trap_has_its_test() -> None:
    told = {*SCALES, *REFUSED, *UNFIT, "pickle_list_of_parameters"}
    assert told == {name for name in TRAPS if not name.startswith("_")}


@pytest.mark.parametrize("name", SCALES)
def test_an_odd_file_is_read_at_its_scale_and_fits_the_model(name: str) -> None:
    adapter = read(GOLDEN / "traps" / TRAPS[name]["file"])
    assert {n: layer.settings.scale for n, layer in adapter.layers.items()} == SCALES[name]
    weights = weights_of(GOLDEN, SD15)
    there = resolved(adapter, weights)
    assert set(there.found) == set(adapter.layers)
    for key, (part, path) in there.found.items():
        layer, weight = adapter.layers[key], weights[part][f"{path}.weight"]
        delta = dense_delta(key, layer, weight)
        down, up = (layer.parts[half].float().flatten(1) for half in ("lora_A", "lora_B"))
        plain = layer.settings.scale * (up @ down).reshape(weight.shape)
        assert delta.isfinite().all()
        if "lora_magnitude" not in layer.parts:
            assert_close(delta, plain.to(delta.dtype))


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_can_not_be_meant_is_refused(name: str) -> None:
    kind, said = REFUSED[name]
    with pytest.raises(kind, match=spoken(said)) as caught:
        read(GOLDEN / "traps" / TRAPS[name]["file"])
    assert type(caught.value) is kind
    assert TRAPS[name]["file"] in str(caught.value)


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_that_does_not_fit_the_model_is_refused(name: str) -> None:
    adapter = read(GOLDEN / "traps" / TRAPS[name]["file"])
    weights = weights_of(GOLDEN, SD15)
    with pytest.raises(MismatchError, match=re.escape(UNFIT[name])):
        for key, (part, path) in resolved(adapter, weights).found.items():
            dense_delta(path, adapter.layers[key], weights[part][f"{path}.weight"])


def test_an_alpha_of_zero_is_noted() -> None:
    notes = read(GOLDEN / "traps" / "alpha_zero.safetensors").notes
    assert notes == (
        f"alpha is 0, so that these add nothing (some programs read it as the rank): '{STEM}'",
    )


def test_float8_is_read_as_float32_and_noted() -> None:
    adapter = read(GOLDEN / "traps" / "fp8_e5m2.safetensors")
    assert adapter.layers[STEM].parts["lora_A"].dtype == torch.float32
    assert adapter.notes == (f"read as float32, as float8 has no arithmetic: '{STEM}'",)


def test_a_list_of_parameters_is_read_on_request() -> None:
    path = GOLDEN / "traps" / "pickle_list_of_parameters.pt"
    with pytest.raises(UnsupportedFileError, match=r"Pass allow_pickle=True to read its tensors"):
        read(path)
    adapter = read(path, allow_pickle=True)
    (layer,) = adapter.layers.values()
    assert (adapter.format, layer.component, layer.path) == ("cloneofsimo", "unet", "0")
    assert layer.settings.scale == 1
    assert not layer.parts["lora_A"].requires_grad


def test_a_text_encoder_is_found_under_its_older_names(tmp_path: Path) -> None:
    adapter = read(GOLDEN / "traps" / "te_only.safetensors")
    for prefix in ("", "text_model."):
        there = resolve(adapter.layers, {"text_encoder": [Host(prefix + TEXT, "linear", (12, 12))]})
        assert list(there.found.values()) == [("text_encoder", prefix + TEXT)]
