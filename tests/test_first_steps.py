"""What people meet who use the library as they know others: wrappers, names, slips."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lora_core
from lora_core import ConfigError, UnsupportedFileError, _config
from lora_core._errors import CorruptFileError
from lora_core._layers import mixin
from lora_core._layers.updates import active
from lora_core.functional import initial_factors
from lora_core.testing import check_lora


def trained(name: str = "default") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora_core.inject(model, targets="0", rank=2, name=name)
    for p in lora_core.parameters(model):
        p.data.normal_()
    return model


def bare() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel])
def test_a_wrapper_puts_nothing_into_the_names_of_a_file(
    wrap: type[nn.Module], tmp_path: Path
) -> None:
    model, x = trained(), torch.randn(3, 4)
    lora_core.save(model, tmp_path / "plain.safetensors")
    lora_core.save(wrap(model), tmp_path / "wrapped.safetensors")
    there = {
        n: safetensors.torch.load_file(tmp_path / f"{n}.safetensors") for n in ("plain", "wrapped")
    }
    assert list(there["plain"]) == list(there["wrapped"])
    other = wrap(bare())
    lora_core.load(other, tmp_path / "plain.safetensors")
    assert torch.equal(other.module(x), model(x))
    lora_core.save({"unet": wrap(model)}, tmp_path / "k.safetensors", format="kohya")
    assert not any("module" in k for k in safetensors.torch.load_file(tmp_path / "k.safetensors"))


@pytest.mark.parametrize("word", _config.RESERVED)
def test_a_file_that_is_called_as_a_keyword_of_scales_gets_another_name(
    word: str, tmp_path: Path
) -> None:
    lora_core.save({"unet": trained()}, tmp_path / f"{word}.safetensors", format="kohya")
    model = bare()
    assert lora_core.load({"unet": model}, tmp_path / f"{word}.safetensors").adapter == f"{word}_"
    with lora_core.scales(model, **{f"{word}_": 0.5}):
        lora_core.save(model, tmp_path / "again.safetensors")
    assert lora_core.load(bare(), tmp_path / "again.safetensors").adapter == f"{word}_"


def test_inputs_by_keyword_after_one_that_is_left_out_reach_an_update() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor, first: Any = None, second: Any = None) -> Tensor:
            return super().forward(x)

    layer = Layer(3, 3)
    layer.lora_host_class = Layer  # type: ignore[attr-defined]
    x = torch.ones(1)
    assert mixin.inputs_of(layer, (x,), {"second": 5}) == (x, None, 5)


@pytest.mark.parametrize("start", ["numbers", "weight", "inputs"])
def test_a_start_without_a_branch_is_an_error(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_config.STARTS, "new", start)
    with pytest.raises(
        ValueError, match="^`init` must have a branch in `initial_factors`, but 'new'"
    ):
        initial_factors("new", torch.eye(4), 2)


def test_a_setting_that_says_nothing_of_itself_is_not_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = {key for key, setting in _config.SETTINGS.items() if setting.plain}
    assert plain == {
        *("rank", "alpha", "dropout", "dtype", "rslora", "init", "read"),
        "reserve_rank",
    }
    model = trained()
    assert model[0].lora_state.configs["default"].plain
    config = _config.AdapterConfig(2, 2.0, 0.0, torch.float32, module_dropout=0.5)
    assert not config.plain
    assert active(model[0]).is_one_update


def test_a_state_dict_of_an_adapted_model_is_called_one(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "model.safetensors"
    said = (
        "must hold an adapter, but holds the state dict of an adapted model, with keys as '0.lora_"
    )
    for state in (model.state_dict(), {k: t for k, t in model.state_dict().items() if "lora" in k}):
        safetensors.torch.save_file(state, path)
        with pytest.raises(UnsupportedFileError, match=re.escape(said)):
            lora_core.load(bare(), path)
    other = bare()
    lora_core.inject(other, targets="0", rank=2)
    other.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert torch.equal(other[0].lora_B_default, model[0].lora_B_default)


def test_a_pickled_model_is_called_an_object(tmp_path: Path) -> None:
    torch.save(bare(), tmp_path / "m.pt")
    said = "must be a pickle of tensors alone, but"
    with pytest.raises(UnsupportedFileError, match=said) as error:
        lora_core.load(bare(), tmp_path / "m.pt", allow_pickle=True)
    assert "save" in str(error.value)
    assert isinstance(error.value, CorruptFileError)


def test_a_folder_is_not_named_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    said = f"`path` must be a folder for the two files of format='peft', but {str(path)!r} is named"
    with pytest.raises(
        ConfigError, match=f"^{re.escape(said)} as a file. Name a folder, or choose"
    ):
        lora_core.save(trained(), path, format="peft")
    assert not path.exists()


def test_a_model_that_draws_is_refused_by_the_laws() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(())

    with pytest.raises(ConfigError, match="^`model` must give the same twice for the laws to be"):
        check_lora(nn.Sequential(Noisy(4, 4)), torch.ones(2, 4), targets="0", rank=1)


@pytest.mark.parametrize("given", [0.5, {"my-style": 0.5}, "style"])
def test_strengths_that_are_given_in_place_are_told_how_to_be_named(given: object) -> None:
    said = (
        f"to strengths, or None for each sample, but got {given!r}. Write scales(model, style=0.5)"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        lora_core.scales(trained(), given)  # type: ignore[arg-type]


def test_adapters_are_combined_at_one_without_weights() -> None:
    a = lora_core.adapter_of(trained())
    once, named = lora_core.combine([a, a]), lora_core.combine([a, a], [1, 1])
    for part, t in once.layers["0"].parts.items():
        assert torch.equal(t, named.layers["0"].parts[part])
    assert copy.deepcopy(once).layers.keys() == {"0"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m: lora_core.load(m, m.state_dict()),
            "a path or an `Adapter`, but is OrderedDict.",
        ),
        (lambda m: lora_core.load(m, 3), "a path or an `Adapter`, but is int."),
        (lora_core.read, "a path, but is Sequential."),
        (lambda m: lora_core.save(m, m), "a path, but is Sequential."),
    ],
)
def test_what_is_no_path_is_told_apart_from_one(call: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^`path` must be {re.escape(said)}$"):
        call(trained())


def test_a_model_is_saved_and_an_adapter_is_written(tmp_path: Path) -> None:
    said = "`adapter` must be an `Adapter`, as `adapter_of` and `read` give it, but is Sequential."
    with pytest.raises(ConfigError, match=f"^{re.escape(said)} `save` writes that of a model.$"):
        lora_core.write(trained(), tmp_path / "a")  # type: ignore[arg-type]
