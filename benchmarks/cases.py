"""The layers that benchmarks.fused measures, and how one of them is measured.

Shapes are those of Stable Diffusion's attention at 512 x 512 pixels, ``tokens x in -> out``, and
one of a language model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.contenders import (
    FROZEN,
    Case,
    Contender,
    NotOfferedError,
    Problem,
    WrongAnswerError,
    build,
    check,
    draw,
    form,
)
from benchmarks.measure import (
    Rounds,
    Work,
    flops,
    saved_bytes,
    thread_seconds,
    timed_rounds,
    work,
)

TRAINING = "f+b"  # forward and backward
INFERENCE = "fwd"  # forward under no_grad
RECORDING = "fwd with graph"  # forward that autograd records
REPLAYED = "f+b as CUDA graph"

NOISY = 0.12  # distance between the quartiles of the frozen time above which a run is repeated

_BF16 = torch.bfloat16
SHAPES = {
    "77x768->320": Case("77x768->320", 77, 768, 320),
    "4096x320->320": Case("4096x320->320", 4096, 320, 320),
    "1024x640->640": Case("1024x640->640", 1024, 640, 640),
    "256x1280->1280": Case("256x1280->1280", 256, 1280, 1280),
    "4096x320->2560": Case("4096x320->2560", 4096, 320, 2560),
    "512x4096->4096 r16": Case("512x4096->4096 r16", 512, 4096, 4096, 16),
}
HALF = [
    Case("4096x320->320 bfloat16 base", 4096, 320, 320, dtype=_BF16),
    Case("1024x640->640 r16 bfloat16 base", 1024, 640, 640, 16, dtype=_BF16),
]
DROPOUT = Case("4096x320->320 r16 dropout 0.1", 4096, 320, 320, 16, dropout=0.1)
DORA = [
    Case("4096x320->320 DoRA", 4096, 320, 320, dora=True),
    Case("1024x640->640 r16 DoRA", 1024, 640, 640, 16, dora=True),
]
SEVERAL = [Case(f"4096x320->320 {k} adapters", 4096, 320, 320, adapters=k) for k in (2, 3)]
MIXED = Case("8x77x768->320 4 adapters by sample", 77, 768, 320, adapters=4, samples=8)
TINY = Case("2x8->8 r2", 2, 8, 8, 2)
CALLS = [Case("1x64->64", 1, 64, 64), Case("8x320->320", 8, 320, 320)]  # more call than sum
# for a GPU alone: batch 4 of Stable Diffusion, and a language model
LARGE = [
    Case("16384x320->320 bfloat16", 16384, 320, 320, dtype=_BF16),
    Case("4096x640->640 bfloat16", 4096, 640, 640, dtype=_BF16),
    Case("1024x1280->1280 bfloat16", 1024, 1280, 1280, dtype=_BF16),
]
LANGUAGE = [
    Case("2048x4096->4096 r16 bfloat16", 2048, 4096, 4096, 16, dtype=_BF16),
    Case("2048x4096->11008 r16 bfloat16", 2048, 4096, 11008, 16, dtype=_BF16),
]
# launch-bound: a replayed graph has no cost of issuing
SMALL = [
    Case(f"{name} bfloat16", case.tokens, case.in_features, case.out_features, dtype=_BF16)
    for name, case in SHAPES.items()
    if case.rank == 4 and case.out_features < 2560
]


@dataclass(frozen=True, slots=True)
class Job:
    """A case, what to time of it, and the goals that look at it.

    Attributes:
        case: The layer.
        passes: Of `TRAINING`, `INFERENCE`, `RECORDING`, `REPLAYED`.
        goals: Numbers of goals.
    """

    case: Case
    passes: tuple[str, ...]
    goals: frozenset[str]


@dataclass(frozen=True, slots=True)
class Counts:
    """What does not depend on the machine.

    Attributes:
        saved: Bytes kept for the backward besides the input and the parameters.
        forward: Operations and new bytes of the forward.
        backward: The same of the backward.
        forward_flops: Of the matrix products in the forward.
        backward_flops: The same of the backward.
    """

    saved: int
    forward: Work
    backward: Work
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True, slots=True)
class Result:
    """One case, measured.

    Attributes:
        case: The layer.
        rounds: Times by pass.
        counts: By contender.
        absent: Why a contender is not here.
        wrong: Whose answer was wrong, and how.
        form: Which form of the fused path ours took, and why.
    """

    case: Case
    rounds: Mapping[str, Rounds]
    counts: Mapping[str, Counts]
    absent: Mapping[str, str]
    wrong: Mapping[str, str]
    form: str = ""


def jobs(device: str, quick: bool = False) -> list[Job]:
    """Everything there is to measure on this kind of device; `quick` shrinks the layers."""
    both = (TRAINING, INFERENCE)
    listed = [
        *(Job(c, both, frozenset({"G1", "G2", "G3", "G5", "G8", "G10"})) for c in SHAPES.values()),
        *(Job(c, both, frozenset({"G4"})) for c in HALF),
        Job(DROPOUT, (TRAINING,), frozenset({"G6"})),
        *(Job(c, (TRAINING,), frozenset({"G7"})) for c in DORA),
        *(Job(c, both, frozenset({"G8"})) for c in SEVERAL),
        Job(MIXED, (INFERENCE,), frozenset({"G8"})),
        Job(TINY, (RECORDING, INFERENCE), frozenset({"G9"})),
        *(Job(c, both, frozenset({"G9"})) for c in CALLS),
    ]
    if device == "cuda":
        listed += [Job(c, both, frozenset({"G12"})) for c in (*LARGE, *LANGUAGE)]
        listed += [Job(c, (TRAINING, REPLAYED), frozenset({"G12"})) for c in SMALL]
    return [replace(job, case=_shrunk(job.case)) for job in listed] if quick else listed


def wanted(listed: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs that these goals look at, all of them where none is named."""
    if not only:
        return list(listed)
    narrow = {  # of the plain shapes these look at some
        "G3": {"4096x320->320", "4096x320->2560"},
        "G8": {"4096x320->320"},
        "G10": {"256x1280->1280"},
    }
    plain = SHAPES.keys()
    return [
        job
        for job in listed
        if any(
            goal in job.goals
            and (job.case.name not in plain or job.case.name in narrow.get(goal, plain))
            for goal in only
        )
    ]


def _shrunk(case: Case) -> Case:
    def less(size: int) -> int:
        return max(size // 32, min(size, 8))

    return replace(
        case,
        tokens=less(case.tokens),
        in_features=less(case.in_features),
        out_features=less(case.out_features),
        rank=min(case.rank, 4, less(case.in_features), less(case.out_features)),
    )


def measure(
    job: Job,
    names: Sequence[str],
    rounds: int,
    device: str = "cpu",
    at_least: float = 0.02,
    attempts: int = 3,
) -> Result:
    """Builds every contender, checks its answer, counts what it does, and times what is left.

    Args:
        job: What to measure.
        names: The contenders.
        rounds: Per run.
        device: Where to.
        at_least: Seconds that one measurement of the frozen layer takes at least.
        attempts: How many runs to make at most until the frozen time is steady; the steadiest
            counts.
    """
    problem = draw(job.case, device)
    contenders: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name in names:
        try:
            contender = build(name, problem)
            check(contender, problem)
        except NotOfferedError as reason:
            absent[name] = str(reason)
        except WrongAnswerError as reason:
            wrong[name] = str(reason)
        else:
            contenders[name] = contender
    counts = {name: count(contender, problem) for name, contender in contenders.items()}
    timed = {
        which: _timed(contenders, problem, which, rounds, device, at_least, attempts)
        for which in job.passes
    }
    return Result(job.case, timed, counts, absent, wrong, form(problem))


def count(contender: Contender, problem: Problem) -> Counts:
    """The bytes, operations and FLOPs of one forward and one backward; of a mixed batch's forward.

    Deterministic: this is what tests hold to the goals.
    """
    if problem.choice:  # the peer's is for inference alone
        with torch.no_grad():
            forward = work(lambda: contender.forward(problem.x))
            return Counts(0, forward, Work((), 0), flops(lambda: contender.forward(problem.x)), 0)
    leaves = contender.leaves(problem.x)
    apart = [problem.x, *contender.module.parameters(), problem.weight, problem.bias]
    saved = saved_bytes(lambda: contender.forward(problem.x), apart)
    outputs: list[Tensor] = []

    def forward_pass() -> None:
        outputs.append(contender.forward(problem.x))

    def backward_pass() -> None:
        torch.autograd.backward(outputs.pop(), problem.dy)

    forward = work(forward_pass)
    backward = work(backward_pass)
    for leaf in leaves:
        leaf.grad = None
    forward_flops = flops(forward_pass)
    backward_flops = flops(backward_pass)
    for leaf in leaves:
        leaf.grad = None
    return Counts(saved, forward, backward, forward_flops, backward_flops)


def _timed(
    contenders: Mapping[str, Contender],
    problem: Problem,
    which: str,
    rounds: int,
    device: str,
    at_least: float,
    attempts: int,
) -> Rounds:
    candidates = {name: _pass(c, problem, which) for name, c in contenders.items()}
    clock = cuda_seconds if device == "cuda" else thread_seconds
    best: Rounds | None = None
    for attempt in range(attempts):
        taken = timed_rounds(
            candidates, rounds, baseline=FROZEN, clock=clock, at_least=at_least, seed=attempt
        )
        if best is None or taken.noise < best.noise:
            best = taken
        if best.noise <= NOISY:
            break
    assert best is not None
    return best


def _pass(contender: Contender, problem: Problem, which: str) -> Callable[[], object]:
    x, dy = problem.x, problem.dy
    if which == TRAINING:
        return lambda: contender.train_once(x, dy)
    if which == RECORDING:
        return lambda: contender.forward(x)
    if which == REPLAYED:
        return captured(lambda: contender.train_once(x, dy))

    def infer() -> Tensor:
        with torch.no_grad():
            return contender.forward(x)

    return infer


def cuda_seconds(fn: Callable[[], object], calls: int) -> float:
    """Seconds per call on the current CUDA stream, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        fn()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / calls


def captured(fn: Callable[[], object]) -> Callable[[], object]:
    """`fn` as a CUDA graph: calling the result replays its kernels without issuing them."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm start, off the default stream
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay
