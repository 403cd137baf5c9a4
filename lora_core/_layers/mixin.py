"""What an adapted layer is: a mixin that joins the class of the very object it adapts.

A layer is adapted by swapping its class for a subclass of that class, so its keys, hooks, flags,
attributes and identity survive.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import ConfigError, MergeError, UnsupportedLayerError, listed

# attribute of a module: adapter -> parameters that it keeps frozen, and whether each trained before
FROZEN = "lora_frozen"
_MARK = "lora_merged"  # key beside a merged weight in a state dict


class Selection(NamedTuple):
    """The active adapters of one layer; replaced whole, so that a forward sees one or another.

    Attributes:
        names: The active adapters, in the order in which they were chosen.
        strengths: What the user multiplies each by.
        gains: ``strength * scale`` as 0-d tensors: a new value recompiles nothing.
    """

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    gains: tuple[Tensor, ...]


class Merged(NamedTuple):
    """What a merge did to one layer.

    Attributes:
        strengths: The adapters that were added, and how strongly.
        kept: The original values, None where the merge kept no copy.
        merged: The merged values while `disabled` shows the originals, else None.
        parameter: The layer's own Parameter where the merge had to untie it, else None.
    """

    strengths: dict[str, float]
    kept: Tensor | None
    merged: Tensor | None = None
    parameter: nn.Parameter | None = None


def reset(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator | None = None) -> None:
    """Fills the factors of a fresh adapter, in place.

    `lora_A` Kaiming-uniform with a = sqrt(5), `lora_B` zero.
    """
    with torch.no_grad():
        bound = 1 / math.sqrt(lora_A.shape[1])  # what nn.init.kaiming_uniform_ works out
        lora_A.uniform_(-bound, bound, generator=generator)
        lora_B.zero_()


class LoRAMixin(nn.Module):
    """Adapters on a layer that maps ``in_features`` to ``out_features`` by one matrix.

    The parameters of adapter `name` are ``lora_A_<name>`` (rank, in_features) and
    ``lora_B_<name>`` (out_features, rank), flat on the layer itself.
    """

    host_class: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False  # whether the weight is stored (in, out)

    weight: Tensor
    lora_configs: dict[str, AdapterConfig]
    lora_selection: Selection
    lora_merged: Merged | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base: Tensor = super().forward(*args, **kwargs)  # the host's
        if not isinstance(base, Tensor):
            raise UnsupportedLayerError(
                f"An adapted layer's host must return a tensor, but {self.host_class.__name__}"
                f" returns {type(base).__name__}. Eject the adapter from this layer."
            )
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        for lora_A, lora_B, gain, dropout in self.active_factors():
            update = functional.lora_update(x, lora_A, lora_B, gain, dropout=dropout)
            base = base + update.to(base.dtype)
        return base

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``(lora_A, lora_B)`` of one adapter."""
        own, down, up = self._parameters, f"lora_A_{name}", f"lora_B_{name}"
        if down in own and up in own:  # at a tenth of what `getattr` takes
            return own[down], own[up]  # type: ignore[return-value]
        return getattr(self, down), getattr(self, up)

    def active_factors(self) -> list[tuple[Tensor, Tensor, Tensor | float, float]]:
        """``(lora_A, lora_B, gain, dropout)`` of what is active, stacked where dropout allows.

        Adapters that drop the same share of the input are one pair of products; merged ones are
        in the weight already and none. A gain is a number where one will do, which costs a fast
        path nothing; under torch.compile it is a tensor, so that another value recompiles nothing.

        Raises:
            MergeError: If the layer is merged and this forward would train an adapter.
        """
        names, strengths, gains = self.lora_selection
        if self.lora_merged is not None:
            self._refuse_training(tuple(self.lora_merged.strengths))
            return []
        scales: Sequence[Tensor | float] = gains
        if not torch.compiler.is_compiling():  # which would guard on the numbers that it sees
            numbers = [
                s * self.lora_configs[name].scale for name, s in zip(names, strengths, strict=True)
            ]
            scales = numbers if len(set(numbers)) == 1 else gains
        if len(names) == 1:
            dropout = self.lora_configs[names[0]].dropout if self.training else 0.0
            return [(*self.factors(names[0]), scales[0], dropout)]
        groups: dict[float, list[tuple[Tensor, Tensor, Tensor | float]]] = {}
        for name, scale in zip(names, scales, strict=True):
            dropout = self.lora_configs[name].dropout if self.training else 0.0
            groups.setdefault(dropout, []).append((*self.factors(name), scale))
        return [(*functional.stack_factors(group), p) for p, group in groups.items()]

    def _refuse_training(self, names: tuple[str, ...]) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for name in names for p in self.factors(name)):
            raise MergeError(
                f"A layer in training mode must be unmerged, but {listed(names)} is merged into its"
                " weight and would get no gradient. Call `unmerge(model)`, or `model.eval()`."
            )

    def delta(self) -> Tensor:
        """The sum of the active updates in the weight's own layout, float32 or wider."""
        dense = functional.lora_delta(*self.stacked())
        return dense.T if self.transposed else dense

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(lora_A, lora_B, gain)`` of what is active as one adapter, detached.

        In the weight's precision, float32 or wider, as a forward multiplies them.
        """
        names, _, gains = self.lora_selection
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        factors = ([f.detach().to(dtype) for f in self.factors(name)] for name in names)
        return functional.stack_factors(
            [(A, B, gain) for (A, B), gain in zip(factors, gains, strict=True)]
        )

    def select(self, strengths: dict[str, float]) -> Selection:
        """The selection with these strengths, of the adapters that this layer has."""
        mine = {name: s for name, s in strengths.items() if name in self.lora_configs}
        return Selection(
            tuple(mine), tuple(mine.values()), tuple(self._gain(n, s) for n, s in mine.items())
        )

    def _gain(self, name: str, strength: float) -> Tensor:
        weight = self.weight
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        for known, s, gain in zip(*self.lora_selection, strict=True):
            if (known, s, gain.device, gain.dtype) == (name, strength, device, dtype):
                return gain
        value, limit = strength * self.lora_configs[name].scale, torch.finfo(dtype).max
        if not abs(value) <= limit:
            raise ConfigError(
                f"`strength * scale` must be at most {limit:.3g}, but is {value:.3g} for"
                f" {name!r}. Choose smaller values."
            )
        # a selection made in inference mode must be usable in training
        with torch.inference_mode(mode=False):
            return torch.tensor(value, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        hollow = [name for name in self.lora_configs if self.factors(name)[0].is_meta]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in hollow:  # now with memory, perhaps, but never with values
            reset(*self.factors(name))
        names, strengths, _ = self.lora_selection
        self.lora_selection = self.select(dict(zip(names, strengths, strict=True)))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_merged(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.lora_merged
        # where the weights hold the update, which they don't inside `disabled`, the dict says so
        if state is not None and state.merged is None:
            destination[f"{prefix}{_MARK}"] = torch.tensor(True)

    def extra_repr(self) -> str:
        adapters = (
            f"{name}: rank={c.rank}, alpha={c.alpha:g}" + ", rslora" * c.rslora
            for name, c in _configs(self)
        )
        return ", ".join(filter(None, [super().extra_repr(), *adapters]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, state, *rest = reduced
        if type(self) is adapted_class(self.host_class):
            make, arguments = _blank, (self.host_class,)
        merged = vars(self).get("lora_merged")
        if merged is not None and merged.merged is not None:
            # inside `disabled`: the copy is the base that is shown, unmerged
            weight = self.weight if merged.parameter is None else merged.parameter
            state = {
                **state,
                "_parameters": {**self._parameters, "weight": weight},
                "lora_selection": Selection((), (), ()),
                "lora_merged": None,
            }
        return (make, arguments, state, *rest)


def refuse_merged(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises if a module below is merged, or the part of a state dict that is meant for it."""
    here = [n for n, m in module.named_modules() if vars(m).get("lora_merged") is not None]
    there = [
        key.removeprefix(prefix).removesuffix(_MARK).rstrip(".")
        for key in state_dict
        if key.startswith(prefix) and f".{key}".endswith(f".{_MARK}")
    ]
    if here or there:
        raise MergeError(
            "A state dict must be saved and loaded unmerged, but {} is merged at {!r}: an update"
            " could be lost or applied twice. Call `unmerge(model)` {}.".format(
                "the model" if here else "the state dict",
                (prefix + (here or there)[0]).rstrip("."),
                "first" if here else "before `state_dict()`",
            )
        )


def _configs(layer: LoRAMixin) -> list[tuple[str, AdapterConfig]]:
    return list(getattr(layer, "lora_configs", {}).items())


class TransposedLoRAMixin(LoRAMixin):
    """The mixin for layers that store their matrix (in, out), as GPT-2's Conv1D does."""

    transposed = True


# host class -> the class that its objects take on when adapted; others are made on demand
ADAPTED: dict[type[nn.Module], type[LoRAMixin]] = {}


def adapted_class(host: type[nn.Module]) -> type[LoRAMixin]:
    """The class that objects of class `host` take on when adapted; one per host class."""
    if host not in ADAPTED:
        mixin = LoRAMixin if issubclass(host, nn.Linear) else TransposedLoRAMixin
        names = {"host_class": host, "__module__": host.__module__, "__doc__": host.__doc__}
        made = type(f"LoRA{host.__name__}", (mixin, host), names)
        ADAPTED[host] = cast(type[LoRAMixin], made)
    return ADAPTED[host]


def _blank(host: type[nn.Module]) -> LoRAMixin:
    """An adapted object without its state: pickle and deepcopy fill it."""
    cls = adapted_class(host)
    return cls.__new__(cls)
