"""What the verbs cost, from inject to eject, against PEFT on the same model.

    python -m benchmarks.lifecycle --json build/lifecycle.json

Wants the extra `bench`; `--without-peers` runs without PEFT. One CPU thread, no network and no
weights: the UNet of Stable Diffusion 1.5 is filled at random, and takes 3.4 GB of memory.
docs/benchmarks.md says how to read what it prints.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import lora_core
from benchmarks.contenders import OURS, PEFT
from benchmarks.goals import QUICK as NOT_JUDGED
from benchmarks.goals import Goal
from benchmarks.lives import (
    CASES,
    IN_PLACE,
    PASS,
    QUICK,
    VERBS,
    Cost,
    Life,
    live,
    missing_package,
    one_thread,
)
from benchmarks.options import add_outputs, write_json

REPETITIONS = 3
_SMALL = {"inject": 1 / 8, "load": 1 / 8, "save": 1 / 4, "second": 1 / 10}
# verb -> the most it may cost, PEFT's being 1
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "sd15": {"inject": 1 / 3, "save": 1 / 2, "load": 1 / 3, "merge": 1, "unmerge": 1 / 20},
    "2000": _SMALL,
    "5600": _SMALL,
}
_NUMBERS = {
    "inject": "L1",
    "second": "L2",
    "save": "L3",
    "load": "L4",
    "merge": "L5",
    "unmerge": "L6",
}
_PASS_BOUND = 2
_LAYERS_BOUND = 1


def judge(lives: Mapping[str, Life], names: Sequence[str], why: str = "") -> list[Goal]:
    """Every goal of these cases; where `why` says why not, none is measured."""
    judged = []
    for name in names:
        life = lives.get(name)
        for verb, bound in BOUNDS[name].items():
            value = _worse(life.ratio(verb)) if life else None
            what = f"{name}: {verb} / PEFT's"
            judged.append(_goal(life, _NUMBERS[verb], what, value, bound, why))
        if name == "sd15":
            value = _worse(life.ratio(IN_PLACE, to_verb=PASS, to=OURS)) if life else None
            what = f"{name}: {IN_PLACE} / {PASS}"
            judged.append(_goal(life, "L7", what, value, _PASS_BOUND, why))
            value = life.peak / life.largest if life and OURS in life.costs else None
            what = f"{name}: {IN_PLACE}, new memory / largest layer"
            judged.append(_goal(life, "L8", what, value, _LAYERS_BOUND, why))
    return judged


def _goal(
    life: Life | None, number: str, what: str, value: float | None, bound: float, why: str
) -> Goal:
    if value is None and not why:
        wrong = "; ".join(life.wrong.values()) if life else ""
        why = wrong or "a package that it needs is not there"
    return Goal(number, what, value, bound, why=why)


def _worse(ratio: Cost | None) -> float | None:
    return None if ratio is None else max(ratio)


def as_text(life: Life) -> str:
    """One case as a table: a row per verb."""
    case = life.case
    lines = [
        f"{case.name}: {case.layers} layers, {case.adapters} adapters to switch between",
        f"  {'':<16}{'/ PEFT, CPU':>14}{'/ PEFT, wall':>14}{'/ own inject':>14}",
    ]
    for verb in (*VERBS, IN_PLACE, PASS):
        peft, own = life.ratio(verb), life.ratio(verb, to=OURS, to_verb="inject")
        shown = [f"{r:.3f}" if r else "-" for r in (*(peft or (0, 0)), own.cpu if own else 0)]
        lines.append(f"  {verb:<16}" + "".join(f"{text:>14}" for text in shown))
    if OURS in life.costs:
        lines.append(f"  {IN_PLACE}: {life.peak / life.largest:.2f} of the largest layer at once")
    lines += [f"  WRONG, not timed: {why}" for why in life.wrong.values()]
    return "\n".join(lines)


def as_data(lives: Mapping[str, Life], goals: Sequence[Goal]) -> dict[str, Any]:
    """Everything that was measured, times as ratios alone."""
    return {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lora_core": lora_core.__version__,
            "peft": _version("peft"),
            "diffusers": _version("diffusers"),
            "threads": 1,
        },
        "cases": {name: _life_data(life) for name, life in lives.items()},
        "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in goals],
    }


def _life_data(life: Life) -> dict[str, Any]:
    to_peft = {verb: life.ratio(verb) for verb in VERBS}
    to_inject = {
        verb: life.ratio(verb, to=OURS, to_verb="inject") for verb in (*VERBS, IN_PLACE, PASS)
    }
    return {
        "layers": life.case.layers,
        "adapters": life.case.adapters,
        "to PEFT": {verb: r._asdict() for verb, r in to_peft.items() if r},
        "to own inject": {verb: r._asdict() for verb, r in to_inject.items() if r},
        "peak bytes of a merge in place": life.peak,
        "bytes of the largest layer": life.largest,
        "wrong": life.wrong,
    }


def _per_layer(lives: Mapping[str, Life]) -> str:
    """How our verbs grow with the number of layers: 1 is linear time."""
    few, many = lives["2000"], lives["5600"]
    layers = many.case.layers / few.case.layers
    rows = [
        f"{verb} {many.costs[OURS][verb].cpu / few.costs[OURS][verb].cpu / layers:.2f}"
        for verb in VERBS
    ]
    return "CPU time per layer at 5600 over that at 2000, ours: " + ", ".join(rows)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and the goals, and writes what else is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lifecycle",
        description="Time every verb from inject to eject against PEFT.",
    )
    parser.add_argument("--only", choices=tuple(CASES), help="this model alone")
    parser.add_argument("--quick", action="store_true", help="a tiny model, none is judged")
    parser.add_argument("--without-peers", action="store_true", help="without PEFT")
    add_outputs(parser, "results")
    arguments = parser.parse_args(argv)
    if not arguments.without_peers and importlib.util.find_spec("peft") is None:
        parser.error(
            "PEFT must be installed, but is missing: run `pip install 'lora_core[bench]'`"
            " or pass --without-peers."
        )
    chosen = [arguments.only] if arguments.only else list(CASES)
    cases = [QUICK] if arguments.quick else [CASES[name] for name in chosen]
    libraries = [OURS] if arguments.without_peers else [OURS, PEFT]
    lives: dict[str, Life] = {}
    with one_thread():
        for case in cases:
            missing = missing_package(case)
            if missing:
                print(f"{case.name} needs {missing}, which is not installed", file=sys.stderr)
                continue
            start = time.monotonic()
            lives[case.name] = live(case, libraries, 1 if arguments.quick else REPETITIONS, _say)
            print(f"{case.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            if arguments.json != "-":
                print(as_text(lives[case.name]) + "\n", flush=True)
    judged = judge(lives, chosen, NOT_JUDGED if arguments.quick else "")
    if arguments.json != "-":
        if {"2000", "5600"} <= {name for name, life in lives.items() if OURS in life.costs}:
            print(_per_layer(lives) + "\n")
        print("Goals")
        print("\n".join(map(str, judged)))
    if arguments.json:
        write_json(as_data(lives, judged), arguments.json, indent=1)
    wrong = [life.wrong[OURS] for life in lives.values() if OURS in life.wrong]
    for why in wrong:
        print(f"A wrong answer: {why}", file=sys.stderr)
    return 1 if wrong else 0


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
