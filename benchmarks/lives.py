"""The whole life of adapters on one model, as this library and PEFT lead it.

Every answer is checked on the way: how many layers, what the model computes after each verb, and
that the base is itself again at the end. A library that errs is not timed.
"""

import gc
import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import lora_core
from benchmarks.contenders import OURS, PEFT, SCALE, WrongAnswerError
from benchmarks.measure import peak_bytes

RANK = 4
FIRST, IN_PLACE, PASS = "default", "merge in place", "in-place pass"
# an in-place pass is no library's verb: the arithmetic alone, over the same weights
VERBS = ("inject", "second", "save", "switch", "merge", "unmerge", "eject", "load")
_TOLERANCE = 1e-4  # relative, in the Frobenius norm; a merge sums in another order


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the layers of it that are adapted.

    Attributes:
        name: As `--only` and the tables call it.
        build: Makes the model.
        run: What the model computes, as one tensor.
        targets: Last segments of the names of the adapted layers.
        layers: How many there are.
        adapters: How many are on the model when it is switched between them.
        needs: A package that `build` imports, "" where none.
    """

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    targets: tuple[str, ...]
    layers: int
    adapters: int
    needs: str = ""


class Cost(NamedTuple):
    """Seconds of one call: the CPU time of the process, and the clock on the wall."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Life:
    """The cheapest of the repetitions, verb by verb.

    Attributes:
        case: What was lived through.
        costs: By library, then verb.
        wrong: By library what it got wrong; such a library has no costs.
        peak: Bytes alive at once at most in a merge in place, beyond what was there before.
        largest: Bytes of the largest adapted weight.
    """

    case: Case
    costs: dict[str, dict[str, Cost]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    peak: int = 0
    largest: int = 0

    def ratio(self, verb: str, *, to: str = PEFT, to_verb: str | None = None) -> Cost | None:
        """Our cost of a verb over that of a library's, None where either has none."""
        mine = self.costs.get(OURS, {}).get(verb)
        theirs = self.costs.get(to, {}).get(to_verb or verb)
        if mine is None or theirs is None:
            return None
        return Cost(mine.cpu / theirs.cpu, mine.wall / theirs.wall)


class Library(Protocol):
    """The verbs of one library; what `inject` and `load` return is the model for the others."""

    def inject(self, model: nn.Module, case: Case) -> Any:
        """Puts the first adapter on a bare model."""

    def add(self, model: Any, case: Case, name: str) -> None:
        """Puts one more on."""

    def switch(self, model: Any, name: str) -> None:
        """Makes one adapter the only active one."""

    def save(self, model: Any, folder: Path) -> None:
        """Writes the first adapter to a folder."""

    def load(self, model: nn.Module, folder: Path) -> Any:
        """Puts what `save` wrote on a bare model."""

    def merge(self, model: Any) -> None:
        """Adds the active adapter to the weights, reversibly in our case."""

    def unmerge(self, model: Any) -> None:
        """Takes it out of the weights."""

    def eject(self, model: Any) -> nn.Module:
        """Takes all adapters off and gives the bare model back."""

    def factors(self, model: Any, name: str) -> list[tuple[Tensor, Tensor]]:
        """``(lora_A, lora_B)`` of one adapter, layer by layer."""


class _Ours:
    def inject(self, model: nn.Module, case: Case) -> Any:
        lora_core.inject(model, RANK, SCALE * RANK, targets=case.targets, name=FIRST)
        return model

    def add(self, model: Any, case: Case, name: str) -> None:
        lora_core.inject(model, RANK, SCALE * RANK, targets=case.targets, name=name)

    def switch(self, model: Any, name: str) -> None:
        lora_core.scales(model, **{name: 1.0})

    def save(self, model: Any, folder: Path) -> None:
        lora_core.save(model, folder / "adapter.safetensors", FIRST)

    def load(self, model: nn.Module, folder: Path) -> Any:
        lora_core.load(model, folder / "adapter.safetensors")
        return model

    def merge(self, model: Any) -> None:
        lora_core.merge(model)

    def unmerge(self, model: Any) -> None:
        lora_core.unmerge(model)

    def eject(self, model: Any) -> nn.Module:
        lora_core.eject(model)
        own: nn.Module = model
        return own

    def factors(self, model: Any, name: str) -> list[tuple[Tensor, Tensor]]:
        layers = (m for m in model.modules() if hasattr(m, f"lora_A_{name}"))
        return [(getattr(m, f"lora_A_{name}"), getattr(m, f"lora_B_{name}")) for m in layers]


class _Peft:
    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # asks no server about the base model
        import peft

        self._peft = peft

    def _config(self, case: Case) -> Any:
        return self._peft.LoraConfig(
            r=RANK, lora_alpha=int(SCALE * RANK), target_modules=list(case.targets)
        )

    def inject(self, model: nn.Module, case: Case) -> Any:
        return self._peft.get_peft_model(model, self._config(case), adapter_name=FIRST)

    def add(self, model: Any, case: Case, name: str) -> None:
        model.add_adapter(name, self._config(case))

    def switch(self, model: Any, name: str) -> None:
        model.set_adapter(name)

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder, selected_adapters=[FIRST])

    def load(self, model: nn.Module, folder: Path) -> Any:
        return self._peft.PeftModel.from_pretrained(model, folder, is_trainable=True)

    def merge(self, model: Any) -> None:
        model.merge_adapter()

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()

    def eject(self, model: Any) -> nn.Module:
        base: nn.Module = model.unload()
        return base

    def factors(self, model: Any, name: str) -> list[tuple[Tensor, Tensor]]:
        layers = (m for m in model.modules() if hasattr(m, "lora_A") and name in m.lora_A)
        return [(m.lora_A[name].weight, m.lora_B[name].weight) for m in layers]


LIBRARIES: dict[str, Callable[[], Library]] = {OURS: _Ours, PEFT: _Peft}


class Blocks(nn.Module):
    """Small layers in blocks of four, each called alone: their number doesn't change the scale."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        names = ("to_q", "to_k", "to_v", "to_out")
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width) for name in names})
            for _ in range(layers // len(names))
        )

    def forward(self, x: Tensor) -> Tensor:
        """What every layer makes of the input."""
        # one after the other would shrink an update to nothing
        y = [layer(x) for block in self.blocks for layer in block.values()]  # type: ignore[operator]
        return torch.stack(y)


def _blocks(name: str, layers: int, width: int, adapters: int) -> Case:
    x = torch.ones(1, width)
    targets = ("to_q", "to_k", "to_v", "to_out")
    return Case(name, lambda: Blocks(layers, width), lambda m: m(x), targets, layers, adapters)


def _unet() -> nn.Module:
    """Stable Diffusion 1.5's UNet in float32, with random weights."""
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
        norm_num_groups=32,
    )
    return unet


def _denoise(unet: nn.Module) -> Tensor:
    # an eighth of the real picture: the weights are read all the same
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 77, 768, generator=generator)
    predicted: Tensor = unet(z, 500, text).sample
    return predicted


SD15 = Case(
    "sd15",
    _unet,
    _denoise,
    ("to_q", "to_k", "to_v", "to_out.0"),
    layers=128,
    adapters=12,
    needs="diffusers",
)
CASES = {c.name: c for c in (SD15, _blocks("2000", 2000, 32, 2), _blocks("5600", 5600, 32, 2))}
QUICK = _blocks("quick", 24, 8, 3)


def missing_package(case: Case) -> str:
    """The package that a case needs and that is not installed; "" where nothing is missing."""
    return case.needs if case.needs and importlib.util.find_spec(case.needs) is None else ""


def live(case: Case, names: Sequence[str], repetitions: int, say: Callable[[str], None]) -> Life:
    """Leads every library through all verbs on one model, and keeps the cheapest of each."""
    torch.manual_seed(0)
    say("build")
    model = case.build().eval()
    sizes = [m.weight.nbytes for m in _targets(model, case)]
    if len(sizes) != case.layers:
        raise ValueError(f"{case.name!r} must have {case.layers} layers, but has {len(sizes)}.")
    life = Life(case, peak=0, largest=max(sizes))
    with torch.no_grad():
        base = case.run(model)
    expected: dict[str, Tensor] = {}
    for i in range(repetitions):
        for name in [n for n in names if n not in life.wrong]:
            say(f"{name} {i + 1}/{repetitions}")
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the peers' own
                one = _Repetition(case, LIBRARIES[name](), name, model, base, Path(folder))
                try:
                    one.run(expected)
                except WrongAnswerError as error:
                    life.wrong[name] = str(error)
                    life.costs.pop(name, None)
                    one.reset()
                    continue
            best = life.costs.setdefault(name, {})
            for verb, cost in one.costs.items():
                old = best.get(verb, cost)
                best[verb] = Cost(min(old.cpu, cost.cpu), min(old.wall, cost.wall))
    if OURS in life.costs:
        life = Life(case, life.costs, life.wrong, _peak(case, model), life.largest)
    return life


def _targets(model: nn.Module, case: Case) -> list[nn.Linear]:
    ends = tuple(f".{target}" for target in case.targets)
    named = model.named_modules()
    return [m for n, m in named if isinstance(m, nn.Linear) and f".{n}".endswith(ends)]


class _Repetition:
    """One library's way through all verbs, each timed once and its result checked."""

    def __init__(
        self, case: Case, library: Library, name: str, model: nn.Module, base: Tensor, folder: Path
    ) -> None:
        self.case, self.library, self.name = case, library, name
        self.model, self.base, self.folder = model, base, folder
        self.costs: dict[str, Cost] = {}
        self.weights = [m.weight for m in _targets(model, case)]
        self.originals = [w.detach().clone() for w in self.weights]
        model.requires_grad_(True)

    def clock(self, verb: str, call: Callable[[], Any]) -> Any:
        gc.collect()  # nobody pays for another's garbage; what a verb makes itself counts
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        self.costs[verb] = Cost(time.process_time() - cpu, time.perf_counter() - wall)
        return result

    def run(self, expected: dict[str, Tensor]) -> None:
        case, library = self.case, self.library
        adapted = self.clock("inject", lambda: library.inject(self.model, case))
        self.count("inject", adapted, FIRST)
        self.expect("a fresh adapter", adapted, self.base)
        fill(library.factors(adapted, FIRST))
        with torch.no_grad():
            own = case.run(adapted)
        # whoever came first has set what all others must compute
        answer = expected.setdefault("adapted", own)
        if distance(own, self.base) < 10 * _TOLERANCE:
            self.err("an adapter changes nothing")
        self.expect("an adapter", adapted, answer)
        self.clock("save", lambda: library.save(adapted, self.folder))
        others = [f"a{i}" for i in range(1, case.adapters)]
        self.clock("second", lambda: library.add(adapted, case, others[0]))
        self.count("second", adapted, others[0])
        for other in others[1:]:
            library.add(adapted, case, other)
        # the others are fresh: alone, they leave the base
        library.switch(adapted, others[-1])
        self.expect("another adapter", adapted, self.base)

        def through_all() -> None:
            for other in (*others, FIRST):
                library.switch(adapted, other)

        self.clock("switch", through_all)
        self.expect("the first adapter again", adapted, answer)
        self.clock("merge", lambda: library.merge(adapted))
        self.expect("a merged model", adapted, answer)
        if all(torch.equal(w, o) for w, o in zip(self.weights, self.originals, strict=True)):
            self.err("a merge changes no weight")
        self.clock("unmerge", lambda: library.unmerge(adapted))
        self.restored("unmerge")
        self.expect("an unmerged model", adapted, answer)
        bare = self.clock("eject", lambda: library.eject(adapted))
        if {type(m) for m in _targets(bare, case)} != {nn.Linear}:
            self.err("an ejected layer is not as it was")
        self.restored("eject")
        self.expect("an ejected model", bare, self.base)
        self.reset()
        loaded = self.clock("load", lambda: library.load(bare, self.folder))
        self.count("load", loaded, FIRST)
        self.expect("a loaded adapter", loaded, answer)
        if self.name == OURS:
            self.in_place(loaded, answer)
        else:
            library.eject(loaded)
        self.reset()

    def in_place(self, loaded: nn.Module, answer: Tensor) -> None:
        """A merge that keeps nothing, beside the arithmetic that it can't do without."""
        factors = [(A.detach(), B.detach()) for A, B in self.library.factors(loaded, FIRST)]

        def arithmetic() -> None:
            for w, (A, B) in zip(self.weights, factors, strict=True):
                w.addmm_(B, A, alpha=SCALE)

        with torch.no_grad():
            self.clock(PASS, arithmetic)
        self.reset()
        self.clock(IN_PLACE, lambda: lora_core.merge(loaded, reversible=False))
        self.expect("a model merged in place", loaded, answer)
        lora_core.eject(loaded)

    def count(self, verb: str, adapted: Any, name: str) -> None:
        found = len(self.library.factors(adapted, name))
        if found != self.case.layers:
            self.err(f"{verb} reaches {found} of {self.case.layers} layers")

    def expect(self, what: str, model: Any, answer: Tensor) -> None:
        with torch.no_grad():
            off = distance(self.case.run(model), answer)
        if not off <= _TOLERANCE:
            self.err(f"{what} is off by {off:.1e}")

    def restored(self, verb: str) -> None:
        """Ours to the bit; PEFT subtracts what it added, and rounding stays."""
        exact = self.name == OURS
        for w, original in zip(self.weights, self.originals, strict=True):
            same = torch.equal(w, original) if exact else distance(w, original) <= _TOLERANCE
            if not same:
                self.err(f"{verb} gives other weights back")

    def reset(self) -> None:
        with torch.no_grad():
            for w, original in zip(self.weights, self.originals, strict=True):
                w.copy_(original)

    def err(self, what: str) -> None:
        raise WrongAnswerError(f"{self.name}: on {self.case.name}, {what}")


def _peak(case: Case, model: nn.Module) -> int:
    library = _Ours()
    library.inject(model, case)
    fill(library.factors(model, FIRST))
    peak = peak_bytes(lambda: lora_core.merge(model, reversible=False))
    library.eject(model)
    return peak


def fill(factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The same numbers in the same layers for every library, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for A, B in factors:
            A.copy_(torch.randn(A.shape, generator=generator) * A.shape[1] ** -0.5)
            B.copy_(torch.randn(B.shape, generator=generator) * 0.1)


def distance(value: Tensor, true: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return float((value - true).norm() / true.norm())


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU time means little where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
