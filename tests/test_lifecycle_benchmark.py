"""The benchmark of the life cycle: it refuses wrong answers, weighs, judges and reports."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_core
from benchmarks import lifecycle, lives, merging
from benchmarks.contenders import OURS, PEFT
from benchmarks.lives import CASES, IN_PLACE, PASS, QUICK, VERBS, Cost, Life, live, missing_package
from benchmarks.measure import peak_bytes

pytestmark = pytest.mark.slow


def quiet(_: str) -> None:
    pass


def test_every_verb_of_ours_is_right_and_timed() -> None:
    life = live(QUICK, [OURS], 1, quiet)
    assert not life.wrong
    assert set(life.costs[OURS]) == {*VERBS, IN_PLACE, PASS}
    assert life.largest == 8 * 8 * 4


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("switch", "another adapter is off by"),
        ("merge", "a merge changes no weight"),
        ("unmerge", "unmerge gives other weights back"),
        ("save", "a loaded adapter is off by"),
    ],
)
def test_a_verb_that_does_nothing_is_never_timed(
    verb: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lazy(lives._Ours):
        pass

    if verb == "save":  # what a file holds is not what the adapter is
        honest = lives._Ours.save

        def save(self: lives._Ours, model: nn.Module, folder: Path) -> None:
            with torch.no_grad():
                kept = [B.clone() for _, B in self.factors(model, lives.FIRST)]
                for _, B in self.factors(model, lives.FIRST):
                    B.mul_(2)
                honest(self, model, folder)
                for (_, B), was in zip(self.factors(model, lives.FIRST), kept, strict=True):
                    B.copy_(was)

        Lazy.save = save
    else:
        setattr(Lazy, verb, lambda *_: None)
    monkeypatch.setitem(lives.LIBRARIES, OURS, Lazy)
    life = live(QUICK, [OURS], 2, quiet)
    assert re.match(f"^ours: on quick, {said}", life.wrong[OURS])
    assert not life.costs
    assert "WRONG, not timed: ours: on quick" in lifecycle.as_text(life)


def test_a_model_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'quick' must have 25 layers, but has 24\.$"):
        live(replace(QUICK, layers=25), [OURS], 1, quiet)


def test_a_goal_takes_the_worse_of_both_clocks() -> None:
    ours = dict.fromkeys((*VERBS, IN_PLACE, PASS), Cost(1.0, 2.0))
    theirs = dict.fromkeys(VERBS, Cost(16.0, 8.0))
    life = Life(CASES["sd15"], {OURS: ours, PEFT: theirs}, {}, peak=30, largest=40)
    judged = {goal.what: goal for goal in lifecycle.judge({"sd15": life}, ["sd15"])}
    assert judged["sd15: save / PEFT's"].value == 1 / 4
    assert judged["sd15: save / PEFT's"].verdict == "met"
    assert judged["sd15: unmerge / PEFT's"].verdict == "not met"
    assert judged["sd15: merge in place / in-place pass"].value == 1
    assert judged["sd15: merge in place, new memory / largest layer"].value == 3 / 4
    alone = Life(CASES["sd15"], {OURS: ours}, {PEFT: "PEFT: off"}, 30, 40)
    first = lifecycle.judge({"sd15": alone}, ["sd15"])[0]
    assert (first.verdict, first.why) == ("not measured", "PEFT: off")


def test_a_case_whose_package_is_missing_says_so() -> None:
    assert missing_package(replace(QUICK, needs="no_such_package")) == "no_such_package"
    assert missing_package(QUICK) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_in_place_merge_takes_less_new_memory_than_a_layer(dtype: torch.dtype) -> None:
    model = nn.Sequential(*[nn.Linear(256, 256, dtype=dtype) for _ in range(40)])
    lora_core.inject(model, rank=2, targets=nn.Linear)
    peak = peak_bytes(lambda: lora_core.merge(model, reversible=False))
    assert 0 < peak < model[0].weight.nbytes


def test_a_peak_forgets_what_was_freed() -> None:
    x = torch.ones(1000)
    assert peak_bytes(lambda: [(x + 1).sum().item() for _ in range(3)]) == 4000 + 4
    assert peak_bytes(lambda: [x + 1, x + 2]) == 8000


def test_the_command_writes_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "lifecycle.json"
    assert lifecycle.main(["--quick", "--without-peers", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert set(data["cases"]) == {"quick"}
    assert data["cases"]["quick"]["to own inject"]["inject"] == {"cpu": 1.0, "wall": 1.0}
    assert {goal["verdict"] for goal in data["goals"]} == {"not measured"}
    assert {goal["number"] for goal in data["goals"]} == {f"L{i}" for i in range(1, 9)}
    printed = capsys.readouterr()
    assert re.search(r"^L5 .*a quick run judges no layer$", printed.out, re.MULTILINE)
    assert "ours 1/1" in printed.err


def test_each_form_of_a_merge_is_weighed_against_its_floor() -> None:
    found = {}
    for name in (merging.ADDMM, merging.PASS, merging.LEAST, *merging.FORMS):
        done = merging.child("quick", name, torch.float32)
        assert [len(times) for times in done["costs"].values()] == [1 + merging.WARM] * 3
        found[name] = [done]
    kept = {name: done["kept"] for name, (done,) in found.items()}
    assert (kept["copy"], kept["no"]) == (1, 0)
    assert 0 < kept["compact"] < 0.6
    rows = merging.ratios(found)
    assert rows["copy"]["over copying, cold"] == 1
    costs = found["no"][0]["costs"]
    assert rows["no"]["merge, warm"] == min(costs["merge"][1:]) / min(costs["floor"][1:])
    pass_cold = found["addmm_"][0]["costs"]["merge"][0]
    assert rows["no"]["merge, cold"] == costs["merge"][0] / pass_cold
    assert "compact" in merging.as_text("quick", "float32", rows)


def test_a_form_that_gives_other_weights_back_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lora_core.unmerge

    def unmerge(model: nn.Module) -> None:
        honest(model)
        model[0].weight.data.mul_(2)

    monkeypatch.setattr(lora_core, "unmerge", unmerge)
    with pytest.raises(ValueError, match="^'copy' must give the weights back, but gives others"):
        merging.child("quick", "copy", torch.float32)


def test_the_shapes_of_a_merge_are_those_of_the_unet() -> None:
    assert len(merging.shapes("sd15")) == 128
    assert sum(inside * outside for inside, outside in merging.shapes("sd15")) == 93_511_680
    assert len(merging.shapes("500")) == 500
