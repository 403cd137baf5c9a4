"""What each command says and writes, held to the library's own answers."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_core
from lora_core import _cli
from lora_core._algebra.combination import METHODS
from lora_core._algebra.comparison import compare, difference_of
from lora_core._algebra.factors import scaled
from lora_core._cli import arguments, parser
from lora_core._cli.answers import Answer, show, visible
from lora_core._cli.completion import commands_of
from lora_core._cli.progress import Results, progress
from lora_core._config import SETTINGS, AdapterConfig
from lora_core._errors import MismatchError
from lora_core._formats import Adapter, AdapterLayer, holding, metadata, read, spelling
from lora_core._formats.families import family_of
from lora_core._formats.writing import write

GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = Path(__file__).parent / "data" / "names"
KOHYA = GOLDEN / "kohya" / "sd15_linear" / "lora.safetensors"
PEFT = GOLDEN / "peft" / "linear"
UNET = GOLDEN / "diffusers_base" / "sd15_tiny_unet.safetensors"
TEXT = GOLDEN / "diffusers_base" / "sd15_tiny_te1.safetensors"
LORALIB = GOLDEN / "loralib" / "bias_none" / "lora.pt"
BASES = ("--base", f"unet={UNET}", "--base", f"text_encoder={TEXT}")
PICKLE = ("--allow-pickle", "--alpha", "8", "--enable-lora", "101")

TRAPS = sorted(p for p in (GOLDEN / "traps").iterdir() if p.suffix != ".json")

Run = Callable[..., tuple[int, str, str]]
Json = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the words: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = _cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def document(run: Run) -> Json:
    """The document that the words print, nothing beside it."""

    def call(*words: object, code: int = 0) -> dict[str, Any]:
        found, out, err = run(*words, "--json")
        assert (found, err) == (code, "")
        answer: dict[str, Any] = json.loads(out)
        assert answer.pop("command") == words[0]
        return answer

    return call


def layer(out: int = 6, size: int = 5, rank: int = 2, **parts: Tensor) -> AdapterLayer:
    """A layer with random factors."""
    config = AdapterConfig(rank, 3.0, 0.0, torch.float32, bias="lora_bias" in parts)
    factors = {"lora_A": torch.randn(rank, size), "lora_B": torch.randn(out, rank)}
    return AdapterLayer("matrix", config, {**factors, **parts})


def delta(layer: AdapterLayer) -> Tensor:
    lora_A, lora_B = scaled(layer)
    return lora_B @ lora_A


def named_layers(column: int, file: str, **changes: Any) -> Adapter:
    """An adapter with the names and sizes of a real model, and no values."""
    layers = {}
    for line in (NAMES / file).read_text().splitlines():
        if line.startswith("#") or line.split("\t")[0] != "transformer":
            continue
        words = line.split("\t")
        down, up = (json.loads(words[n].replace("r", "4")) for n in (3, 4))
        parts = {
            "lora_A": torch.empty(down, device="meta"),
            "lora_B": torch.empty(up, device="meta"),
        }
        config = AdapterConfig(4, 4.0, 0.0, torch.float32)
        stem = words[column]
        path = stem.removeprefix("lora_unet_")
        layers[stem] = AdapterLayer(
            "matrix", config, parts, component="unet", path=path, spelling="stem"
        )
    return Adapter("style", layers)


# inspect


@pytest.mark.parametrize(
    ("case", "words", "options"),
    [
        ("kohya/sd15_locon_fp16/lora.safetensors", (), {}),
        ("peft/patterns_rslora", (), {}),
        ("peft/dora", (), {}),
        ("peft/embedding", (), {}),
        ("diffusers/sd15_nometa/pytorch_lora_weights.safetensors", (), {}),
        ("lycoris/wrapper_tucker/lycoris.safetensors", (), {}),
        ("cloneofsimo/safetensors/lora.safetensors", (), {}),
        (
            "loralib/bias_none/lora.pt",
            PICKLE,
            {"alpha": 8, "allow_pickle": True, "enable_lora": [True, False, True]},
        ),
    ],
)
def test_inspect_says_what_the_reader_finds(
    case: str, words: tuple[str, ...], options: dict[str, Any], document: Json
) -> None:
    adapter = read(GOLDEN / case, **options)
    said = document("inspect", GOLDEN / case, *words)
    assert (said["format"], said["name"]) == (adapter.format, adapter.name)
    assert said["metadata"] == dict(adapter.metadata)
    assert [entry["name"] for entry in said["layers"]] == list(adapter.layers)
    for entry, held in zip(said["layers"], adapter.layers.values(), strict=True):
        settings = held.settings
        assert (entry["rank"], entry["alpha"]) == (settings.rank, settings.alpha)
        assert (entry["scale"], entry["alpha_from"]) == (settings.scale, held.alpha_from)
        assert entry["norm"] == pytest.approx(float(delta(held).norm()), rel=1e-5)
        assert entry["dtype"] == str(held.parts["lora_A"].dtype).removeprefix("torch.")
        assert ("DoRA" in entry["form"]) == settings.dora
        assert ("Tucker" in entry["form"]) == settings.tucker
    assert sum(block["layers"] for block in said["blocks"]) == len(adapter.layers)
    squares = sum(float(delta(held).square().sum()) for held in adapter.layers.values())
    assert sum(block["norm"] ** 2 for block in said["blocks"]) == pytest.approx(squares, rel=1e-5)
    assert all(0 < block["largest"] <= block["norm"] + 1e-12 for block in said["blocks"])


def test_inspect_tells_blocks_by_the_first_number_in_a_name(document: Json) -> None:
    said = document("inspect", PEFT)
    assert [block["name"] for block in said["blocks"]] == ["blocks.0", "blocks.1", "head"]


def test_blocks_stand_in_the_order_of_their_numbers(tmp_path: Path, document: Json) -> None:
    layers = {f"blocks.{n}.to_q": layer() for n in (10, 2, 1)}
    write(Adapter("style", layers), tmp_path / "a.safetensors")
    said = document("inspect", tmp_path / "a.safetensors")
    assert [block["name"] for block in said["blocks"]] == ["blocks.1", "blocks.2", "blocks.10"]


@pytest.mark.parametrize(
    ("file", "column", "name", "why"),
    [
        ("kohya_keys_sd15.txt", 5, "SD1.x", "cross-attention takes text of width 768"),
        ("kohya_keys_sd15.txt", 6, "SD1.x", "cross-attention takes text of width 768"),
        ("kohya_keys_sdxl.txt", 5, "SDXL", "cross-attention takes text of width 2048"),
        ("kohya_keys_sdxl.txt", 6, "SDXL", "cross-attention takes text of width 2048"),
    ],
)
def test_the_family_of_a_real_model_is_told_by_the_width_of_its_text(
    file: str, column: int, name: str, why: str
) -> None:
    assert family_of(named_layers(column, file))[:2] == (name, why)


@pytest.mark.parametrize(
    ("file", "name", "why"),
    [
        ("kohya_keys_sd15.txt", "SD1.x", "proj_in and proj_out are convolutions"),
        ("kohya_keys_sdxl.txt", "SDXL", "it alone has down_blocks_1_attentions_0_transformer_"),
    ],
)
def test_without_cross_attention_it_is_told_by_blocks(file: str, name: str, why: str) -> None:
    adapter = named_layers(5, file)
    layers = {n: held for n, held in adapter.layers.items() if "attn2_to_" not in n}
    told = family_of(dataclasses.replace(adapter, layers=layers))
    assert told.name == name
    assert why in told.because


def test_projections_that_are_matrices_tell_the_second_stable_diffusion() -> None:
    adapter = named_layers(5, "kohya_keys_sd15.txt")
    layers = {n: x for n, x in adapter.layers.items() if "attn2_to_" not in n}
    flat = {
        n: dataclasses.replace(x, parts={k: t.flatten(1) for k, t in x.parts.items()})
        for n, x in layers.items()
    }
    assert family_of(dataclasses.replace(adapter, layers=flat)).name == "SD2.x"


@pytest.mark.parametrize(
    ("case", "name", "why"),
    [
        (
            "traps/te_only.safetensors",
            "text encoder only",
            "every layer is one of text_encoder, of width 12",
        ),
        ("peft/linear", "unknown", "no layer has a name of Stable Diffusion's UNet"),
        (
            "cloneofsimo/safetensors/lora.safetensors",
            "unknown",
            "the file has numbers in place of names",
        ),
    ],
)
def test_what_tells_no_family_is_said(case: str, name: str, why: str, document: Json) -> None:
    said = document("inspect", GOLDEN / case)
    assert said["family"] == {"name": name, "because": why, "claimed": ""}


def test_a_text_encoder_is_known_by_its_names_alone() -> None:
    layers = {f"encoder.layers.{n}.self_attn.q_proj": layer(out=768, size=768) for n in range(2)}
    why = "every layer has a name of CLIP's text encoders, of width 768"
    assert family_of(Adapter("style", layers)) == ("text encoder only", why, "")
    mixed = {**layers, "decoder.q_proj": layer()}
    assert family_of(Adapter("style", mixed)).name == "unknown"


def test_what_a_file_claims_of_its_base_stands_apart(document: Json, run: Run) -> None:
    assert document("inspect", KOHYA)["family"]["claimed"] == "sd_v1"
    assert "; the file itself says 'sd_v1')" in run("inspect", KOHYA)[1]


def test_inspect_prints_a_table_of_blocks_and_on_request_of_layers(run: Run) -> None:
    code, out, err = run("inspect", PEFT)
    assert (code, err) == (0, "")
    assert out.startswith(f"file     {PEFT}\nname     linear\nformat   peft\n")
    assert "block     layers  rank" in out
    assert "blocks.0.attn.to_q" not in out
    listed = run("inspect", PEFT, "--layers")[1]
    assert all(name in listed for name in read(PEFT).layers)


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path: Path, run: Run) -> None:
    write(
        Adapter("style", {"to_q": layer()}, metadata={"note": "\x1b[2J\u202e" + "long " * 40}),
        tmp_path / "a.safetensors",
    )
    out = run("inspect", tmp_path / "a.safetensors")[1]
    assert "\x1b" not in out
    assert r"note: \x1b[2J\u202elong" in out
    assert "... (" in out


def test_a_picture_is_drawn_in_one_step_and_alike_each_time(tmp_path: Path, run: Run) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.PNG"
    assert run("inspect", KOHYA, "--plot", first)[1].endswith(f"drew {first}\n")
    run("inspect", KOHYA, "--plot", second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")
    assert len(first.read_bytes()) > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.PNG"]


def test_a_picture_needs_the_package_that_draws(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("inspect", PEFT, "--plot", tmp_path / "a.png")
    assert code == 1
    assert err == (
        "lora-core: error: --plot must have 'matplotlib' to draw with, but it is not installed."
        " Run: pip install 'lora_core[demo]'\n"
    )


def test_a_picture_is_a_png(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _cli.main(["inspect", "a", "--plot", "a.svg"])
    wanted = "argument --plot: must end in '.png', but is 'a.svg'.\n"
    assert capsys.readouterr().err.endswith(wanted)


# reading


def test_a_pickle_is_refused_with_the_option_that_allows_it(run: Run) -> None:
    code, out, err = run("inspect", LORALIB)
    assert (code, out) == (1, "")
    assert err == (
        f"lora-core: error: '{LORALIB}' must be a safetensors file, but is a pickle, which may hold"
        " code. Pass --allow-pickle to read its tensors alone: no code in it is run.\n"
    )


def test_what_a_file_needs_is_named_as_an_option(run: Run) -> None:
    err = run("inspect", LORALIB, "--allow-pickle", "--enable-lora", "101")[2]
    assert err.startswith("lora-core: error: `alpha` must be given for ")
    assert err.endswith(
        " Pass --alpha A, or --alpha MODULE=A for each module, as it was trained.\n"
    )
    err = run("inspect", LORALIB, "--allow-pickle", "--alpha", "8")[2]
    assert " Pass --enable-lora, as it was trained.\n" in err


def test_an_alpha_may_be_for_one_module(document: Json) -> None:
    words = ("--allow-pickle", "--enable-lora", "qkv=101", "--enable-lora", "qkv_t=101")
    alphas = dict.fromkeys(
        read(LORALIB, allow_pickle=True, alpha=1, enable_lora=[True, False, True]).layers, "8"
    )
    alphas["fc"] = "3"
    given = [word for name, value in alphas.items() for word in ("--alpha", f"{name}={value}")]
    said = document("inspect", LORALIB, *words, *given)
    found = {entry["name"]: entry["alpha"] for entry in said["layers"]}
    assert found["fc"] == 3


def test_of_several_files_alpha_is_for_those_that_store_none(
    tmp_path: Path, document: Json, run: Run
) -> None:
    plain = tmp_path / "plain.safetensors"
    document("convert", LORALIB, plain, "--to", "lora_core", *PICKLE)
    assert document("diff", LORALIB, plain, *PICKLE)["same"]
    code, _, err = run("diff", plain, plain, "--alpha", "8")
    assert code == 1
    assert err.startswith("lora-core: error: `alpha` must be left out where a file stores it, but")
    assert " Pass no --alpha, and a strength" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--alpha", "qkv=many"), "must be a number, or MODULE=NUMBER, but is 'qkv=many'."),
        (("--alpha", "nan"), "must be a number, or MODULE=NUMBER, but is 'nan'."),
        (
            ("--enable-lora", "yes"),
            "must be a 1 or a 0 for each projection, as in qkv=101, but is 'yes'.",
        ),
    ],
)
def test_odd_values_of_options_are_shown(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _cli.main(["inspect", "a", *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"argument {words[0]}: {said}\n")


@pytest.mark.parametrize("path", TRAPS, ids=lambda path: path.name)
def test_no_file_brings_the_program_down(path: Path, run: Run, tmp_path: Path) -> None:
    for words in (("inspect", path), ("diff", path, path), ("plan", path, "--targets", "*")):
        code, out, err = run(*words, *(("--allow-pickle",) * (words[0] != "plan")))
        assert code in (0, 1), err
        assert bool(out) == (code == 0)
        assert err.count("\n") == code


# convert


@pytest.mark.parametrize(
    ("source", "words", "to"),
    [
        (KOHYA, BASES, "lora_core"),
        (KOHYA, BASES, "diffusers"),
        (KOHYA, (), "kohya"),
        (KOHYA, (), "lycoris"),
        (KOHYA, ("--fold",), "kohya"),
        (PEFT, (), "lora_core"),
        (PEFT, (), "peft"),
        (PEFT, (), "lycoris"),
        (GOLDEN / "peft" / "dora", (), "lycoris"),
        (GOLDEN / "peft" / "patterns_rslora", (), "lycoris"),
        (GOLDEN / "lycoris" / "wrapper_tucker" / "lycoris.safetensors", (), "lycoris"),
        (LORALIB, PICKLE, "lora_core"),
    ],
)
def test_a_converted_adapter_is_the_same_function(
    source: Path, words: tuple[str, ...], to: str, tmp_path: Path, document: Json
) -> None:
    out = tmp_path / "out"
    said = document("convert", source, out, "--to", to, *words)
    assert (said["format"], said["out"]) == (to, str(out))
    allowed = PICKLE if source is LORALIB else ()
    compared = document("diff", source, out, *allowed)
    assert compared["same"]
    assert len(compared["layers"]) == said["layers"]
    assert read(out).format == to
    files = [out] if out.is_file() else list(out.iterdir())
    assert said["bytes"] == sum(file.stat().st_size for file in files)


def test_dotted_names_come_from_the_base(tmp_path: Path, document: Json) -> None:
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", *BASES)
    names = read(tmp_path / "a").layers
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0" in names
    assert "text_encoder.encoder.layers.0.mlp.fc1" in {
        name.replace("text_model.", "") for name in names
    }
    # from there every format is in reach
    document("convert", tmp_path / "a", tmp_path / "b", "--to", "lora_core")
    document("convert", tmp_path / "b", tmp_path / "c", "--to", "kohya")
    assert read(tmp_path / "c").layers.keys() == read(KOHYA).layers.keys()
    assert document("diff", KOHYA, tmp_path / "c")["same"]


def test_a_pipelines_folder_is_a_base(tmp_path: Path, document: Json) -> None:
    for part, file in (("unet", UNET), ("text_encoder", TEXT)):
        (tmp_path / part).mkdir()
        shutil.copy(file, tmp_path / part / "model.safetensors")
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", "--base", tmp_path)
    assert document("diff", KOHYA, tmp_path / "a")["same"]


def test_one_file_with_all_parts_is_a_base(tmp_path: Path, document: Json) -> None:
    tensors = {}
    prefixes = {"model.diffusion_model.": UNET, "cond_stage_model.transformer.": TEXT}
    for prefix, file in prefixes.items():
        weights = safetensors.torch.load_file(file)
        tensors |= {f"{prefix}{name}": t for name, t in weights.items()}
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(tensors, whole)
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", "--base", whole)
    assert document("diff", KOHYA, tmp_path / "a")["same"]


def test_spellings_of_ldm_are_found_in_a_base_of_diffusers(tmp_path: Path, document: Json) -> None:
    source = GOLDEN / "kohya" / "sdxl_sgm_names" / "lora.safetensors"
    stem = GOLDEN / "diffusers_base" / "sdxl_tiny_"
    parts = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
    bases = [
        word
        for part, name in parts.items()
        for word in ("--base", f"{part}={stem}{name}.safetensors")
    ]
    document("convert", source, tmp_path / "a", "--to", "diffusers", *bases)
    names = read(tmp_path / "a").layers
    assert not any("input_blocks" in name for name in names)
    assert document("diff", source, tmp_path / "a", *bases)["same"]
    unequal = document("diff", source, tmp_path / "a", code=3)
    assert unequal["only_in_a"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            (),
            "A module must be known by its dotted name to be written as 'diffusers', but"
            " 'lora_te_text_model_encoder_layers_0_mlp_fc1',",
        ),
        (
            ("--base", UNET),
            f"`base` must have every part of '{KOHYA}', but has nothing of 'text_encoder', which 12"
            " of its 204 layers are for. Give each its own: --base text_encoder=CHECKPOINT --base"
            " unet=CHECKPOINT.",
        ),
        (
            ("--base", f"unet={TEXT}", "--base", f"text_encoder={TEXT}"),
            f"`base` must have every module of '{KOHYA}', but lacks 192 of its 204: 'lora_unet_",
        ),
        (
            (*BASES, "--base", f"unet={UNET}"),
            "Each part must have one base, but 'unet' has several. Write PART=PATH, with a part of",
        ),
        (("--base", "missing"), "the system says 'No such file or directory' about 'missing'."),
    ],
)
def test_a_base_that_does_not_do_is_refused(
    words: tuple[object, ...], said: str, tmp_path: Path, run: Run
) -> None:
    code, out, err = run("convert", KOHYA, tmp_path / "a", "--to", "diffusers", *words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"lora-core: error: {said}")
    assert not list(tmp_path.iterdir())


def test_a_base_may_store_matrices_either_way(tmp_path: Path, document: Json) -> None:
    base = LORALIB.parent / "base.safetensors"
    words = ("--base", base, *PICKLE)
    document("convert", LORALIB, tmp_path / "a", "--to", "peft", *words)
    compared = document("diff", LORALIB, tmp_path / "a", *words)
    assert compared["same"]
    assert len(compared["layers"]) == len(read(tmp_path / "a").layers)


def test_projections_in_one_weight_are_in_a_base(tmp_path: Path, document: Json) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base")
    report = lora_core.inject(model, rank=2)
    lora_core.save(model, tmp_path / "a")
    document(
        "convert", tmp_path / "a", tmp_path / "b", "--to", "lora_core", "--base", tmp_path / "base"
    )
    found = read(tmp_path / "b").layers
    assert found.keys() == {layer.name for layer in report.layers}
    assert {held.kind for held in found.values()} == {"weight", "linear"}


def test_a_part_with_dotted_names_needs_no_base(tmp_path: Path, document: Json) -> None:
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", *BASES)
    words = ("--to", "lora_core", "--base", f"unet={UNET}")
    document("convert", tmp_path / "a", tmp_path / "b", *words)
    assert document("diff", KOHYA, tmp_path / "b")["same"]


def test_factors_and_a_difference_of_one_module_stay_apart(tmp_path: Path, document: Json) -> None:
    parts = {
        "lora_unet_a_b.lora_down.weight": torch.randn(2, 5),
        "lora_unet_a_b.lora_up.weight": torch.randn(6, 2),
        "lora_unet_a_b.diff_b": torch.randn(6),
    }
    safetensors.torch.save_file(parts, tmp_path / "a")
    base = {"a.b.weight": torch.zeros(6, 5), "a.b.bias": torch.zeros(6)}
    safetensors.torch.save_file(base, tmp_path / "base")
    words = ("--to", "lycoris", "--base", f"unet={tmp_path / 'base'}")
    assert document("convert", tmp_path / "a", tmp_path / "b", *words)["layers"] == 2
    compared = document("diff", tmp_path / "a", tmp_path / "b")
    assert compared["same"]
    assert len(compared["layers"]) == 2


def test_numbers_are_not_looked_for_in_a_checkpoint(tmp_path: Path, run: Run) -> None:
    source = GOLDEN / "cloneofsimo" / "safetensors" / "lora.safetensors"
    code, _, err = run("convert", source, tmp_path / "a", "--to", "diffusers", *BASES)
    assert code == 1
    assert err.startswith(
        "lora-core: error: Modules must have names to be found in a checkpoint, but"
    )


def test_a_format_with_no_place_for_something_names_the_option(tmp_path: Path, run: Run) -> None:
    tucker = GOLDEN / "lycoris" / "wrapper_tucker" / "lycoris.safetensors"
    base = tucker.parent / "base.safetensors"
    code, _, err = run("convert", tucker, tmp_path / "a", "--to", "peft", "--base", base)
    assert code == 1
    assert "`format` must have a place for all of the adapter, but 'peft' has none for" in err
    assert "Pass --fold, or --to " in err
    assert run("convert", tucker, tmp_path / "a", "--to", "peft", "--base", base, "--fold")[0] == 0
    assert run("diff", tucker, tmp_path / "a")[0] == 0


def test_a_name_may_be_given(tmp_path: Path, document: Json, run: Run) -> None:
    document("convert", PEFT, tmp_path / "a", "--to", "lora_core", "--name", "ink")
    assert read(tmp_path / "a").name == "ink"
    code, _, err = run("convert", PEFT, tmp_path / "b", "--to", "lora_core", "--name", "a b")
    assert code == 1
    assert err.startswith("lora-core: error: `name` must ")


# combine, resize, extract, merge


def same_tensors(path: Path, adapter: Adapter) -> None:
    found = read(path)
    assert found.layers.keys() == adapter.layers.keys()
    for name, held in adapter.layers.items():
        for part, tensor in held.parts.items():
            assert torch.equal(found.layers[name].parts[part], tensor)
        assert found.layers[name].settings.alpha == held.settings.alpha


def told(call: Callable[..., Any]) -> tuple[Any, list[dict[str, Any]]]:
    results: list[Any] = []
    made = call(told=results.append)
    keys = ("name", "rank", "error")
    return made, [{key: getattr(result, key) for key in keys} for result in results]


def test_combine_writes_what_the_library_makes(tmp_path: Path, document: Json) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for seed, path in enumerate((a, b)):
        torch.manual_seed(seed)
        write(Adapter("style", {f"x.{n}": layer() for n in range(3)}), path)
    said = document("combine", a, b, tmp_path / "c", "--weights", "2", "-0.5", "--rank", "3")
    made, results = told(
        lambda told: lora_core.combine([read(a), read(b)], [2, -0.5], 3, told=told)
    )
    same_tensors(tmp_path / "c", made)
    assert said["results"] == results
    assert said["worst_error"] == max(result["error"] for result in results) > 0
    document("combine", a, b, tmp_path / "d")
    same_tensors(tmp_path / "d", lora_core.combine([read(a), read(b)], [1, 1]))


def test_other_methods_are_seeded(tmp_path: Path, document: Json) -> None:
    a, dare = tmp_path / "a", ("--method", "dare", "--density", "0.5", "--rank", "3")
    write(Adapter("style", {f"x.{n}": layer() for n in range(3)}), a)
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        document("combine", a, a, tmp_path / name, *dare, "--seed", seed)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert (tmp_path / "b").read_bytes() != (tmp_path / "d").read_bytes()


def test_two_names_of_one_module_are_not_summed_as_two(
    tmp_path: Path, document: Json, run: Run
) -> None:
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", *BASES)
    document("convert", tmp_path / "a", tmp_path / "b", "--to", "lora_core")
    layers = read(tmp_path / "b").layers
    plain = {
        name: replace(x, path=x.path.removeprefix("text_model.")) for name, x in layers.items()
    }
    wrapped = {
        name: replace(x, path=f"text_model.{x.path}") if x.component != "unet" else x
        for name, x in plain.items()
    }
    for name, spelt in (("w", wrapped), ("p", plain)):
        write(Adapter("a", spelt), tmp_path / name)
    code, _, err = run("combine", tmp_path / "w", tmp_path / "p", tmp_path / "c")
    assert code == 1
    assert err.startswith(
        "lora-core: error: Adapters must call a module by one name to be combined, but"
    )
    words = ("--weights", "0.5", "0.5", *BASES, "--to", "diffusers")
    document("combine", tmp_path / "w", tmp_path / "p", tmp_path / "c", *words)
    assert document("diff", KOHYA, tmp_path / "c")["same"]


@pytest.mark.parametrize(
    "limit", [{"rank": 2}, {"energy": 0.5}, {"error": 0.3}], ids=["rank", "energy", "error"]
)
def test_resize_writes_what_the_library_makes(
    limit: dict[str, Any], tmp_path: Path, document: Json
) -> None:
    (option, value), *_ = limit.items()
    said = document("resize", PEFT, tmp_path / "a", f"--{option}", value, "--to", "lora_core")
    made, results = told(lambda told: lora_core.resize(read(PEFT), **limit, told=told))
    same_tensors(tmp_path / "a", made)
    assert said["results"] == results


def test_the_errors_of_layers_are_printed(tmp_path: Path, run: Run) -> None:
    code, out, _ = run("resize", PEFT, tmp_path / "a", "--rank", "1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "rank", "error"]
    assert lines[2].split()[:2] == ["blocks.0.attn.to_q", "1"]
    assert "relative error" in out
    assert f"wrote linear to {tmp_path / 'a'} as peft: 7 layers," in out


def test_an_adapter_keeps_its_format_unless_another_is_asked_for(
    tmp_path: Path, document: Json
) -> None:
    assert document("resize", KOHYA, tmp_path / "a", "--rank", "2")["format"] == "kohya"
    assert document("resize", PEFT, tmp_path / "b", "--rank", "2")["format"] == "peft"
    assert (tmp_path / "b" / "adapter_config.json").exists()


def test_factors_may_be_of_another_type(tmp_path: Path, document: Json) -> None:
    half = ("--rank", "2", "--dtype", "float16", "--to", "lora_core")
    document("resize", PEFT, tmp_path / "a", *half)
    types = {t.dtype for held in read(tmp_path / "a").layers.values() for t in held.parts.values()}
    assert types == {torch.float16}


def test_kohyas_files_have_two_spellings_and_say_their_base(tmp_path: Path, document: Json) -> None:
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", *BASES)
    words = ("--to", "kohya", "--spelling", "ldm", "--family", "sd_v2")
    document("convert", tmp_path / "a", tmp_path / "b", *words)
    found = read(tmp_path / "b")
    assert any("lora_unet_input_blocks_1_1_" in name for name in found.layers)
    assert found.metadata["ss_base_model_version"] == "sd_v2"
    assert document("inspect", tmp_path / "b")["family"]["claimed"] == "sd_v2"


def test_square_matrices_are_stored_as_is_said(tmp_path: Path, document: Json) -> None:
    weight = torch.randn(6, 6)
    safetensors.torch.save_file({"a.weight": weight}, tmp_path / "base")
    held = layer(size=6)
    write(Adapter("style", {"a": held}), tmp_path / "lora")
    for option, wanted in (("--transposed", delta(held).T), ("--no-transposed", delta(held))):
        document("merge", tmp_path / "base", tmp_path / "lora", tmp_path / option, option)
        merged = safetensors.torch.load_file(tmp_path / option)["a.weight"]
        torch.testing.assert_close(merged, weight + wanted)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, an adapter, and both merged by the library."""
    torch.manual_seed(0)
    weights = {
        "a.weight": torch.randn(6, 5),
        "a.bias": torch.randn(6),
        "b.weight": torch.randn(6, 5),
    }
    base, adapter, merged = (tmp_path / f"{name}.safetensors" for name in ("base", "lora", "both"))
    safetensors.torch.save_file(weights, base)
    write(Adapter("style", {"a": layer()}), adapter)
    lora_core.merge_file(base, read(adapter), merged, strength=0.5)
    return base, adapter, merged


def test_merge_writes_what_the_library_writes(
    checkpoints: tuple[Path, Path, Path], tmp_path: Path, document: Json
) -> None:
    base, adapter, merged = checkpoints
    said = document("merge", base, adapter, tmp_path / "m", "--strength", "0.5")
    assert (tmp_path / "m").read_bytes() == merged.read_bytes()
    assert (said["changed"], said["untouched"], said["strength"]) == (1, 2, 0.5)
    assert said["results"][0]["name"] == "a"
    assert said["bytes"] == merged.stat().st_size


def test_merge_takes_one_part(tmp_path: Path, document: Json, run: Run) -> None:
    document("convert", KOHYA, tmp_path / "a", "--to", "diffusers", *BASES)
    code, _, err = run("merge", UNET, tmp_path / "a", tmp_path / "m")
    assert code == 1
    assert "Pass --only 'unet' for that part alone." in err
    assert (
        document("merge", UNET, tmp_path / "a", tmp_path / "m", "--only", "unet")["changed"] == 192
    )
    document("merge", UNET, KOHYA, tmp_path / "n", "--only", "unet")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "n").read_bytes()


def test_extract_writes_what_the_library_makes(
    checkpoints: tuple[Path, Path, Path], tmp_path: Path, document: Json
) -> None:
    base, adapter, merged = checkpoints
    said = document("extract", base, merged, tmp_path / "x", "--rank", "2")
    made, results = told(lambda told: lora_core.extract(base, merged, rank=2, told=told))
    same_tensors(tmp_path / "x", made)
    assert said["results"] == results
    half = lora_core.combine([read(adapter)], [0.5])
    write(half, tmp_path / "half")
    assert document("diff", tmp_path / "x", tmp_path / "half", "--tolerance", "1e-4")["same"]


def test_what_no_factors_express_is_said_once(tmp_path: Path, run: Run) -> None:
    before = {"a.weight": torch.zeros(4, 4), "a.bias": torch.zeros(4)}
    after = {name: t + 1 for name, t in before.items()}
    for name, weights in (("before", before), ("after", after)):
        safetensors.torch.save_file(weights, tmp_path / name)
    code, out, err = run(
        "extract", tmp_path / "before", tmp_path / "after", tmp_path / "x", "--rank", 1
    )
    assert (code, err) == (0, "")
    assert out.count("note: left out are 1 tensors that differ, being no layer's matrix") == 1


# diff


def save_two(
    folder: Path, one: dict[str, AdapterLayer], other: dict[str, AdapterLayer]
) -> list[Path]:
    paths = [folder / "one.safetensors", folder / "other.safetensors"]
    for path, layers in zip(paths, (one, other), strict=True):
        write(Adapter("style", layers), path)
    return paths


@given(ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99))
def test_a_difference_is_that_of_dense_updates(ranks: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    one, other = (layer(rank=rank) for rank in ranks)
    gap = delta(one).double() - delta(other).double()
    wanted = float(gap.norm()) / max(float(delta(one).norm()), float(delta(other).norm()))
    found, why = difference_of(one, other)
    assert (found, why) == (pytest.approx(wanted, rel=1e-5), "")
    assert difference_of(other, one)[0] == pytest.approx(found, rel=1e-9)
    assert difference_of(one, one) == (0.0, "")


def test_a_small_difference_is_measured_without_cancellation() -> None:
    one = layer()
    parts = {**one.parts, "lora_B": one.parts["lora_B"] * (1 + 1e-6)}
    found, _ = difference_of(one, dataclasses.replace(one, parts=parts))
    assert found == pytest.approx(1e-6, rel=0.1)


def test_equal_functions_of_other_ranks_are_the_same(tmp_path: Path, document: Json) -> None:
    one = layer()
    twice = dataclasses.replace(
        one,
        config=dataclasses.replace(one.settings, rank=4, alpha=6.0),
        parts={
            "lora_A": torch.cat([one.parts["lora_A"]] * 2),
            "lora_B": torch.cat([one.parts["lora_B"] / 2] * 2, dim=1),
        },
    )
    said = document("diff", *save_two(tmp_path, {"x": one}, {"x": twice}))
    assert said["same"]
    assert said["largest_difference"] < 1e-6


def test_what_one_alone_has_counts_unless_it_adds_nothing(
    tmp_path: Path, document: Json, run: Run
) -> None:
    one = layer()
    zero = layer()
    zero = dataclasses.replace(zero, parts={**zero.parts, "lora_B": torch.zeros(6, 2)})
    paths = save_two(tmp_path, {"x": one, "y": zero}, {"x": one})
    assert document("diff", *paths) == {
        "same": True,
        "tolerance": 1e-5,
        "largest_difference": 0.0,
        "layers": [{"name": "x", "other": "x", "difference": 0.0, "why": ""}],
        "only_in_a": {"y": 0.0},
        "only_in_b": {},
    }
    paths = save_two(tmp_path, {"x": one, "y": layer()}, {"x": one})
    said = document("diff", *paths, code=3)
    assert not said["same"]
    assert said["only_in_a"]["y"] > 0
    code, out, _ = run("diff", *paths)
    assert code == 3
    assert out.startswith(f"only in {paths[0]}: 1 layers\n  y  norm ")
    assert out.endswith(
        "not the same function: 0 of 1 layers differ by more than 1e-05, 0.00e+00 at most\n"
    )


def test_the_tolerance_decides(tmp_path: Path, document: Json, run: Run) -> None:
    one = layer()
    other = dataclasses.replace(one, parts={**one.parts, "lora_B": one.parts["lora_B"] * 1.01})
    paths = save_two(tmp_path, {"x": one}, {"x": other})
    said = document("diff", *paths, code=3)
    assert said["largest_difference"] == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert document("diff", *paths, "--tolerance", "0.02")["same"]
    code, _, err = run("diff", *paths, "--tolerance", "-1")
    assert (code, err) == (1, "lora-core: error: `tolerance` must be at least 0, but is -1.\n")


def test_what_can_not_be_subtracted_is_different(tmp_path: Path, document: Json) -> None:
    said = document("diff", GOLDEN / "peft" / "dora", PEFT, code=3)
    assert said["largest_difference"] is None  # JSON has no infinity
    assert {entry["why"] for entry in said["layers"]} == {"LoRA, DoRA in one, LoRA in the other"}
    found, why = difference_of(layer(out=6), layer(out=7))
    assert (found, why) == (float("inf"), "for a weight (6, 5) in one, (7, 5) in the other")


def test_biases_and_lengths_are_compared_too() -> None:
    one = layer(lora_bias=torch.ones(6))
    assert difference_of(one, one) == (0.0, "")
    plain = dataclasses.replace(one, parts={p: t for p, t in one.parts.items() if "bias" not in p})
    assert difference_of(one, plain)[0] == 1
    rows = dataclasses.replace(plain, parts={**plain.parts, "lora_magnitude": torch.ones(6)})
    longer = dataclasses.replace(plain, parts={**plain.parts, "lora_magnitude": torch.ones(6) * 2})
    assert difference_of(rows, longer)[0] == pytest.approx(0.5)


def shaped(kind: str, a: tuple[int, ...], b: tuple[int, ...], **settings: Any) -> AdapterLayer:
    config = AdapterConfig(2, 3.0, 0.0, torch.float32, **settings)
    parts = {"lora_A": torch.randn(a), "lora_B": torch.randn(b)}
    return AdapterLayer(kind, config, parts)


@pytest.mark.parametrize(
    ("factors", "shape", "turned"),
    [
        (shaped("linear", (2, 5), (6, 2)), (6, 5), False),
        (shaped("matrix", (2, 5), (6, 2)), (5, 6), True),
        (replace(shaped("linear", (2, 5), (5, 2)), transposed=True), (5, 5), True),
        (shaped("embedding", (2, 9), (4, 2)), (9, 4), True),
        (shaped("embedding", (2, 4), (4, 2)), (4, 4), True),
        (shaped("conv", (2, 5, 3, 3), (6, 2, 1, 1)), (6, 5, 3, 3), False),
        (shaped("weight", (3, 2, 5), (3, 6, 2)), (3, 6, 5), False),
        (shaped("weight", (2, 5), (1, 2)), (5,), False),
    ],
)
def test_a_whole_difference_is_compared_with_factors(
    factors: AdapterLayer, shape: tuple[int, ...], turned: bool
) -> None:
    dense = delta(factors)
    whole = AdapterLayer(
        "difference", None, {"weight": (dense.mT if turned else dense).reshape(shape)}
    )
    for pair in ((factors, whole), (whole, factors)):
        found, why = difference_of(*pair)
        assert (found < 1e-6, why) == (True, "")
    half = replace(whole, parts={"weight": whole.parts["weight"] / 2})
    assert difference_of(factors, half)[0] == pytest.approx(0.5, rel=1e-5)
    found = compare(Adapter("a", {"x": factors}), Adapter("b", {"x": whole}), lambda *_: None)
    assert found.is_same(1e-5)
    assert [(x.name, x.other) for x in found.layers] == [("x", "x")]


def test_what_factors_can_not_be_compared_with_is_said() -> None:
    one = layer()
    values = AdapterLayer("values", None, {"weight": delta(one)})
    assert difference_of(one, values) == (float("inf"), "LoRA in one, values in the other")
    assert difference_of(values, values) == (0.0, "")
    whole = AdapterLayer("difference", None, {"weight": torch.zeros(3, 3)})
    assert difference_of(whole, whole) == (0.0, "")
    assert difference_of(whole, one) == (
        float("inf"),
        "{'weight': (3, 3)} in one, {'lora_A': (2, 5), 'lora_B': (6, 2)} in the other",
    )
    bias = AdapterLayer("difference", None, {"bias": torch.ones(6)})
    assert difference_of(one, bias)[0] == 1
    both = {"lora_bias": torch.ones(6), "lora_B": torch.zeros(6, 2)}
    assert difference_of(replace(one, parts={**one.parts, **both}), bias) == (0.0, "")


def test_a_bias_may_stand_apart_from_its_factors() -> None:
    one = layer(lora_bias=torch.arange(6.0))
    bias = AdapterLayer("difference", None, {"bias": torch.arange(6.0)}, path="x")
    factors = {part: t for part, t in one.parts.items() if part != "lora_bias"}
    apart = {"x": replace(one, parts=factors), "x.bias": bias}
    step: Callable[..., None] = lambda *_: None  # noqa: E731
    together = Adapter("a", {"x": one})
    found = compare(together, Adapter("b", apart), step)
    assert [(x.name, x.other, x.difference) for x in found.layers] == [("x", "x", 0.0)]
    assert found.is_same(0)
    zero = replace(bias, parts={"bias": torch.zeros(6)})
    found = compare(together, Adapter("b", {"x": one, "x.bias": zero}), step)
    assert found.is_same(0)
    assert not compare(together, Adapter("b", {"x": one, "x.bias": bias}), step).is_same(0.1)
    more = replace(bias, parts={"weight": torch.ones(6, 5)})
    found = compare(together, Adapter("b", {"x": one, "x.weight": more}), step)
    assert found.layers[0].why == "LoRA, bias in one, LoRA, bias and difference in the other"
    assert not found.is_same(1)
    assert found.alone == ({}, {})


def test_names_that_agree_get_no_hint_of_other_names(tmp_path: Path, run: Run) -> None:
    one, stem = layer(), "lora_unet_a_b"
    factors = {
        f"{stem}.lora_{n}.weight": one.parts[p] for n, p in (("down", "lora_A"), ("up", "lora_B"))
    }
    factors[f"{stem}.alpha"] = torch.tensor(3.0)
    safetensors.torch.save_file(factors, tmp_path / "a")
    for name, whole in (("b", delta(one)), ("c", torch.ones(3, 3))):
        safetensors.torch.save_file({f"{stem}.diff": whole}, tmp_path / name)
    assert run("diff", tmp_path / "a", tmp_path / "b")[0] == 0
    code, out, _ = run("diff", tmp_path / "a", tmp_path / "c")
    assert code == 3
    assert "(2, 5), 'lora_B': (6, 2)} in one, {'weight': (3, 3)} in the other" in out
    assert "--base" not in out


def test_names_that_may_be_either_are_refused() -> None:
    one = Adapter("a", {"x.y_z": layer(), "x_y.z": layer()})
    stems = {"lora_x_y_z": dataclasses.replace(layer(), path="x_y_z", spelling="stem")}
    message = r"^A name must mean one layer to be compared, but 'x\.y_z', 'x_y\.z' may both be the"
    with pytest.raises(MismatchError, match=message):
        compare(one, Adapter("b", stems), lambda done, total: None)


def test_files_with_no_name_in_common_get_a_hint(tmp_path: Path, run: Run) -> None:
    code, out, _ = run("diff", PEFT, KOHYA)
    assert code == 3
    assert (
        "\nwhat only one has may be the other's under a name as another program spells it: pass"
        " --base with the model of both\n"
    ) in out
    base = {f"{name}.weight": torch.zeros(3) for name in ("a", "b")}
    safetensors.torch.save_file(base, tmp_path / "base")
    for name in ("a", "b"):
        whole = {f"lora_unet_{name}.diff": torch.ones(3)}
        safetensors.torch.save_file(whole, tmp_path / name)
    two = (tmp_path / "a", tmp_path / "b")
    for words, hinted in ((), True), (("--base", f"unet={tmp_path / 'base'}"), False):
        code, out, _ = run("diff", *two, *words)
        assert (code, "--base" in out) == (3, hinted)


# plan


@pytest.fixture
def unet(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = lora_core.models.UNet()
    path = tmp_path / "unet.safetensors"
    safetensors.torch.save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    return model, path


def test_plan_says_what_the_library_says_of_the_model(
    unet: tuple[nn.Module, Path], document: Json, run: Run
) -> None:
    model, path = unet
    rules = {"*mid*": {"rank": 8, "alpha": 4}}
    report = lora_core.plan(model, 4, rules=rules, exclude="*attn1*")
    words = ("plan", path, "--rules", json.dumps(rules), "--exclude", "*attn1*")
    said = document(*words)
    ours = {entry["name"]: entry for entry in said["layers"]}
    assert ours.keys() == {layer.name for layer in report.layers}
    for entry in report.layers:
        for key in ("kind", "in_features", "out_features", "rank", "alpha", "scale", "parameters"):
            assert ours[entry.name][key] == getattr(entry, key)
    assert said["parameters"] == report.parameters
    assert set(said["left_out"]) == set(report.left_out)
    out = run(*words)[1]
    assert "\nmodules told by names and shapes: " in out
    assert f"adapter 'default': {len(report.layers)} layers" in out


def test_every_kind_is_told_by_its_tensors(tmp_path: Path, document: Json) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding = nn.Embedding(9, 8)
            self.attn = nn.MultiheadAttention(8, 2)
            self.fc, self.norm = nn.Linear(8, 6), nn.LayerNorm(8)
            self.conv = nn.ModuleList(
                [nn.Conv1d(3, 4, 2), nn.Conv2d(3, 4, 2), nn.Conv3d(3, 4, (1, 2, 3))]
            )
            self.experts = nn.Module()
            self.experts.w = nn.Parameter(torch.zeros(2, 4, 5))

    model = Model()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m")
    targets = ["attn.*", "fc", "conv.*", "token_embedding", "experts.w"]
    report = lora_core.plan(model, 2, targets=targets)
    words = [word for target in targets for word in ("--targets", target)]
    said = document("plan", tmp_path / "m", "--rank", "2", *words)
    ours = {e["name"]: (e["kind"], e["in_features"], e["out_features"]) for e in said["layers"]}
    for entry in report.layers:
        kind, *sizes = ours[entry.name]
        assert sizes == [entry.in_features, entry.out_features]
        if entry.name != "attn.out_proj" and not entry.name.startswith("experts"):
            assert kind == entry.kind
    assert ours.keys() == {entry.name for entry in report.layers}


def test_gpt2s_layers_are_told_by_their_biases(tmp_path: Path, document: Json) -> None:
    shapes = {
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.c_proj.weight": (8, 8),
        "h.0.attn.c_proj.bias": (8,),
    }
    safetensors.torch.save_file({n: torch.zeros(s) for n, s in shapes.items()}, tmp_path / "m")
    said = document("plan", tmp_path / "m", "--targets", "c_*")
    assert [(e["kind"], e["in_features"], e["out_features"]) for e in said["layers"]] == [
        ("Conv1D", 8, 24),
        ("Conv1D", 8, 8),
    ]


def test_names_of_attributes_are_names_of_modules(tmp_path: Path, document: Json) -> None:
    names = ("forward", "training", "a.b", "a", "_modules", "")
    tensors = {f"{name}.weight".lstrip("."): torch.zeros(4, 4) for name in names}
    safetensors.torch.save_file(tensors, tmp_path / "m")
    said = document("plan", tmp_path / "m", "--targets", "*", "--rank", "1")
    assert {e["name"] for e in said["layers"]} >= {"forward", "training", "a.b", "a", "_modules"}


def test_a_target_that_matches_nothing_is_an_error(unet: tuple[nn.Module, Path], run: Run) -> None:
    code, _, err = run("plan", unet[1], "--targets", "to_qq")
    assert code == 1
    assert err.startswith(
        "lora-core: error: `targets` must match a layer, but 'to_qq' matches none"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be JSON, but is not: "),
        ("3", """must be a JSON object, as in '{"*mid*": {"rank": 16}}', but is '3'."""),
    ],
)
def test_rules_are_a_json_object(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _cli.main(["plan", "a", "--rules", text])
    assert f"argument --rules: {said}" in capsys.readouterr().err


# outputs


def writers(folder: Path) -> dict[str, tuple[object, ...]]:
    """The words of every command that writes, without its output."""
    base, adapter = folder / "base.safetensors", folder / "lora.safetensors"
    both = folder / "both.safetensors"
    return {
        "convert": ("convert", adapter, "{}", "--to", "lora_core"),
        "combine": ("combine", adapter, adapter, "{}"),
        "resize": ("resize", adapter, "{}", "--rank", "1"),
        "extract": ("extract", base, both, "{}", "--rank", "1"),
        "merge": ("merge", base, adapter, "{}"),
        "inspect": ("inspect", adapter, "--plot", "{}"),
    }


@pytest.mark.parametrize("name", ["convert", "combine", "resize", "extract", "merge", "inspect"])
def test_an_output_is_left_alone_unless_force_is_given(
    name: str, checkpoints: tuple[Path, Path, Path], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    words = [out if word == "{}" else word for word in writers(tmp_path)[name]]
    what = "plot" if name == "inspect" else "out"
    code, printed, err = run(*words)
    assert (code, printed) == (1, "")
    assert err == (
        f"lora-core: error: `{what}` must be new, but '{out}' is there. Pass --force to replace"
        " it.\n"
    )
    assert out.read_bytes() == b"mine"
    assert run(*words, "--force")[0] == 0
    assert len(out.read_bytes()) > 100
    before = out.read_bytes()
    assert run(*words, "--force")[0] == 0
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors",
        "both.safetensors",
        "lora.safetensors",
        "out.png",
    ]


def test_an_output_without_a_folder_is_refused_before_the_work(tmp_path: Path, run: Run) -> None:
    code, _, err = run("resize", PEFT, tmp_path / "no" / "out", "--rank", "1")
    assert code == 1
    assert err == (
        f"lora-core: error: `out` must be in a folder that is there, but '{tmp_path / 'no'}' is"
        " none. Make it first.\n"
    )


@pytest.mark.parametrize("name", ["combine", "resize", "extract", "merge"])
def test_stopping_half_way_leaves_nothing(
    name: str,
    checkpoints: tuple[Path, Path, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(self: Results, result: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "__call__", stop)
    before = sorted(tmp_path.iterdir())
    words = [tmp_path / "out" if word == "{}" else word for word in writers(tmp_path)[name]]
    assert run(*words) == (130, "", "lora-core: interrupted\n")
    assert sorted(tmp_path.iterdir()) == before


# the frame


def test_the_switches_of_plan_are_those_of_the_table_of_settings() -> None:
    said = {
        action.dest: action.help
        for action in commands_of(parser())["plan"]._actions
        if action.nargs == 0 and action.dest not in {"help", "json", "debug"}
    }
    off = {key: s.help for key, s in SETTINGS.items() if s.asked and s.default is False}
    assert list(said) == list(off)
    assert [text.capitalize() for text in map(str, said.values())] == [
        text.rstrip(".").capitalize() for text in off.values()
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (arguments.FORMATS, holding.FORMATS),
        (arguments.SPELLINGS, spelling.SPELLINGS),
        (arguments.METHODS, ("sum", *METHODS)),
        (arguments.FAMILIES, tuple(metadata.BASES)),
    ],
)
def test_choices_are_the_librarys(ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    assert set(ours) == set(theirs)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Pass force=True to replace it.", "Pass --force to replace it."),
        ("Pass only='unet' for it.", "Pass --only 'unet' for it."),
        ("Pass alpha=None, and go.", "Pass no --alpha, and go."),
        ("Pass alpha=, a number.", "Pass --alpha, a number."),
        ("Use format='peft'.", "Use --to 'peft'."),
        ("given are rank=4, other=3.", "given are --rank 4, other=3."),
        ("A file's '/a force=x/b' has rank=4.", "A file's '/a force=x/b' has --rank 4."),
    ],
)
def test_advice_is_in_the_words_of_the_command(message: str, said: str) -> None:
    args = argparse.Namespace(force=False, only=None, alpha=None, to=None, rank=None)
    assert _cli._with_options(message, args) == said


def test_the_dotted_names_that_a_format_needs_come_from_the_base(tmp_path: Path, run: Run) -> None:
    code, _, err = run("convert", KOHYA, tmp_path / "a", "--to", "peft")
    assert code == 1
    assert err.startswith("lora-core: error: A module must be known by its dotted name to be writt")
    assert err.endswith(" is known by a stem alone. Pass --base with its model.\n")
    assert run("convert", KOHYA, tmp_path / "d", "--to", "diffusers", *BASES)[0] == 0
    code, _, err = run("combine", KOHYA, tmp_path / "d", tmp_path / "b")
    assert code == 1
    assert err.endswith(". Pass --base with their model.\n")


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        (["combine", "a", "b", "c", "--weights", "1", "-1e-3"], "weights", [1.0, -0.001]),
        (["combine", "a", "b", "c", "--weights", "-.5E+1", "-2."], "weights", [-5.0, -2.0]),
        (["merge", "a", "b", "c", "--strength", "-1e-1"], "strength", -0.1),
        (["inspect", "a", "--alpha", "-1e1"], "alpha", [("", -10.0)]),
    ],
)
def test_negative_numbers_may_have_an_exponent(words: list[str], option: str, value: Any) -> None:
    assert getattr(parser().parse_args(words), option) == value


def test_a_number_that_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"a": float("inf"), "b": [float("nan"), 1.5, True, None], "c": Path("x")}
    show(Answer(values, ""), "diff", as_json=True)
    wanted = {"command": "diff", "a": None, "b": [None, 1.5, True, None], "c": "x"}
    assert json.loads(capsys.readouterr().out) == wanted


def test_what_a_stream_can_not_encode_is_spelled_out() -> None:
    class Ascii:
        encoding = "ascii"

    assert visible("é\n", Ascii()) == "\\xe9\n"  # type: ignore[arg-type]


def test_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    import warnings

    def tell(settings: object) -> None:
        warnings.warn("watch\n  out", stacklevel=1)

    import lora_core.demo

    monkeypatch.setattr(lora_core.demo, "tell", tell)
    assert run("demo") == (0, "", "lora-core: warning: watch out\n")


def test_the_story_of_the_demo_stays_out_of_its_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lora_core.demo

    def tell(settings: object) -> dict[str, int]:
        print("a story")
        return {"steps": 6}

    monkeypatch.setattr(lora_core.demo, "tell", tell)
    assert _cli.main(["demo", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"command": "demo", "report": {"steps": 6}}
    assert captured.err == "a story\n"


def test_short_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working") as step:
        for n in range(100):
            step(n, 100)
    assert capsys.readouterr() == ("", "")


def test_long_work_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("lora_core._cli.progress.time.monotonic", lambda: float(next(now)))
    with progress("working") as step:
        for n in range(1, 21):
            step(n, 40)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["working: 2/40, 38 s left", "working: 12/40, 28 s left"]


def test_a_terminal_gets_a_bar_that_is_wiped_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("working") as step:
        step(1, 2)
    err = capsys.readouterr().err
    assert f"[{'#' * 15}{'.' * 15}] working: 1/2, 0 s left" in err
    assert err.endswith("\r\033[K")
