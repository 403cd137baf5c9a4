"""The counts behind docs/parameter-count.md: real layers, known totals, real file sizes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_core
from benchmarks import fused, parameter_count
from benchmarks.parameter_count import (
    RANKS,
    SKELETONS,
    ModelCount,
    adapter_bytes,
    count_layer,
    count_model,
    count_models,
    file_bytes,
    main,
    numbers,
    skeleton,
)

# parameters, and bytes of the float16 UNet checkpoints that Hugging Face hosts
PUBLISHED = {"sd15_unet": (859_520_964, 1_719_125_304), "sdxl_unet": (2_567_463_684, 5_135_149_760)}


@pytest.fixture(scope="module")
def models() -> list[ModelCount]:
    return count_models((1, 2, 3, 128))


def test_1000_by_2000_at_rank_2_has_6000_parameters_against_two_million() -> None:
    layer = count_layer(2000, 1000, rank=2)
    assert (layer.adapter, layer.dense) == (6_000, 2_000_000)


@pytest.mark.parametrize(("stem", "published"), PUBLISHED.items())
def test_a_skeleton_has_the_published_parameters_and_checkpoint_bytes(
    stem: str, published: tuple[int, int]
) -> None:
    model = skeleton(stem)
    assert all(p.is_meta for p in model.parameters())
    assert numbers(model.parameters()) == published[0]
    assert file_bytes(model.state_dict(), {"format": "pt"}) == published[1]


@pytest.mark.parametrize("stem", SKELETONS.values())
def test_a_skeleton_has_exactly_the_shapes_of_its_data(stem: str) -> None:
    path = Path(parameter_count.__file__).parent / "data" / f"{stem}.json"
    modules = json.loads(path.read_text())["modules"]
    expected = {f"{name}.weight": weight for name, (_, weight, _) in modules.items()}
    expected |= {f"{name}.bias": bias for name, (_, _, bias) in modules.items() if bias}
    assert {n: list(p.shape) for n, p in skeleton(stem).named_parameters()} == expected


def test_a_skeleton_that_misses_its_total_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"parameter_count": 13, "modules": {"a.b": ["Linear", [3, 4], None]}}
    (tmp_path / "small.json").write_text(json.dumps(wrong))
    monkeypatch.setattr(parameter_count, "_DATA", tmp_path)
    message = "The layers of 'small' must have 13 parameters, but have 12. Restore the data file."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        skeleton("small")


def test_a_skeleton_of_unknown_layers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"parameter_count": 12, "modules": {"a": ["Bilinear", [3, 4], None]}}
    (tmp_path / "small.json").write_text(json.dumps(wrong))
    monkeypatch.setattr(parameter_count, "_DATA", tmp_path)
    with pytest.raises(ValueError, match="^`kind` must be Linear, .*, but is 'Bilinear'. Restore"):
        skeleton("small")


def test_stable_diffusion_has_128_attention_layers_with_its_own_names() -> None:
    layers = lora_core.plan(skeleton("sd15_unet")).layers
    assert len(layers) == 128
    ends = [re.sub(r".*\.(attn[12])\.", r"\1 ", layer.name) for layer in layers]
    for block in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            assert ends.count(f"{block} {projection}") == 16


def test_parameters_are_linear_in_rank(models: list[ModelCount]) -> None:
    for model in models:
        one, *others = model.adapters
        assert one.parameters > 0
        for other in others:
            assert other.parameters == other.rank * one.parameters


def test_a_rank_beyond_the_narrowest_layer_is_left_out(models: list[ModelCount]) -> None:
    small, *large = models
    assert small.max_rank < 128
    assert [a.rank for a in small.adapters] == [1, 2, 3]
    assert all([a.rank for a in m.adapters] == [1, 2, 3, 128] for m in large)


def test_the_ratio_is_checkpoint_bytes_over_file_bytes(models: list[ModelCount]) -> None:
    for model in models:
        for adapter in model.adapters:
            assert adapter.ratio == model.nbytes / adapter.nbytes > 1
            assert adapter.nbytes > 2 * adapter.parameters  # the header


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(8, 6)})
    before = dict(model.state_dict(keep_vars=True))
    counted = count_model("small", model, [1, 6, 7])
    assert [(a.rank, a.parameters) for a in counted.adapters] == [(1, 14), (6, 84)]
    assert type(model["to_q"]) is nn.Linear
    after = dict(model.state_dict(keep_vars=True))
    assert before.keys() == after.keys()
    assert all(after[key] is before[key] and after[key].requires_grad for key in before)


@pytest.mark.parametrize("rank", [1, 7, 48])
def test_adapter_bytes_are_those_that_save_writes(tmp_path: Path, rank: int) -> None:
    unet = lora_core.models.UNet()
    lora_core.inject(unet, rank=rank, dtype=torch.float16)
    path = tmp_path / "adapter.safetensors"
    report = lora_core.save(unet, path)
    assert adapter_bytes(unet) == report.nbytes == path.stat().st_size


def test_the_table_counts_the_bytes_of_a_saved_file(
    tmp_path: Path, models: list[ModelCount]
) -> None:
    unet = lora_core.models.UNet()
    lora_core.inject(unet, rank=3, dtype=torch.float16)
    path = tmp_path / "adapter.safetensors"
    lora_core.save(unet, path)
    counted = {a.rank: a for a in models[0].adapters}[3]
    assert counted.nbytes == path.stat().st_size
    assert counted.parameters == numbers(lora_core.parameters(unet))


def test_meta_adapters_count_the_same_bytes_as_real_ones() -> None:
    counts = []
    for device in ("cpu", "meta"):
        model = nn.ModuleDict({"to_q": nn.Linear(16, 16), "to_v": nn.Linear(16, 8)}).to(device)
        lora_core.inject(model, rank=4, dtype=torch.float16)
        counts.append(adapter_bytes(model))
    assert counts[0] == counts[1]


def test_checkpoint_bytes_are_those_of_a_real_file(tmp_path: Path) -> None:
    unet = lora_core.models.UNet()
    path = tmp_path / "unet.safetensors"
    safetensors.torch.save_file(unet.half().state_dict(), path, {"format": "pt"})
    assert file_bytes(unet.state_dict(), {"format": "pt"}) == path.stat().st_size


def test_the_command_writes_its_json_and_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path, png_path = tmp_path / "new" / "counts.json", tmp_path / "new" / "sizes.png"
    arguments = ["--ranks", "4", "1", "4", "--json", str(json_path), "--plot", str(png_path)]
    assert main(arguments) == 0
    counts = json.loads(json_path.read_text())
    assert (counts["layer"]["adapter"], counts["layer"]["dense"]) == (6_000, 2_000_000)
    assert [m["layers"] for m in counts["models"]][1:] == [128, 560]
    assert all([a["rank"] for a in m["adapters"]] == [1, 4] for m in counts["models"])
    assert png_path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "6,000 parameters, 333 times fewer" in printed
    assert "859,520,964 parameters, fp16 checkpoint 1,719.13 MB" in printed
    assert "no rank" not in printed


def test_a_dash_prints_json_and_nothing_else(
    models: list[ModelCount], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_count, "count_models", lambda ranks: models)
    assert main(["--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == len(models)


def test_the_table_says_which_ranks_do_not_fit(models: list[ModelCount]) -> None:
    text = parameter_count.as_text(count_layer(), models, (1, 2, 3, 128))
    limit = models[0].max_rank
    assert f"no rank 128: its narrowest attention layer allows {limit} at most" in text
    assert text.count("no rank") == 1


def refused(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The last line of a command that says what is wrong with its words, and nothing else."""
    with pytest.raises(SystemExit) as exit_:
        command(list(arguments))
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1].partition(": error: ")[2]


@pytest.mark.parametrize("rank", ["0", "x", "1.5"])
def test_a_rank_that_is_none_is_refused(rank: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"argument --ranks: a rank must be a whole number of at least 1, but is {rank!r}"
    assert refused(main, capsys, "--ranks", rank) == said


def test_ranks_that_fit_no_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = "argument --ranks: a rank must be at most 640 for any of these models, but the lowest is"
    assert refused(main, capsys, "--ranks", "99999", "641") == f"{said} 641"


@pytest.mark.parametrize("command", [main, fused.main], ids=["parameter_count", "fused"])
def test_a_result_that_could_not_be_written_is_refused_before_the_work(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for option in ("--json", "--plot"):
        said = f"argument {option}: a result must go to a file, but {str(tmp_path)!r} is a folder"
        assert refused(command, capsys, option, str(tmp_path)) == said
        said = f"argument {option}: a result must go into a folder, but {str(file)!r} is a file"
        assert refused(command, capsys, option, str(file / "new" / "x.png")) == said
    said = "argument --plot: a picture must end in .png, .svg or .pdf, but is 'p.txt'"
    assert refused(command, capsys, "--plot", "p.txt") == said


def test_a_folder_that_may_not_be_written_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    said = f"argument --json: a result must go where you may write, but {str(tmp_path)!r} forbids"
    assert refused(main, capsys, "--json", str(tmp_path / "new" / "x")) == f"{said} it"


def test_a_picture_without_matplotlib_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = "argument --plot: a picture must have matplotlib to be drawn, but it is not installed: "
    assert refused(main, capsys, "--plot", "p.png").startswith(said)


def test_a_number_of_rounds_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = "argument --rounds: the number of rounds must be a whole number of at least 1, but is"
    for rounds in ("0", "x"):
        assert refused(fused.main, capsys, "--rounds", rounds) == f"{said} {rounds!r}"


def test_the_document_shows_what_the_command_prints() -> None:
    document = (Path(__file__).parents[1] / "docs" / "parameter-count.md").read_text()
    ranks = (1, 64, 128)
    printed = parameter_count.as_text(count_layer(), count_models(ranks), ranks)
    for line in printed.splitlines():
        assert line in document
    assert all(f"\n{rank:>6} " in document for rank in RANKS)
