"""How fast and how lean an adapted layer is, against the frozen layer and other libraries.

    python -m benchmarks.fused --json build/fused.json --plot build/fused.png

Wants the extra `bench`; `--without-peers` runs without. One CPU thread, no network and no weights.
Every answer is checked before it is timed. docs/benchmarks.md says how to read what it prints.
"""

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lora_core
from benchmarks import goals
from benchmarks.cases import INFERENCE, TRAINING, Result, jobs, measure, wanted
from benchmarks.contenders import (
    FROZEN,
    NAMES,
    OURS,
    PEERS,
    PEFT,
    missing_peers,
)
from benchmarks.goals import Goal, judge, losses
from benchmarks.measure import Spread
from benchmarks.options import add_outputs, at_least_one, write_json

ROUNDS = 21
_QUICK_ROUNDS = 3
_COLORS = {
    "reference": "#999999",
    OURS: "#d55e00",
    PEFT: "#0072b2",
    "loralib": "#009e73",
    "diffusers legacy": "#cc79a7",
}


def as_text(result: Result) -> str:
    """One case as a table: a row per contender, times as ratios with their quartiles."""
    case, rounds = result.case, result.rounds
    kinds = {str(t).removeprefix("torch.") for t in (case.dtype, case.factor_dtype)}
    quality = "; ".join(
        f"{which}: frozen +-{r.noise / 2:.1%}, {r.rejected} of"
        f" {r.rejected + len(r.seconds[FROZEN])} rounds rejected"
        for which, r in rounds.items()
    )
    lines = [
        f"{case.name}: ({case.rows}, {case.in_features}) -> ({case.rows}, {case.out_features}),"
        f" rank {case.rank}, {' and '.join(sorted(kinds))}",
        f"  {quality}",
        "  "
        + f"{'':<17}"
        + "".join(f"{which + ' / frozen':>24}" for which in rounds)
        + f"{'/ PEFT':>8}{'saved':>12}{'new fwd':>12}{'new bwd':>12}{'ops':>8}{'FLOPs':>8}",
    ]
    base = result.counts.get(FROZEN)
    for name, counts in result.counts.items():
        first = next(iter(rounds.values()))
        to_peft = f"{first.ratio(name, PEFT).median:.2f}" if PEFT in first.seconds else "-"
        trained = not case.samples
        share = (
            (counts.forward_flops + counts.backward_flops)
            / (base.forward_flops + base.backward_flops)
            if base
            else 0.0
        )
        ops = f"{len(counts.forward.kernels)}" + (
            f"/{len(counts.backward.kernels)}" if trained else ""
        )
        lines.append(
            f"  {name:<17}"
            + "".join(f"{_spread(r.ratio(name, FROZEN)):>24}" for r in rounds.values())
            + f"{to_peft:>8}"
            + f"{_size(counts.saved) if trained else '-':>12}{_size(counts.forward.nbytes):>12}"
            + f"{_size(counts.backward.nbytes) if trained else '-':>12}{ops:>8}{share:>8.3f}"
        )
    if result.form:
        lines.append(f"  ours by {result.form}")
    lines += [f"  no {name}: {why}" for name, why in result.absent.items()]
    lines += [f"  WRONG, not timed: {why}" for why in result.wrong.values()]
    return "\n".join(lines)


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def _size(nbytes: int) -> str:
    return f"{nbytes:,} B" if nbytes < 10_000 else f"{nbytes / 1e6:,.2f} MB"


def as_data(results: Sequence[Result], judged: Sequence[Goal], device: str) -> dict[str, Any]:
    """Everything that was measured, times as ratios alone."""
    return {
        "environment": {
            "device": _device_name(device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lora_core": lora_core.__version__,
            **{package: _version(package) for package in PEERS.values()},
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cases": [_case_data(result) for result in results],
        "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in judged],
        "losses": [asdict(loss) for loss in losses(results)],
    }


def _case_data(result: Result) -> dict[str, Any]:
    case = asdict(result.case)
    case |= {key: str(case[key]).removeprefix("torch.") for key in ("dtype", "factor_dtype")}
    timed = {}
    for which, rounds in result.rounds.items():
        against = [name for name in (FROZEN, PEFT) if name in rounds.seconds]
        timed[which] = {
            "frozen_spread": rounds.noise,
            "rounds": len(rounds.seconds[FROZEN]),
            "rejected": rounds.rejected,
            "ratios": {
                name: {f"to {to}": asdict(rounds.ratio(name, to)) for to in against}
                for name in rounds.seconds
            },
        }
    return {
        "case": case,
        "times": timed,
        "counts": {name: asdict(counts) for name, counts in result.counts.items()},
        "absent": dict(result.absent),
        "wrong": dict(result.wrong),
        "form": result.form,
    }


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws each contender's time over the frozen layer's, case by case, with quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    # tiny layers are all overhead, which is a matter of microseconds and not of ratios
    panels = {
        which: shown
        for which in (TRAINING, INFERENCE)
        if (shown := [r for r in results if which in r.rounds and r.case.rows > 2])
    }
    if not panels:
        raise ValueError(
            "`--plot` must have a pass to draw, but this run timed none. Name other goals, or none."
        )
    titles = {TRAINING: "forward and backward", INFERENCE: "forward without gradients"}
    height = 1.9 + 0.52 * max(len(shown) for shown in panels.values())
    figure = Figure(figsize=(6.4 * len(panels), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for axes, (which, shown) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for row, result in enumerate(shown):
            rounds = result.rounds[which]
            present = [name for name in _COLORS if name in rounds.seconds]
            for i, name in enumerate(present):
                spread = rounds.ratio(name, FROZEN)
                low, high = spread.median - spread.low, spread.high - spread.median
                handles[name] = axes.errorbar(
                    spread.median,
                    row + (i - (len(present) - 1) / 2) * 0.13,
                    xerr=[[low], [high]],
                    fmt="D" if name == OURS else "o",
                    markersize=6 if name == OURS else 4.5,
                    color=_COLORS[name],
                    linewidth=1.2,
                    zorder=4 if name == OURS else 3,
                )
            bound = goals.bound_to_frozen(result.case, which)
            if bound is not None:
                handles["goal for ours"] = axes.plot(
                    [bound, bound], [row - 0.4, row + 0.4], color="black", linewidth=1.4
                )[0]
            if row:
                axes.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
        axes.axvline(1, color="black", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        left, right = axes.get_xlim()
        left, right = min(left, 0.95), max(right, 1.3)
        steps = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20)
        axes.set_xticks([step for step in steps if left <= step <= right])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(left, right)
        axes.set_yticks(range(len(shown)), [r.case.name for r in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("time, frozen layer = 1 (logarithmic)")
        axes.set_title(titles[which])
        axes.grid(axis="x", alpha=0.3)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, the goals and the losses, and writes what else is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fused",
        description="Time and weigh adapted layers against the frozen layer and other libraries.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rounds",
        type=at_least_one("the number of rounds"),
        metavar="N",
        help=f"rounds a case ({ROUNDS})",
    )
    parser.add_argument("--only", type=_numbers, metavar="G1,G5", default=(), help="these goals")
    parser.add_argument("--quick", action="store_true", help="tiny layers, none is judged")
    parser.add_argument("--without-peers", action="store_true", help="without PEFT and the others")
    add_outputs(parser, "results", "times")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` must have a GPU that PyTorch can use, but there is none.")
    missing = [] if arguments.without_peers else missing_peers()
    if missing:
        parser.error(
            f"PEFT, loralib and diffusers must be installed, but {', '.join(missing)}"
            f" {'is' if len(missing) == 1 else 'are'} missing: run `pip install 'lora_core[bench]'`"
            " or `make bench`, or pass --without-peers."
        )
    names = [n for n in NAMES if not (arguments.without_peers and n in PEERS)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = _measured(arguments, names)
        judged = judge(results, arguments.only or goals.NUMBERS, _timeless(arguments))
    finally:
        torch.set_num_threads(threads)
    if arguments.json != "-":
        print("Goals")
        print("\n".join(map(str, judged)))
        if not arguments.quick:
            print("\n" + _losses_text(results))
    if arguments.json:
        write_json(as_data(results, judged, arguments.device), arguments.json, indent=1)
    if arguments.plot:
        plot(results, arguments.plot)
    wrong = [why for result in results for name, why in result.wrong.items() if name == OURS]
    for why in wrong:
        print(f"A wrong answer: {why}", file=sys.stderr)
    return 1 if wrong else 0


def _measured(arguments: argparse.Namespace, names: Sequence[str]) -> list[Result]:
    quick = arguments.quick
    rounds = arguments.rounds or (_QUICK_ROUNDS if quick else ROUNDS)
    chosen = wanted(jobs(arguments.device, quick), arguments.only)
    results: list[Result] = []
    for i, job in enumerate(chosen, start=1):
        start = time.monotonic()
        print(f"[{i}/{len(chosen)}] {job.case.name}", end=" ", file=sys.stderr, flush=True)
        settings: dict[str, Any] = {"at_least": 1e-4, "attempts": 1} if quick else {}
        results.append(measure(job, names, rounds, arguments.device, **settings))
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if arguments.json != "-":  # now rather than at the end: a whole run takes minutes
            print(as_text(results[-1]) + "\n", flush=True)
    return results


def _timeless(arguments: argparse.Namespace) -> str:
    if arguments.quick:
        return goals.QUICK
    if arguments.device == "cuda":
        return "a goal for one CPU thread"
    return ""


def _losses_text(results: Sequence[Result]) -> str:
    lost = losses(results)
    if not any(OURS in r.seconds for result in results for r in result.rounds.values()):
        return "Where ours is slower: nothing was timed"
    if not lost:
        return "Where ours is slower: nowhere, against any of the others"
    return "Where ours is slower, our time over theirs:\n" + "\n".join(map(str, lost))


def _numbers(text: str) -> tuple[str, ...]:
    numbers = tuple(text.upper().split(","))
    unknown = [number for number in numbers if number not in goals.NUMBERS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"a goal must be one of G1 to {goals.NUMBERS[-1]}, but is {unknown[0]!r}"
        )
    return numbers


if __name__ == "__main__":
    sys.exit(main())
