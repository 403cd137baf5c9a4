"""What a call costs: the bytes it keeps and makes, its operations, its FLOPs, its CPU time.

The counts are exact and the same on every machine; the time is a ratio to a baseline that ran in
the same rounds.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
# memory without values: no kernel fills it
_BARE = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.empty_permuted,
    _aten.new_empty,
    _aten.new_empty_strided,
}
# results that are no tensors, but read one; on a GPU the host waits for them
_READS = {_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero}


@dataclass(frozen=True, slots=True)
class Work:
    """What a call did.

    Attributes:
        kernels: Its operations in order; views and bare allocations are none.
        nbytes: Bytes of every storage that came into being, temporaries included.
    """

    kernels: tuple[str, ...]
    nbytes: int

    @property
    def products(self) -> tuple[str, ...]:
        """The matrix products among the kernels."""
        return tuple(name for name in self.kernels if "mm" in name or name in {"mv", "addmv"})


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation, and holds no tensor: one held would make autograd copy gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[str] = []
        self.nbytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func.namespace == "aten" and packet not in _BARE and _is_composite(func):
            with self:  # inference mode leaves these whole
                return func.decompose(*args, **kwargs)
        # a storage that none of the arguments has is new: it can't have the address of a live one
        known = {_storage(t) for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        made = {_storage(t): t.untyped_storage() for t in _tensors(result)}
        new = [storage for key, storage in made.items() if key not in known]
        for storage in new:
            self.made(storage)
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if writes or packet in _READS or (new and packet not in _BARE):
            self.kernels.append(packet.__name__)
        return result

    def made(self, storage: UntypedStorage) -> None:
        """Takes note of a storage that came into being."""
        self.nbytes += storage.nbytes()


def work(fn: Callable[[], object]) -> Work:
    """The operations of one call and the bytes it made, the backward's if it runs one.

    An operator from outside PyTorch is one operation, whatever it does inside.

    Example:
        >>> x = torch.ones(4, 4)
        >>> work(lambda: (x.t() + x).relu_())
        Work(kernels=('add', 'relu_'), nbytes=64)
    """
    with _Recorder() as recorder:
        fn()
    return Work(tuple(recorder.kernels), recorder.nbytes)


class _Peak(_Recorder):  # type: ignore[no-untyped-call]
    """Knows besides which of the new storages are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[Any, int]] = []
        self.peak = 0

    def made(self, storage: UntypedStorage) -> None:
        weak: Any = StorageWeakRef  # untyped
        self.alive = [(ref, n) for ref, n in self.alive if not ref.expired()]
        self.alive.append((weak(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(n for _, n in self.alive))


def peak_bytes(fn: Callable[[], object]) -> int:
    """Bytes of new storages that are alive at once at most, as seen after each operation.

    What an operation makes and frees inside itself is not seen.

    Example:
        >>> x = torch.ones(4)
        >>> peak_bytes(lambda: [(x + 1).sum().item(), (x * 2 + 1).sum().item()])
        32
    """
    with _Peak() as recorder:
        fn()
    return int(recorder.peak)


def saved_bytes(fn: Callable[[], object], apart: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward keeps for its backward, each storage counted once and whole.

    Counts what goes through ``save_for_backward`` and the tensors that a Python Function keeps as
    attributes of its context.

    Args:
        fn: Runs the forward and returns its result.
        apart: Tensors whose storages don't count: the parameters and the input, as a rule.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> saved_bytes(lambda: x.exp()), saved_bytes(lambda: x * x, apart=[x])
        (16, 0)
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # alive to the end: no address is used twice
        return saved[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    saved += [t for node in _graph(result) for t in _tensors(getattr(node, "__dict__", {}))]
    kept = {_storage(t): t.untyped_storage().nbytes() for t in saved}
    for tensor in apart:
        kept.pop(_storage(tensor), None)
    return sum(kept.values())


def flops(fn: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one call, the in-place ones too.

    `FlopCounterMode` alone passes over `addmm_` and `baddbmm_`.

    Example:
        >>> a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
        >>> flops(lambda: c.addmm_(a, b)) == 2 * (2 * 3 * 5)
        True
    """
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        fn()
    return int(counter.get_total_flops())


def _product(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]  # the leading sizes of b are among those of a


def _matrix_vector(a: Sequence[int], _: Any, **__: Any) -> int:
    return 2 * math.prod(a)


_IN_PLACE: dict[Any, Any] = {
    _aten.addmm_: _product,
    _aten.baddbmm_: _product,
    _aten.mv: _matrix_vector,
    _aten.addmv: lambda _, a, v, **kwargs: _matrix_vector(a, v, **kwargs),
    _aten.addmv_: lambda _, a, v, **kwargs: _matrix_vector(a, v, **kwargs),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Some measurements by their quartiles.

    Attributes:
        median: The middle.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def width(self) -> float:
        """The distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True, slots=True)
class Rounds:
    """Times of several candidates, each measured once in every round.

    Attributes:
        seconds: Per candidate its seconds per call, round by round, of the rounds that were kept.
        baseline: The candidate by which rounds were judged.
        rejected: How many rounds were left out.
    """

    seconds: Mapping[str, tuple[float, ...]]
    baseline: str
    rejected: int

    @property
    def noise(self) -> float:
        """The baseline's distance between quartiles, as a share of its median."""
        return Spread.of(self.seconds[self.baseline]).width

    def ratio(self, name: str, to: str) -> Spread:
        """Time of one candidate over that of another, taken within each round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Spread.of([mine / other for mine, other in pairs])

    def excess(self, name: str, to: str) -> Spread:
        """Seconds per call that one candidate takes more than another, within each round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Spread.of([mine - other for mine, other in pairs])


def thread_seconds(fn: Callable[[], object], calls: int) -> float:
    """CPU seconds per call of this thread alone, whatever else the machine does meanwhile."""
    start = time.thread_time()
    for _ in range(calls):
        fn()
    return (time.thread_time() - start) / calls


def timed_rounds(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    baseline: str,
    clock: Callable[[Callable[[], object], int], float] = thread_seconds,
    at_least: float = 0.02,
    seed: int = 0,
) -> Rounds:
    """Measures every candidate once per round, in an order shuffled for each round.

    A round in which the baseline's time is an outlier of all rounds is left out: more than 1.5
    times the distance between the quartiles away from them.

    Args:
        candidates: What to call, by name.
        rounds: How many rounds to run, at least 1.
        baseline: The candidate by which rounds are judged.
        clock: Takes a candidate and a number of calls, gives seconds per call.
        at_least: Seconds that one measurement of the baseline should take at least; decides how
            many calls make a measurement, for all candidates alike.
        seed: Of the shuffling.
    """
    for fn in candidates.values():
        clock(fn, 2)  # warm: allocator, caches, lazy imports
    calls = max(1, round(at_least / max(clock(candidates[baseline], 3), 1e-9)))
    order = list(candidates)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                seconds[name].append(clock(candidates[name], calls))
    finally:
        if was_enabled:
            gc.enable()
    kept = inliers(seconds[baseline])
    return Rounds(
        {name: tuple(times[i] for i in kept) for name, times in seconds.items()},
        baseline,
        rounds - len(kept),
    )


def inliers(values: Sequence[float]) -> list[int]:
    """Places of the values within 1.5 times the distance between the quartiles from these.

    Example:
        >>> inliers([1.0, 1.1, 9.0, 1.2, 1.0])
        [0, 1, 3, 4]
    """
    spread = Spread.of(values)
    reach = 1.5 * (spread.high - spread.low)
    return [i for i, v in enumerate(values) if spread.low - reach <= v <= spread.high + reach]


def _storage(tensor: Tensor) -> int:
    # the storage object's own address: fake and meta tensors have one too
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_composite(func: Any) -> bool:
    return bool(func._can_decompose()) and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )


def _graph(result: object) -> Iterator[Any]:
    """Every node of the graph behind some tensors, once."""
    stack = [t.grad_fn for t in _tensors(result)]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        yield node
