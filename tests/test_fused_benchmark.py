"""The benchmark of the fused path: it refuses wrong answers, counts, judges and reports."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cases, composability, contenders, fused, goals
from benchmarks.cases import INFERENCE, TRAINING, Counts, Job, Result, count, jobs, measure, wanted
from benchmarks.contenders import (
    FROZEN,
    NAMES,
    OURS,
    PEERS,
    PEFT,
    REFERENCE,
    Case,
    Contender,
    WrongAnswerError,
    build,
    check,
    draw,
)
from benchmarks.goals import Goal, judge, losses
from benchmarks.measure import Rounds, Work

pytestmark = pytest.mark.slow

SMALL = Case("small", 40, 24, 16, 3)
OWN = [name for name in NAMES if name not in PEERS]


def altered(change: Callable[[Tensor, Contender], Tensor], case: Case = SMALL) -> None:
    """Checks our layer with its forward changed."""
    problem = draw(case)
    ours = build(OURS, problem)
    check(ours, problem)
    check(replace(ours, forward=lambda x: change(x, ours)), problem)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, dtype=torch.bfloat16),
        replace(SMALL, adapters=3),
        replace(SMALL, tokens=400, in_features=80, dropout=0.1),
        replace(SMALL, adapters=2, samples=5),
    ],
)
def test_the_librarys_own_answers_are_right(name: str, case: Case) -> None:
    problem = draw(case)
    try:
        contender = build(name, problem)
    except contenders.NotOfferedError as reason:
        pytest.skip(str(reason))
    check(contender, problem)
    assert all(leaf.grad is None for leaf in contender.leaves(problem.x))


def test_a_wrong_scale_is_never_timed() -> None:
    def half(x: Tensor, ours: Contender) -> Tensor:
        base = nn.functional.linear(x, ours.module.weight, ours.module.bias)
        return base + (ours.forward(x) - base) / 2

    with pytest.raises(WrongAnswerError, match="^ours: output of small is off by"):
        altered(half)


def test_a_lost_gradient_is_never_timed() -> None:
    with pytest.raises(WrongAnswerError, match="^ours: leaf 0 of small has no gradient"):
        altered(lambda x, ours: ours.forward(x.detach()))


def test_a_wrong_gradient_is_never_timed() -> None:
    class Louder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy * 1.01

    with pytest.raises(WrongAnswerError, match="^ours: gradient 0 of small is off by 1.0e-02"):
        altered(lambda x, ours: ours.forward(Louder.apply(x)))


DROPPING = replace(SMALL, tokens=400, in_features=80, dropout=0.1)


def test_dropout_that_drops_nothing_is_never_timed() -> None:
    def whole(x: Tensor, ours: Contender) -> Tensor:
        ours.module.eval()
        y = ours.forward(x)
        ours.module.train()
        return y

    with pytest.raises(WrongAnswerError, match="^ours: dropout 0.1 of small is off: one mask"):
        altered(whole, DROPPING)


def test_a_gradient_of_another_mask_is_never_timed() -> None:
    class TwoMasks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, a: Tensor) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return nn.functional.dropout(x, 0.1) @ a.t()

        @staticmethod
        def backward(ctx: object, dh: Tensor) -> tuple[None, Tensor]:
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return None, dh.t() @ nn.functional.dropout(x, 0.1)

    def two(x: Tensor, ours: Contender) -> Tensor:
        if not ours.module.training:
            return ours.forward(x)
        (A, B), module = ours.factors[0], ours.module
        # x needs its gradient too, of any mask
        h = TwoMasks.apply(x, A) + (x - x.detach()) @ A.detach().t()
        base = nn.functional.linear(x, module.weight, module.bias)
        return base + contenders.SCALE * h @ B.t()

    with pytest.raises(WrongAnswerError, match="doesn't fit the mask that was drawn"):
        altered(two, DROPPING)


def test_the_frozen_layer_and_the_reference_count_as_known() -> None:
    problem = draw(Case("known", 10, 6, 8, 2))
    m, k, n, r = 10, 6, 8, 2
    frozen = count(build(FROZEN, problem), problem)
    assert frozen == Counts(
        0, Work(("addmm",), 4 * m * n), Work(("mm",), 4 * m * k), 2 * m * k * n, 2 * m * k * n
    )
    reference = count(build(REFERENCE, problem), problem)
    assert reference.forward_flops == 2 * m * k * n + 2 * m * r * (k + n)
    assert reference.backward_flops == 2 * m * k * n + 4 * m * r * (k + n)
    assert len(reference.forward.products) == 3
    assert len(reference.backward.products) == 5
    assert reference.saved >= 4 * m * r
    assert problem.x.grad is None


def test_a_goal_is_met_at_its_bound_and_not_above() -> None:
    assert Goal("G1", "x", 1.25, 1.25).verdict == "met"
    assert Goal("G1", "x", 1.2501, 1.25).verdict == "not met"
    assert Goal("G1", "x", None, 1.25, why="no time").verdict == "not measured"
    assert str(Goal("G1", "x", 1.5, 1.25)).split()[-5:] == ["1.50", "<=", "1.25", "not", "met"]


def test_times_are_judged_as_medians_of_ratios_within_rounds() -> None:
    name = "4096x320->320"
    nothing = Counts(0, Work((), 0), Work((), 0), 1, 1)
    timed = Rounds(
        {FROZEN: (1.0, 2.0, 1.0), OURS: (1.1, 2.4, 1.3), PEFT: (2.0, 4.0, 2.0)}, FROZEN, 0
    )
    result = Result(
        cases.SHAPES[name],
        {TRAINING: timed},
        dict.fromkeys((FROZEN, OURS, PEFT), nothing),
        {},
        {},
    )
    lines = {f"{g.number} {g.what}": g for g in judge([result], ["G1", "G2"])}
    assert lines[f"G1 {name}: f+b / frozen"].value == pytest.approx(1.2)
    assert lines[f"G2 {name}: f+b / PEFT"].value == pytest.approx(0.6)
    assert lines["G1 77x768->320: f+b / frozen"].verdict == "not measured"
    untimed = judge([result], ["G1"], timeless=goals.QUICK)
    assert {g.verdict for g in untimed} == {"not measured"}


def test_a_loss_is_reported_by_how_much() -> None:
    timed = Rounds(
        {FROZEN: (1.0,) * 4, OURS: (2.0, 2.2, 2.1, 2.3), PEFT: (2.0,) * 4, REFERENCE: (3.0,) * 4},
        FROZEN,
        0,
    )
    (loss,) = losses([Result(SMALL, {TRAINING: timed}, {}, {}, {})])
    assert (loss.case, loss.which, loss.to) == ("small", TRAINING, PEFT)
    assert loss.ratio == pytest.approx(2.15 / 2)


def test_a_wrong_answer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(contender: Contender, problem: contenders.Problem) -> None:
        if contender.name == OURS:
            raise WrongAnswerError("ours: off")

    monkeypatch.setattr(cases, "check", wrong)
    job = Job(SMALL, (TRAINING, INFERENCE), frozenset({"G1"}))
    result = measure(job, OWN, 2, at_least=1e-5, attempts=1)
    assert result.wrong == {OURS: "ours: off"}
    assert set(result.counts) == {FROZEN, REFERENCE}
    assert all(set(r.seconds) == {FROZEN, REFERENCE} for r in result.rounds.values())
    assert "WRONG, not timed: ours: off" in fused.as_text(result)


def test_every_goal_has_a_line_and_looks_at_a_job() -> None:
    assert {goal.number for goal in judge([], [n for n in goals.NUMBERS if n != "G11"])} | {
        "G11"
    } == set(goals.NUMBERS)
    for number in goals.NUMBERS:
        assert wanted(jobs("cuda"), [number]) or number == "G11"
    assert len({job.case.name for job in jobs("cuda")}) == len(jobs("cuda"))


def test_a_failing_cell_is_not_met_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ZeroDivisionError("by zero")

    def cannot() -> None:
        raise composability.NotMeasuredError("no compiler")

    monkeypatch.setattr(composability, "CELLS", {"a": fails, "b": cannot, "c": lambda: None})
    lines = judge([], ["G11"])
    assert [(g.verdict, g.why) for g in lines] == [
        ("not met", "by zero"),
        ("not measured", "no compiler"),
        ("met", ""),
    ]


def test_the_command_writes_its_json_and_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_path, png_path = tmp_path / "new" / "fused.json", tmp_path / "new" / "fused.png"
    arguments = ["--quick", "--without-peers", "--rounds", "1", "--only", "G5,g6"]
    assert fused.main([*arguments, "--json", str(json_path), "--plot", str(png_path)]) == 0
    data = json.loads(json_path.read_text())
    assert {goal["number"] for goal in data["goals"]} == {"G5", "G6"}
    assert len(data["cases"]) == len(cases.SHAPES) + 1
    for case in data["cases"]:
        assert set(case["counts"]) == set(OWN)
        ratios = case["times"][TRAINING]["ratios"]
        assert ratios[FROZEN]["to frozen"]["median"] == 1
    assert "seconds" not in json_path.read_text()
    assert png_path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr()
    assert re.search(r"^G5 .*not measured: a quick run judges no layer$", printed.out, re.MULTILINE)
    assert "[1/7]" in printed.err


def test_missing_peers_are_named_with_the_repair(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "missing_peers", lambda: ["peft", "loralib"])
    with pytest.raises(SystemExit):
        fused.main(["--quick"])
    told = capsys.readouterr().err
    assert "peft, loralib are missing: run `pip install 'lora_core[bench]'`" in told


def test_an_unknown_goal_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fused.main(["--only", "G5,G13"])
    assert "a goal must be one of G1 to G12, but is 'G13'" in capsys.readouterr().err
