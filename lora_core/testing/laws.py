"""What must hold of any model that carries an adapter, as one call."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

import lora_core._adapters as adapters
from lora_core._errors import ConfigError, listed
from lora_core._files import load, save
from lora_core._injection import eject, inject
from lora_core._layers import LoRAWeight, computes_as_torch, stored_parts, trained_parts
from lora_core._merging import merge, unmerge
from lora_core._reports import Report

_Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]]]
_Run = Callable[[nn.Module], list[Tensor]]


_SAMPLES = 3  # of a layer's first input


class LawError(AssertionError):
    """A law does not hold; the message names the law and the layer."""


def check_lora(
    model: nn.Module,
    *inputs: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    **inject_options: Any,
) -> Report:
    """Runs the laws of LoRA on a model of your own and leaves it as it was.

    1. A fresh adapter changes nothing, bit for bit.
    2. Only the adapter trains, and every adapted layer takes effect on these inputs.
    3. Saving and loading into a bare copy is bit-exact.
    4. Each sample has a mix of its own, also where a program repeats samples.
    5. Merging keeps the function of every layer; a weight that is tied elsewhere is untied for it.
    6. Unmerging restores every bit.
    7. Ejecting restores every object, class, attribute, flag and bit.

    Args:
        model: The model; run in evaluation mode, so it must be deterministic there. Its buffers
            are put back after every call; what it keeps in plain attributes is its own affair.
        inputs: What it is called with.
        model_kwargs: What it is called with by keyword.
        inject_options: What `inject` is called with.

    Returns:
        The report of the injection.

    Raises:
        LawError: If a law does not hold; an AssertionError that names the law and the layer.
        ConfigError: If the model has an adapter already, or without one isn't finite or doesn't
            give the same twice.
        LoRAError: If a verb refuses this model, as `merge` does where a weight is parametrized.

    Example:
        >>> len(check_lora(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8), targets="0").layers)
        1
    """
    name = inject_options.get("name", "default")
    there = adapters.adapter_names(adapters.adapted_layers(model))
    if there:
        raise ConfigError(
            f"`model` must be bare for the laws to be checked, but has {listed(there)}."
            " Eject first."
        )

    def run(model: nn.Module) -> list[Tensor]:
        # a model may work in place, on its inputs too
        args, kwargs = _copied((inputs, model_kwargs or {}))
        return _outputs(model(*args, **kwargs))

    with _evaluation(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before, bare = _Picture(model), copy.deepcopy(model)
        with torch.no_grad(), _buffers_kept(model):
            plain = run(model)
            twice = run(model)
        _refuse_not_finite(model, plain)
        if not _same(plain, twice):
            raise ConfigError(
                "`model` must give the same twice for the laws to be checked, but does not in"
                " evaluation mode. Give it a fixed seed or state."
            )
        report = inject(model, **inject_options)
        try:
            names = {layer.name for layer in report.layers}
            _check_fresh(model, bare, run, names)
            train_pretend(model, name)
            _check_training(model, run, name, names, freeze=inject_options.get("freeze", True))
            calls = _record(model, run, names)
            _check_file(model, bare, run, name)
            _check_samples(model, calls, name)
            _check_merge(model, calls, before)
        finally:
            layers = adapters.adapted_layers(model).values()
            if any(layer.lora_state.merged is not None for layer in layers):
                unmerge(model)
            eject(model, name)
        before.compare(model)
        with torch.no_grad(), _buffers_kept(model):
            again = run(model)
        _demand(_same(plain, again), "eject restores every bit", "(the model's output)")
    return report


def train_pretend(model: nn.Module, name: str) -> None:
    """Adds small noise to all of an adapter but `lora_A`, as if it had been trained."""
    with torch.no_grad():
        for layer in adapters.layers_with(model, name).values():
            std = 0.5 / layer.lora_state.configs[name].rank ** 0.5
            for part, p in trained_parts(layer, name).items():
                if part != "lora_A":
                    p.add_(torch.randn_like(p), alpha=std)


def _refuse_not_finite(model: nn.Module, outputs: list[Tensor]) -> None:
    floating = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
    bad = [n for n, p in floating if not _is_wrapped(p) and not bool(p.isfinite().all())]
    if bad:
        raise ConfigError(
            f"`model` must be finite for the laws to be checked, but {listed(bad)} holds NaN or"
            " infinity. Repair it first."
        )
    if any(bool(out.isnan().any()) for out in outputs):
        raise ConfigError(
            "`model` must return numbers for the laws to be checked, but returns NaN without any"
            " adapter. Pass other inputs or repair it first."
        )


def _is_wrapped(p: Tensor) -> bool:
    """Whether a weight is quantised or the like: it says that it is floating, and shows nothing."""
    wrapped: bool = is_traceable_wrapper_subclass(p)
    return wrapped


def _check_fresh(model: nn.Module, bare: nn.Module, run: _Run, names: set[str]) -> None:
    law = "a fresh adapter changes nothing"
    _copy_flags(model, bare)
    with torch.no_grad(), _stepwise(), _buffers_kept(bare), _buffers_kept(model):
        plain, fresh = run(bare), run(model)
    if not _same(plain, fresh):
        with _stepwise():
            base, now = _record(bare, run, names), _record(model, run, names)
        guilty = [n for n in base if not _same_calls(base[n], now.get(n, []))]
        raise LawError(f"law broken: {law}; layer {(guilty or ['(the model)'])[0]!r}")


def _check_training(
    model: nn.Module, run: _Run, name: str, names: set[str], *, freeze: bool
) -> None:
    own = {id(p) for p in adapters.parameters(model, name)}
    if freeze:
        strays = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
        _demand(not strays, "only the adapter trains", *strays)
    with torch.enable_grad(), _buffers_kept(model):
        total = sum((out.double() * _weights(out)).sum() for out in run(model))
        _demand(isinstance(total, Tensor), "the model returns a floating tensor", "(the model)")
        layers = adapters.layers_with(model, name)
        factors = {n: list(trained_parts(m, name).values()) for n, m in layers.items()}
        flat = [f for parts in factors.values() for f in parts]
        live = total.requires_grad  # type: ignore[union-attr]
        found = torch.autograd.grad(total, flat, allow_unused=True) if live else [None] * len(flat)  # type: ignore[arg-type]
    gradients = iter(found)
    for layer, parts in factors.items():
        mine = [next(gradients) for _ in parts]
        effect = any(g is not None and bool((g.to_dense() != 0).any()) for g in mine)
        _demand(effect, "every adapted layer takes effect on these inputs", layer)
    _demand(names <= factors.keys(), "every reported layer is adapted", *(names - factors.keys()))


def _weights(out: Tensor) -> Tensor:
    """Fixed numbers for an output: its squares alone are constant where it is normalised."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)


def _copied(value: Any) -> Any:
    """The same structure with tensors of its own."""
    return tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), value
    )


def _check_file(model: nn.Module, bare: nn.Module, run: _Run, name: str) -> None:
    law = "saving and loading is bit-exact"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "law.safetensors"
        save(model, path, name)
        load(bare, path)
    _copy_flags(model, bare)
    theirs = adapters.layers_with(bare, name)
    for layer, mine in adapters.layers_with(model, name).items():
        ours, other = stored_parts(mine, name), stored_parts(theirs[layer], name)
        same = ours.keys() == other.keys() and all(_equal(ours[k], other[k]) for k in ours)
        _demand(same, law, layer)
    with torch.no_grad(), _buffers_kept(bare), _buffers_kept(model):
        same = _same(run(model), run(bare))
    _demand(same, law, "(the model's output)")


def _check_samples(model: nn.Module, calls: _Calls, name: str) -> None:
    """Holds for layers that see samples; on others one strength is for all."""
    layers = adapters.adapted_layers(model)
    for path, recorded in calls.items():
        layer, (args, kwargs, _) = layers[path], recorded[0]
        shared = layer.lora_is_read or layer.lora_state.configs[name].dora
        host: Any = layer.lora_host_class
        if shared or len(args) != 1 or kwargs or not computes_as_torch(host):
            continue
        if not layer.lora_kind.samples(layer, args[0]):
            continue
        x, before = args[0][:_SAMPLES], layer.lora_state.strengths
        with torch.no_grad(), _buffers_kept(layer):
            rows = []
            for i in range(len(x)):
                adapters.scales(layer, **{name: _mix(i)})
                rows.append(layer(x[i : i + 1]))
            expected = torch.cat(rows)
            mix = [_mix(i) for i in range(len(x))]
            for guidance, repeats in ((False, 1), (True, 1), (False, 3), (True, 3)):
                adapters.scales(layer, **{name: mix}, guidance=guidance, repeats=repeats)
                many, wanted = (
                    torch.cat([t.repeat_interleave(repeats, 0)] * (1 + guidance))
                    for t in (x, expected)
                )
                error = (layer(many).double() - wanted.double()).norm()
                bound = 32 * torch.finfo(wanted.dtype).eps * float(wanted.double().norm())
                _demand(bool(error <= bound), "each sample has a mix of its own", path)
            adapters.scales(layer, **before)


def _mix(sample: int) -> float:
    """What a sample's strength is: no two are alike, and none is the whole."""
    return 0.75 - 0.5 * sample


def _check_merge(model: nn.Module, calls: _Calls, before: "_Picture") -> None:
    merge(model, untie=True)
    layers = adapters.adapted_layers(model)
    for name, recorded in calls.items():
        layer = layers[name]
        eps = torch.finfo(layer.weight.dtype).eps
        for args, kwargs, adapted in recorded:
            with torch.no_grad(), _buffers_kept(layer):
                if isinstance(layer, LoRAWeight):  # it is given the parameter, and now that is it
                    start, stop = layer.lora_rows or (0, len(adapted[0]))
                    adapted, merged = [adapted[0][start:stop]], [layer.weight]  # noqa: PLW2901
                else:
                    merged = _outputs(layer(*args, **kwargs))
            for a, b in zip(adapted, merged, strict=True):
                error = (a.double() - b.double()).norm()
                bound = 32 * eps * max(float(a.double().norm()), eps)
                _demand(bool(error <= bound), "merging keeps the function", name)
    unmerge(model)
    for label, p in model.named_parameters():
        if label in before.values:
            _demand(_equal(p, before.values[label]), "unmerging restores every bit", label)


class _Picture:
    """What a model consists of, to be compared with later."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {
            n: (m, type(m), sorted(vars(m)), list(m._parameters), list(m._buffers))
            for n, m in model.named_modules()
        }
        self.tensors = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
        self.values = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.buffers = {n: (b, b.detach().clone()) for n, b in model.named_buffers()}

    def compare(self, model: nn.Module) -> None:
        law = "eject restores every object"
        now = _Picture(model)
        for name, seen in self.modules.items():
            _demand(now.modules.get(name) == seen, law, name)
        for name, (p, flag) in self.tensors.items():
            _demand(now.tensors[name][0] is p, law, name)
            _demand(now.tensors[name][1] == flag, "eject restores every requires_grad", name)
            _demand(_equal(p, self.values[name]), "eject restores every bit", name)
        for name, (buffer, value) in self.buffers.items():
            _demand(now.buffers[name][0] is buffer, law, name)
            _demand(_unchanged(buffer, value), "eject restores every bit", name)
        extra = sorted(now.tensors.keys() - self.tensors.keys())
        _demand(not extra, law, *extra)


def _copy_flags(model: nn.Module, bare: nn.Module) -> None:
    """Gives `bare` the flags of `model`, in place.

    Another kernel, or another form of the layer, may run for a weight that needs no gradient.
    """
    flags = {adapters.clean(n): p.requires_grad for n, p in model.named_parameters()}
    for n, p in bare.named_parameters():
        p.requires_grad_(flags[adapters.clean(n)])


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts back every buffer that a call assigns or writes to."""
    held = [(m._buffers, dict(m._buffers)) for m in model.modules()]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for buffers, own in held:
            buffers.clear()
            buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                if not _unchanged(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _stepwise() -> Iterator[None]:
    """Switches off torch's fused encoders, which round otherwise and blank what is padded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for p, grad in grads:
            p.grad = grad


def _record(model: nn.Module, run: _Run, names: set[str]) -> _Calls:
    """Every call of the named layers during one forward of the model, with its outputs."""
    calls: _Calls = {}
    modules = {adapters.clean(n): m for n, m in model.named_modules() if adapters.clean(n) in names}

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # what comes after may work in place on any of these
            calls.setdefault(name, []).append(_copied((args, kwargs, _outputs(output))))

        return note

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with torch.no_grad(), _buffers_kept(model):
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _outputs(value: Any) -> list[Tensor]:
    """The floating tensors in whatever a model returns."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _outputs(item)] if isinstance(value, list | tuple) else []


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _unchanged(a: Tensor, b: Tensor) -> bool:
    """Whether two are equal, NaN for NaN; infinities are common in masks."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _same_calls(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(_same(x[2], y[2]) for x, y in zip(a, b, strict=True))


def _demand(holds: bool, law: str, *where: str) -> None:
    if not holds:
        raise LawError(f"law broken: {law}; layer {', '.join(map(repr, where))}")
