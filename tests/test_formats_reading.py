"""Any program's file into the neutral form: exact numbers, or a refusal that says why."""

import copy
import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import lora_core
from lora_core import ConfigError, CorruptFileError, LoRAError, MismatchError
from lora_core._errors import UnsupportedFileError
from lora_core._formats import Adapter, container, read
from lora_core._formats.deltas import bias_delta, dense_delta
from lora_core._formats.fitting import fitted

GOLDEN = Path(__file__).parent / "data" / "golden"
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
KOHYA = "lora_unet_mid_to_q"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def store(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    whole = {key: t.contiguous().clone() for key, t in tensors.items()}
    safetensors.torch.save_file(whole, path, metadata)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def kohya(module: str = KOHYA, rank: int = 2, alpha: float | None = 1.0) -> dict[str, Tensor]:
    tensors = {
        f"{module}.lora_down.weight": rand(rank, 5),
        f"{module}.lora_up.weight": rand(4, rank),
    }
    return tensors | ({} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)})


def pair(module: str, rank: int = 2, ins: int = 5, outs: int = 4) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": rand(rank, ins), f"{module}.lora_B.weight": rand(outs, rank)}


def only(adapter: Adapter) -> Any:
    (layer,) = adapter.layers.values()
    return layer


# -- laws: what a program writes comes back as what it means

segment = st.from_regex(r"[a-z0-9]{1,3}(_[a-z0-9]{1,3})?", fullmatch=True)
names = st.lists(segment, min_size=1, max_size=3).map(".".join)


class Written:
    """One module as a program holds it, and the update that it means."""

    def __init__(self, draw: Any) -> None:
        self.rank, self.alpha = draw(st.integers(1, 4)), draw(st.floats(-8, 8, width=16))
        self.dtype = draw(st.sampled_from(DTYPES))
        self.kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 3)]))
        ins, outs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.shape = (outs, ins, *self.kernel)
        self.down = torch.randn(self.rank, ins, *self.kernel, generator=seed).to(self.dtype)
        ones = [1] * len(self.kernel)
        self.up = torch.randn(outs, self.rank, *ones, generator=seed).to(self.dtype)

    def delta(self, scale: float) -> Tensor:
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return scale * product.reshape(self.shape)

    def check(self, adapter: Adapter, name: str, scale: float) -> None:
        layer = adapter.layers[name]
        assert layer.settings.rank == self.rank
        assert layer.parts["lora_A"].dtype == self.dtype
        assert layer.settings.scale == pytest.approx(scale, rel=1e-12)
        delta = dense_delta(name, layer, torch.zeros(self.shape))
        assert_close(delta, self.delta(scale).to(delta.dtype), rtol=1e-5, atol=1e-5)


@st.composite
def written(draw: Any, unique: Any = lambda name: name) -> dict[str, Written]:
    found = draw(st.lists(names, min_size=1, max_size=4, unique_by=unique))
    return {name: Written(draw) for name in found}


@SAME_FOLDER
@given(
    written(lambda name: name.replace(".", "_")),
    st.sampled_from(["lora_unet", "lora_te", "lora_te1", "lora_te2", "lycoris"]),
    st.sampled_from([*DTYPES, torch.int64, None]),
    st.booleans(),
)
def test_kohyas_files(
    tmp_path: Path, modules: dict[str, Written], prefix: str, kind: torch.dtype | None, flat: bool
) -> None:
    tensors = {}
    for name, module in modules.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": module.down, f"{key}.lora_up.weight": module.up}
        if kind is not None:
            alpha = torch.tensor(module.alpha).to(kind)
            tensors[f"{key}.alpha"] = alpha.reshape(1) if flat else alpha
    adapter = read(store(tmp_path / "x.safetensors", tensors, {"ss_network_dim": "77"}))
    assert adapter.format == ("lycoris" if prefix == "lycoris" else "kohya")
    assert adapter.metadata == {"ss_network_dim": "77"}
    assert len(adapter.layers) == len(modules)
    for name, module in modules.items():
        stem = name.replace(".", "_")
        alpha = module.rank if kind is None else torch.tensor(module.alpha).to(kind).item()
        module.check(adapter, f"{prefix}_{stem}", alpha / module.rank)
        layer = adapter.layers[f"{prefix}_{stem}"]
        assert (layer.path, layer.spelling) == (stem, "stem")
        assert layer.alpha_from == ("the file" if kind is not None else "missing, and so the rank")


@SAME_FOLDER
@given(written(), st.booleans(), st.booleans(), st.floats(-4, 4))
def test_pefts_folders(
    tmp_path: Path, modules: dict[str, Written], rslora: bool, named: bool, alpha: float
) -> None:
    adapter_name = ".default" if named else ""
    tensors, first = {}, next(iter(modules))
    for name, module in modules.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A{adapter_name}.weight"] = module.down
        tensors[f"{key}.lora_B{adapter_name}.weight"] = module.up
    config = {
        "peft_type": "LORA",
        "r": 77,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "alpha_pattern": {f"^{re.escape(first)}": 3},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    store(tmp_path / "adapter_model.safetensors", tensors)
    adapter = read(tmp_path)
    assert adapter.format == "peft"
    assert set(adapter.layers) == set(modules)
    for name, module in modules.items():
        by = math.sqrt(module.rank) if rslora else module.rank
        module.check(adapter, name, (3 if name == first else alpha) / by)


@SAME_FOLDER
@given(
    written(),
    st.sampled_from(["unet", "text_encoder", "text_encoder_2", "transformer"]),
    st.sampled_from([("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")]),
    st.booleans(),
)
def test_diffusers_files(
    tmp_path: Path, modules: dict[str, Written], part: str, old: tuple[str, str], new: bool
) -> None:
    halves = ("lora_A", "lora_B") if new else old
    tensors = {}
    for name, module in modules.items():
        tensors[f"{part}.{name}.{halves[0]}.weight"] = module.down
        tensors[f"{part}.{name}.{halves[1]}.weight"] = module.up
    about = {f"{part}.peft_type": "LORA", f"{part}.lora_alpha": 5, "prior.peft_type": "LORA"}
    metadata = {"lora_adapter_metadata": json.dumps(about)}
    for given_metadata in (None, metadata):
        adapter = read(store(tmp_path / "x.safetensors", tensors, given_metadata))
        assert adapter.format == "diffusers"
        for name, module in modules.items():
            scale = 5 / module.rank if given_metadata and new else 1.0
            module.check(adapter, f"{part}.{name}", scale)
            layer = adapter.layers[f"{part}.{name}"]
            assert (layer.component, layer.path) == (part, name)


@SAME_FOLDER
@given(written(), st.booleans())
def test_loralibs_files(tmp_path: Path, modules: dict[str, Written], ordered: bool) -> None:
    tensors: dict[str, Tensor] = OrderedDict() if ordered else {}
    for name, module in modules.items():
        tensors |= {
            f"{name}.lora_A": module.down.flatten(1),
            f"{name}.lora_B": module.up.flatten(1),
        }
    torch.save(tensors, tmp_path / "x.pt")
    alphas = {name: module.alpha for name, module in modules.items()}
    adapter = read(tmp_path / "x.pt", allow_pickle=True, alpha=alphas)
    for name, module in modules.items():
        module.check(adapter, name, module.alpha / module.rank)
        assert adapter.layers[name].alpha_from == "the caller"


@SAME_FOLDER
@given(written(), st.booleans())
def test_dotted_files_with_alphas(
    tmp_path: Path, modules: dict[str, Written], peft_halves: bool
) -> None:
    halves = ("lora_A", "lora_B") if peft_halves else ("lora_down", "lora_up")
    tensors = {}
    for name, module in modules.items():
        tensors[f"diffusion_model.{name}.{halves[0]}.weight"] = module.down
        tensors[f"diffusion_model.{name}.{halves[1]}.weight"] = module.up
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(module.alpha)
    adapter = read(store(tmp_path / "x.safetensors", tensors))
    for name, module in modules.items():
        module.check(adapter, f"diffusion_model.{name}", module.alpha / module.rank)
        assert adapter.layers[f"diffusion_model.{name}"].component == "unet"


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True), (True,) * 3])
def test_loralibs_merged_projections_become_plain_factors(
    tmp_path: Path, enabled: tuple[bool, ...]
) -> None:
    rank, ins, height, count = 2, 5, 3, sum(enabled)
    down, up = rand(rank * count, ins), rand(height * count, rank)
    torch.save({"qkv.lora_A": down, "qkv.lora_B": up}, tmp_path / "x.pt")
    blocks = iter(u @ d for u, d in zip(up.split(height), down.split(rank), strict=True))
    expected = torch.cat([next(blocks) if e else torch.zeros(height, ins) for e in enabled])
    for given_slots in (
        (list(enabled), {"qkv": list(enabled)}) if count > 1 else ({"qkv": enabled},)
    ):
        adapter = read(tmp_path / "x.pt", allow_pickle=True, alpha=4, enable_lora=given_slots)
        layer = adapter.layers["qkv"]
        assert layer.settings.scale == 2
        assert_close(
            dense_delta("qkv", layer, torch.zeros(height * len(enabled), ins)), 2 * expected
        )


def test_loralibs_other_settings_are_asked_for_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"qkv.lora_A": rand(4, 5), "qkv.lora_B": rand(6, 2), "fc.bias": rand(3)}, file)
    options = {"allow_pickle": True, "alpha": 1}
    said = r"^`enable_lora` must be given for 'qkv' of '.*x\.pt', but is None: its factors \(4, 5\)"
    with pytest.raises(ConfigError, match=said):
        read(file, **options)
    with pytest.raises(ConfigError, match=r"^`enable_lora` must name modules of .* but has 'k';"):
        read(file, **options, enable_lora={"k": [True], "qkv": [True, True]})
    with pytest.raises(ConfigError, match=r"^`enable_lora` must be a list of True and False, one"):
        read(file, **options, enable_lora=[False])
    with pytest.raises(CorruptFileError, match=r"must have factors for the 3 projections of `en"):
        read(file, **options, enable_lora=[True, True, True])
    adapter = read(file, **options, enable_lora=[True, True])
    assert adapter.layers["fc"].kind == "values"
    torch.testing.assert_close(adapter.layers["fc"].parts["bias"], rand(3))
    with pytest.raises(ConfigError, match=r"but has none to be for; the file has none"):
        read(store(tmp_path / "y.safetensors", kohya()), enable_lora=[True])


def test_a_whole_state_dict_is_refused_whose_weights_may_be_merged(tmp_path: Path) -> None:
    torch.save(
        {"fc.lora_A": rand(2, 5), "fc.lora_B": rand(4, 2), "fc.weight": rand(4, 5)},
        tmp_path / "x.pt",
    )
    said = r"must hold an adapter alone, but holds 1 parameters of the model itself: 'fc\.weight'"
    with pytest.raises(UnsupportedFileError, match=said):
        read(tmp_path / "x.pt", allow_pickle=True, alpha=1)


def test_minloras_files_in_its_three_orientations(path: Path) -> None:
    key = "{}.parametrizations.weight.0.lora_{}".format
    tensors = {
        key("fc", "A"): rand(2, 5),
        key("fc", "B"): rand(4, 2),
        key("conv", "A"): rand(2, 27),
        key("conv", "B"): rand(4, 2),
        key("emb", "A"): rand(7, 2),
        key("emb", "B"): rand(2, 6),
        "fc.parametrizations.weight.0.lora_dropout_mask": torch.ones(1, 5),
    }
    adapter = read(store(path, tensors), alpha=1)
    assert adapter.format == "minlora"
    fc = dense_delta("fc", adapter.layers["fc"], torch.zeros(4, 5))
    assert_close(fc, rand(4, 2) @ rand(2, 5) / 2)
    conv = dense_delta("conv", adapter.layers["conv"], torch.zeros(4, 3, 3, 3))
    assert_close(conv.flatten(1), rand(4, 2) @ rand(2, 27) / 2)
    emb = dense_delta("emb", adapter.layers["emb"], torch.zeros(7, 6))
    assert_close(emb, rand(7, 2) @ rand(2, 6) / 2)
    tensors["fc.parametrizations.weight.original"] = rand(4, 5)
    with pytest.raises(UnsupportedFileError, match=r"parameters of the model itself: 'fc\.param"):
        read(store(path, tensors), alpha=1)


# -- DoRA, Tucker, differences


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_lycoris_lengths_are_of_the_axis_that_their_shape_says(
    path: Path, kernel: tuple[int, ...], axis: int
) -> None:
    ones = [1] * len(kernel)
    weight, down, up = rand(4, 5, *kernel), rand(2, 5, *kernel), rand(4, 2, *ones)
    length = rand((4, 5)[axis]).abs() + 1
    shape = [-1 if n == axis else 1 for n in range(weight.ndim)]
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}
    tensors |= {f"{KOHYA}.dora_scale": length.reshape(shape), f"{KOHYA}.alpha": torch.tensor(1.0)}
    layer = only(read(store(path, tensors)))
    both = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    others = [n for n in range(weight.ndim) if n != axis]
    norm = both.square().sum(others, keepdim=True).sqrt()
    assert_close(dense_delta("m", layer, weight), both / norm * length.reshape(shape) - weight)
    assert_close(dense_delta("m", layer, weight, strength=0.0), torch.zeros_like(weight))
    assert ("lora_magnitude" in layer.parts) is (axis == 0)
    tensors[f"{KOHYA}.dora_scale"] = torch.ones(3, 1)
    with pytest.raises(
        CorruptFileError, match=r"`dora_scale` of 'lora_unet_mid_to_q' in .* is \(3, 1"
    ):
        read(store(path, tensors))


def test_a_tucker_core_stands_the_right_way_round(path: Path) -> None:
    down, mid, up = rand(2, 5, 1, 1), rand(2, 2, 3, 3), rand(4, 2, 1, 1)
    tensors = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    tensors = {f"{KOHYA}.{leaf}.weight": t for leaf, t in tensors.items()}
    layer = only(read(store(path, tensors)))
    expected = torch.einsum("abhw,oa,bi->oihw", mid, up.flatten(1), down.flatten(1))
    assert_close(dense_delta("m", layer, torch.zeros(4, 5, 3, 3)), expected)
    assert layer.settings.tucker
    tensors[f"{KOHYA}.lora_mid.weight"] = rand(2, 3, 3, 3)
    with pytest.raises(
        CorruptFileError, match=r"The middle factor of '.*' must be \(2, 2, \.\.\.\)"
    ):
        read(store(path, tensors))


def test_differences_are_added_and_stand_beside_factors(path: Path) -> None:
    tensors = kohya() | {
        f"{KOHYA}.diff_b": rand(4),
        "lora_unet_norm.w_norm": rand(3),
        "lora_unet_norm.b_norm": rand(3),
        "diffusion_model.out.diff": rand(4, 5),
    }
    adapter = read(store(path, tensors))
    assert {n: (x.kind, x.path) for n, x in adapter.layers.items()} == {
        KOHYA: ("matrix", "mid_to_q"),
        "lora_unet_norm": ("difference", "norm"),
        "diffusion_model.out": ("difference", "out"),
        f"{KOHYA}.bias": ("difference", "mid_to_q"),
    }
    store(path, tensors | {"lora_unet_norm.alpha": torch.tensor(1.0)})  # which no difference has
    assert set(read(path).layers) == set(adapter.layers)
    norm = adapter.layers["lora_unet_norm"]
    assert_close(dense_delta("norm", norm, torch.ones(3)), rand(3))
    assert_close(bias_delta(norm, torch.ones(3), strength=2.0), 2 * rand(3))
    out = adapter.layers["diffusion_model.out"]
    assert dense_delta("out", out, torch.ones(4, 5, 1, 1), strength=0.5).shape == (4, 5, 1, 1)
    assert bias_delta(out, None) is None
    beside = adapter.layers[f"{KOHYA}.bias"]
    assert not dense_delta("out", beside, torch.ones(4, 5)).any()
    with pytest.raises(
        MismatchError, match=r"^The adapter of 'out' must fit a weight of shape \(4, 6"
    ):
        dense_delta("out", out, torch.ones(4, 6))
    with pytest.raises(
        MismatchError, match=r"must fit a weight of shape \(5,\), but has bias \(3,"
    ):
        dense_delta("norm", norm, torch.ones(5))


# -- PEFT


def peft_folder(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    about = {"peft_type": "LORA", "lora_alpha": 4, **config}
    about = {key: value for key, value in about.items() if value != "absent"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    store(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{key}": t for key, t in tensors.items()},
    )
    return folder


def test_peft_values_replace_and_biases_are_scaled(tmp_path: Path) -> None:
    tensors = pair("fc") | {
        "fc.lora_B.bias": rand(4),
        "fc.base_layer.bias": rand(4) + 1,
        "norm.bias": rand(3),
        "head.modules_to_save.default.weight": rand(2, 3),
        "attn.base_layer.out_proj.lora_A.weight": rand(2, 5),
        "attn.base_layer.out_proj.lora_B.weight": rand(4, 2),
    }
    adapter = read(peft_folder(tmp_path, tensors))
    assert {n: x.kind for n, x in adapter.layers.items()} == {
        "attn.out_proj": "matrix",
        "fc": "matrix",
        "fc.bias": "values",
        "head": "values",
        "norm": "values",
    }
    assert adapter.layers["fc.bias"].path == "fc"
    assert_close(bias_delta(adapter.layers["fc"], None), 2 * rand(4))
    assert_close(bias_delta(adapter.layers["norm"], torch.ones(3)), rand(3) - 1)
    head = adapter.layers["head"]
    assert_close(dense_delta("head", head, torch.ones(2, 3)), rand(2, 3) - 1)


def test_an_embedding_and_its_lengths(tmp_path: Path) -> None:
    A, B, weight, length = rand(2, 7), rand(6, 2), rand(7, 6), rand(6).abs() + 1
    tensors = {"emb.lora_embedding_A": A, "emb.lora_embedding_B": B}
    tensors["emb.lora_magnitude_vector"] = length
    layer = only(read(peft_folder(tmp_path, tensors, lora_alpha=2)))
    both = weight + (B @ A).T
    assert layer.kind == "embedding"
    assert_close(dense_delta("emb", layer, weight), both / both.norm(dim=0) * length - weight)
    with pytest.raises(
        MismatchError, match=r"must fit a weight of kind 'linear' of shape \(6, 7\)"
    ):
        dense_delta("emb", layer, weight.T, kind="linear")


def test_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    layer = only(read(peft_folder(tmp_path, pair("c_attn"), fan_in_fan_out=True)))
    expected = 2 * rand(4, 2) @ rand(2, 5)
    assert_close(dense_delta("c", layer, torch.zeros(5, 4)), expected.T)
    assert_close(dense_delta("c", layer, torch.zeros(4, 5)), expected)  # a plain layer after all
    assert_close(dense_delta("c", layer, torch.zeros(5, 4), transposed=True), expected.T)
    with pytest.raises(MismatchError, match=r"shape \(5, 4\)"):
        dense_delta("c", layer, torch.zeros(5, 4), transposed=False)


def test_an_alpha_that_peft_leaves_out_is_eight(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, pair("fc"), lora_alpha="absent", novelty=3)
    adapter = read(folder)
    assert only(adapter).settings.alpha == 8
    assert adapter.notes == (
        "settings that this reader doesn't know: 'novelty'",
        "alpha is PEFT's default, as adapter_config.json names none",
    )
    assert only(read(folder, alpha=3)).settings.alpha == 3


def test_the_first_pattern_that_ends_a_path_decides(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name in ("ff.net.0.proj", "a.to_q", "a.q", "layers.1", "layers.10", "x.q.y"):
        tensors |= pair(name)
    patterns = {"proj": 1, "q": 2, "layers.1": 3, "^x": 5, "^x.q.y": 6}
    adapter = read(peft_folder(tmp_path, tensors, alpha_pattern=patterns))
    assert {name: x.settings.alpha for name, x in adapter.layers.items()} == {
        "ff.net.0.proj": 1,
        "a.to_q": 4,
        "a.q": 2,
        "layers.1": 3,
        "layers.10": 4,
        "x.q.y": 6,
    }
    assert adapter.layers["a.q"].alpha_from == "adapter_config.json, alpha_pattern"


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ({"peft_type": "ADALORA"}, UnsupportedFileError, "is of PEFT's kind 'ADALORA'"),
        ({"peft_type": "absent"}, CorruptFileError, "must name its `peft_type`, but has None"),
        ({"use_qalora": True}, UnsupportedFileError, "must be plain LoRA, but sets 'use_qalora'"),
        ({"megatron_config": {"a": 1}}, UnsupportedFileError, "but sets 'megatron_config'"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedFileError, "which changed the base"),
        ({"init_lora_weights": "olora"}, UnsupportedFileError, "which changed the base"),
        ({"lora_alpha": "4"}, CorruptFileError, "`lora_alpha` must be a finite number"),
        ({"alpha_pattern": [1]}, CorruptFileError, "`alpha_pattern` must be a dict"),
        ({"alpha_pattern": {"(": 1}}, CorruptFileError, "must be a regular expression, but '('"),
        ({"alpha_pattern": {"(a+)+b": 1}}, CorruptFileError, "must be simple to match"),
        ({"alpha_pattern": {".*a.*b.*c": 1}}, CorruptFileError, "must be simple to match"),
        ({"alpha_pattern": {"a": None}}, CorruptFileError, "must be a finite number"),
    ],
)
def test_settings_that_plain_lora_has_not_are_refused(
    tmp_path: Path, config: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=re.escape(said)) as caught:
        read(peft_folder(tmp_path, pair("fc"), **config))
    assert type(caught.value) is kind
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "it is a list"),
        ("{", "Expecting"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1, "a": 1}', "a key stands twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_settings_that_are_no_json_object_are_refused(tmp_path: Path, text: str, said: str) -> None:
    folder = peft_folder(tmp_path, pair("fc"))
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CorruptFileError, match=rf"must be PEFT's settings, .*{re.escape(said)}"):
        read(folder)


def test_the_settings_beside_a_file_are_its_settings(tmp_path: Path) -> None:
    file = peft_folder(tmp_path, pair("fc")) / "adapter_model.safetensors"
    assert only(read(file)).alpha_from == "adapter_config.json"
    assert read(file).name == re.sub(r"\W+", "_", tmp_path.name).strip("_")[:64]
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"^`alpha` must be given for .* missing for 'fc': this"):
        read(file)
    assert only(read(file, alpha={"fc": 6})).settings.scale == 3


def test_pefts_pickles_are_read_on_request(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, pair("fc"))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(UnsupportedFileError, match=r"adapter_model\.bin' must be .*allow_pickle="):
        read(folder)
    assert only(read(folder, allow_pickle=True)).settings.scale == 2


def test_pefts_prefix_makes_no_values_of_another_formats_factors(path: Path) -> None:
    tensors = {f"base_model.model.{key}": t for key, t in kohya("fc").items()}
    assert only(read(store(path, tensors))).settings.scale == 0.5


def test_two_adapters_in_one_file_are_refused(path: Path) -> None:
    tensors = {f"base_model.model.fc.lora_A.{name}.weight": rand(2, 5) for name in "ab"}
    with pytest.raises(CorruptFileError, match=r"must hold one adapter, but has two keys for the"):
        read(store(path, tensors), alpha=1)


# -- diffusers and its relatives


@pytest.mark.parametrize("part", ["", "unet.", "text_encoder."])
def test_attention_processors_leave_out_an_index(path: Path, part: str) -> None:
    tensors = {}
    attention = "a.self_attn" if "text" in part else "a.attn1"
    for projection in ("to_q", "to_out"):
        for half, t in (("down", rand(2, 5)), ("up", rand(4, 2))):
            infix = "" if "text" in part else ".processor"
            tensors[f"{part}{attention}{infix}.{projection}_lora.{half}.weight"] = t
    adapter = read(store(path, tensors))
    inside = ("q_proj", "out_proj") if "text" in part else ("to_q", "to_out.0")
    assert set(adapter.layers) == {f"{part}{attention}.{name}" for name in inside}
    assert {x.settings.scale for x in adapter.layers.values()} == {1.0}


def test_a_file_may_mix_dialects(path: Path) -> None:
    tensors = pair("text_encoder.l.fc1") | {
        "text_encoder.l.q_proj.lora_linear_layer.down.weight": rand(2, 5),
        "text_encoder.l.q_proj.lora_linear_layer.up.weight": rand(4, 2),
    }
    adapter = read(store(path, tensors | kohya()))
    assert [x.settings.scale for x in adapter.layers.values()] == [0.5, 1.0, 1.0]


def test_a_magnitude_without_an_index_is_that_of_the_first_output(path: Path) -> None:
    tensors = pair("unet.attn.to_out.0") | {"unet.attn.to_out.lora_magnitude_vector": rand(4)}
    assert "lora_magnitude" in only(read(store(path, tensors))).parts
    key = "lora_unet_attn1_to_out_0"
    tensors = kohya(key) | {"lora_unet_attn1_to_out.0.lora_magnitude_vector": rand(4)}
    adapter = read(store(path, tensors))
    assert list(adapter.layers) == [key]
    assert "lora_magnitude" in only(adapter).parts


def test_metadata_of_one_model_has_no_component(path: Path) -> None:
    about = {"peft_type": "LORA", "lora_alpha": 6, "use_rslora": True}
    layer = only(read(store(path, pair("fc"), {"lora_adapter_metadata": json.dumps(about)})))
    assert layer.settings.scale == 6 / math.sqrt(2)
    assert layer.alpha_from == "the file's lora_adapter_metadata"


@pytest.mark.parametrize(("text", "said"), [("[]", "it is a list"), ("{", "Expecting")])
def test_broken_metadata_is_refused_where_it_decides(path: Path, text: str, said: str) -> None:
    metadata = {"lora_adapter_metadata": text}
    with pytest.raises(CorruptFileError, match=rf"'lora_adapter_metadata', but {said}"):
        read(store(path, pair("unet.fc"), metadata))
    assert only(read(store(path, kohya(), metadata))).settings.scale == 0.5


def test_a_stored_alpha_is_not_that_of_the_metadata(path: Path) -> None:
    about = {"peft_type": "LORA", "lora_alpha": 6, "use_rslora": True}
    tensors = pair("unet.a") | pair("unet.b") | {"unet.b.alpha": torch.tensor(3.0)}
    about = {f"unet.{key}": value for key, value in about.items()}
    adapter = read(store(path, tensors, {"lora_adapter_metadata": json.dumps(about)}))
    scales = {name: layer.settings.scale for name, layer in adapter.layers.items()}
    assert scales == {"unet.a": 6 / math.sqrt(2), "unet.b": 1.5}


def test_an_alpha_of_rslora_stored_in_the_file_is_not_divided_again(path: Path) -> None:
    about = json.dumps({"ss_network_args": '{"rs_lora": "True"}'})
    assert only(read(store(path, kohya(), {"x": about}))).settings.scale == 0.5


def test_comfyuis_text_encoders_are_components(path: Path) -> None:
    tensors = pair("text_encoders.clip_l.transformer.a") | pair(
        "text_encoders.clip_g.transformer.a"
    )
    adapter = read(store(path, tensors))
    assert {(x.component, x.path, x.alpha_from) for x in adapter.layers.values()} == {
        ("text_encoder", "a", "the format, whose scale is 1"),
        ("text_encoder_2", "a", "the format, whose scale is 1"),
    }


def test_a_scale_overrides_an_alpha(path: Path) -> None:
    layer = only(read(store(path, kohya() | {f"{KOHYA}.scale": torch.tensor(0.7)})))
    assert layer.settings.scale == pytest.approx(0.7)
    assert layer.alpha_from == "the file's scale"


def test_textual_inversion_beside_lora_is_noted(path: Path) -> None:
    adapter = read(store(path, kohya() | {"bundle_emb.cat.clip_l": rand(2, 8)}))
    assert adapter.notes == ("left out, embeddings of textual inversion: 'bundle_emb.cat.clip_l'",)


def test_a_module_of_no_rank_is_left_out_and_noted(path: Path) -> None:
    none = {"lora_unet_a.lora_down.weight": torch.zeros(0, 5)}
    none["lora_unet_a.lora_up.weight"] = torch.zeros(4, 0)
    adapter = read(store(path, kohya() | none))
    assert list(adapter.layers) == [KOHYA]
    assert adapter.notes == ("left out, modules of rank 0: 'lora_unet_a'",)
    with pytest.raises(UnsupportedFileError, match=r"none of its modules has a rank\. left out"):
        read(store(path, none))


# -- who says what alpha is


def test_an_alpha_that_the_file_stores_is_not_the_callers(path: Path) -> None:
    store(path, kohya())
    for given_alpha in (4, {KOHYA: 4}):
        with pytest.raises(
            ConfigError, match=rf"^`alpha` must be left out .* '{KOHYA}' in the file"
        ):
            read(path, alpha=given_alpha)


def test_an_alpha_for_a_module_that_the_file_lacks_is_refused(path: Path) -> None:
    said = rf"^`alpha` must name modules of '.*', but 'to_q' are none of its 1: '{KOHYA}'"
    with pytest.raises(ConfigError, match=said):
        read(store(path, kohya()), alpha={"to_q": 4})


def test_a_callers_alpha_fills_what_is_missing(path: Path) -> None:
    store(path, kohya() | kohya("lora_unet_b", alpha=None))
    adapter = read(path, alpha=4)
    assert {n: x.settings.alpha for n, x in adapter.layers.items()} == {KOHYA: 1, "lora_unet_b": 4}
    assert adapter.layers["lora_unet_b"].alpha_from == "the caller"


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "4", True, {"a": None}])
def test_an_alpha_must_be_a_finite_number(path: Path, alpha: Any) -> None:
    with pytest.raises(ConfigError, match=r"^`alpha` must be a finite number, but is"):
        read(store(path, kohya()), alpha=alpha)


@pytest.mark.parametrize("value", [[math.nan], [math.inf], [1.0, 1.0], []])
def test_a_stored_alpha_must_be_one_finite_number(path: Path, value: list[float]) -> None:
    tensors = kohya() | {f"{KOHYA}.alpha": torch.tensor(value)}
    with pytest.raises(
        CorruptFileError, match=rf"must be one finite number, but that of '{KOHYA}'"
    ):
        read(store(path, tensors))


def test_bare_factors_need_an_alpha_and_with_a_component_do_not(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^`alpha` must be given for"):
        read(store(path, pair("fc")))
    layer = only(read(store(path, pair("transformer.fc"))))
    assert (layer.component, layer.settings.scale) == ("transformer", 1)
    assert only(read(path, alpha=6)).settings.scale == 3


# -- what is no LoRA


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["lora_unet_a.hada_w1_a", "lora_unet_a.alpha"], "LoHa"),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2_a"], "LoKr"),
        (["diffusion_model.a.lokr_w1"], "LoKr"),
        (["lora_unet_a.a1.weight", "lora_unet_a.bm.weight"], "GLoRA"),
        (["lora_unet_a.oft_diag"], "OFT"),
        (["lora_unet_a.weight", "lora_unet_a.on_input"], "(IA)^3"),
        (["lora_unet_a.p_layer.weight", "lora_unet_a.lambda_layer"], "T-LoRA"),
        (["base_model.model.a.lora_E", "base_model.model.a.lora_A"], "AdaLoRA"),
        (["base_model.model.a.vera_lambda_b"], "VeRA"),
        (["base_model.model.a.ia3_l"], "(IA)^3"),
        (["base_model.model.a.token_adapter.trainable_tokens_delta"], "trained tokens"),
        (["lora_controlnet", "input_hint_block.0.weight"], "Control-LoRA"),
        (["string_to_param.*"], "embeddings of textual inversion: 'string_to_param.*'"),
        (["<cat>"], "embeddings of textual inversion"),
        (["emb_params"], "embeddings of textual inversion"),
        (["clip_l", "clip_g"], "embeddings of textual inversion"),
        (["model.diffusion_model.out.2.weight"], "is a full checkpoint of 1 tensors"),
        (["down_blocks.0.conv.weight", "conv_in.bias"], "2 parameters of the model itself"),
        (["what.ever"], "its keys are of no format that is known: 'what.ever'"),
    ],
)
def test_what_is_no_lora_is_refused_by_its_name(path: Path, keys: list[str], said: str) -> None:
    store(path, {key: rand(2, 2) for key in keys})
    with pytest.raises(UnsupportedFileError, match=re.escape(said)):
        read(path)


def test_a_butterfly_is_told_by_its_dimensions(path: Path) -> None:
    with pytest.raises(UnsupportedFileError, match="but holds BOFT"):
        read(store(path, {"lora_unet_a.oft_blocks": rand(1, 2, 2, 2)}))


def test_lora_mixed_with_another_algorithm_is_refused_with_what_is_there(path: Path) -> None:
    said = (
        r"^'.*' must be LoRA throughout, but beside 1 modules of LoRA it has keys of LoHa \(1: 'l"
    )
    with pytest.raises(UnsupportedFileError, match=said):
        read(store(path, kohya() | {"lora_unet_b.hada_w1_a": rand(2, 2)}))


def test_what_is_no_part_of_a_lora_is_refused_or_left_out_with_a_note(path: Path) -> None:
    tensors = kohya() | {"lora_unet_b.lora_up.weight": rand(4, 2)}
    store(path, tensors)
    with pytest.raises(CorruptFileError, match="but 'lora_unet_b' has only the up factor"):
        read(path)
    assert read(path, strict=False).notes == (
        "left out, modules without both factors: 'lora_unet_b (only up)'",
    )
    store(path, tensors | {"what.ever": rand(2, 2)})
    said = (
        "^'.*' must be LoRA throughout, but beside 2 modules of LoRA it has 1 keys of no format"
        " that is known: 'what.ever'. Read it with the program that wrote it, or leave them out"
        " with strict=False.$"
    )
    with pytest.raises(UnsupportedFileError, match=said):
        read(path)
    adapter = read(path, strict=False)
    assert list(adapter.layers) == [KOHYA]
    assert adapter.notes[0] == "left out, keys of no known format: 'what.ever'"
    # with part of what it does left out, another algorithm's adapter is another
    store(path, tensors | {"lora_unet_c.hada_w1_a": rand(2, 2)})
    with pytest.raises(UnsupportedFileError, match="keys of LoHa"):
        read(path, strict=False)
    store(path, {"lora_unet_b.lora_up.weight": rand(4, 2)})
    with pytest.raises(UnsupportedFileError, match="none of its modules has a rank. left out, mod"):
        read(path, strict=False)


def test_formats_that_no_program_mixes_are_refused(path: Path) -> None:
    tensors = kohya() | {"fc.lora_A": rand(2, 5), "fc.lora_B": rand(4, 2)}
    with pytest.raises(UnsupportedFileError, match=r"of one format, but has keys of 'kohya', 'lor"):
        read(store(path, tensors))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((2, 5), (4, 3)),
        ((5,), (4, 2)),
        ((2, 5), (4, 2, 3, 3)),
        ((2, 0), (4, 2)),
        ((0, 5), (4, 2)),
        ((5, 2), (2, 4)),
        ((2, 4), (4, 3)),
    ],
)
def test_halves_that_are_no_pair_are_refused(
    path: Path, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    tensors = {f"{KOHYA}.lora_down.weight": rand(*down), f"{KOHYA}.lora_up.weight": rand(*up)}
    said = rf"'{KOHYA}'.* (are|has) {re.escape(f'down {down} and up {up}')}"
    with pytest.raises(CorruptFileError, match=said) as caught:
        read(store(path, tensors))
    assert ("transposed" in str(caught.value)) is (down == (5, 2))


def test_factors_that_are_no_floats_are_refused(path: Path) -> None:
    tensors = {key: t.to(torch.int8) for key, t in kohya().items()}
    with pytest.raises(CorruptFileError, match=rf"must be floating .* '{KOHYA}' has torch\.int8"):
        read(store(path, tensors))


@pytest.mark.parametrize("weight", [(5, 4), (4, 5, 3, 3), (4, 6), (5,), (8, 10, 2, 2)])
def test_factors_that_do_not_fit_a_weight_are_refused(path: Path, weight: tuple[int, ...]) -> None:
    layer = only(read(store(path, kohya())))
    with pytest.raises(MismatchError, match=re.escape(f"of shape {weight}, but has lora_A (2, 5)")):
        fitted("m", layer, weight, where="x")


# -- containers


def test_the_same_file_is_a_native_one_too(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    lora_core.inject(model, rank=2, name="style", targets="0")
    lora_core.save(model, path)
    adapter = read(path)
    assert (adapter.format, adapter.name) == ("lora_core", "style")
    delta = dense_delta("0", adapter.layers["0"], model[0].weight.detach())
    assert_close(delta, torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r"^`alpha` must be left out .* that of '0' in the file"):
        read(path, alpha=4)


def test_what_an_adapter_began_with_is_subtracted(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4)).requires_grad_(requires_grad=False)
    lora_core.inject(model, rank=2, targets="0", init="pissa")
    with torch.no_grad():
        for factor in lora_core.parameters(model):
            factor.mul_(1.5)
    lora_core.save(model, path)
    base = model[0].weight.detach().clone()
    lora_core.merge(model)
    delta = dense_delta("0", only(read(path)), base)
    assert delta.abs().max() > 0.01
    assert_close(base + delta, model[0].weight.detach())


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"<html>Log in</html>", "a web page"),
        (b'{"error": "gone"}' + b" " * 20, "JSON text"),
        (b"GGUF" + b"\x03\0\0\0" * 8, "a GGUF model"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (b"\x80\x04]q\x00." + b"\0" * 20, "a pickle, which may hold code"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
def test_what_a_file_is_shows_before_it_is_parsed(
    tmp_path: Path, data: bytes, looks: str, name: str
) -> None:
    (tmp_path / name).write_bytes(data)
    kind = CorruptFileError if "pickle" in looks and name == "x.pt" else UnsupportedFileError
    said = r"'.*' must be a whole file of torch\.save" if kind is CorruptFileError else looks
    with pytest.raises(kind, match=said):
        read(tmp_path / name, allow_pickle=True)


class Code:
    def __reduce__(self) -> Any:
        return print, ("never",)


def zipped(path: Path) -> None:
    """Compresses a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def doubled(path: Path) -> None:
    """Lists each entry of a file of torch.save many times over."""
    with zipfile.ZipFile(path, "a") as archive:
        for n, entry in enumerate(archive.infolist() * 9):
            twin = copy.copy(entry)
            twin.filename = f"{entry.filename}{n}"
            archive.filelist.append(twin)
        archive._didModify = True


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({"a": Code()}, UnsupportedFileError, "runs code, which is never done: it calls for"),
        ({"a": torch.zeros(1).expand(2**40)}, CorruptFileError, "'a' is no plain tensor whose"),
        ({"a": torch.eye(2).to_sparse()}, CorruptFileError, "'a' is no plain tensor"),
        ({"a": torch.zeros(2, device="meta")}, CorruptFileError, "'a' is no plain tensor"),
        ({"a": "text"}, UnsupportedFileError, "must hold tensors alone, but 'a' is a str"),
        ("text", UnsupportedFileError, "must hold a dict or a list of tensors, but holds a str"),
        ({}, UnsupportedFileError, "must hold a dict or a list of tensors"),
        (
            [torch.zeros(2, 2)] * 3,
            CorruptFileError,
            "must be a list of factors in pairs, but has 3",
        ),
        ({"state_dict": {"a": torch.ones(1)}}, UnsupportedFileError, "is a full checkpoint"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_is_no_adapter_is_refused(
    tmp_path: Path, value: object, kind: type[Exception], said: str, old: bool, capsys: Any
) -> None:
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(kind, match=re.escape(said)):
        read(tmp_path / "x.pt", allow_pickle=True)
    assert not capsys.readouterr().out


def test_a_pickle_under_the_wrong_name_is_never_unpickled(tmp_path: Path) -> None:
    torch.save({"fc.lora_A": rand(2, 5), "fc.lora_B": rand(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedFileError, match=r"must be a whole safetensors file, but it has"):
        read(tmp_path / "x.safetensors", alpha=1, allow_pickle=True)
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(
        CorruptFileError, match=r"must be a whole file of torch\.save, but it can't"
    ):
        read(tmp_path / "y.pt", allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "values"),
    [(zipped, torch.zeros(2, 50_000)), (zipped, torch.rand(2, 10)), (doubled, torch.rand(2, 9000))],
)
def test_an_archive_that_unpacks_to_more_is_refused(
    tmp_path: Path, change: Any, values: Tensor
) -> None:
    file = tmp_path / "x.pt"
    torch.save({"fc.lora_A": values, "fc.lora_B": rand(4, 2)}, file)
    assert read(file, allow_pickle=True, alpha=1)
    change(file)
    with pytest.raises(CorruptFileError, match=r"its archive unpacks to more than it holds"):
        read(file, allow_pickle=True, alpha=1)


def test_a_safetensors_file_may_be_called_otherwise(tmp_path: Path) -> None:
    assert only(read(store(tmp_path / "x.pt", kohya()))).settings.scale == 0.5


def test_what_is_no_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a file is needed, or a folder with adapter_config\.json"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "x.pt", allow_pickle=True)
    with pytest.raises(ConfigError, match=r"^`allow_pickle` must be True or False, but is 1\."):
        read(tmp_path, allow_pickle=1)


def rewritten(path: Path, pad: bytes, note: str = "") -> Path:
    """The same tensors under a header that begins with `pad` and holds a note."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"ss_tag_frequency": note}
    text = pad + json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return path


@pytest.mark.parametrize("pad", [b"", b" ", b"  \n"])
def test_a_header_may_be_padded_and_the_numbers_unaligned(path: Path, pad: bytes) -> None:
    expected = only(read(store(path, kohya())))
    for note in ("", "x", "xy"):
        layer = only(read(rewritten(path, pad, note)))
        for part, tensor in layer.parts.items():
            assert torch.equal(tensor, expected.parts[part])
            assert tensor.data_ptr() % tensor.itemsize == 0


def test_a_header_of_several_megabytes_is_ordinary(path: Path) -> None:
    store(path, kohya())
    adapter = read(rewritten(path, b"", "tag " * 10**6))
    assert len(adapter.metadata["ss_tag_frequency"]) == 4 * 10**6


def test_a_large_checkpoint_is_told_by_its_header(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(path, {"first_stage_model.conv.weight": rand(2, 2)})
    monkeypatch.setattr("lora_core._formats.opening._LARGE", 0)
    monkeypatch.setattr(container, "content", lambda path: pytest.fail("it was read"))
    with pytest.raises(UnsupportedFileError, match=r"is a full checkpoint of 1 tensors"):
        read(path)


def test_what_was_read_owns_its_memory(path: Path) -> None:
    adapter = read(store(path, kohya() | kohya("lora_unet_b")))
    before = {n: {p: t.clone() for p, t in x.parts.items()} for n, x in adapter.layers.items()}
    path.write_bytes(b"\xff" * path.stat().st_size)
    places = set()
    for name, layer in adapter.layers.items():
        for part, tensor in layer.parts.items():
            assert torch.equal(tensor, before[name][part])
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            places.add(tensor.data_ptr())
    assert len(places) == 4


# -- whatever is in a file: finite numbers, or one of our errors

ADAPTERS = sorted(
    p
    for pattern in ("*/*/*lora*", "*/*/adapter_model*", "*/*/lycoris*", "traps/*.*")
    for p in GOLDEN.glob(pattern)
    if p.suffix != ".json" and p.stat().st_size < 120_000
)


def finite(adapter: Adapter) -> bool:
    return all(bool(t.isfinite().all()) for x in adapter.layers.values() for t in x.parts.values())


@settings(SAME_FOLDER, max_examples=200)
@given(st.data())
def test_a_mutated_file_gives_finite_numbers_or_one_of_our_errors(
    tmp_path: Path, data: st.DataObject
) -> None:
    original = data.draw(st.sampled_from(ADAPTERS))
    mutated = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # the header, where most that matters is, as often as all the rest
        end = data.draw(st.sampled_from([200, 2000, len(mutated)]))
        where = data.draw(st.integers(0, min(end, len(mutated)) - 1))
        mutated[where] = data.draw(st.integers(0, 255))
    file = tmp_path / f"x{original.suffix}"
    file.write_bytes(mutated[: data.draw(st.sampled_from([len(mutated), len(mutated) // 2]))])
    with suppress(LoRAError):
        assert finite(read(file, allow_pickle=True, alpha=1))


leaf = st.sampled_from(
    [
        *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "scale", "dora_scale"),
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_A", "lora_B", "diff", "diff_b"),
        *("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "bias", "weight"),
        *("lora.down.weight", "lora.up.weight", "processor.to_out_lora.up.weight", "w_norm"),
        *("parametrizations.weight.0.lora_A", "parametrizations.weight.0.lora_B", "hada_w1_a"),
    ]
)
stem = st.sampled_from(
    ["lora_unet_a", "unet.a", "base_model.model.a", "a", "a.to_out", "a.to_out.0", "lycoris_a"]
)
size = st.lists(st.integers(0, 3), max_size=4)


@SAME_FOLDER
@given(
    st.dictionaries(st.tuples(stem, leaf).map(".".join), size, min_size=1, max_size=6),
    st.sampled_from([None, 1.0]),
)
def test_any_mix_of_known_keys_is_read_or_refused(
    tmp_path: Path, shapes: dict[str, list[int]], alpha: float | None
) -> None:
    store(tmp_path / "x.safetensors", {key: torch.ones(shape) for key, shape in shapes.items()})
    try:
        adapter = read(tmp_path / "x.safetensors", alpha=alpha)
    except LoRAError:
        return
    assert finite(adapter)
    for name, layer in adapter.layers.items():
        for weight in (torch.ones(3, 3), torch.ones(2, 1, 1, 1), torch.ones(3)):
            with suppress(LoRAError):
                assert dense_delta(name, layer, weight).shape == weight.shape


def test_pefts_copies_of_a_bias_are_one_and_the_bases_own_is_none(path: Path) -> None:
    root, bias = "base_model.model", rand(4)
    tensors = {
        **pair(f"{root}.q"),
        f"{root}.head.weight": rand(4, 5),
        f"{root}.head.bias": bias,
        f"{root}.head.modules_to_save.bias": bias,
        f"{root}.head.original_module.bias": rand(4),
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "all"}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    folder = path.parent / "adapter_model.safetensors"
    store(folder, tensors)
    head = read(path.parent).layers["head"]
    assert head.kind == "values"
    assert torch.equal(head.parts["bias"], bias)
    store(folder, tensors | {f"{root}.head.modules_to_save.bias": bias + 1})
    with pytest.raises(CorruptFileError, match="two keys for the bias of 'head'"):
        read(path.parent)


def test_a_float8_difference_is_noted_as_float8_factors_are(path: Path) -> None:
    narrow = {"lycoris_q.diff": rand(4, 5).to(torch.float8_e4m3fn)}
    adapter = read(store(path, narrow))
    assert adapter.notes == ("read as float32, as float8 has no arithmetic: 'lycoris_q'",)
    assert adapter.layers["lycoris_q"].parts["weight"].dtype == torch.float32


def test_an_alpha_for_a_module_that_is_left_out_is_no_mistake(path: Path) -> None:
    store(path, kohya(alpha=None) | {"lora_unet_b.lora_up.weight": rand(4, 2)})
    adapter = read(path, alpha={KOHYA: 4, "lora_unet_b": 2}, strict=False)
    assert only(adapter).settings.alpha == 4
