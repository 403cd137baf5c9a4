"""The benchmark of whole models: it refuses wrong answers, weighs, judges and reports."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.contenders import FROZEN, OURS, PEFT
from benchmarks.models import (
    CASES,
    INFERENCE,
    OURS_SEVERAL,
    PEFT_SEVERAL,
    QUICK,
    STEP,
    Result,
    judge,
    measure,
)

pytestmark = pytest.mark.slow

OWN = (FROZEN, OURS, OURS_SEVERAL)


def test_one_adapter_and_three_are_right_and_timed() -> None:
    result = measure(QUICK, OWN, 1)
    assert not result.wrong
    assert result.layers == 6
    for which in (STEP, INFERENCE):
        assert set(result.seconds[which]) == set(OWN)
    assert set(result.cold) == set(OWN)
    # where a matrix is small, x is all that is kept, of however many adapters
    assert 0 < result.kept[FROZEN] < result.kept[OURS] <= result.kept[OURS_SEVERAL]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("scale", r"the output is off by"),
        ("factor", r"gradient \d+ is off by"),
    ],
)
def test_a_wrong_answer_is_never_timed(
    wrong: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = models._ours

    def ours(*args: object) -> object:
        model, adapters = honest(*args)
        if wrong == "factor":  # one whose gradient is twice what it should be
            adapters[0][0][0].register_hook(lambda grad: 2 * grad)
        else:
            models.lora_core.scales(model, a0=0.5)
        return model, adapters

    monkeypatch.setitem(models._LIBRARIES, OURS, ours)
    result = measure(QUICK, [FROZEN, OURS], 1)
    assert re.match(f"^ours: on quick, {said}", result.wrong[OURS])
    assert OURS not in result.seconds[STEP]
    assert "WRONG, not timed: ours: on quick" in models.as_text(result)


def test_a_goal_compares_within_a_round() -> None:
    times = {FROZEN: [1.0, 2.0, 4.0], OURS: [1.1, 2.2, 4.4], OURS_SEVERAL: [1.2, 2.4, 4.8]}
    kept = {OURS: 3, PEFT: 4, OURS_SEVERAL: 6, PEFT_SEVERAL: 4}
    result = Result(CASES["unet"], 1, seconds={STEP: times, INFERENCE: times}, kept=kept)
    judged = {goal.what: goal for goal in judge({"unet": result}, ["unet"])}
    assert judged["unet: step / frozen"].value == pytest.approx(1.1)
    assert judged["unet: step / frozen"].verdict == "not met"
    assert judged["unet: step, 3 adapters beyond one"].value == pytest.approx(0.1)
    assert judged["unet: bytes kept, ours / PEFT"].value == 0.75
    assert judged["unet: bytes kept, ours, 3 adapters / PEFT, 3 adapters"].verdict == "not met"
    alone = Result(CASES["unet"], 1, wrong={OURS: "ours: off"})
    assert judge({"unet": alone}, ["unet"])[0].why == "ours: off"


@pytest.mark.parametrize("name", list(CASES))
def test_a_model_is_adapted_wherever_its_package_is(name: str) -> None:
    case = CASES[name]
    pytest.importorskip(case.needs)
    torch.manual_seed(0)
    layers = len(models._linears(case.build(), case))
    assert layers == {"unet": 56, "llama": 16}[name]


def test_the_command_writes_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "models.json"
    assert models.main(["--quick", "--without-peers", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert set(data["models"]) == {"quick"}
    assert data["models"]["quick"]["to frozen"][STEP][FROZEN]["median"] == 1
    assert {goal["verdict"] for goal in data["goals"]} == {"not measured"}
    assert {goal["number"] for goal in data["goals"]} == {f"M{i}" for i in range(1, 6)}
    assert "seconds" not in path.read_text()
    printed = capsys.readouterr()
    assert re.search(r"^M1 .*a quick run judges no layer$", printed.out, re.MULTILINE)
    assert "inference" in printed.err


def test_missing_peers_are_named_with_the_repair(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        models.main(["--quick"])
    said = r"PEFT and loralib must be installed, but peft, loralib is missing: run"
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
