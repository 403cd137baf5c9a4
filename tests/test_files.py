"""One adapter, one self-describing file: exact, atomic, and refused whole where it does not fit."""

import copy
import errno
import json
import multiprocessing
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_core
from lora_core import AdapterError, ConfigError, CorruptFileError, MergeError, MismatchError
from lora_core._config import AdapterConfig
from lora_core._files.fingerprint import differing, fingerprint
from lora_core._formats import Adapter, AdapterLayer, container, native, replacing
from lora_core._layers import factors_of
from lora_core.testing.laws import train_pretend

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def net(seed: int = 0, width: int = 6, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(width, width, dtype=dtype) for _ in range(3)]).eval()


def adapted(**options: object) -> nn.Sequential:
    model = net()
    lora_core.inject(model, **{"rank": 2, "targets": nn.Linear, "name": "style", **options})
    train_pretend(model, "style")
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a small adapter."""
    file = tmp_path / "style.safetensors"
    lora_core.save(adapted(), file, metadata={"ss_note": "für alle"})
    return file


def picture(model: nn.Module) -> object:
    """Everything about a model that a refused load must leave alone."""
    return [
        (n, type(m), sorted(vars(m)), [(k, id(p), p.requires_grad) for k, p in m._parameters.items()
         if p is not None])
        for n, m in model.named_modules()
    ]  # fmt: skip


@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.floats(-1e3, 1e3).filter(bool),
    st.sampled_from([0.0, 0.25]),
    st.text("abcXYZ019_-", min_size=1, max_size=64),
)
@SAME_FOLDER
def test_a_saved_adapter_comes_back_bit_for_bit(
    tmp_path: Path,
    dtype: torch.dtype,
    ranks: list[int],
    alpha: float,
    dropout: float,
    name: str,
) -> None:
    rules = {str(i): {"rank": rank} for i, rank in enumerate(ranks)}
    model = net()
    lora_core.inject(
        model, 1, alpha, targets=nn.Linear, rules=rules, name=name, dropout=dropout, dtype=dtype
    )
    train_pretend(model, name)
    file, bare, x = tmp_path / "a.safetensors", net(), torch.randn(4, 6)
    lora_core.save(model, file)
    report = lora_core.load(bare, file)
    assert report.adapter == name
    for mine, theirs in zip(model, bare, strict=True):
        assert mine.lora_state.configs == theirs.lora_state.configs
        for a, b in zip(factors_of(mine, name), factors_of(theirs, name), strict=True):
            assert a.dtype == b.dtype == dtype
            assert torch.equal(a, b)
    assert torch.equal(model(x), bare(x))


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.integers(1, 6))
@SAME_FOLDER
def test_a_rank_stabilised_scale_comes_back_and_the_second_file_is_the_first(
    tmp_path: Path, flags: list[bool], rank: int
) -> None:
    rules = {str(i): {"rslora": flag} for i, flag in enumerate(flags)}
    model, bare, x = adapted(rank=rank, alpha=3.0, rules=rules), net(), torch.randn(4, 6)
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    lora_core.save(model, first)
    report = lora_core.load(bare, first)
    assert [layer.rslora for layer in report.layers] == flags
    assert [m.lora_state.configs for m in bare] == [m.lora_state.configs for m in model]
    assert torch.equal(model(x), bare(x))
    lora_core.save(bare, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().count(b"rslora") == sum(flags)


def test_a_plain_adapter_is_described_as_ever() -> None:
    config = AdapterConfig(rank=1, alpha=2.0, dropout=0.0, dtype=torch.float32)
    parts = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(3, 1)}
    layer = AdapterLayer("linear", config, parts)
    _, entries = native.encode(Adapter("a", {"x": layer}, {"dtype": "d", "samples": "s"}, {}))
    assert entries["lora_core"] == (
        '{"adapter":"a","base":{"dtype":"d","samples":"s"},'
        '"layers":{"x":{"alpha":2.0,"init":"kaiming","kind":"linear","rank":1}},"version":1}'
    )
    _, entries = native.encode(
        Adapter("a", {"x": replace(layer, config=replace(config, rslora=True))}, {}, {})
    )
    assert (
        '"x":{"alpha":2.0,"init":"kaiming","kind":"linear","rank":1,"rslora":true}'
        in entries["lora_core"]
    )


def test_equal_adapters_are_equal_bytes_merged_or_not(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    metadata = {key: key * 2 for key in "hgfedcba"}
    model = adapted()
    lora_core.save(model, files[0], metadata=metadata)
    lora_core.save(adapted(), files[1], metadata=dict(reversed(metadata.items())))
    lora_core.merge(model)
    lora_core.save(model, files[2], metadata=metadata)
    lora_core.unmerge(model)
    with lora_core.disabled(model):
        lora_core.save(model, files[3], metadata=metadata)
    assert len({file.read_bytes() for file in files}) == 1


def test_any_safetensors_reader_opens_the_file(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    assert sorted(tensors) == [f"{i}.lora_{f}" for i in range(3) for f in "AB"]
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lora_core"])
    assert about["layers"]["1"] == {
        "alpha": 2.0,
        "init": "kaiming",
        "kind": "linear",
        "rank": 2,
    }
    assert about["adapter"] == "style"


def test_the_users_metadata_comes_back_verbatim(path: Path) -> None:
    assert lora_core.load(net(), path).metadata == {"ss_note": "für alle"}


def test_the_receipt_tells_the_size(path: Path, tmp_path: Path) -> None:
    receipt = lora_core.save(adapted(), tmp_path / "b.safetensors")
    assert receipt.nbytes == (tmp_path / "b.safetensors").stat().st_size
    assert receipt.parameters == 3 * 2 * 12
    assert str(receipt).startswith("saved style to ")


def test_loading_freezes_the_host_and_leaves_other_adapters_training(path: Path) -> None:
    model = net()
    lora_core.inject(model, rank=1, targets="1", name="mine")
    lora_core.load(model, path, name="theirs", scale=0.5)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.partition(".")[2].split("_", 2)[2] for n in training} == {"mine", "theirs"}
    assert {a.name: a.strengths for a in lora_core.summary(model).adapters} == {
        "mine": (1.0,),
        "theirs": (0.5,),
    }
    lora_core.eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_scale_multiplies_what_the_file_adds(path: Path) -> None:
    x, base = torch.randn(3, 6), net()
    once, half = net(), net()
    lora_core.load(once, path)
    lora_core.load(half, path, scale=0.5)
    plain = base[0](x)
    torch.testing.assert_close(half[0](x) - plain, (once[0](x) - plain) / 2)


def test_another_base_is_refused_with_both_values(path: Path) -> None:
    model = net(seed=1)
    before = picture(model)
    said = (
        r"^The model must be the one that '.*' was trained on, but its base weights differ at 3 of"
        r" 3 layers: '0 \(file .*, model .*\)', .* and 1 more. Load that base first, or pass"
        r" check_base=False.$"
    )
    with pytest.raises(MismatchError, match=said):
        lora_core.load(model, path)
    assert picture(model) == before
    with pytest.warns(UserWarning, match="base weights differ at 3 of 3 layers"):
        report = lora_core.load(model, path, strict=False)
    assert "base weights differ" in report.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_core.load(net(seed=1), path, check_base=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(path: Path, dtype: torch.dtype) -> None:
    lora_core.load(net().to(dtype), path)


def test_a_base_that_differs_in_one_bit_is_told_apart(path: Path) -> None:
    model = net()
    with torch.no_grad():
        flat = model[1].weight.view(-1)
        flat[36 // 8] = torch.nextafter(flat[36 // 8], torch.tensor(9.0))
    with pytest.raises(MismatchError, match="differ at 1 of 3 layers"):
        lora_core.load(model, path)


def test_a_model_without_the_layers_is_refused_with_both_sides(path: Path) -> None:
    model = nn.ModuleDict({"0": net()[0], "head": nn.Linear(6, 6)})
    before = picture(model)
    said = (
        r"^The model must have all 3 layers of '.*', but 2 are no layers of this"
        r" ModuleDict: '1', '2'; it has 2: '0', 'head'. Load it into the model it was made for,"
        r" or pass strict=False.$"
    )
    with pytest.raises(MismatchError, match=said):
        lora_core.load(model, path)
    assert picture(model) == before
    with pytest.warns(UserWarning, match="not in the model: '1', '2'"):
        report = lora_core.load(model, path, strict=False)
    assert [layer.name for layer in report.layers] == ["0"]
    assert dict(report.left_out) == {"1": "not in the model", "2": "not in the model"}


def test_not_strict_still_needs_one_layer(path: Path) -> None:
    with pytest.raises(MismatchError, match="^The model must have all 3 layers of"):
        lora_core.load(nn.ModuleDict({"a": nn.Linear(6, 6)}), path, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_other_sizes_are_refused_and_change_nothing(path: Path, strict: bool) -> None:
    model = net(width=8)
    before = picture(model)
    said = r"but 3 of 3 differ: '0 \(file 6 -> 6, model 8 -> 8\)'"
    with pytest.raises(MismatchError, match=said):
        lora_core.load(model, path, strict=strict)
    assert picture(model) == before


def test_a_taken_name_is_refused_and_changes_nothing(path: Path) -> None:
    model = adapted()
    before = picture(model)
    with pytest.raises(AdapterError, match="^`name` must be new to the model, but 'style' is on"):
        lora_core.load(model, path)
    assert picture(model) == before


def test_a_shared_module_under_two_names_of_the_file_is_refused(path: Path) -> None:
    layer = net()[0]
    with pytest.raises(MismatchError, match="two names of the file are one shared module"):
        lora_core.load(nn.Sequential(layer, layer, net()[2]), path, check_base=False)


def test_an_adapter_of_a_called_layer_fits_where_the_same_matrix_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    host = nn.ModuleDict({"out_proj": nn.Linear(4, 4)})
    lora_core.inject(host, rank=1, targets="out_proj")
    lora_core.save(host, file)
    attention = nn.MultiheadAttention(4, 2)
    assert [layer.name for layer in lora_core.load(attention, file, check_base=False).layers] == [
        "out_proj"
    ]


def test_saving_needs_a_name_where_there_are_several(tmp_path: Path) -> None:
    model = adapted()
    lora_core.inject(model, rank=1, targets="0", name="b")
    said = "^`name` must say which adapter is meant, but the model has 'style', 'b'.$"
    with pytest.raises(AdapterError, match=said):
        lora_core.save(model, tmp_path / "x")
    assert lora_core.save(model, tmp_path / "x", name="b").layers == ("0",)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"a": 1}, "^`metadata` must map strings to strings, but 'a' does not."),
        (["a"], r"^`metadata` must map strings to strings, but is \['a'\]\."),
        ({"lora_core": ""}, "to the format, but sets 'lora_core'. Choose other keys.$"),
        (  # what kohya's files say of the ranks, in any format
            {"ss_network_dim": "8", "mine": ""},
            "^`metadata` must leave 'format', 'lora_core', 'lora_adapter_metadata',"
            " 'sshs_model_hash', 'sshs_legacy_hash', 'ss_network_dim', 'ss_network_alpha' to the"
            " format, but sets 'ss_network_dim'. Choose other keys.$",
        ),
    ],
)
def test_bad_metadata_is_refused_before_writing(tmp_path: Path, metadata: Any, said: str) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=said):
        lora_core.save(model, tmp_path / "x", metadata=metadata)
    with pytest.raises(ConfigError, match=said):
        lora_core.write(lora_core.adapter_of(model), tmp_path / "x", "peft", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_a_diverged_adapter_is_not_saved(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model[1].lora_B_style[0] = float("inf")
    with pytest.raises(
        ConfigError, match="^An adapter must be finite to be written, but that of '1'"
    ):
        lora_core.save(model, tmp_path / "x")


def test_factors_without_values_are_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = adapted()
    said = (
        "An adapter must have values to be saved, but that of '0', '1', '2' is on the meta device."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)} Call `model.to_empty"):
        lora_core.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_model_without_values_takes_no_file(path: Path) -> None:
    model = net().to("meta")
    before = picture(model)
    with pytest.raises(MismatchError, match="but '0', '1', '2' is on the meta device. Call"):
        lora_core.load(model, path)
    assert picture(model) == before


def test_a_dtype_that_no_factor_has_is_not_packed() -> None:
    said = (
        "A tensor must be one of 'torch.float64', 'torch.float32', 'torch.bfloat16',"
        " 'torch.float16' to be saved, but 'a' is torch.int8. Cast it first."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        container.pack({"a": torch.ones(2, dtype=torch.int8)}, {})


def test_the_bytes_are_laid_out_as_safetensors_lays_them_out() -> None:
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
    tensors = {f"{i}": torch.randn(i + 1, 3).to(dtypes[i % 4]) for i in range(8)}
    tensors["turned"] = torch.randn(3, 5).T
    data = container.pack(tensors, {"a": "b"})
    plain = safetensors.torch.save(
        {n: t.contiguous() for n, t in tensors.items()}, metadata={"a": "b"}
    )
    (size,) = struct.unpack("<Q", data[:8])
    assert json.loads(data[8 : 8 + size]) == json.loads(plain[8 : 8 + size])
    assert data[8 + size :] == plain[8 + size :]


def test_an_adapter_whose_base_is_gone_is_not_saved(tmp_path: Path) -> None:
    model = adapted()
    lora_core.merge(model, reversible=False)
    with pytest.raises(MergeError, match="^An adapter must be saved with its base at hand"):
        lora_core.save(model, tmp_path / "x")


def test_loaded_factors_survive_the_file(path: Path) -> None:
    model = net()
    lora_core.load(model, path)
    before = [p.detach().clone() for p in lora_core.parameters(model)]
    with path.open("r+b") as file:
        file.truncate(0)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_core.parameters(model), strict=True))


# -- damaged and hostile files


def rewrite(path: Path, change: object) -> None:
    """Applies `change` to the header of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def about(change: object) -> object:
    """A header change that edits the library's own description."""

    def edit(header: dict[str, dict[str, str]]) -> None:
        value = json.loads(header["__metadata__"]["lora_core"])
        edited = change(value)
        value = edited if isinstance(edited, str) else value
        header["__metadata__"]["lora_core"] = value if isinstance(value, str) else json.dumps(value)

    return edit


HOSTILE = {
    "another version": (about(lambda a: a.update(version=2)), "version is 2, this reader knows 1"),
    "a path as name": (about(lambda a: a.update(adapter="../x")), "`name` must be 1 to 64 letters"),
    "no layers": (about(lambda a: a.update(layers={})), "must hold exactly the tensors of its 0"),
    "a missing layer": (about(lambda a: a["layers"].pop("1")), "must hold exactly the tensors of"),
    "a surplus layer": (
        about(lambda a: a["layers"].update({"7": a["layers"]["1"]})),
        "'7.lora_A', '7.lora_B' is missing. Save it again.",
    ),
    "a false rank": (
        about(lambda a: a["layers"]["1"].update(rank=2**28)),
        "described rank 2684354",
    ),
    "an unknown kind": (about(lambda a: a["layers"]["1"].update(kind="x")), "unknown kind 'x'"),
    "an unknown key": (
        about(lambda a: a.update(dora=True)),
        "the description has the unknown keys 'dora'; this reader knows 'version', 'adapter',",
    ),
    "an unknown key of a layer": (
        about(lambda a: a["layers"]["1"].update(glora=True)),
        "'1' has the unknown keys 'glora'; this reader knows 'alpha', 'kind', 'rank', 'dropout',",
    ),
    "an unknown key of the base": (
        about(lambda a: a["base"].update(seed=1)),
        "the base has the unknown keys 'seed'; this reader knows 'dtype', 'samples'. Read it with",
    ),
    "aliases that are no names": (
        about(lambda a: a["layers"]["1"].update(aliases=[3])),
        "the aliases of '1' are [3]; a list of names is needed",
    ),
    "an rslora that is no boolean": (
        about(lambda a: a["layers"]["1"].update(rslora=1)),
        "`rslora` must be True or False, but is 1.",
    ),
    "no alpha": (about(lambda a: a["layers"]["1"].pop("alpha")), "malformed (KeyError"),
    "a null alpha": (
        about(lambda a: a["layers"]["1"].update(alpha=None)),
        "'1' has no alpha, which sets the scale.",
    ),
    "NaN alpha": (
        about(lambda a: json.dumps(a).replace('"alpha": 2.0', '"alpha": NaN')),
        "NaN is no JSON number",
    ),
    "infinite alpha": (
        about(lambda a: json.dumps(a).replace('"alpha": 2.0', '"alpha": 1e400')),
        "`alpha` must be a finite number",
    ),
    "a key twice": (
        about(lambda a: json.dumps(a).replace('"version": 1', '"version": 1, "version": 1')),
        "a key stands twice",
    ),
    "deep nesting": (about(lambda a: "[" * 100_000), "nested too deeply"),
    "a list": (about(lambda a: "[]"), "malformed"),
    "no base": (about(lambda a: a.pop("base")), "malformed (KeyError: 'base')"),
    "a false base": (about(lambda a: a["base"].update(samples="AAAA")), "fingerprint is malformed"),
    "header no JSON": (lambda h: b"{" + b"x" * 9, "its header is not valid"),
    "an integer tensor": (
        lambda h: h["1.lora_A"].update(dtype="I32"),
        "a floating matrix of 16 bits",
    ),
    "a vector": (lambda h: h["1.lora_A"].update(shape=[12]), "a floating matrix of 16 bits"),
    "disagreeing factors": (lambda h: h["1.lora_A"].update(shape=[3, 4]), "disagree"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_changes_nothing(path: Path, case: str) -> None:
    change, said = HOSTILE[case]
    rewrite(path, change)
    model = net()
    before = picture(model)
    with pytest.raises(CorruptFileError, match=re.escape(said)):
        lora_core.load(model, path)
    assert picture(model) == before


def test_a_file_that_lost_its_description_asks_for_what_was_in_it(path: Path) -> None:
    rewrite(path, lambda h: h["__metadata__"].pop("lora_core") and None)
    model = net()
    before = picture(model)
    with pytest.raises(ConfigError, match="^`alpha` must be given for .*, but is missing for '0'"):
        lora_core.load(model, path)
    assert picture(model) == before


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"", ""),
        (b"\x00", ""),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a git-lfs"),
        (b"PK\x03\x04" + b"\x00" * 60, "a zip archive, as torch.save writes"),
        (b"\x80\x02}q\x00." + b"\x00" * 20, "a pickle, which may hold code"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, data: bytes, looks: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    said = r"^'.*' must be a whole safetensors file, but it has no header\..*" + re.escape(looks)
    with pytest.raises(CorruptFileError, match=said):
        lora_core.load(net(), file)


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: d[: len(d) // 2]]
)
def test_a_cut_or_lengthened_file_is_refused(path: Path, change: object) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorruptFileError, match="must be a whole safetensors file, but"):
        lora_core.load(net(), path)


def test_a_non_finite_payload_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="holds NaN or infinity"):
        lora_core.load(net(), path)


def test_an_oversized_header_is_refused_unparsed(tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    size = 9 * 2**20
    file.write_bytes(struct.pack("<Q", size) + b"{" + b" " * size)
    with pytest.raises(CorruptFileError, match="its header has 9,437,184 bytes, over the limit"):
        lora_core.load(net(), file)


@given(st.data())
@SAME_FOLDER
def test_a_mutated_file_loads_finite_numbers_or_is_refused(path: Path, data: st.DataObject) -> None:
    original = path.read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        mutated[where] = data.draw(st.integers(0, 255))
    file = path.with_name("mutated.safetensors")
    file.write_bytes(mutated)
    model = net()
    before = picture(model)
    try:
        lora_core.load(model, file)
    except lora_core.LoRAError:
        assert picture(model) == before
    else:
        assert all(bool(p.isfinite().all()) for p in lora_core.parameters(model))


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_what_is_no_file_is_an_os_error(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    if kind == "folder":
        target.mkdir()
    if kind == "pipe":
        os.mkfifo(target)
    with pytest.raises(OSError, match=re.escape(str(target))):
        lora_core.load(net(), target)
    if kind != "missing":
        with pytest.raises(OSError, match=re.escape(str(target))):
            lora_core.save(adapted(), target)
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


# -- atomic writing


def test_permissions_follow_the_umask_and_an_existing_file_keeps_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    before = os.umask(0o027)
    try:
        lora_core.save(adapted(), file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    file.chmod(0o604)
    lora_core.save(adapted(), file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o604


def test_a_symbolic_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_bytes(b"old")
    link.symlink_to(real)
    lora_core.save(adapted(), link)
    assert link.is_symlink()
    assert len(real.read_bytes()) > 100
    lora_core.load(net(), link)


def test_without_nameless_files_saving_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    lora_core.save(adapted(), tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_keeps_the_old_file_and_names_the_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device \(\d+ bytes\): '.*style.safe"):
        lora_core.save(adapted(), path)
    assert path.read_bytes() == old
    assert len(list(path.parent.iterdir())) == 1


def test_droppings_of_dead_processes_are_swept_and_others_left(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here, dead, alive = replacing._host(), child.pid, os.getppid()
    gone = [f"{here}.{dead}.aa", "00000000.1.bb"]
    kept = [f"{here}.{alive}.cc", "00000000.1.dd"]
    files = {name: path.parent / f".{path.name}.{name}.tmp" for name in gone + kept}
    for file in files.values():
        file.write_bytes(b"")
    os.utime(files["00000000.1.bb"], (time.time() - 7200,) * 2)
    lora_core.save(adapted(), path)
    assert [name for name, file in files.items() if file.exists()] == kept


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    contents = [bytes([i]) * 300_000 for i in range(2)]
    file.write_bytes(contents[0])
    script = textwrap.dedent(
        """
        import sys
        from lora_core._formats.container import write
        contents = [bytes([i]) * 300_000 for i in range(2)]
        print("ready", flush=True)
        while True:
            for data in contents:
                write(sys.argv[1], data)
        """
    )
    for i in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.003 * i)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert file.read_bytes() in contents
    container.write(file, contents[0])  # a kill in the instant of naming is tidied up by the next
    assert len(list(tmp_path.iterdir())) == 1


def _write_often(path: Path, byte: int) -> None:
    for _ in range(40):
        container.write(path, bytes([byte]) * 50_000)


def test_two_writers_of_one_path_never_mix(tmp_path: Path) -> None:
    file = tmp_path / "a"
    container.write(file, b"\1" * 50_000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(file, i)) for i in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        data = file.read_bytes()
        assert len(data) == 50_000
        assert len(set(data)) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# -- modules with several names


def twins(shared: bool) -> nn.Sequential:
    first = net()
    return nn.Sequential(first, first if shared else copy.deepcopy(first)).eval()


def test_a_shared_modules_adapter_is_not_halved(tmp_path: Path) -> None:
    shared, apart, file = twins(True), twins(False), tmp_path / "a.safetensors"
    lora_core.inject(shared, rank=2, targets=nn.Linear)
    train_pretend(shared, "default")
    lora_core.save(shared, file)
    other = twins(True)
    lora_core.load(other, file)
    x, before = torch.randn(4, 6), picture(apart)
    assert torch.equal(other(x), shared(x))
    said = (
        f"The model must share the layers that {str(file)!r} shares, but 3 names are not the same"
        " module: '1.0 (file 0.0, model another or none)', "
    )
    with pytest.raises(MismatchError, match=f"^{re.escape(said)}"):
        lora_core.load(apart, file)
    assert picture(apart) == before
    with pytest.warns(UserWarning, match="shared in the file, not in the model: '1.0 [(]file 0.0"):
        report = lora_core.load(apart, file, strict=False)
    assert [layer.name for layer in report.layers] == ["0.0", "0.1", "0.2"]
    assert any("shared in the file" in note for note in report.notes)


def test_a_file_of_a_model_without_shared_modules_says_nothing_of_them(path: Path) -> None:
    assert b"aliases" not in path.read_bytes()


# -- arguments of another kind


def test_load_refuses_what_is_no_model(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^`model` must be an nn.Module, or modules.*NoneType.$"):
        lora_core.load(None, path)  # type: ignore[arg-type]


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    file, model = os.fsencode(tmp_path / "a.safetensors"), net()
    assert lora_core.save(adapted(), file).path == os.fsdecode(file)  # type: ignore[arg-type]
    assert len(lora_core.load(model, file).layers) == 3  # type: ignore[arg-type]


def test_metadata_of_another_kind_is_refused(tmp_path: Path) -> None:
    said = "`metadata` must map strings to strings, but is ['a']. Write {'note': 'text'}, for"
    for wrong in (["a"], []):
        with pytest.raises(
            ConfigError, match=f"^{re.escape(said.replace(repr(['a']), repr(wrong)))}"
        ):
            lora_core.save(adapted(), tmp_path / "a", metadata=wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_read_only_file_is_refused_and_stays(path: Path) -> None:
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="the file there is read-only"):
        lora_core.save(adapted(rank=1), path)
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list(path.parent.iterdir()) == [path]


# -- how far weights of another dtype may differ


@pytest.mark.parametrize(("factor", "same"), [(1.5, True), (4.0, False), (150.0, False)])
def test_across_dtypes_weights_differ_by_what_rounding_explains_and_no_more(
    factor: float, same: bool
) -> None:
    model = net()
    eps = torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1 + factor * eps)
    stored = fingerprint({"0": model[0]})
    half = nn.Linear(6, 6, dtype=torch.float64)
    base = {**stored, "dtype": "bfloat16"}
    half.weight.data = net()[0].weight.data.double()
    assert (differing(base, {"0": half}) == []) is same


def test_what_is_no_regular_file_is_refused_with_its_name(tmp_path: Path) -> None:
    said = (
        f"[Errno {errno.EISDIR}] a file is needed, or a folder with adapter_config.json and"
        f" adapter_model.safetensors: {str(tmp_path)!r}"
    )
    with pytest.raises(IsADirectoryError, match=f"^{re.escape(said)}$"):
        lora_core.load(net(), tmp_path)
    said = f"[Errno {errno.EINVAL}] a regular file is needed, but this is a device or pipe: "
    with pytest.raises(OSError, match=f"^{re.escape(said)}'/dev/null'$"):
        lora_core.load(net(), "/dev/null")
    said = f"[Errno {errno.EINVAL}] a file is to be written, but a folder is there: "
    with pytest.raises(OSError, match=f"^{re.escape(said)}"):
        lora_core.save(adapted(), tmp_path)


def test_a_header_beyond_the_limit_is_not_written(tmp_path: Path) -> None:
    rule = "A file's header must have at most 8,388,608 bytes and 65,536 tensors, but has 8,"
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}.* and 6. Shorten the metadata.$"):
        lora_core.save(adapted(), tmp_path / "a", metadata={"note": "x" * 2**23})
    assert not list(tmp_path.iterdir())


def test_a_module_under_more_names_than_a_walk_notes_is_still_shared(tmp_path):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({f"l{i}": shared for i in range(20)})
    lora_core.inject(model, rank=2, targets=nn.Linear)
    lora_core.save(model, tmp_path / "shared.safetensors")
    lora_core.eject(model)
    more = nn.ModuleDict({"first": shared, **model})
    assert lora_core.load(more, tmp_path / "shared.safetensors").layers
