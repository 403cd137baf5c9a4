"""Well-formed files of any content obey the law of damaged ones: loaded whole, or refused whole."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_core
from tests.fuzz.corpus import models
from tests.fuzz.law import obeys
from tests.fuzz.mutations import (
    DTYPES,
    LEAVES,
    NAMES,
    ODD_NUMBERS,
    PATTERNS,
    TEXTS,
    header_of,
    laid_out,
    with_header,
)

MANY = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MODULES = {"lin_in": (16, 12), "head": (5, 16), "blocks.0.attn.to_q": (16, 16)}


def any_of(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of them; some are too long to be shown in the strategy's own name."""
    return st.integers(0, len(values) - 1).map(values.__getitem__)


texts = st.one_of(
    st.text(max_size=40),
    st.text("./\\_:-\0\n\x1b\u202e%{}*?[]()~ab0", max_size=20),
    any_of(TEXTS),
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, any_of(ODD_NUMBERS))
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
prefixes = st.sampled_from(
    ("", "base_model.model.", "unet.", "lora_unet_", "lora_te_", "lycoris_", "diffusion_model.")
)
stems = st.one_of(
    st.sampled_from([*MODULES, *(name.replace(".", "_") for name in MODULES), "unet:0", "conv_in"]),
    texts,
)
keys = st.one_of(
    st.builds("{}{}{}".format, prefixes, stems, any_of(LEAVES)),
    any_of(NAMES),
    texts,
)
sizes = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6, 12, 16, 40])
shapes = st.one_of(
    st.lists(sizes, max_size=5),
    st.sampled_from(
        [[2, 12], [16, 2], [2, 16], [5, 2], [2**62, 0], [0, 2**62], [2**31, 0], [1] * 64]
    ),
)
numbers = st.sampled_from(
    [b"\0", b"\1", b"\xff", b"\0\x3c", b"\0\x7c", b"\xff\xff\x7f\x7f", b"\0\0\x80\x3f", b"\x7f" * 8]
)
tensors = st.tuples(keys, st.sampled_from(DTYPES), shapes, numbers)


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    """One model for all of them: what it was it is again."""
    return models("peft/linear")


@given(trees, st.binary(max_size=64))
@example({"__metadata__": None}, b"")
@example({"__metadata__": {"lora_core": "{}"}}, b"")
@MANY
def test_any_header(parts: dict[str, nn.Module], tmp_path: Path, tree: Any, payload: bytes) -> None:
    text = json.dumps(tree).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    # an object without tensors is a file, and no adapter
    assert obeys(parts, file) in ("CorruptFileError", "UnsupportedFileError")


@given(
    st.lists(tensors, max_size=6),
    st.none() | st.dictionaries(texts, texts, max_size=3),
    st.none() | st.floats(),
)
@MANY
def test_any_names_kinds_and_shapes(
    parts: dict[str, nn.Module],
    tmp_path: Path,
    held: list[tuple[str, str, list[int], bytes]],
    about: dict[str, str] | None,
    alpha: float | None,
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(laid_out([("__metadata__", about)] if about is not None else [], held))
    obeys(parts, file, alpha=alpha)


@given(st.sampled_from(sorted(MODULES)), st.data())
@MANY
def test_factors_of_any_kind_that_fit_are_loaded_unless_their_numbers_are_none(
    parts: dict[str, nn.Module], tmp_path: Path, name: str, data: st.DataObject
) -> None:
    out, size = MODULES[name]
    rank = data.draw(st.integers(1, min(out, size)))
    kinds = st.sampled_from(("F64", "F32", "F16", "BF16"))
    down, up = data.draw(st.tuples(kinds, kinds))
    bits = data.draw(st.sampled_from([b"\0", b"\1", b"\x3c", b"\x01\x02\x03\x04\x05\x06\x07\x08"]))
    scale = data.draw(
        st.sampled_from([("F32", b"\0\0\x80\x3f"), ("F16", b"\0\x3c"), ("U8", b"\4")])
    )
    held = [
        (f"{name}.lora_down.weight", down, [rank, size], bits),
        (f"{name}.lora_up.weight", up, [out, rank], bits),
        (f"{name}.alpha", scale[0], [], scale[1]),
    ]
    file = tmp_path / "x.safetensors"
    file.write_bytes(laid_out([], data.draw(st.permutations(held))))
    assert obeys(parts, file) == "loaded"
    where = data.draw(st.sampled_from([0, 1]))
    key, _, shape, _ = held[where]
    held[where] = (key, "F32", shape, b"\0\0\x80\x7f")
    file.write_bytes(laid_out([], held))
    assert obeys(parts, file) == "CorruptFileError"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Files of this library's own, one for each kind of description."""
    model, file = models("peft/linear")[""], tmp_path_factory.mktemp("ours") / "x.safetensors"
    found = []
    kinds: list[dict[str, Any]] = [{}, {"dora": True}, {"bias": True}, {"init": "pissa"}]
    for options in kinds:
        lora_core.inject(model, rank=2, targets=["to_q", "head"], name="style", **options)
        lora_core.save(model, file)
        lora_core.eject(model)
        found.append(file.read_bytes())
    return found


@given(st.data())
@MANY
def test_any_description_of_our_own(
    parts: dict[str, nn.Module], ours: list[bytes], tmp_path: Path, data: st.DataObject
) -> None:
    entries, payload = header_of(data.draw(st.sampled_from(ours))) or ([], b"")
    found, file = dict(entries), tmp_path / "x.safetensors"
    about = json.loads(found["__metadata__"]["lora_core"])
    layer = data.draw(st.sampled_from(sorted(about["layers"])))
    places = [about, about["base"], about["layers"], about["layers"][layer]]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(place)) if place else texts)
        place[key] = data.draw(trees)
    found["__metadata__"]["lora_core"] = json.dumps(about)
    file.write_bytes(with_header(list(found.items()), payload))
    obeys(parts, file)


SETTINGS = (
    *("peft_type", "lora_alpha", "alpha_pattern", "rank_pattern", "r", "use_rslora", "bias"),
    *("init_lora_weights", "fan_in_fan_out", "layer_replication", "target_modules", "use_dora"),
    *("base_model_name_or_path", "auto_mapping", "loftq_config", "modules_to_save"),
)
patterns = st.one_of(
    st.text(string.ascii_lowercase[:3] + r".*+?|()[]{}\^$0", max_size=30),
    any_of(PATTERNS),
    st.from_regex(r"(blocks|lin|[a-z]\.){1,3}[*+?]?(_in|[0-9]+)?", fullmatch=True),
)


@given(
    st.dictionaries(st.sampled_from(SETTINGS) | texts, trees, max_size=5),
    st.dictionaries(patterns, st.floats() | st.integers(), max_size=5),
    st.booleans(),
)
@MANY
def test_any_settings_of_pefts(
    parts: dict[str, nn.Module],
    tmp_path: Path,
    config: dict[str, Any],
    alphas: dict[str, float],
    inside: bool,
) -> None:
    """Beside the file, or in its metadata as diffusers keeps them."""
    given_ = {"peft_type": "LORA", "alpha_pattern": alphas, **config}
    text, about = json.dumps(given_), []
    prefix = "base_model.model.lin_in"
    if inside:
        flat = json.dumps({f"unet.{key}": value for key, value in given_.items()})
        about, prefix = [("__metadata__", {"lora_adapter_metadata": flat})], "unet.lin_in"
    held = [
        (f"{prefix}.lora_A.weight", "F32", [2, 12], b"\0\0\x80\x3f"),
        (f"{prefix}.lora_B.weight", "F32", [16, 2], b"\0\0\x80\x3f"),
    ]
    (tmp_path / "adapter_model.safetensors").write_bytes(laid_out(about, held))
    (tmp_path / "adapter_config.json").unlink(missing_ok=True)
    if not inside:
        (tmp_path / "adapter_config.json").write_text(text)
    obeys(parts, tmp_path if not inside else tmp_path / "adapter_model.safetensors")


values = st.recursive(
    st.one_of(
        leaves,
        st.builds(
            lambda shape, dtype: torch.ones([min(n, 40) for n in shape]).to(dtype),
            st.lists(sizes, max_size=3),
            st.sampled_from([torch.float32, torch.float16, torch.int64, torch.complex64]),
        ),
        st.sampled_from([torch.ones(1).expand(2**40), torch.ones(3).to_sparse(), nn.Parameter()]),
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=10,
)  # fmt: skip


@given(
    st.dictionaries(keys, values, max_size=5) | values, st.booleans(), st.sampled_from([None, 1.0])
)
@MANY
def test_any_pickle(
    parts: dict[str, nn.Module], tmp_path: Path, value: Any, old: bool, alpha: float | None
) -> None:
    file = tmp_path / "x.pt"
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    assert obeys(parts, file, alpha=alpha) == "UnsupportedFileError"  # unless it is asked for
    obeys(parts, file, alpha=alpha, allow_pickle=True)
