"""How much faster the low-rank path of the adapter algebra is than a dense decomposition.

    python -m benchmarks.algebra --json build/algebra.json

One CPU thread, no network and no weights. A dense candidate is what the same answer takes without
the factors: the update of a layer written out, and its SVD. Every answer is checked against that
one before it is timed; times are those of a layer, in an adapter of 32, as ratios within one round.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Spread, peak_bytes, timed_rounds
from benchmarks.options import add_outputs, at_least_one, write_json
from lora_core import Adapter, combine, functional, resize
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer

ROUNDS = 7
_QUICK_ROUNDS = 3
_QUICK_SIZE = 64
_TOLERANCE = 1e-4
_LAYERS = 32  # fewer than any real adapter has


@dataclass(frozen=True, slots=True)
class Case:
    """One verb on a layer, against its dense form.

    Attributes:
        verb: What was called.
        size: The layer's inputs, and its outputs.
        rank: The rank of all the factors together.
        kept: The rank asked for.
        ratio: Time of the dense form over that of the verb.
        nbytes: Bytes that the verb makes at once at most for one layer.
        dense_nbytes: Bytes that the dense form makes.
    """

    verb: str
    size: int
    rank: int
    kept: int
    ratio: Spread
    nbytes: int
    dense_nbytes: int


def layer(size: int, rank: int, seed: int) -> AdapterLayer:
    """A layer of random factors."""
    draw = torch.Generator().manual_seed(seed)
    parts = {
        "lora_A": torch.randn(rank, size, generator=draw) / size**0.5,
        "lora_B": torch.randn(size, rank, generator=draw) / rank**0.5,
    }
    config = AdapterConfig(rank=rank, alpha=float(rank), dropout=0.0, dtype=torch.float32)
    return AdapterLayer("linear", config, parts)


def adapter(one: AdapterLayer, layers: int) -> Adapter:
    """An adapter of several such layers."""
    return Adapter("benchmark", {str(i): one for i in range(layers)})


def approximated(layers: Sequence[AdapterLayer], kept: int) -> Tensor:
    """The best approximation of a sum of updates, by way of the sum itself."""
    total = torch.stack([delta(one) for one in layers]).sum(0)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    found: Tensor = (U[:, :kept] * S[:kept]) @ Vh[:kept]
    return found


def delta(one: AdapterLayer) -> Tensor:
    """The update written out."""
    lora_A, lora_B = one.parts["lora_A"], one.parts["lora_B"]
    return functional.lora_delta(lora_A, lora_B, one.settings.scale)


def measure(size: int, rank: int, rounds: int) -> list[Case]:
    """Both verbs, at half the rank that their factors have together."""
    kept = max(1, rank // 2)
    whole = layer(size, rank, 0)
    halves = [layer(size, kept, i) for i in range(2)]
    cases: dict[str, tuple[Callable[[int], Adapter], Sequence[AdapterLayer], int]] = {
        "resize": (lambda n: resize(adapter(whole, n), rank=kept), [whole], rank),
        "combine": (
            lambda n: combine([adapter(half, n) for half in halves], [1, 1], kept),
            halves,
            2 * kept,
        ),
    }
    found = []
    for verb, (act, layers, together) in cases.items():
        dense = partial(approximated, layers, kept)
        asked = dense()
        gap = float((delta(act(1).layers["0"]) - asked).norm() / asked.norm())
        if not gap < _TOLERANCE:
            raise RuntimeError(f"`{verb}` must be the dense answer, but is {gap:.2e} off it.")
        timed = timed_rounds(
            {verb: partial(act, _LAYERS), "dense": dense}, rounds, baseline="dense", at_least=0
        )
        ratio = Spread(*(_LAYERS * part for part in astuple(timed.ratio("dense", verb))))
        nbytes = peak_bytes(partial(act, 1)), peak_bytes(dense)
        found.append(Case(verb, size, together, kept, ratio, *nbytes))
    return found


def as_text(cases: Sequence[Case]) -> str:
    """The cases as a table."""
    head = f"{'verb':<9}{'size':>6}{'rank':>6}{'kept':>6}{'dense / ours':>20}{'KiB':>9}{'dense':>9}"
    rows = [
        f"{c.verb:<9}{c.size:>6}{c.rank:>6}{c.kept:>6}"
        f"{c.ratio.median:>8,.0f} ({c.ratio.low:,.0f}-{c.ratio.high:,.0f})".ljust(49)
        + f"{c.nbytes / 1024:>7,.0f}{c.dense_nbytes / 1024:>9,.0f}"
        for c in cases
    ]
    return "\n".join([head, *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and writes what else is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.algebra",
        description="Time the low-rank path of combine and resize against a dense decomposition.",
    )
    parser.add_argument("--size", type=at_least_one("a size"), default=1024, metavar="N")
    parser.add_argument("--rank", type=at_least_one("a rank"), default=16, metavar="R")
    parser.add_argument("--rounds", type=at_least_one("the number of rounds"), default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="seconds: a small layer")
    add_outputs(parser, "results")
    arguments = parser.parse_args(argv)
    size, rounds = arguments.size, arguments.rounds
    if arguments.quick:
        size, rounds = _QUICK_SIZE, _QUICK_ROUNDS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = measure(size, min(arguments.rank, size), rounds)
    finally:
        torch.set_num_threads(threads)
    if arguments.json != "-":
        print(as_text(cases))
    if arguments.json:
        write_json([asdict(case) for case in cases], arguments.json, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
