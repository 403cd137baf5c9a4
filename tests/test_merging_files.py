"""Merging into checkpoint files what is more, or less, than factors on a matrix."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_core
from lora_core import Adapter, MismatchError, UnsupportedLayerError, merge_file
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer


def whole(path: str, kind: str = "difference", **parts: Tensor) -> AdapterLayer:
    return AdapterLayer(kind, None, parts, path=path)


def factors(ins: int, outs: int, **about: Any) -> AdapterLayer:
    config = AdapterConfig(rank=2, alpha=2.0, dropout=0.0, dtype=torch.float32)
    parts = {"lora_A": torch.randn(2, ins), "lora_B": torch.randn(outs, 2)}
    return AdapterLayer("linear", config, parts, **about)


def merged(base: dict[str, Tensor], folder: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors after a merge of `layers` into these."""
    layers = options.pop("layers")
    safetensors.torch.save_file(base, folder / "base.safetensors")
    merge_file(folder / "base.safetensors", Adapter("a", layers), folder / "out", **options)
    return safetensors.torch.load_file(folder / "out")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 2, dtype=torch.int8), torch.full((3, 2), torch.nan), -torch.zeros(3, 2)],
)
def test_a_bias_alone_is_merged_beside_a_weight_that_is_never_read(
    weight: Tensor, tmp_path: Path
) -> None:
    base = {"lin.weight": weight, "lin.bias": torch.ones(3)}
    after = merged(base, tmp_path, layers={"lin": whole("lin", bias=torch.ones(3))})
    assert torch.equal(after["lin.bias"], torch.full((3,), 2.0))
    assert after["lin.weight"].view(torch.int8).equal(weight.view(torch.int8))


@pytest.mark.parametrize(
    ("bias", "error", "said"),
    [
        (torch.zeros(3, dtype=torch.int64), UnsupportedLayerError, "'lin.bias' is I64"),
        (torch.zeros(3).to(torch.float8_e4m3fn), UnsupportedLayerError, "'lin.bias' is F8_E4M3"),
        (
            torch.zeros(1),
            MismatchError,
            r"the adapter's, \(3,\), but 'lin.bias' of '.*' has \(1,\)",
        ),
    ],
)
def test_a_bias_must_fit_as_a_weight_must(
    bias: Tensor, error: type[Exception], said: str, tmp_path: Path
) -> None:
    base = {"lin.weight": torch.zeros(3, 2), "lin.bias": bias}
    layers = {"lin": whole("lin", weight=torch.ones(3, 2), bias=torch.ones(3))}
    with pytest.raises(error, match=said):
        merged(base, tmp_path, layers=layers)
    assert not (tmp_path / "out").exists()


def test_vectors_are_merged_under_their_own_names(tmp_path: Path) -> None:
    base = {"gamma": torch.ones(4), "lin.weight": torch.ones(3, 4), "lin.bias": torch.ones(3)}
    layers = {"gamma": whole("gamma", weight=torch.ones(4))}
    layers["lin.bias"] = whole("lin.bias", weight=torch.ones(3))
    after = merged(base, tmp_path, layers=layers)
    assert torch.equal(after["gamma"], torch.full((4,), 2.0))
    assert torch.equal(after["lin.bias"], torch.full((3,), 2.0))
    assert torch.equal(after["lin.weight"], base["lin.weight"])


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1, 2)])
def test_a_tensor_of_no_or_too_many_dimensions_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    said = rf"^A tensor must have 1 to 5 dimensions to be merged into, but 's' has {len(shape)}\."
    with pytest.raises(UnsupportedLayerError, match=said):
        merged(
            {"s": torch.zeros(shape)}, tmp_path, layers={"s": whole("s", weight=torch.ones(shape))}
        )


def test_a_packed_weight_takes_its_parts_or_the_whole(tmp_path: Path) -> None:
    layers = {
        "a.in_proj_weight": whole("a.in_proj_weight", weight=torch.ones(6, 2)),
        "a.q_proj_weight": whole("a.q_proj_weight", weight=torch.ones(2, 2)),
    }
    said = (
        r"^Each layer must have a tensor of its own, but 'a.in_proj_weight', 'a.q_proj_weight' sh"
    )
    with pytest.raises(MismatchError, match=said):
        merged({"a.in_proj_weight": torch.zeros(6, 2)}, tmp_path, layers=layers)


def test_only_those_that_share_a_tensor_are_named(tmp_path: Path) -> None:
    base = {f"{n}.weight": torch.zeros(3, 2) for n in "xyz"}
    layers = {n: factors(2, 3) for n in "xyz"}
    layers["z.weight"] = whole("z", weight=torch.ones(3, 2))
    with pytest.raises(MismatchError, match="but 'z' has both, which are no low-rank update"):
        merged(base, tmp_path, layers=layers)


def test_the_bases_own_values_beside_factors_are_passed_by(tmp_path: Path) -> None:
    base = {"head.weight": torch.randn(5, 4)}
    layers = {"head": factors(4, 5)}
    alone = merged(base, tmp_path, layers=layers)
    layers["head.weight"] = whole("head", "values", weight=base["head.weight"].clone())
    assert torch.equal(
        merged(base, tmp_path, layers=layers, force=True)["head.weight"], alone["head.weight"]
    )


def test_shapes_beat_what_an_adapter_says_of_its_layers_and_doubt_is_refused(
    tmp_path: Path,
) -> None:
    # PEFT says of a whole adapter what it found of its last layer
    base = {"lin.weight": torch.randn(5, 4), "square.weight": torch.randn(4, 4)}
    layers = {"lin": factors(4, 5, transposed=True), "square": factors(4, 4, transposed=True)}
    said = (
        r"^Square matrices must be stored as all others are, but some of '.*' are stored \(in, out"
        r"\), as the adapter says, and some \(out, in\), as 'lin'\. Pass transposed=True or"
        r" transposed=False for 'square'\.$"
    )
    with pytest.raises(MismatchError, match=said):
        merged(base, tmp_path, layers=layers)
    model = nn.ModuleDict(
        {"lin": nn.Linear(4, 5, bias=False), "square": nn.Linear(4, 4, bias=False)}
    )
    model.load_state_dict(base)
    lora_core.load(model, Adapter("a", layers, format="peft"))
    lora_core.merge(model)
    after = merged(base, tmp_path, layers=layers, transposed=False)
    assert all(torch.equal(after[f"{n}.weight"], m.weight) for n, m in model.items())
