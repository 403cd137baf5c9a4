"""What an adapter costs a whole model: one optimiser step, and one inference.

    python -m benchmarks.models --json build/models.json

A small UNet of diffusers and a small Llama of transformers, with random weights, each beside the
frozen model and the same adapters of PEFT, of loralib and written by hand. Wants the extra `bench`;
`--without-peers` runs without them. One CPU thread and no network. docs/benchmarks.md says how to
read what it prints.
"""

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import os
import platform
import random
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lora_core
from benchmarks.contenders import FROZEN, LORALIB, OURS, PEFT, SCALE, WrongAnswerError
from benchmarks.goals import QUICK as NOT_JUDGED
from benchmarks.goals import Goal
from benchmarks.lives import distance, fill, one_thread
from benchmarks.measure import Spread, saved_bytes, thread_seconds
from benchmarks.options import add_outputs, at_least_one, write_json

RANK, ROUNDS = 4, 21
SEVERAL = 3
BY_HAND = "by hand"
OURS_SEVERAL, PEFT_SEVERAL, BY_HAND_SEVERAL = (
    f"{name}, {SEVERAL} adapters" for name in (OURS, PEFT, BY_HAND)
)
ALONE = (FROZEN, OURS, BY_HAND, OURS_SEVERAL, BY_HAND_SEVERAL)  # that need no other library
NAMES = (*ALONE[:2], PEFT, LORALIB, BY_HAND, OURS_SEVERAL, PEFT_SEVERAL, BY_HAND_SEVERAL)
STEP, INFERENCE = "step", "inference"
_TOLERANCE = 1e-4  # relative, in the Frobenius norm
# model -> step and inference over the frozen model's, three adapters beyond one
BOUNDS = {"unet": (1.05, 1.01, 0.03), "llama": (1.08, 1.06, 0.03)}

Factors = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its input, and the layers of it that are adapted.

    Attributes:
        name: As `--only` and the tables call it.
        build: Makes the model.
        x: Its input, which wants a gradient.
        run: What the model makes of an input.
        targets: Last segments of the names of the adapted layers.
        needs: A package that `build` imports, "" where none.
    """

    name: str
    build: Callable[[], nn.Module]
    x: Tensor
    run: Callable[[nn.Module, Tensor], Tensor]
    targets: tuple[str, ...]
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Contender:
    """A model with the adapters of one library, and what trains them."""

    case: Case
    model: nn.Module
    adapters: list[Factors]
    optimiser: torch.optim.Optimizer | None

    def step(self) -> None:
        """Forward, backward and an optimiser step, leaving no gradient behind."""
        torch.autograd.backward(loss(self.case.run(self.model, self.case.x)))
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.case.x.grad = None

    def infer(self) -> None:
        """A forward without gradients."""
        with torch.no_grad():
            self.case.run(self.model, self.case.x)


@dataclass(slots=True)
class Result:
    """One case, measured.

    Attributes:
        case: The model.
        layers: How many were adapted.
        cold: The first step of each contender, seconds.
        seconds: By pass, then contender, round by round.
        kept: Bytes for the backward beside the input and the parameters.
        absent: Contenders that are not here, and why.
        wrong: Whose answer was wrong, and how.
    """

    case: Case
    layers: int
    cold: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def ratio(self, which: str, name: str, to: str = FROZEN) -> Spread | None:
        """Time of one contender over that of another, taken within each round."""
        times = self.seconds.get(which, {})
        if name not in times or to not in times:
            return None
        return Spread.of([a / b for a, b in zip(times[name], times[to], strict=True)])


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=32,
    )
    return unet


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    llama: nn.Module = LlamaModel(config)
    return llama


def _mlp() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3)]
    return nn.Sequential(*blocks)


def _input(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


_TEXT = _input(1, 77, 64, seed=1).detach()
CASES = {
    "unet": Case(
        "unet",
        _unet,
        _input(1, 4, 32, 32),
        lambda m, x: m(x, 500, _TEXT, return_dict=False)[0],
        ("to_q", "to_k", "to_v", "to_out.0"),
        "diffusers",
    ),
    "llama": Case(
        "llama",
        _llama,
        _input(1, 128, 256),
        lambda m, x: m(inputs_embeds=x, use_cache=False, return_dict=False)[0],
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "transformers",
    ),
}
QUICK = Case("quick", _mlp, _input(8, 16), lambda m, x: m(x), ("0", "2"))


def loss(y: Tensor) -> Tensor:
    """A number to descend; the mean square would be a constant behind a normalisation."""
    return y.sin().mean()


def _linears(model: nn.Module, case: Case) -> dict[str, nn.Linear]:
    ends = tuple(f".{target}" for target in case.targets)
    found = model.named_modules()
    return {n: m for n, m in found if type(m) is nn.Linear and f".{n}".endswith(ends)}


def _ours(model: nn.Module, case: Case, names: Sequence[str]) -> tuple[nn.Module, list[Factors]]:
    for name in names:
        settings: dict[str, Any] = {"targets": list(_linears(model, case)) or None}
        if name != names[0]:
            settings["targets"] = [n for n, m in model.named_modules() if hasattr(m, "lora_state")]
        lora_core.inject(model, RANK, SCALE * RANK, name=name, **settings)
    lora_core.scales(model, **dict.fromkeys(names, 1.0))
    layers = [m for m in model.modules() if hasattr(m, f"lora_A_{names[0]}")]
    return model, [
        [(getattr(m, f"lora_A_{name}"), getattr(m, f"lora_B_{name}")) for m in layers]
        for name in names
    ]


def _peft(model: nn.Module, case: Case, names: Sequence[str]) -> tuple[nn.Module, list[Factors]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # asks no server about the base model
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=list(_linears(model, case))
    )
    # in place, so that no wrapper of the whole model is timed
    for name in names:
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.set_adapter(list(names))
    return model, [
        [(m.lora_A[name].weight, m.lora_B[name].weight) for m in layers] for name in names
    ]


def _loralib(model: nn.Module, case: Case, names: Sequence[str]) -> tuple[nn.Module, list[Factors]]:  # noqa: ARG001
    import loralib

    factors = []
    for path, host in _linears(model, case).items():
        layer = loralib.Linear(
            host.in_features,
            host.out_features,
            r=RANK,
            lora_alpha=int(SCALE * RANK),
            merge_weights=False,
            bias=host.bias is not None,
        )
        layer.weight, layer.bias = host.weight, host.bias
        model.set_submodule(path, layer)
        factors.append((layer.lora_A, layer.lora_B))
    return model, [factors]


class _ByHand(nn.Module):
    """The formula over a layer's weight: no names, no choice, nothing that could be left out."""

    def __init__(self, host: nn.Linear, several: int) -> None:
        super().__init__()
        self.weight, self.bias = host.weight, host.bias
        outs, ins = host.weight.shape
        self.lora_A = nn.ParameterList(torch.empty(RANK, ins) for _ in range(several))
        self.lora_B = nn.ParameterList(torch.empty(outs, RANK) for _ in range(several))

    def forward(self, x: Tensor) -> Tensor:
        base = nn.functional.linear(x, self.weight, self.bias)
        if len(self.lora_A) == 1:
            lora_A, lora_B = self.lora_A[0], self.lora_B[0]
        else:
            lora_A, lora_B = torch.cat(list(self.lora_A)), torch.cat(list(self.lora_B), 1)
        out: Tensor = base + nn.functional.linear(x, lora_A) * SCALE @ lora_B.T
        return out


def _by_hand(model: nn.Module, case: Case, names: Sequence[str]) -> tuple[nn.Module, list[Factors]]:
    layers = {path: _ByHand(host, len(names)) for path, host in _linears(model, case).items()}
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    several = range(len(names))
    return model, [[(m.lora_A[i], m.lora_B[i]) for m in layers.values()] for i in several]


_LIBRARIES = {OURS: _ours, PEFT: _peft, LORALIB: _loralib, BY_HAND: _by_hand}


def build(name: str, case: Case, base: nn.Module) -> Contender:
    """One contender's model, a copy of `base` with filled adapters.

    Raises:
        ImportError: If that library is not installed.
    """
    model = copy.deepcopy(base)
    if name == FROZEN:
        return Contender(case, model, [], None)
    library, _, several = name.partition(",")
    names = [f"a{i}" for i in range(SEVERAL if several else 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        model, adapters = _LIBRARIES[library](model, case, names)
    fill([pair for factors in adapters for pair in factors])
    for p in model.parameters():
        p.requires_grad_(False)
    trained = [f for factors in adapters for pair in factors for f in pair]
    for factor in trained:
        factor.requires_grad_()
    return Contender(case, model.train(), adapters, torch.optim.AdamW(trained, lr=1e-6))


def check(contender: Contender, base: nn.Module) -> None:
    """Compares the output and every gradient with those of the merged model.

    Raises:
        WrongAnswerError: If anything differs.
    """
    case, merged = contender.case, copy.deepcopy(base)
    hosts = list(_linears(merged, case).values())
    for factors in contender.adapters:
        for host, (A, B) in zip(hosts, factors, strict=True):
            host.weight.requires_grad_()
            with torch.no_grad():
                host.weight.addmm_(B, A, alpha=SCALE)
    expected, got = case.run(merged, case.x), case.run(contender.model, case.x)
    _compare("the output", got, expected)
    leaves = [f for factors in contender.adapters for pair in factors for f in pair]
    dx, *own = torch.autograd.grad(loss(got), [case.x, *leaves])
    weights = [host.weight for host in hosts] if leaves else []
    true_dx, *dense = torch.autograd.grad(loss(expected), [case.x, *weights])
    _compare("the gradient of the input", dx, true_dx)
    true = [
        grad
        for factors in contender.adapters
        for (A, B), dW in zip(factors, dense, strict=True)
        for grad in (SCALE * B.T @ dW, SCALE * dW @ A.T)
    ]
    for i, (mine, exact) in enumerate(zip(own, true, strict=True)):
        _compare(f"gradient {i}", mine, exact.detach())


def _compare(what: str, got: Tensor, true: Tensor) -> None:
    off = distance(got.detach(), true.detach())
    if not off <= 10 * _TOLERANCE:
        raise WrongAnswerError(f"{what} is off by {off:.1e}")


def measure(
    case: Case, names: Sequence[str], rounds: int, say: Callable[[str], None] = lambda _: None
) -> Result:
    """Builds and checks every contender, then times what is left in interleaved rounds."""
    torch.manual_seed(0)
    base = case.build().requires_grad_(requires_grad=False)
    result = Result(case, len(_linears(base, case)))
    build(FROZEN, case, base).step()  # torch's own first time, which is nobody's
    contenders: dict[str, Contender] = {}
    for name in names:
        say(name)
        try:
            contender = build(name, case, base)
        except ImportError as reason:
            result.absent[name] = str(reason)
            continue
        result.cold[name] = thread_seconds(contender.step, 1)
        fill([pair for factors in contender.adapters for pair in factors])
        try:
            check(contender, base)
        except WrongAnswerError as reason:
            result.wrong[name] = f"{name}: on {case.name}, {reason}"
            continue
        apart = [case.x, *contender.model.parameters(), *contender.model.buffers()]
        result.kept[name] = saved_bytes(partial(case.run, contender.model, case.x), apart)
        contenders[name] = contender
    passes = {STEP: Contender.step, INFERENCE: Contender.infer}
    shuffle, order = random.Random(0).shuffle, list(contenders)
    for which, run in passes.items():
        say(which)
        seconds = result.seconds[which] = {name: [] for name in contenders}
        for contender in contenders.values():
            run(contender)
        for _ in range(rounds):
            gc.collect()  # nobody pays for another's garbage; in a round it is on
            shuffle(order)
            for name in order:
                once = contenders[name]
                seconds[name].append(thread_seconds(partial(run, once), 2))
    return result


def judge(results: Mapping[str, Result], names: Sequence[str], why: str = "") -> list[Goal]:
    """Every goal of these models; where `why` says why not, none is measured."""
    judged = []
    for name in names:
        step, inference, more = BOUNDS[name]
        result = None if why else results.get(name)
        for number, which, bound in (("M1", STEP, step), ("M2", INFERENCE, inference)):
            spread = result.ratio(which, OURS) if result else None
            judged.append(_goal(number, f"{name}: {which} / frozen", spread, bound, why, result))
        for number, which in (("M3", STEP), ("M4", INFERENCE)):
            value = None
            if result and (one := result.ratio(which, OURS)):
                several = result.ratio(which, OURS_SEVERAL)
                value = several.median - one.median if several else None
            what = f"{name}: {which}, {SEVERAL} adapters beyond one"
            judged.append(_goal(number, what, value, more, why, result))
        for mine, theirs in ((OURS, PEFT), (OURS_SEVERAL, PEFT_SEVERAL)):
            kept = result.kept if result else {}
            value = kept[mine] / kept[theirs] if {mine, theirs} <= kept.keys() else None
            what = f"{name}: bytes kept, {mine} / {theirs}"
            judged.append(_goal("M5", what, value, 1.0, why, result))
    return judged


def _goal(
    number: str, what: str, value: Spread | float | None, bound: float, why: str, at: Result | None
) -> Goal:
    if value is None and not why:
        wrong = "; ".join(at.wrong.values()) if at else ""
        why = wrong or "a package that it needs is not there"
    median = value.median if isinstance(value, Spread) else value
    return Goal(number, what, median, bound, why=why)


def as_text(result: Result) -> str:
    """One model as a table: a row per contender."""
    head = (*(f"{which} / frozen" for which in (STEP, INFERENCE)), "first step", "kept")
    lines = [
        f"{result.case.name}: {result.layers} layers of rank {RANK}",
        f"  {'':<18}" + "".join(f"{text:>22}" for text in head),
    ]
    for name in result.kept:
        cells = [_spread(result.ratio(which, name)) for which in (STEP, INFERENCE)]
        cells += [f"{result.cold[name] / result.cold[FROZEN]:.2f}"]
        cells += [f"{result.kept[name] / 1e6:.2f} MB"]
        lines.append(f"  {name:<18}" + "".join(f"{text:>22}" for text in cells))
    lines += [f"  no {name}: {why}" for name, why in result.absent.items()]
    lines += [f"  WRONG, not timed: {why}" for why in result.wrong.values()]
    return "\n".join(lines)


def _spread(spread: Spread | None) -> str:
    return f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]" if spread else "-"


def as_data(results: Mapping[str, Result], goals: Sequence[Goal]) -> dict[str, Any]:
    """Everything that was measured, times as ratios alone."""
    packages = ("peft", "loralib", "diffusers", "transformers")
    return {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lora_core": lora_core.__version__,
            **{package: _version(package) for package in packages},
            "threads": 1,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "models": {name: _result_data(result) for name, result in results.items()},
        "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in goals],
    }


def _result_data(result: Result) -> dict[str, Any]:
    ratios = {
        which: {n: asdict(r) for n in result.kept if (r := result.ratio(which, n))}
        for which in result.seconds
    }
    cold = {name: seconds / result.cold[FROZEN] for name, seconds in result.cold.items()}
    return {
        "layers": result.layers,
        "rank": RANK,
        "to frozen": ratios,
        "first step to frozen": cold,
        "bytes kept": result.kept,
        "absent": result.absent,
        "wrong": result.wrong,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and the goals, and writes what else is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="Time an optimiser step and an inference of whole adapted models.",
    )
    parser.add_argument("--only", choices=tuple(CASES), help="this model alone")
    parser.add_argument(
        "--rounds", type=at_least_one("the number of rounds"), metavar="N", help=f"({ROUNDS})"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, none is judged")
    parser.add_argument("--without-peers", action="store_true", help="without PEFT and loralib")
    add_outputs(parser, "results")
    arguments = parser.parse_args(argv)
    peers = [] if arguments.without_peers else ["peft", "loralib"]
    missing = [package for package in peers if importlib.util.find_spec(package) is None]
    if missing:
        parser.error(
            f"PEFT and loralib must be installed, but {', '.join(missing)} is missing: run"
            " `pip install 'lora_core[bench]'` or pass --without-peers."
        )
    chosen = [arguments.only] if arguments.only else list(CASES)
    cases = [QUICK] if arguments.quick else [CASES[name] for name in chosen]
    names = [n for n in NAMES if peers or n in ALONE]
    rounds = arguments.rounds or (2 if arguments.quick else ROUNDS)
    results: dict[str, Result] = {}
    with one_thread():
        for case in cases:
            if case.needs and importlib.util.find_spec(case.needs) is None:
                print(f"{case.name} needs {case.needs}, which is not installed", file=sys.stderr)
                continue
            results[case.name] = measure(case, names, rounds, _say)
            if arguments.json != "-":
                print(as_text(results[case.name]) + "\n", flush=True)
    judged = judge(results, chosen, NOT_JUDGED if arguments.quick else "")
    if arguments.json != "-":
        print("Goals")
        print("\n".join(map(str, judged)))
    if arguments.json:
        write_json(as_data(results, judged), arguments.json, indent=1)
    ours = (OURS, OURS_SEVERAL)
    wrong = [why for result in results.values() for n, why in result.wrong.items() if n in ours]
    for why in wrong:
        print(f"A wrong answer: {why}", file=sys.stderr)
    return 1 if wrong else 0


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
