"""What each form of `merge` costs over its own arithmetic, cold and warm.

    python -m benchmarks.merging
    python -m benchmarks.merging --quick

Layers of the shapes of Stable Diffusion 1.5's attention projections, and 500 of 32x32; rank 4, one
CPU thread. Every figure comes from processes that do nothing else: the first call of one is cold,
its memory still to be had from the system; the cheapest of the next is warm. The floor of a merge
that keeps copies is `addmm` into new tensors, that of one in place is `addmm_`, and a warm one is
held against the floor on its own weights, which are faster in some processes than in others. Shown
beside is the least that a merge in place must do: apply the scale, and know before the first write
that no sum will overflow. Contenders take turns, and the cheapest of all counts, in CPU time.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lora_core
from benchmarks.options import add_outputs, write_json

RANK, SCALE, WARM = 4, 1.0, 3
SHAPES = Path(__file__).parent / "data" / "sd15_unet.json"
_COLD, _WARM = slice(1), slice(1, None)
_ENDS = ("to_q", "to_k", "to_v", "to_out.0")
CASES = ("sd15", "500", "quick")
ADDMM, PASS, LEAST = "addmm", "addmm_", "least in place"
FORMS: dict[str, bool | Literal["compact"]] = {"copy": True, "compact": "compact", "no": False}
FLOORS = {"copy": ADDMM, "compact": ADDMM, "no": PASS, LEAST: PASS}


def shapes(case: str) -> list[tuple[int, int]]:
    """``(in, out)`` of each layer."""
    if case != "sd15":
        return [(32, 32)] * (500 if case == "500" else 8) + [(160, 128)] * (case == "quick")
    modules = json.loads(SHAPES.read_text())["modules"]
    sizes = [about[1] for n, about in modules.items() if about[0] == "Linear" and n.endswith(_ENDS)]
    return [(inside, outside) for outside, inside in sizes]


def built(case: str, dtype: torch.dtype) -> tuple[nn.Sequential, list[Tensor]]:
    """Bare layers of these shapes, and their weights."""
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False, dtype=dtype) for i, o in shapes(case)]
    for layer in layers:
        nn.init.normal_(layer.weight, 0, 0.02)
    return nn.Sequential(*layers).eval(), [layer.weight.detach() for layer in layers]


def adapt(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Puts an update of a twentieth of the weights on a bare model; its ``(lora_B, lora_A)``."""
    lora_core.inject(model, rank=RANK, targets=nn.Linear)
    factors = [p.detach() for p in lora_core.parameters(model)]
    for A, B in zip(factors[::2], factors[1::2], strict=True):
        A.normal_()
        B.normal_(0, 5e-4)
    return list(zip(factors[1::2], factors[::2], strict=True))


class _Contender:
    """One way to merge these layers, and back."""

    def __init__(self, name: str, case: str, dtype: torch.dtype) -> None:
        self.name = name
        self.model, self.weights = built(case, dtype)
        self.factors = [(B.to(dtype), A.to(dtype)) for B, A in adapt(self.model)]
        self.kept = float(name == "copy")  # as a share of the weights
        self.new: list[Tensor] = []

    def merge(self) -> None:
        if self.name == LEAST:
            read = (self.weights, *zip(*self.factors, strict=True))
            w, B, A = (torch.stack(torch._foreach_norm(list(tensors))) for tensors in read)
            assert bool((w + B * A < torch.finfo(w.dtype).max).all())
            for weight, (up, down) in zip(self.weights, self.factors, strict=True):
                weight.addmm_(up * SCALE, down)
        elif self.name not in FORMS:
            self.floor()
        else:
            report = lora_core.merge(self.model, reversible=FORMS[self.name])
            if report.kept is not None:
                self.kept = report.kept / sum(w.nbytes for w in self.weights)

    def floor(self) -> None:
        """What this way can't do without, on the same weights."""
        pairs = zip(self.weights, self.factors, strict=True)
        if FLOORS.get(self.name, self.name) == ADDMM:
            self.new = [torch.addmm(w, B, A) for w, (B, A) in pairs]
        else:
            for w, (B, A) in pairs:
                w.addmm_(B, A)

    def unmerge(self) -> None:
        if FORMS.get(self.name):
            lora_core.unmerge(self.model)
        self.new.clear()

    def begin(self) -> None:
        """Makes ready for the next time."""
        if self.name == "no":
            lora_core.eject(self.model)
            adapt(self.model)


def child(case: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """CPU seconds of the calls of one contender, the first one first."""
    torch.set_num_threads(1)
    contender = _Contender(name, case, dtype)
    sums = [float(w.double().sum()) for w in contender.weights]
    costs: dict[str, list[float]] = {"merge": [], "unmerge": [], "floor": []}
    for _ in range(1 + WARM):
        for verb, times in costs.items():
            gc.collect()
            start = time.process_time()
            getattr(contender, verb)()
            times.append(time.process_time() - start)
        contender.new.clear()
        now = [float(w.double().sum()) for w in contender.weights]
        if FORMS.get(name) and now != sums:
            raise ValueError(f"{name!r} must give the weights back, but gives others.")
        contender.begin()
    return {"costs": costs, "kept": contender.kept}


def measured(case: str, dtype: str, turns: int) -> dict[str, list[dict[str, Any]]]:
    """By contender what `child` says, once for each turn."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(turns):
        for contender in (ADDMM, PASS, LEAST, *FORMS):
            command = [sys.executable, "-m", "benchmarks.merging", "--child", case, contender]
            done = subprocess.run([*command, dtype], capture_output=True, text=True, check=True)
            found.setdefault(contender, []).append(json.loads(done.stdout))
    return found


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """By form: its merge over the floor and over the copying one, its unmerge over its merge."""
    rows = {}
    for form, floor in FLOORS.items():
        cold, warm = (partial(_least, found, when=when) for when in (_COLD, _WARM))
        rows[form] = {
            "kept": found[form][0]["kept"],
            "merge, cold": cold(form, "merge") / cold(floor, "merge"),
            "merge, warm": (
                warm(form, "merge") / warm(floor, "merge")
                if floor == ADDMM
                else median(_over_own_floor(one["costs"]) for one in found[form])
            ),
            "over copying, cold": cold(form, "merge") / cold("copy", "merge"),
            "over copying, warm": warm(form, "merge") / warm("copy", "merge"),
        }
        if FORMS.get(form):
            for when, least in (("cold", cold), ("warm", warm)):
                rows[form][f"unmerge, {when}"] = least(form, "unmerge") / least(form, "merge")
    return rows


def _least(found: dict[str, list[dict[str, Any]]], name: str, verb: str, when: slice) -> float:
    least: float = min(seconds for one in found[name] for seconds in one["costs"][verb][when])
    return least


def _over_own_floor(costs: dict[str, list[float]]) -> float:
    return min(costs["merge"][_WARM]) / min(costs["floor"][_WARM])


def as_text(case: str, dtype: str, rows: dict[str, dict[str, float]]) -> str:
    """One case as a table: a row per form."""
    columns = [f"{what}, {when}" for what in ("merge", "over copying") for when in ("cold", "warm")]
    columns += ["unmerge, cold", "unmerge, warm", "kept"]
    lines = [
        f"{case}, {dtype}: merge over its floor and over the copying form; unmerge over merge",
        f"  {'':<16}" + "".join(f"{column:>20}" for column in columns),
    ]
    for form, row in rows.items():
        shown = [f"{row[column]:.2f}" if column in row else "-" for column in columns]
        lines.append(f"  {form:<16}" + "".join(f"{text:>20}" for text in shown))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and writes what else is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merging",
        description="Time each form of merge over its own arithmetic, cold and warm.",
    )
    parser.add_argument("--only", choices=CASES[:2], help="these layers alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="a few tiny layers, once")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    add_outputs(parser, "results")
    arguments = parser.parse_args(argv)
    if arguments.child:
        case, contender, dtype = arguments.child
        print(json.dumps(child(case, contender, getattr(torch, dtype))))
        return 0
    cases = ["quick"] if arguments.quick else [arguments.only] if arguments.only else CASES[:2]
    tables = {}
    for case in cases:
        found = measured(case, arguments.dtype, 1 if arguments.quick else 5)
        tables[case] = ratios(found)
        if arguments.json != "-":
            print(as_text(case, arguments.dtype, tables[case]), flush=True)
    if arguments.json:
        write_json({"dtype": arguments.dtype, "cases": tables}, arguments.json, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
