"""What the fused path is held to, goal by goal, and how it stands.

The bounds were set from a sketch of the fused path, timed on one CPU thread, with a margin of about
the distance between the quartiles. Bytes, operations and FLOPs are the same on every machine, so
these goals are tests as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks import composability
from benchmarks.cases import (
    CALLS,
    DORA,
    DROPOUT,
    HALF,
    INFERENCE,
    LANGUAGE,
    LARGE,
    MIXED,
    NOISY,
    RECORDING,
    REPLAYED,
    SEVERAL,
    SHAPES,
    SMALL,
    TINY,
    TRAINING,
    Counts,
    Result,
)
from benchmarks.contenders import FROZEN, OURS, PEFT, REFERENCE, SCALE, Case, draw
from lora_core import functional

NUMBERS = tuple(f"G{i}" for i in range(1, 13))
SLACK = 64  # bytes: a seed, a scale
QUICK = "a quick run judges no layer"

# case: most times the frozen layer's, and most times PEFT's, for forward and backward
_TRAINING = {
    "77x768->320": (1.25, 0.93),
    "4096x320->320": (1.18, 0.72),
    "1024x640->640": (1.12, 0.90),
    "256x1280->1280": (1.08, 0.96),
    "4096x320->2560": (1.15, 0.60),
    "512x4096->4096 r16": (1.06, 1.02),
}
_FORWARD = {"4096x320->320": 1.05, "4096x320->2560": 1.05}
_HALF_BASE = (1.30, 0.62)
_LOW_RANK = "256x1280->1280"  # few tokens, so every version of the rule takes the low-rank form


@dataclass(frozen=True, slots=True)
class Goal:
    """One bound and where we stand.

    Attributes:
        number: G1 to G12.
        what: Is held to the bound.
        value: Measured; None where it was not.
        bound: The most it may be.
        unit: Of both.
        why: No value, or an explanation of it.
    """

    number: str
    what: str
    value: float | None
    bound: float
    unit: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        """``met``, ``not met`` or ``not measured``."""
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.bound else "not met"

    def __str__(self) -> str:
        value = "-" if self.value is None else _number(self.value)
        bound = f"<= {_number(self.bound)}{self.unit and ' ' + self.unit}"
        why = f": {self.why}" if self.why else ""
        return f"{self.number:<4}{self.what:<58}{value:>9}  {bound:<13}{self.verdict}{why}"


def _number(value: float) -> str:
    whole = value == int(value)
    return f"{int(value)}" if whole else f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


@dataclass(frozen=True, slots=True)
class Book:
    """Results, and why some say nothing.

    Attributes:
        results: By name of the case.
        timeless: Why no time is judged; "" where it is.
    """

    results: Mapping[str, Result]
    timeless: str = ""

    def time(
        self,
        number: str,
        case: Case,
        which: str,
        to: str,
        bound: float,
        timeless: str | None = None,
    ) -> Goal:
        """Our time over that of `to` in one pass."""
        what = f"{case.name}: {which} / {to}"
        timeless = self.timeless if timeless is None else timeless
        why = timeless or self._missing(case, OURS, to, which=which)
        if why:
            return Goal(number, what, None, bound, why=why)
        rounds = self.results[case.name].rounds[which]
        noise = "" if rounds.noise <= NOISY else f"a noisy run, frozen +-{rounds.noise / 2:.0%}"
        return Goal(number, what, rounds.ratio(OURS, to).median, bound, why=noise)

    def excess(self, case: Case, which: str, name: str) -> float | None:
        """Microseconds per call beyond the frozen layer's."""
        if self.timeless or self._missing(case, name, which=which):
            return None
        rounds = self.results[case.name].rounds[which]
        return rounds.excess(name, FROZEN).median * 1e6

    def counts(self, case: Case, name: str = OURS) -> Counts | None:
        """The counts of one contender, None where it was not measured."""
        result = None if self.timeless == QUICK else self.results.get(case.name)
        return result.counts.get(name) if result else None

    def missing(self, case: Case, *names: str) -> str:
        """Why a case says nothing about these contenders, "" if it does."""
        return QUICK if self.timeless == QUICK else self._missing(case, *names)

    def _missing(self, case: Case, *names: str, which: str = "") -> str:
        result = self.results.get(case.name)
        if result is None or (which and which not in result.rounds):
            return "this run left it out"
        for name in names:
            if name in result.wrong:
                return f"{name} gives a wrong answer"
            if name not in result.counts:
                return result.absent.get(name, f"this run left {name} out")
        return ""


def judge(
    results: Sequence[Result], numbers: Sequence[str] = NUMBERS, timeless: str = ""
) -> list[Goal]:
    """Every line of these goals.

    Args:
        results: What was measured.
        numbers: Of the goals to judge.
        timeless: Why the times of these results are not judged against bounds for one CPU
            thread, "" if they are; `QUICK` judges no bytes and operations either.
    """
    book = Book({result.case.name: result for result in results}, timeless)
    return [line for number in numbers for line in _JUDGES[number](book)]


def _g1(book: Book) -> list[Goal]:
    return [
        book.time("G1", SHAPES[name], TRAINING, FROZEN, bound)
        for name, (bound, _) in _TRAINING.items()
    ]


def _g2(book: Book) -> list[Goal]:
    return [
        book.time("G2", SHAPES[name], TRAINING, PEFT, bound)
        for name, (_, bound) in _TRAINING.items()
    ]


def _g3(book: Book) -> list[Goal]:
    return [
        book.time("G3", SHAPES[name], INFERENCE, FROZEN, bound) for name, bound in _FORWARD.items()
    ]


def _g4(book: Book) -> list[Goal]:
    return [
        book.time("G4", HALF[0], TRAINING, FROZEN, _HALF_BASE[0]),
        book.time("G4", HALF[0], TRAINING, PEFT, _HALF_BASE[1]),
    ]


def bound_to_frozen(case: Case, which: str) -> float | None:
    """The most times the frozen layer's time that a case may take, None where there is no goal."""
    if which == TRAINING:
        if case == HALF[0]:
            return _HALF_BASE[0]
        return _TRAINING.get(case.name, (None,))[0]
    return _FORWARD.get(case.name) if which == INFERENCE else None


def most_forward_bytes(case: Case) -> int:
    """The output, and room for ``x A^T`` twice."""
    small = 2 * case.rows * case.rank * case.adapters
    return (case.rows * case.out_features + small) * case.dtype.itemsize


def most_backward_bytes(case: Case) -> int:
    """The input's gradient, and twice everything that is as small as the factors."""
    sizes = case.rows + case.in_features + case.out_features
    small = 2 * case.rank * case.adapters * sizes
    return (case.rows * case.in_features + small) * case.dtype.itemsize


def most_saved_bytes(case: Case) -> int:
    """``x A^T``, and a seed or a scale."""
    return case.rows * case.rank * case.adapters * case.dtype.itemsize + SLACK


def _g5(book: Book) -> list[Goal]:
    measured: tuple[tuple[str, Callable[[Counts], int], Callable[[Case], int]], ...] = (
        ("new bytes of forward / (y + 2 M r)", lambda c: c.forward.nbytes, most_forward_bytes),
        (
            "new bytes of backward / (dx + 2 r (M + K + N))",
            lambda c: c.backward.nbytes,
            most_backward_bytes,
        ),
        ("saved besides x / (M r)", lambda c: c.saved, most_saved_bytes),
    )
    lines = []
    for what, value, bound in measured:
        shares = {
            name: value(counts) / bound(book.results[name].case)
            for name, case in SHAPES.items()
            if (counts := book.counts(case))
        }
        if not shares:
            lines.append(Goal("G5", what, None, 1.0, why=book.missing(SHAPES[_LOW_RANK], OURS)))
            continue
        worst = max(shares, key=lambda name: shares[name])
        above = sum(share > 1 for share in shares.values())
        why = f"worst is {worst}; {above} of {len(shares)} above the bound"
        lines.append(Goal("G5", what, shares[worst], 1.0, why=why))
    return lines


def _g6(book: Book) -> list[Goal]:
    counts = book.counts(DROPOUT)
    share = None
    if counts:
        share = counts.saved / most_saved_bytes(book.results[DROPOUT.name].case)
    return [
        book.time("G6", DROPOUT, TRAINING, PEFT, 0.85),
        Goal(
            "G6",
            "with dropout: saved besides x / (M r)",
            share,
            1.0,
            why="" if counts else book.missing(DROPOUT, OURS),
        ),
    ]


def _g7(book: Book) -> list[Goal]:
    lines = [book.time("G7", case, TRAINING, PEFT, 0.9) for case in DORA]
    for case in DORA:
        ours, peft = book.counts(case), book.counts(case, PEFT)
        share = ours.saved / peft.saved if ours and peft else None
        why = "" if share else book.missing(case, OURS, PEFT)
        lines.append(Goal("G7", f"{case.name}: saved / PEFT", share, 0.5, why=why))
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        error = norm_error(dtype)
        why = "`functional.dora_norm` is not there yet" if error is None else ""
        lines.append(Goal("G7", f"relative error of the norm, {kind} weight", error, 5e-7, why=why))
    return lines


def norm_error(dtype: torch.dtype) -> float | None:
    """Largest relative error of `functional.dora_norm` over rows, None where there is none."""
    norm = getattr(functional, "dora_norm", None)
    if norm is None:
        return None
    problem = draw(Case("norm", 1, 320, 320, dtype=dtype))
    lora_A, lora_B = problem.factors[0]
    whole = problem.weight.double() + SCALE * lora_B.double() @ lora_A.double()
    true = whole.norm(dim=1)
    got = norm(problem.weight, lora_A, lora_B, SCALE).double().reshape(true.shape)
    return float(((got - true) / true).abs().max())


def _g8(book: Book) -> list[Goal]:
    one = SHAPES["4096x320->320"]
    counted = [c for case in (one, *SEVERAL) if (c := book.counts(case))]
    lines = []
    what: tuple[tuple[str, Sequence[Counts], Callable[[Counts], int]], ...] = (
        (
            "more matrix products, 3 active adapters against 1",
            counted,
            lambda c: len(c.forward.products) + len(c.backward.products),
        ),
        (
            "more operations, 3 active adapters against 2",
            counted[1:],
            lambda c: len(c.forward.kernels) + len(c.backward.kernels),
        ),
    )
    for name, some, number in what:
        if len(counted) < 3:
            lines.append(Goal("G8", name, None, 0, why=book.missing(SEVERAL[-1], OURS)))
            continue
        numbers = [number(c) for c in some]
        listed = ", ".join(map(str, numbers))
        lines.append(Goal("G8", name, numbers[-1] - numbers[0], 0, why=f"in all {listed}"))
    return [
        *lines,
        book.time("G8", SEVERAL[-1], TRAINING, PEFT, 0.55),
        book.time("G8", MIXED, INFERENCE, PEFT, 0.82),
    ]


def _g9(book: Book) -> list[Goal]:
    lines = []
    for which, most, share in ((RECORDING, 24.0, 0.75), (INFERENCE, 11.0, 0.45)):
        ours, peft = (book.excess(TINY, which, name) for name in (OURS, PEFT))
        why = book.timeless or book.missing(TINY, OURS)
        what = f"{TINY.name}: {which}, beyond nn.Linear"
        lines.append(Goal("G9", what, ours, most, "us", "" if ours is not None else why))
        ratio = ours / peft if ours is not None and peft else None
        why = book.timeless or book.missing(TINY, OURS, PEFT)
        lines.append(Goal("G9", f"{what} / PEFT", ratio, share, why="" if ratio else why))
    for case in CALLS:
        for which, share in ((TRAINING, 0.5), (INFERENCE, 0.35)):
            ours, formula, peft = (book.excess(case, which, n) for n in (OURS, REFERENCE, PEFT))
            what = f"{case.name}: {which}, beyond nn.Linear / PEFT"
            if ours is None or not peft:
                why = book.timeless or book.missing(case, OURS, PEFT)
                lines.append(Goal("G9", what, None, share, why=why))
                continue
            why = "" if formula is None else f"the formula's is {formula / peft:.2f}"
            lines.append(Goal("G9", what, ours / peft, share, why=why))
    return lines


def _g10(book: Book) -> list[Goal]:
    counts = book.counts(SHAPES[_LOW_RANK])
    why = "" if counts else book.missing(SHAPES[_LOW_RANK], OURS)
    lines = []
    for direction, most in (("forward", 3), ("backward", 5)):
        done: tuple[str, ...] = ()
        if counts:
            done = (counts.forward if direction == "forward" else counts.backward).kernels
        what = f"operations of the low-rank form, {direction}"
        value = len(done) if counts else None
        lines.append(Goal("G10", what, value, most, why=", ".join(done) or why))
    value = None
    if counts:
        value = sum(
            len(part.kernels) - len(part.products) for part in (counts.forward, counts.backward)
        )
    lines.append(Goal("G10", "of these no matrix product", value, 0, why=why))
    launches = "kernel launches are counted by the tests of the Triton kernels"
    lines += [
        Goal("G10", f"launches of the {form} form, {direction}", None, most, why=launches)
        for form, forward, backward in (("two-kernel", 2, 3), ("one-kernel", 1, 2))
        for direction, most in (("forward", forward), ("backward", backward))
    ]
    return lines


def _g11(book: Book) -> list[Goal]:
    lines = []
    for name, cell in composability.CELLS.items():
        failed: float | None = 0
        why = ""
        if book.timeless and "compile" in name:  # takes longer than all else of a quick run
            lines.append(Goal("G11", f"failures: {name}", None, 0, why=book.timeless))
            continue
        try:
            cell()
        except composability.NotMeasuredError as reason:
            failed, why = None, str(reason)
        except Exception as error:  # noqa: BLE001  # whatever it is, the cell does not hold
            failed, why = 1, (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        lines.append(Goal("G11", f"failures: {name}", failed, 0, why=why))
    return lines


def _g12(book: Book) -> list[Goal]:
    groups = (
        (LANGUAGE, TRAINING, 1.15),
        (LARGE, TRAINING, 1.8),
        (SMALL, REPLAYED, 2.0),
    )
    gpu = "" if any(c.name in book.results for c in LANGUAGE) else "wants a GPU (--device cuda)"
    return [
        book.time("G12", case, which, to, bound, timeless=gpu)
        for cases, which, most in groups
        for case in cases
        for to, bound in ((FROZEN, most), (PEFT, 0.8))
    ]


_JUDGES: dict[str, Callable[[Book], list[Goal]]] = dict(
    zip(NUMBERS, (_g1, _g2, _g3, _g4, _g5, _g6, _g7, _g8, _g9, _g10, _g11, _g12), strict=True)
)


@dataclass(frozen=True, slots=True)
class Loss:
    """Where another contender was faster than ours.

    Attributes:
        case: The layer.
        which: The pass.
        to: Who was faster.
        ratio: Our time over theirs, the median.
        low: The first quartile.
        high: The third.
    """

    case: str
    which: str
    to: str
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        where = f"{self.case}: {self.which} / {self.to}"
        return f"    {where:<62}{self.ratio:>6.2f} [{self.low:.2f}, {self.high:.2f}]"


def losses(results: Sequence[Result]) -> list[Loss]:
    """Every pass in which ours was slower in three rounds of four, the frozen layer left out."""
    found = []
    for result in results:
        for which, rounds in result.rounds.items():
            for name in rounds.seconds:
                if name in {FROZEN, OURS} or OURS not in rounds.seconds:
                    continue
                spread = rounds.ratio(OURS, name)
                if spread.low > 1:
                    loss = Loss(
                        result.case.name, which, name, spread.median, spread.low, spread.high
                    )
                    found.append(loss)
    return sorted(found, key=lambda loss: -loss.ratio)
