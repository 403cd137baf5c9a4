"""The same adapted layer as several libraries build it, on the same numbers.

Every contender reads one weight, one bias and equal factors; `check` compares its answer with the
formula in float64 before anything is timed.
"""

import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_core
from lora_core import functional

FROZEN, REFERENCE, OURS = "frozen", "reference", "ours"
PEFT, LORALIB, LEGACY = "PEFT", "loralib", "diffusers legacy"
NAMES = (FROZEN, REFERENCE, OURS, PEFT, LORALIB, LEGACY)
PEERS = {PEFT: "peft", LORALIB: "loralib", LEGACY: "diffusers"}

SCALE = 2.0  # not 1, so that a forgotten scale is a wrong answer
# largest relative error of an answer, in the Frobenius norm
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_SEEDS = 8  # dropout is averaged over these


class NotOfferedError(Exception):
    """A contender has no such layer; the message says which."""


class WrongAnswerError(Exception):
    """A contender's output or gradient is not the formula's."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layer to adapt, and how.

    Attributes:
        name: Shape of the product, as the tables and goals call it.
        tokens: Rows of the input, M.
        in_features: Columns of the input, K.
        out_features: Columns of the output, N.
        rank: Of each adapter.
        dtype: Of input and weight.
        factor_dtype: Of the factors.
        dropout: Probability in the update.
        adapters: How many are active.
        samples: Where above 0, the input has this many samples of `tokens` each, and every sample
            has one of the adapters.
        dora: Whether the columns are renormalised (weight-decomposed LoRA).
    """

    name: str
    tokens: int
    in_features: int
    out_features: int
    rank: int = 4
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    adapters: int = 1
    samples: int = 0
    dora: bool = False

    @property
    def rows(self) -> int:
        """Rows of the matrix product, over all samples."""
        return self.tokens * max(self.samples, 1)


@dataclass(frozen=True, slots=True)
class Problem:
    """The numbers of a case, shared by all contenders.

    Attributes:
        case: What they are for.
        x: Input, a leaf that wants a gradient.
        dy: Gradient of the output.
        weight: The frozen matrix.
        bias: The frozen bias.
        factors: ``(lora_A, lora_B)`` of each adapter.
        choice: The adapter of each sample, empty where there are no samples.
    """

    case: Case
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    factors: tuple[tuple[Tensor, Tensor], ...]
    choice: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contender:
    """One library's layer.

    Attributes:
        name: As in the tables.
        module: Owns the parameters.
        forward: The adapted layer.
        factors: ``(lora_A, lora_B)`` of each adapter as this library holds them.
    """

    name: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    factors: tuple[tuple[Tensor, Tensor], ...]

    def leaves(self, x: Tensor) -> list[Tensor]:
        """What a backward gives a gradient: the input and the factors."""
        return [x, *(f for pair in self.factors for f in pair)]

    def train_once(self, x: Tensor, dy: Tensor) -> None:
        """Forward and backward, leaving no gradient behind."""
        torch.autograd.backward(self.forward(x), dy)
        for leaf in self.leaves(x):
            leaf.grad = None


def draw(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    """Numbers for a case, the update about as large as the layer's own output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(device, dtype)

    leading = (case.samples, case.tokens) if case.samples else (case.tokens,)
    k, n, rank = case.in_features, case.out_features, case.rank
    factors = [
        (
            normal(rank, k, spread=k**-0.5, dtype=case.factor_dtype),
            normal(n, rank, spread=rank**-0.5 / SCALE, dtype=case.factor_dtype),
        )
        for _ in range(case.adapters)
    ]
    return Problem(
        case,
        normal(*leading, k).requires_grad_(),
        normal(*leading, n),
        normal(n, k, spread=k**-0.5),
        normal(n),
        tuple(factors),
        tuple(i % case.adapters for i in range(case.samples)),
    )


def missing_peers() -> list[str]:
    """Names of the peers' packages that are not installed."""
    return [package for package in PEERS.values() if importlib.util.find_spec(package) is None]


def build(name: str, problem: Problem) -> Contender:
    """The layer of one contender on these numbers, in training mode.

    Raises:
        NotOfferedError: If that library has no such layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' deprecations
        return _BUILDERS[name](problem)


def _linear(problem: Problem) -> nn.Linear:
    linear = nn.Linear(problem.case.in_features, problem.case.out_features, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


def _own_factors(problem: Problem) -> tuple[tuple[nn.Parameter, nn.Parameter], ...]:
    return tuple(
        (nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone()))
        for lora_A, lora_B in problem.factors
    )


def _frozen(problem: Problem) -> Contender:
    linear = _linear(problem)
    return Contender(FROZEN, linear, linear, ())


def _reference(problem: Problem) -> Contender:
    if problem.case.dora:
        raise NotOfferedError("`functional` has no DoRA yet")
    return _composed(REFERENCE, functional.lora_linear, problem)


def _composed(name: str, linear: Callable[..., Tensor], problem: Problem) -> Contender:
    """A function of tensors as a layer: it stacks the active factors and calls the function."""
    own = _own_factors(problem)
    gain = torch.tensor(SCALE, device=problem.weight.device)
    gains = _gain(problem)

    def forward(x: Tensor) -> Tensor:
        lora_A, lora_B, stacked = functional.stack_factors([(A, B, gain) for A, B in own])
        return linear(
            x,
            problem.weight,
            problem.bias,
            lora_A,
            lora_B,
            stacked if gains is None else gains,
            dropout=problem.case.dropout,
        )

    return Contender(name, nn.ParameterList(f for pair in own for f in pair), forward, own)


def _gain(problem: Problem) -> Tensor | None:
    """``(samples, R)``: each sample's scale on the ranks of its own adapter and 0 elsewhere."""
    if not problem.choice:
        return None
    device, rank = problem.weight.device, problem.case.rank
    chosen = torch.tensor(problem.choice, device=device)
    one_hot = nn.functional.one_hot(chosen, problem.case.adapters) * SCALE
    return one_hot.repeat_interleave(rank, dim=1)


class _Model(nn.Module):
    """What calls a layer, as a user's model does: a layer by itself carries a hook that says so."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Any:
        return self.site(x)


def _ours(problem: Problem) -> Contender:
    case = problem.case
    if case.dora:
        return _dora(problem)
    settings: dict[str, Any] = {
        "rank": case.rank,
        "alpha": SCALE * case.rank,
        "dropout": case.dropout,
        "dtype": case.factor_dtype,
    }
    names = [f"a{i}" for i in range(case.adapters)]
    model = _Model(_linear(problem))
    for name in names:
        lora_core.inject(model, targets="site", name=name, **settings)
    for p in lora_core.parameters(model):
        p.requires_grad_()
    layer: Any = model.site
    own = tuple(
        (getattr(layer, f"lora_A_{name}"), getattr(layer, f"lora_B_{name}")) for name in names
    )
    _fill(own, problem)
    if problem.choice:
        strengths = {n: [float(i == j) for j in problem.choice] for i, n in enumerate(names)}
        lora_core.scales(layer, **strengths)
    return Contender(OURS, layer, layer, own)


def _dora(problem: Problem) -> Contender:
    """DoRA, which the library offers as a function; the norm is taken anew in every call."""
    own = _own_factors(problem)
    (lora_A, lora_B), weight = own[0], problem.weight
    squared = torch.linalg.vecdot(weight.float(), weight.float())
    magnitude = nn.Parameter(squared.sqrt())

    def forward(x: Tensor) -> Tensor:
        A, B = lora_A.detach(), lora_B.detach()
        norm = functional.dora_norm(weight, A, B, SCALE, squared=squared)
        return functional.dora_linear(
            x, weight, problem.bias, lora_A, lora_B, SCALE, magnitude, norm=norm
        )

    module = nn.ParameterList([lora_A, lora_B, magnitude])
    return Contender(OURS, module, forward, own)


def form(problem: Problem) -> str:
    """The form that our layer takes on these numbers, and why; "" where it has no choice."""
    if problem.case.samples or problem.case.dora:
        return ""
    gain = torch.tensor(SCALE, device=problem.weight.device)
    stacked = functional.stack_factors([(A, B, gain) for A, B in problem.factors])
    x, weight, bias = problem.x, problem.weight, problem.bias
    plan = functional.fused_plan(x, weight, bias, *stacked, dropout=problem.case.dropout)
    return str(plan)


def _peft(problem: Problem) -> Contender:
    import peft

    case = problem.case
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALE * case.rank),
        lora_dropout=case.dropout,
        target_modules=["linear"],
        use_dora=case.dora,
    )
    names = [f"a{i}" for i in range(case.adapters)]
    host = nn.Sequential(OrderedDict(linear=_linear(problem)))
    model = peft.get_peft_model(host, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model.linear
    layer.set_adapter(names)
    own = tuple((layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names)
    _fill(own, problem)
    if problem.choice:
        chosen = [names[i] for i in problem.choice]
        return Contender(PEFT, layer.eval(), lambda x: layer(x, adapter_names=chosen), own)
    return Contender(PEFT, layer.train(), layer, own)


def _loralib(problem: Problem) -> Contender:
    import loralib

    case = problem.case
    if case.dora or case.samples or case.adapters > 1:
        raise NotOfferedError("loralib has one plain adapter per layer")
    if case.factor_dtype != case.dtype:
        raise NotOfferedError("loralib wants factors of the weight's dtype")
    layer = loralib.Linear(
        case.in_features,
        case.out_features,
        r=case.rank,
        lora_alpha=int(SCALE * case.rank),
        lora_dropout=case.dropout,
        merge_weights=False,
        device=problem.weight.device,
        dtype=case.dtype,
    )
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    layer.bias = nn.Parameter(problem.bias, requires_grad=False)
    own = ((layer.lora_A, layer.lora_B),)
    _fill(own, problem)
    return Contender(LORALIB, layer, layer, own)


def _legacy(problem: Problem) -> Contender:
    case = problem.case
    if case.dora or case.samples or case.adapters > 1 or case.dropout:
        raise NotOfferedError("diffusers' legacy layer has one adapter without dropout")
    try:
        from diffusers.models.lora import LoRACompatibleLinear, LoRALinearLayer
    except ImportError as error:
        raise NotOfferedError("this diffusers has dropped its legacy layers") from error

    update = LoRALinearLayer(
        case.in_features,
        case.out_features,
        rank=case.rank,
        network_alpha=SCALE * case.rank,
        device=problem.weight.device,
        dtype=case.factor_dtype,
    )
    layer = LoRACompatibleLinear(
        case.in_features, case.out_features, lora_layer=update, device="meta"
    )
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    layer.bias = nn.Parameter(problem.bias, requires_grad=False)
    own = ((update.down.weight, update.up.weight),)
    _fill(own, problem)
    return Contender(LEGACY, layer, layer, own)


_BUILDERS: dict[str, Callable[[Problem], Contender]] = {
    FROZEN: _frozen,
    REFERENCE: _reference,
    OURS: _ours,
    PEFT: _peft,
    LORALIB: _loralib,
    LEGACY: _legacy,
}


def _fill(own: Sequence[tuple[Tensor, Tensor]], problem: Problem) -> None:
    for mine, given in zip(own, problem.factors, strict=True):
        for parameter, values in zip(mine, given, strict=True):
            if parameter.dtype != values.dtype:
                raise ValueError(
                    f"The factors must be {values.dtype}, but are {parameter.dtype}."
                    " Build the layer with the dtype of the case."
                )
            with torch.no_grad():
                parameter.copy_(values)


def check(contender: Contender, problem: Problem) -> None:
    """Compares output and every gradient with the formula in float64.

    Under dropout the mask differs between libraries. There the layer without dropout is compared;
    with it, the gradients must fit the mask that was drawn, the mean over several masks must be
    the update itself, and a single one must not.

    Raises:
        WrongAnswerError: If anything differs.
    """
    if not problem.case.dropout:
        _check_exactly(contender, problem)
        return
    if contender.name != REFERENCE:  # a function, which has no evaluation mode
        contender.module.eval()
        _check_exactly(contender, problem)
        contender.module.train()
    if contender.name != FROZEN:
        _check_dropout(contender, problem)


def _check_exactly(contender: Contender, problem: Problem) -> None:
    case = problem.case
    expected, leaves = _truth(problem, adapted=contender.name != FROZEN)
    if case.samples:  # PEFT's is for inference alone
        with torch.no_grad():
            got = [("output", contender.forward(problem.x), expected)]
    else:
        y = contender.forward(problem.x)
        torch.autograd.backward(y, problem.dy)
        torch.autograd.backward(expected, problem.dy.double())
        got = [("output", y, expected)]
        mine = contender.leaves(problem.x)
        for i, (leaf, true) in enumerate(zip(mine, leaves, strict=True)):
            if leaf.grad is None or true.grad is None:
                raise WrongAnswerError(f"{contender.name}: leaf {i} of {case.name} has no gradient")
            got.append((f"gradient {i}", leaf.grad, true.grad))
            leaf.grad = None
    for what, value, true in got:
        error = _distance(value, true)
        if not error <= _TOLERANCE[case.dtype]:
            raise WrongAnswerError(
                f"{contender.name}: {what} of {case.name} is off by {error:.1e}, more than"
                f" {_TOLERANCE[case.dtype]:.0e}"
            )


def _truth(problem: Problem, adapted: bool) -> tuple[Tensor, list[Tensor]]:
    """The formula's output in float64, and the leaves that a backward gives its gradients."""
    x = problem.x.detach().double().requires_grad_()
    weight, bias = problem.weight.double(), problem.bias.double()
    if not adapted:
        return nn.functional.linear(x, weight, bias), [x]
    factors = [
        (A.double().requires_grad_(), B.double().requires_grad_()) for A, B in problem.factors
    ]
    leaves = [x, *(f for pair in factors for f in pair)]
    if problem.case.dora:
        lora_A, lora_B = factors[0]
        whole = weight + SCALE * lora_B @ lora_A
        norm = whole.detach().norm(dim=1, keepdim=True)  # a constant, by the paper's section 4.3
        return nn.functional.linear(x, whole * (weight.norm(dim=1, keepdim=True) / norm), bias), (
            leaves
        )
    y = nn.functional.linear(x, weight, bias)
    updates = [functional.lora_update(x, A, B, SCALE) for A, B in factors]
    if problem.choice:
        mine = [updates[which][sample] for sample, which in enumerate(problem.choice)]
        return y + torch.stack(mine), leaves
    return y + sum(updates), leaves


def _check_dropout(contender: Contender, problem: Problem) -> None:
    case, dy = problem.case, problem.dy.double()
    weight, bias = problem.weight.double(), problem.bias.double()
    base = nn.functional.linear(problem.x.detach().double(), weight, bias)
    whole = _truth(problem, adapted=True)[0].detach() - base
    y = contender.forward(problem.x)
    torch.autograd.backward(y, problem.dy)
    update = y.detach().double() - base
    # the update is linear in x, in A and in B, so each gradient gives it back by Euler's identity
    by_dy = (dy * update).sum()
    size = dy.norm() * update.norm()
    leaves = contender.leaves(problem.x)
    targets = [by_dy + (dy * (base - bias)).sum(), *[by_dy] * (len(leaves) - 1)]
    for i, (leaf, target) in enumerate(zip(leaves, targets, strict=True)):
        if leaf.grad is None:
            raise WrongAnswerError(f"{contender.name}: leaf {i} of {case.name} has no gradient")
        error = float(((leaf.grad.double() * leaf.detach().double()).sum() - target).abs() / size)
        leaf.grad = None
        if not error <= _TOLERANCE[case.dtype]:
            raise WrongAnswerError(
                f"{contender.name}: gradient {i} of {case.name} doesn't fit the mask that was"
                f" drawn, by {error:.1e}"
            )
    with torch.no_grad():
        draws = [contender.forward(problem.x).double() - base for _ in range(_SEEDS)]
    one, mean = _distance(draws[0], whole), _distance(sum(draws) / _SEEDS, whole)
    # a share p of the terms is missing: relative standard deviation sqrt(p / (1 - p))
    expected = (case.dropout / (1 - case.dropout)) ** 0.5
    if not (0.7 * expected < one < 1.4 * expected and mean < 1.4 * expected * _SEEDS**-0.5):
        raise WrongAnswerError(
            f"{contender.name}: dropout {case.dropout} of {case.name} is off: one mask differs by"
            f" {one:.3f} and the mean of {_SEEDS} by {mean:.3f}, {expected:.3f} of one is right"
        )


def _distance(value: Tensor | float, true: Tensor) -> float:
    difference = torch.as_tensor(value).detach().double() - true.detach()
    return float(difference.norm() / true.detach().norm())
