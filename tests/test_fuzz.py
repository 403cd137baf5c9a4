"""Damaged files load whole or are refused whole; what the fuzzer once found stays mended."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_core
from lora_core import ConfigError, CorruptFileError
from lora_core._formats import container, pickles
from lora_core._formats.showing import shown
from tests.fuzz.corpus import models, specimens
from tests.fuzz.law import Fuzzer, LawError, limited, obeys
from tests.fuzz.mutations import header_of, laid_out, with_header
from tests.golden import GOLDEN

ROOT = Path(__file__).parents[1]
A, B = torch.ones(2, 12), torch.ones(16, 2)


@pytest.fixture
def parts() -> dict[str, nn.Module]:
    """The models that the files here are for."""
    return models("peft/linear")


@pytest.mark.slow
def test_five_hundred_damaged_files_load_whole_or_are_refused_whole() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--files", "500", "--jobs", "2"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^500 files of \d+ specimens: .* loaded.*; 0 broken$", done.stdout, re.M)


def test_every_golden_file_is_damaged() -> None:
    held = [data for specimen in specimens() for data in specimen.files.values()]
    paths = [p for p in GOLDEN.rglob("*") if p.suffix in (".safetensors", ".pt")]
    paths += GOLDEN.rglob("adapter_config.json")
    assert len(paths) > 100
    assert not [path for path in paths if path.read_bytes() not in held]


def test_a_number_names_one_damaged_file(tmp_path: Path) -> None:
    first, second = (Fuzzer(specimens(), tmp_path) for _ in range(2))
    changed = 0
    for number in range(40):
        specimen, files, keywords = first.damaged(number)
        assert (specimen, files, keywords) == second.damaged(number)
        changed += files != specimen.files
    assert changed > 30


# -- the law notices what breaks it


def hang(*_: Any, **__: Any) -> None:
    while True:
        pass


def gorge(*_: Any, **__: Any) -> None:
    bytearray(2 * 2**30)  # more than a process has lying about, which no limit would see


def stumble(*_: Any, **__: Any) -> None:
    raise KeyError("raw")


def rant(*_: Any, **__: Any) -> None:
    raise ConfigError("\x1b[31m")


def spoil(model: nn.Module, *_: Any, **__: Any) -> None:
    with torch.no_grad():
        model.lin_in.weight[0, 0] += 1  # type: ignore[index, union-attr, operator]
    raise ConfigError("no")


def linger(model: nn.Module, *_: Any, **__: Any) -> Any:
    report = lora_core.inject(model, rank=1, targets="lin_in")
    model.register_buffer("left", torch.ones(1))
    return report


def diverge(model: nn.Module, *_: Any, **__: Any) -> Any:
    report = lora_core.inject(model, rank=1, targets="lin_in")
    model.lin_in.lora_A_default.data[:] = float("nan")  # type: ignore[union-attr]
    return report


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (hang, "slower than"),
        (gorge, "MemoryError is no error of ours"),
        (stumble, "KeyError is no error of ours"),
        (rant, "a message of 5 characters"),
        (spoil, "the model is another after ConfigError"),
        (linger, "the model is another once the adapter of loaded is off"),
        (diverge, "lin_in.lora_A_default is not finite"),
    ],
)
def test_the_law_notices_what_breaks_it(
    parts: dict[str, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., Any],
    said: str,
) -> None:
    monkeypatch.setattr(lora_core, "load", fault)
    with pytest.raises(LawError, match=f"^{said}"):
        obeys(parts, Path("x"))


def test_the_law_looks_at_an_adapter_whose_place_is_taken(
    parts: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GOLDEN / "peft" / "linear"
    assert obeys(parts, folder, replaced=True) == "loaded"

    def forget(model: nn.Module, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for p in lora_core.parameters(model):
                p.zero_()
        raise ConfigError("no")

    monkeypatch.setattr(lora_core, "load", forget)
    with pytest.raises(LawError, match="^the model is another after ConfigError"):
        obeys(parts, folder, replaced=True)


# -- what the fuzzer found, mended


def plain(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def header(path: Path, text: str) -> Path:
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode())
    return path


def peft(folder: Path, path: str = "lin_in", **config: Any) -> Path:
    """A folder of PEFT's with one module, and with these settings."""
    plain(
        folder / "adapter_model.safetensors",
        {
            f"base_model.model.{path}.lora_A.weight": A,
            f"base_model.model.{path}.lora_B.weight": B,
        },
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def pickled(path: Path, value: object) -> Path:
    torch.save(value, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def described(path: Path, parts: dict[str, nn.Module], change: Callable[[Any], Any]) -> Path:
    """A file of our own whose description is changed."""
    lora_core.inject(parts[""], rank=2, targets="to_q", name="style")
    lora_core.save(parts[""], path)
    lora_core.eject(parts[""])
    entries, payload = header_of(path.read_bytes()) or ([], b"")
    found = dict(entries)
    about = json.loads(found["__metadata__"]["lora_core"])
    change(about)
    found["__metadata__"]["lora_core"] = json.dumps(about)
    path.write_bytes(with_header(list(found.items()), payload))
    return path


def refused(parts: dict[str, nn.Module], path: Path, said: str, **keywords: Any) -> None:
    assert obeys(parts, path, **keywords) in ("CorruptFileError", "UnsupportedFileError")
    target: Any = parts[""]
    with pytest.raises(CorruptFileError, match=said):
        lora_core.load(target, path, **keywords)


ENTRY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"{"x" * 1025}":{ENTRY}}}', "has a name of 1,025 characters, over the limit of 1,024"),
        (f'{{"a":[{"[]," * 330_000}0]}}', "it has more than 327,680 lists and objects"),
        (f'{{"a":[{"{}," * 330_000}0]}}', "it has more than 327,680 lists and objects"),
        (
            '{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}',
            "must be a whole safetensors file, but ",
        ),
        (
            '{"a":{"dtype":"' + r"\u001b[31m" + '","shape":[0],"data_offsets":[0,0]}}',
            r"unknown variant `\\x1b\[31m`",
        ),
    ],
)
def test_a_header_that_is_built_to_cost_is_refused_at_once(
    parts: dict[str, nn.Module], tmp_path: Path, text: str, said: str
) -> None:
    refused(parts, header(tmp_path / "x.safetensors", text), said)


@pytest.mark.parametrize("leaf", ["lora_down.weight", "alpha", "diff", "lora_A"])
def test_a_tensor_of_more_dimensions_than_torch_can_count_is_refused(
    parts: dict[str, nn.Module], tmp_path: Path, leaf: str
) -> None:
    held = [(f"lin_in.{leaf}", "F32", [1] * 70, b"\0\0\x80\x3f")]
    path = tmp_path / "x.safetensors"
    path.write_bytes(laid_out([], held))
    refused(parts, path, f"'lin_in.{leaf}' has more than 16 dimensions")
    file = pickled(tmp_path / "x", {f"lin_in.{leaf}": torch.ones([1] * 17)})
    refused(parts, file, "is no plain tensor whose numbers the file holds", allow_pickle=True)


def test_the_longest_name_that_is_taken() -> None:
    assert container.MAX_NAME == 1024


@pytest.mark.parametrize(
    "pattern",
    [
        "a?" * 28 + "a" * 28 + "$",
        "(a|a)" * 22 + "b",
        "(?x:(a+)#\n+)b",
        r"\\*\\*\\*x",
        "(?i:a)",
        "(?P<n>.)",
        r"(.)\1",
        "(a+)+b",
        ".*.*.*x",
    ],
)
def test_a_pattern_that_may_take_a_matcher_for_ever_is_never_run(
    parts: dict[str, nn.Module], tmp_path: Path, pattern: str
) -> None:
    folder = peft(tmp_path, "a" * 28, alpha_pattern={pattern: 1})
    refused(parts, folder, "A pattern must be simple to match")


@pytest.mark.parametrize(
    "pattern",
    [
        r"blocks\.(0|1|2|3)\.attn\.(to_q|to_k|to_v)",
        r".*\.[0-9]+\.to_q",
        "lin_in",
        r"^lin_in",
        r"(?:lin|x)_in",
        r"lin\\?_in",
    ],
)
def test_patterns_that_people_write_are_taken(tmp_path: Path, pattern: str) -> None:
    folder = peft(tmp_path, alpha_pattern={pattern: 3}, lora_alpha=2)
    (layer,) = lora_core._formats.read(folder).layers.values()  # type: ignore[attr-defined]
    assert layer.settings.alpha == (3 if re.match(rf"(.*\.)?({pattern})$", "lin_in") else 2)


def test_many_patterns_on_many_long_paths_are_refused_before_any_is_tried(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    patterns = {f".*{n}.*x": 1 for n in range(1000)}
    start = time.process_time()
    refused(
        parts, peft(tmp_path, "a." * 150 + "a", alpha_pattern=patterns), "must be quick to match"
    )
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"\x1b[31m": "x" * 100_000}},
        {"alpha_pattern": {"[" + "\u202e" * 300: 1}},
        {"peft_type": "z" * 100_000},
        {"peft_type": ["z"] * 10_000},
        {"init_lora_weights": "pissa" + "z" * 100_000},
        {"lora_alpha": "z" * 100_000},
    ],
)
def test_a_message_about_settings_is_short_and_plain(
    parts: dict[str, nn.Module], tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = peft(tmp_path, **config)
    with pytest.raises(CorruptFileError) as error:
        lora_core.load(parts[""], folder)
    assert len(str(error.value)) < 1_000
    assert str(error.value).isprintable()


def test_settings_beyond_the_limit_are_refused_unread(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    folder = peft(tmp_path)
    os.truncate(folder / "adapter_config.json", 2**33)
    refused(parts, folder, "a JSON object, but it has 8,589,934,592 bytes. Save it again.")


def test_an_unknown_setting_is_noted_in_short(parts: dict[str, nn.Module], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="settings that this reader doesn't know") as said:
        lora_core.load(parts[""], peft(tmp_path, lora_alpha=2, **{"z" * 100_000: 1}))
    assert len(str(said[0].message)) < 1_000


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"x.lora_A": A, "x.lora_B": B, "x.alpha": 10**400}, "'x.alpha' is a number beyond every"),
        ({1: A, "1": B}, "two of its keys are spelled alike"),
        ({"x": {"y": A}, "x.y": B}, "two of its keys are spelled alike"),
        ({"x" * 1025: A}, "a key is no text of up to 1,024 characters"),
        ({2**70: A}, "a key is no text of up to 1,024 characters"),
        ({(1, 2): A}, "a key is no text of up to 1,024 characters"),
        ({"x" * 1_000: {str(i): 0 for i in range(10_000)}}, "its keys have more than 8,388,608"),
        ({"x" * 1_000_000: {str(i): 0 for i in range(2_000)}}, "a key is no text of up to"),
    ],
)
def test_a_pickle_that_is_built_to_cost_is_refused_at_once(
    parts: dict[str, nn.Module], tmp_path: Path, value: object, said: str
) -> None:
    path = pickled(tmp_path / "x", value)
    refused(parts, path, said, allow_pickle=True, alpha=1.0)


def laughing(depth: int) -> bytes:
    """A tuple of two of a tuple of two, and so on, as a dict's key."""
    inside = b"(K\x01K\x02tq\x00" + b"".join(
        b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(depth)
    )
    return b"\x80\x02}" + inside + b"K\x01s."


def archived(path: Path, program: bytes) -> Path:
    """A file of torch.save with another program in it."""
    torch.save({"a": A}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("program", "said"),
    [
        (laughing(60), "it holds a tuple twice"),
        (laughing(60).replace(b"q", b"N0q"), "it holds a tuple twice"),
        (
            b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x70\x85R.",
            "it calls for 'builtins.bytearray'",
        ),
        (b"\x80\x02" + b"N0" * 600_000 + b"N.", "it has more than 1,048,576 instructions"),
        (b"\x80\x02N", "it can't be read"),
    ],
)
def test_a_pickle_whose_instructions_cost_without_end_is_refused_unread(
    parts: dict[str, nn.Module], tmp_path: Path, program: bytes, said: str, old: bool
) -> None:
    path = tmp_path / "x.pt"
    if old:
        path.write_bytes(program + b"\x80\x02N." * 4)
    else:
        archived(path, program)
    start = time.process_time()
    with limited(seconds=20.0), pytest.raises(CorruptFileError, match=said):
        lora_core.load(parts[""], path, allow_pickle=True, alpha=1.0)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["archive/data.pkl", "x/data.pkl", "x/DATA.pkl"])
def test_an_archive_with_two_programs_is_refused(
    parts: dict[str, nn.Module], tmp_path: Path, name: str
) -> None:
    path = pickled(tmp_path / "x", {"lin_in.lora_A": A, "lin_in.lora_B": B})
    assert obeys(parts, path, alpha=1.0, allow_pickle=True) == "loaded"
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the second of a name
        archive.writestr(name, laughing(60))
    refused(parts, path, "named alike|holds a tuple twice", allow_pickle=True, alpha=1.0)


def test_one_tensor_under_a_million_names_is_no_million_tensors(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    one = torch.ones(2**17)
    path = pickled(tmp_path / "x", {str(n): one for n in range(4_000)})
    refused(parts, path, "is no plain tensor whose numbers the file holds", allow_pickle=True)
    twice = pickled(tmp_path / "y", {"a": one, "b": one, "c": one.half(), "d": one.view(2, -1)})
    assert len(pickles.read(twice)) == 4
    old = tmp_path / "z.pt"
    torch.save(
        {"a": one, "b": one, "c": nn.Parameter(one)}, old, _use_new_zipfile_serialization=False
    )
    assert len(pickles.read(old)) == 3


def test_a_nested_dict_is_read_under_names_with_dots(tmp_path: Path) -> None:
    nested = {"a": {"b": A, 3: {"": B}}, "": A}
    found = pickles.read(pickled(tmp_path / "x", nested))
    assert sorted(found) == ["", "a.3.", "a.b"]


@pytest.mark.parametrize("name", ["_inductor", "onnx", "finfo", "load", 3, None, ["float32"]])
def test_a_dtype_in_a_file_is_never_looked_up_unless_it_is_one(
    parts: dict[str, nn.Module], tmp_path: Path, name: object
) -> None:
    path = tmp_path / "x.safetensors"
    described(path, parts, lambda about: about["base"].update(dtype=name))
    before = set(sys.modules)
    refused(parts, path, "which is no floating dtype")
    assert set(sys.modules) == before


def first_layer(about: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(about["layers"].values()))
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: first_layer(about).update(rank=2.0), "described rank 2.0"),
        (lambda about: first_layer(about).update(kind="z" * 10_000), "of the unknown kind"),
        (lambda about: about.update(version="z" * 10_000), "its format version is"),
        (lambda about: about.update(adapter="z" * 10_000), "`name` must be 1 to 64"),
    ],
)
def test_a_description_of_other_kinds_is_refused_in_short(
    parts: dict[str, nn.Module], tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    path = described(tmp_path / "x.safetensors", parts, change)
    refused(parts, path, said)
    with pytest.raises(CorruptFileError) as error:
        lora_core.load(parts[""], path)
    assert len(str(error.value)) < 1_000


def test_a_wide_bias_beside_a_narrow_difference_stays_finite(
    parts: dict[str, nn.Module], tmp_path: Path
) -> None:
    wide = torch.full((16,), 1e300, dtype=torch.float64)
    tensors = {"lycoris_lin_in.diff": torch.ones(16, 12), "lycoris_lin_in.diff_b": wide}
    assert obeys(parts, plain(tmp_path / "x.safetensors", tensors)) == "loaded"


def test_what_is_shown_of_a_file_is_cut_and_plain() -> None:
    assert shown("für") == "für"
    assert shown(ValueError("a\u202eb\n")) == r"a\u202eb\n"
    assert shown("x" * 301) == "x" * 300 + "..."


@pytest.mark.slow
def test_the_largest_header_that_is_taken_fits_in_the_memory(tmp_path: Path) -> None:
    entries = ",".join(f'"layer{n}.lora_A":{ENTRY}' for n in range(65_536))
    path = header(tmp_path / "x.safetensors", f"{{{entries}}}")
    start = time.process_time()
    with limited(seconds=30.0), pytest.raises(CorruptFileError, match="must have both factors"):
        lora_core.load(nn.Linear(2, 2), path, alpha=1.0)
    # a file of so many is real, and takes its time
    assert time.process_time() - start < 15
