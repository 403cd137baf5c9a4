import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_core
from lora_core import _cli, models
from lora_core.demo import DemoError, Settings, pictures, story, studio, tell
from lora_core.demo.classifier import recognised
from lora_core.demo.pictures import stroke_width, stroke_widths, style_score
from lora_core.demo.studio import Studio, style_images, train
from lora_core.models import pretrained

pytestmark = pytest.mark.slow

FILES = {"styles.png", "loss.png", "style.safetensors", "report.json"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the words of one quick run, through the command line as a user meets it."""
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "lora_core", "demo", "--quick", "--out", os.fspath(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out, done.stdout


@pytest.fixture(scope="module")
def figures(told: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((told[0] / "report.json").read_text())


def bar(width: int, length: int = 24) -> Tensor:
    """One image with an upright bar of ink."""
    image = torch.full((1, 1, 28, 28), -1.0)
    image[..., 2 : 2 + length, 10 : 10 + width] = 1.0
    return image


def test_a_quick_run_writes_its_files_and_nothing_else(told: tuple[Path, str]) -> None:
    out, _ = told
    assert {path.name for path in out.iterdir()} == FILES
    for name in ("styles.png", "loss.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_report_agrees_with_the_files(told: tuple[Path, str], figures: dict[str, Any]) -> None:
    adapter = told[0] / "style.safetensors"
    assert figures["adapter_bytes"] == adapter.stat().st_size
    assert figures["checkpoint_bytes"] == pretrained.CHECKPOINT.stat().st_size
    assert figures["times_smaller"] == figures["checkpoint_bytes"] / figures["adapter_bytes"]
    report = lora_core.load(models.pretrained_unet(), adapter)
    assert figures["trainable_parameters"] == report.parameters
    assert figures["total_parameters"] == report.total
    assert len(figures["losses"]) == figures["settings"]["steps"]
    assert {layer.rank for layer in report.layers} == {figures["settings"]["rank"]}


def test_the_adapter_is_ten_times_smaller(figures: dict[str, Any]) -> None:
    assert figures["times_smaller"] >= 10


def test_what_must_be_exact_is_exact(figures: dict[str, Any]) -> None:
    assert figures["reproduced_exactly"] is True
    assert figures["base_restored"] is True
    assert 0 <= figures["largest_difference_merged"] < 1e-2


def test_the_scale_of_the_score_runs_from_the_base_to_the_style(figures: dict[str, Any]) -> None:
    scores = figures["scores"]
    assert scores["base"]["style"] == 0
    assert scores["style images"]["style"] == 1
    assert scores["style images"]["recognised"] > 0.8
    assert scores["style images"]["stroke_width"] > scores["base"]["stroke_width"]


def test_lines_stand_in_for_the_bar_outside_a_terminal(told: tuple[Path, str]) -> None:
    _, words = told
    assert "step 6/6  loss " in words
    assert "\x1b" not in words
    assert "not meant to convince" in words
    assert "exactly the same images" in words


def test_an_inexact_run_is_an_error_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(story, "_same_bits", lambda *models: False)
    with pytest.raises(
        DemoError,
        match=r"^The demo must reproduce its images and restore its base exactly, but"
        r" reproduced_exactly is True and base_restored is False\. Please report this",
    ):
        tell(Settings.quick(steps=1, sampling_steps=1, out=tmp_path))
    assert "NOT the same base weights" in capsys.readouterr().out


def test_same_bits_sees_one_changed_number() -> None:
    one, other = models.pretrained_unet(), models.pretrained_unet()
    assert story._same_bits(one, other)
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-3
    assert not story._same_bits(one, other)


def test_the_same_seed_trains_the_same_adapter() -> None:
    def trained(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        unet = models.pretrained_unet()
        lora_core.inject(unet, rank=1)
        train(Studio.open(1), unet, 2, seed, lambda step, loss: None)
        return [p.detach() for p in lora_core.parameters(unet)]

    one, again, other = trained(3), trained(3), trained(4)
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))


def test_training_moves_the_adapter_and_nothing_else() -> None:
    unet = models.pretrained_unet()
    lora_core.inject(unet, rank=1)
    steps: list[int] = []
    losses = train(Studio.open(1), unet, 2, 0, lambda step, loss: steps.append(step))
    assert steps == [1, 2]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert all(p.any() for name, p in unet.named_parameters() if "lora_B_" in name), (
        "a factor that stayed zero took no part"
    )
    lora_core.eject(unet)
    assert story._same_bits(unet, models.pretrained_unet())


def test_an_interrupt_leaves_whole_files_only(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("of an earlier run")
    # a shell's background job is started deaf to Ctrl-C, and so would be its children
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from lora_core._cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "demo",
            "--force",
            "--steps",
            "100000",
            "--out",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("Training ")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == "lora-core: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["loss_curve", "style_sheet", "_say"])
def test_an_interrupt_between_files_leaves_each_whole(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, moment, interrupted)
    words = ["demo", "--force", "--quick", "--steps", "1", "--out", os.fspath(tmp_path)]
    assert _cli.main(words) == 130
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= FILES
    for name in left & {"styles.png", "loss.png"}:
        # the last chunk of a PNG file
        assert (tmp_path / name).read_bytes().endswith(b"IEND\xaeB`\x82")
    lora_core.load(models.pretrained_unet(), tmp_path / "style.safetensors")


def test_missing_packages_are_named_with_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else found(name)
    )
    with pytest.raises(
        DemoError,
        match=r"^The demo must have 'matplotlib', 'rich' to draw with, but 'rich' is not"
        r" installed\. Run: pip install 'lora_core\[demo\]'$",
    ):
        tell(Settings.quick(out=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_a_thick_bar_has_wider_strokes_than_a_thin_one() -> None:
    widths = [stroke_width(bar(width)) for width in (1, 2, 4, 6)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] / 2


def test_a_long_bar_is_as_wide_as_it_is() -> None:
    # from edge to edge of a long page only the two sides count
    image = torch.full((1, 1, 2000, 28), -1.0)
    image[..., 10:14] = 1.0
    assert stroke_width(image) == pytest.approx(4, rel=0.01)


def test_stroke_width_does_not_depend_on_the_place_or_the_direction() -> None:
    across = bar(3).transpose(2, 3)
    moved = bar(3).roll((1, 5), dims=(2, 3))
    assert_close(stroke_widths(across), stroke_widths(bar(3)))
    assert_close(stroke_widths(moved), stroke_widths(bar(3)))


def test_grain_does_not_pass_for_bold_strokes() -> None:
    grain = torch.rand(4, 1, 28, 28) * 2 - 1
    assert stroke_width(grain) < stroke_width(bar(4))


def test_an_empty_page_has_no_strokes() -> None:
    assert stroke_widths(torch.full((2, 1, 28, 28), -1.0)).tolist() == [0.0, 0.0]


def test_the_score_is_0_at_the_base_and_1_at_the_style() -> None:
    assert style_score(2.1, ordinary=2.1, style=3.3) == 0
    assert style_score(3.3, ordinary=2.1, style=3.3) == 1
    assert style_score(1.5, ordinary=2.1, style=3.3) < 0
    assert style_score(3.5, ordinary=2.1, style=3.3) > 1


def test_a_score_without_a_scale_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^`style` must differ from `ordinary`, but both are 2 pixels\."
    ):
        style_score(1.0, ordinary=2.0, style=2.0)


def test_recognition_is_the_share_read_as_asked() -> None:
    class Reader(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()

    images = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1, 1)
    assert recognised(Reader(), images, torch.tensor([0, 1, 2, 9])) == 0.75


def test_style_images_are_real_bold_digits() -> None:
    images, labels = style_images()
    assert images.shape == (64, 1, 28, 28)
    assert images.aminmax() == (-1, 1)
    assert set(labels.tolist()) == set(range(10))


def test_a_strip_is_ink_on_paper_with_gaps() -> None:
    page = pictures.strip(torch.ones(2, 1, 4, 4))
    assert page.shape == (4, 10)
    assert page[:, 4:6].eq(1).all()
    assert page[:, :4].eq(0).all()


def test_a_style_sheet_is_the_same_bytes_again() -> None:
    rows = {"base": torch.rand(3, 1, 28, 28), "other": torch.rand(3, 1, 28, 28)}
    assert pictures.style_sheet(rows, "title") == pictures.style_sheet(rows, "title")


def test_the_bar_shows_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with studio.progress("Learning", 3) as told:
        for step in (1, 2, 3):
            told(step, 0.5)
    shown = capsys.readouterr().out
    assert "Learning" in shown
    assert "3/3" in shown
    assert "loss 0.5000" in shown


def test_the_running_mean_forgets_the_start() -> None:
    mean = studio.RunningMean()
    assert mean(5.0) == pytest.approx(5)
    assert mean(1.0) < 5
    for _ in range(300):
        last = mean(1.0)
    assert last == pytest.approx(1, abs=1e-4)
