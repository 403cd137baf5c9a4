"""Files that other programs wrote, read without any model, give the weights they computed."""

import json
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

GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = ("lora.safetensors", "lycoris.safetensors", "pytorch_lora_weights.safetensors", "lora.pt")
CASES = sorted(
    str(case.parent.relative_to(GOLDEN))
    for case in GOLDEN.glob("*/*/case.json")
    if not case.parent.name.startswith("refuse_")
)
COMPONENTS = {"te1": "text_encoder", "te2": "text_encoder_2"}
TRAPS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "traps" / "traps.json").read_text())
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"


def tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def weights_of(case: Path, about: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The base's weights by component, in the order of the model's modules; "" for a plain one."""
    if "base" not in about:
        return {"": tensors(case / "base.safetensors")}
    found = {}
    for file in about["base"]:
        part = Path(file).stem.rpartition("_")[2]
        found[COMPONENTS.get(part, part)] = tensors(GOLDEN / file)
    skeleton = Path(about["base"][0]).name.partition("_unet")[0]
    described = json.loads((GOLDEN / "diffusers_base" / f"{skeleton}_skeleton.json").read_text())
    order = [f"{name}.weight" for name in described["unet_modules"]]
    found["unet"] = {name: found["unet"][name] for name in order}
    for part, listed in described["text_modules"].items():
        component = COMPONENTS[part]
        found[component] = {name: found[component][name] for name in listed}
    return found


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
    if about["peer"] == "peft":
        return read(case)
    path = next(case / name for name in NAMES if (case / name).exists())
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


@pytest.mark.parametrize("name", CASES)
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
