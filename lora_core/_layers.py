"""Layers that carry adapters: a mixin that joins the class of the very object it adapts.

A layer is adapted by swapping its class for a subclass of that class, so its keys, hooks, flags,
attributes and identity survive; see design decision 1 in docs/decisions.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import (
    AdapterConfig,
    check_alpha,
    check_dropout,
    check_dtype,
    check_name,
    check_rank,
)
from lora_core._errors import MergeError, UnsupportedLayerError, listed

# attribute of a module: adapter -> names of the parameters that its arrival froze
FROZEN = "lora_frozen"


class Selection(NamedTuple):
    """The active adapters of one layer; replaced whole, so that a forward sees one or another.

    Attributes:
        names: The active adapters, in the order in which they were chosen.
        strengths: What the user multiplies each by.
        gains: ``strength * alpha / rank`` as 0-d tensors: a new value recompiles nothing.
    """

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    gains: tuple[Tensor, ...]


class Merged(NamedTuple):
    """What a merge did to one layer.

    Attributes:
        names: The adapters that were added.
        kept: The original values, None where the merge kept no copy.
        merged: The merged values while `disabled` shows the originals, else None.
        parameter: The layer's own Parameter where the merge had to untie it, else None.
    """

    names: tuple[str, ...]
    kept: Tensor | None
    merged: Tensor | None = None
    parameter: nn.Parameter | None = None


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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Tensor = super().forward(x, *args, **kwargs)  # the host's
        for lora_A, lora_B, gain, dropout in self.active_factors():
            update = functional.lora_update(x, lora_A, lora_B, gain, dropout=dropout)
            base = base + update.to(base.dtype)
        return base

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``(lora_A, lora_B)`` of one adapter."""
        return getattr(self, f"lora_A_{name}"), getattr(self, f"lora_B_{name}")

    def active_factors(self) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        """``(lora_A, lora_B, gain, dropout)`` of what is active, stacked where dropout allows.

        Adapters that drop the same share of the input are one pair of products; merged ones are
        in the weight already and none.

        Raises:
            MergeError: If the layer is merged and this forward would train an adapter.
        """
        names, _, gains = self.lora_selection
        if self.lora_merged is not None:
            self._refuse_training(self.lora_merged.names)
            return []
        groups: dict[float, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for name, gain in zip(names, gains, strict=True):
            dropout = self.lora_configs[name].dropout if self.training else 0.0
            groups.setdefault(dropout, []).append((*self.factors(name), gain))
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
        names, _, gains = self.lora_selection
        stacked = functional.stack_factors(
            [
                (self.factors(name)[0].detach(), self.factors(name)[1].detach(), gain)
                for name, gain in zip(names, gains, strict=True)
            ]
        )
        dense = functional.lora_delta(*stacked)
        return dense.T if self.transposed else dense

    def select(self, strengths: dict[str, float]) -> Selection:
        """The selection with these strengths, of the adapters that this layer has."""
        mine = {name: s for name, s in strengths.items() if name in self.lora_configs}
        device = self.weight.device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # a selection made in inference mode must be usable in training
        with torch.inference_mode(mode=False):
            gains = tuple(
                torch.tensor(s * self.lora_configs[n].scale, dtype=dtype, device=device)
                for n, s in mine.items()
            )
        return Selection(tuple(mine), tuple(mine.values()), gains)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        names, strengths, _ = self.lora_selection
        self.lora_selection = self.select(dict(zip(names, strengths, strict=True)))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        here = self.lora_merged is not None
        if here or f"{prefix}lora_merged" in state_dict:
            raise MergeError(
                "A state dict must be saved and loaded unmerged, but {} is merged at {!r}: an"
                " update could be lost or applied twice. Call `unmerge(model)` {}.".format(
                    "the model" if here else "the state dict",
                    prefix.rstrip("."),
                    "first" if here else "before `state_dict()`",
                )
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_merged is not None:  # the weights hold the update: the dict says so
            destination[f"{prefix}lora_merged"] = torch.tensor(True)

    def extra_repr(self) -> str:
        adapters = (f"{name}: rank={c.rank}, alpha={c.alpha:g}" for name, c in _configs(self))
        return ", ".join(filter(None, [super().extra_repr(), *adapters]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self) is not adapted_class(self.host_class):
            return reduced
        return (_blank, (self.host_class,), *reduced[2:])


def _configs(layer: LoRAMixin) -> list[tuple[str, AdapterConfig]]:
    return list(getattr(layer, "lora_configs", {}).items())


class LoRALinear(LoRAMixin, nn.Linear):
    """A frozen linear layer plus a trainable low-rank update.

    Computes ``x @ weight.T + bias + (alpha / rank) * (x @ lora_A.T) @ lora_B.T``; equal to the
    wrapped layer until trained, because `lora_B` starts at zero. The new module adopts the
    Parameters of `linear` and freezes them; `inject` does the same in place.

    Args:
        linear: The layer to adapt.
        rank: Inner dimension of the update.
        alpha: Numerator of the scale; None means `rank`, a scale of 1.
        name: The adapter's name.
        dropout: Probability of dropping an input element of the update while training.
        dtype: Type of the factors; None means the weight's, but float32 at least.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Raises:
        ConfigError: If `rank` is outside ``1 .. min(in_features, out_features)``, or another
            setting is out of range.
        UnsupportedLayerError: If `linear` is no plain `nn.Linear`.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> layer = LoRALinear(nn.Linear(2000, 1000, bias=False), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 2000]), torch.Size([1000, 2]))
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        6000
    """

    host_class = nn.Linear

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 4,
        alpha: float | None = None,
        *,
        name: str = "default",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(
                f"`linear` must be a plain nn.Linear, but is {type(linear).__name__}."
                " Use `inject(model, targets=...)`, which keeps a subclass's own forward."
            )
        problem = why_not(linear)
        if problem:
            raise UnsupportedLayerError(f"`linear` must be adaptable, but {problem}")
        config = layer_config(linear, rank, alpha, dropout, dtype)
        factors = fresh_factors(linear, config)
        check_name(name)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        frozen = tuple(n for n, p in self.named_parameters() if p.requires_grad)
        if frozen:
            vars(self)[FROZEN] = {name: frozen}
            self.requires_grad_(False)
        attach(self, name, config, *factors)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        active = self.active_factors()
        if len(active) != 1:
            return super().forward(input)
        lora_A, lora_B, gain, dropout = active[0]
        return functional.lora_linear(
            input, self.weight, self.bias, lora_A, lora_B, gain, dropout=dropout
        )


class TransposedLoRAMixin(LoRAMixin):
    """The mixin for layers that store their matrix (in, out), as GPT-2's Conv1D does."""

    transposed = True


def mixin_for(module: nn.Module) -> type[LoRAMixin] | None:
    """The mixin that adapts modules of this kind, None if none does."""
    if isinstance(module, LoRAMixin):
        return type(module)
    if isinstance(module, nn.Linear):
        return LoRAMixin
    # transformers' Conv1D, known by its looks so that transformers need not be installed
    weight = getattr(module, "weight", None)
    looks = type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2
    return TransposedLoRAMixin if looks and hasattr(module, "nf") else None


# host class -> the class that its objects take on when adapted; others are made on demand
_ADAPTED: dict[type[nn.Module], type[LoRAMixin]] = {nn.Linear: LoRALinear}


def adapted_class(host: type[nn.Module]) -> type[LoRAMixin]:
    """The class that objects of class `host` take on when adapted; one per host class."""
    if host not in _ADAPTED:
        mixin = LoRAMixin if issubclass(host, nn.Linear) else TransposedLoRAMixin
        names = {"host_class": host, "__module__": host.__module__, "__doc__": host.__doc__}
        made = type(f"LoRA{host.__name__}", (mixin, host), names)
        _ADAPTED[host] = cast(type[LoRAMixin], made)
    return _ADAPTED[host]


def _blank(host: type[nn.Module]) -> LoRAMixin:
    """An adapted object without its state: pickle and deepcopy fill it."""
    cls = adapted_class(host)
    return cls.__new__(cls)


def sizes(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of an adaptable module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    in_features, out_features = module.weight.shape  # type: ignore[misc]
    return in_features, out_features


def why_not(module: nn.Module) -> str:
    """Why a layer of an adaptable kind can't be adapted, with the repair; "" if it can."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and has no shape yet. Run one batch through the model first."
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module, whose class can't change. Adapt it before scripting."
    if "forward" in vars(module):
        return (
            "has a `forward` patched onto the instance (offloading hooks do this), which would"
            " bypass the adapter. Remove that patch, adapt, and put it back."
        )
    weight = module.weight
    if type(weight).__name__ == "DTensor":
        return "is sharded already. Adapt the model before `fully_shard` or tensor parallelism."
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "has a weight that is no floating-point tensor. Exclude it."
    return ""


def layer_config(
    module: nn.Module,
    rank: object,
    alpha: object,
    dropout: object,
    dtype: object,
    where: str = "",
) -> AdapterConfig:
    """Checks the settings for one layer and fills in what follows from the layer."""
    checked = check_rank(rank, *sizes(module), where)
    weight_dtype = module.weight.dtype
    return AdapterConfig(
        rank=checked,
        alpha=check_alpha(alpha, checked),
        dropout=check_dropout(dropout),
        dtype=check_dtype(dtype) or torch.promote_types(weight_dtype, torch.float32),  # type: ignore[arg-type]
    )


def fresh_factors(
    module: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """New factors for one layer: `lora_A` Kaiming-uniform with a = sqrt(5), `lora_B` zero.

    Drawn on the CPU in float32, so that a seed gives the same bits on every device.
    """
    in_features, out_features = sizes(module)
    device = module.weight.device
    with torch.inference_mode(mode=False):
        lora_A = torch.empty(
            config.rank, in_features, device="meta" if device.type == "meta" else "cpu"
        )
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        lora_B = torch.zeros(out_features, config.rank, dtype=config.dtype, device=device)  # type: ignore[arg-type]
        return nn.Parameter(lora_A.to(device, config.dtype)), nn.Parameter(lora_B)  # type: ignore[arg-type]


def attach(
    module: nn.Module,
    name: str,
    config: AdapterConfig,
    lora_A: nn.Parameter,
    lora_B: nn.Parameter,
    strength: float = 1.0,
) -> None:
    """Puts one adapter on a layer, in place, and makes it active beside those that are."""
    if not isinstance(module, LoRAMixin):
        module.__class__ = adapted_class(type(module))
    assert isinstance(module, LoRAMixin)
    if "lora_configs" not in vars(module):
        module.lora_configs = {}
        module.lora_selection = Selection((), (), ())
        module.lora_merged = None
    module.register_parameter(f"lora_A_{name}", lora_A)
    module.register_parameter(f"lora_B_{name}", lora_B)
    module.lora_configs = {**module.lora_configs, name: config}
    names, strengths, _ = module.lora_selection
    module.lora_selection = module.select(
        {**dict(zip(names, strengths, strict=True)), name: strength}
    )


def detach(module: LoRAMixin, name: str) -> None:
    """Takes one adapter off a layer, in place; with the last one goes every trace."""
    names, strengths, _ = module.lora_selection
    kept = {n: s for n, s in zip(names, strengths, strict=True) if n != name}
    module.lora_selection = module.select(kept)
    delattr(module, f"lora_A_{name}")
    delattr(module, f"lora_B_{name}")
    module.lora_configs = {n: c for n, c in module.lora_configs.items() if n != name}
    if not module.lora_configs:
        del module.lora_configs, module.lora_selection, module.lora_merged
        module.__class__ = module.host_class  # type: ignore[assignment]
