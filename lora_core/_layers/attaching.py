"""Putting an adapter on one layer and taking it off, with the checks that come before."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_core._config import (
    AdapterConfig,
    check_alpha,
    check_dropout,
    check_dtype,
    check_flag,
    check_rank,
)
from lora_core._errors import ConfigError
from lora_core._layers.mixin import LoRAMixin, Selection, TransposedLoRAMixin, adapted_class, reset


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
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            "is never called: nn.MultiheadAttention reads its weight itself, so an adapter would"
            " have no effect. Exclude it."
        )
    weight = module.weight
    if type(weight).__name__ == "DTensor":
        return "is sharded already. Adapt the model before `fully_shard` or tensor parallelism."
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "has a weight that is no floating-point tensor. Exclude it."
    if weight.dtype.itemsize < 2:
        return (
            f"has a weight of {weight.dtype}, which nothing but a cast can take. Cast the layer to"
            " 16 bits or more, or exclude it."
        )
    return ""


def factor_names(adapters: Iterable[str]) -> set[str]:
    """The names that the parameters of these adapters have on a layer."""
    return {f"lora_{letter}_{name}" for name in adapters for letter in "AB"}


def non_finite(factors: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """The layers one of whose factors holds NaN or infinity; few operations where none does."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for f in (f for pair in factors.values() for f in pair):
        groups.setdefault((f.device, f.dtype), []).append(f.detach().reshape(-1))
    if all(bool(torch.cat(group).isfinite().all()) for group in groups.values()):
        return []
    return [n for n, pair in factors.items() if not all(bool(f.isfinite().all()) for f in pair)]


def layer_config(
    module: nn.Module,
    rank: object,
    alpha: object,
    dropout: object,
    dtype: object,
    rslora: object = False,
    where: str = "",
) -> AdapterConfig:
    """Checks the settings for one layer and fills in what follows from the layer."""
    checked = check_rank(rank, *sizes(module), where)
    if check_alpha(alpha, checked) == 0:  # a file may hold it: what was saved comes back
        raise ConfigError(
            f"`alpha` must not be 0, but is {alpha!r}{where}: the adapter could have no effect and"
            " no gradient. Use `scales` to turn an adapter off."
        )
    weight_dtype = module.weight.dtype
    return AdapterConfig(
        rank=checked,
        alpha=check_alpha(alpha, checked),
        dropout=check_dropout(dropout),
        dtype=check_dtype(dtype) or torch.promote_types(weight_dtype, torch.float32),  # type: ignore[arg-type]
        rslora=check_flag("rslora", rslora),
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
        where = "meta" if device.type == "meta" else "cpu"
        lora_A = torch.empty(config.rank, in_features, device=where, dtype=torch.float32)
        lora_B = torch.empty(out_features, config.rank, dtype=config.dtype, device=device)  # type: ignore[arg-type]
        reset(lora_A, lora_B, generator)
        return nn.Parameter(lora_A.to(device, config.dtype)), nn.Parameter(lora_B)  # type: ignore[arg-type]


def call_me(module: nn.Module, args: tuple[object, ...]) -> None:
    """A forward pre-hook that does nothing: torch's fused paths call a layer that has one."""


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
    own = vars(module)  # torch's own way to set an attribute looks for parameters first
    if "lora_configs" not in own:
        own |= {"lora_configs": {}, "lora_selection": Selection((), (), ()), "lora_merged": None}
    module.register_parameter(f"lora_A_{name}", lora_A)
    module.register_parameter(f"lora_B_{name}", lora_B)
    own["lora_configs"] = {**module.lora_configs, name: config}
    names, strengths, _ = module.lora_selection
    chosen = {**dict(zip(names, strengths, strict=True)), name: strength}
    own["lora_selection"] = module.select(chosen)


def detach(module: LoRAMixin, name: str) -> None:
    """Takes one adapter off a layer, in place; with the last one goes every trace."""
    own = vars(module)
    names, strengths, _ = module.lora_selection
    kept = {n: s for n, s in zip(names, strengths, strict=True) if n != name}
    own["lora_selection"] = module.select(kept)
    del module._parameters[f"lora_A_{name}"], module._parameters[f"lora_B_{name}"]
    own["lora_configs"] = {n: c for n, c in module.lora_configs.items() if n != name}
    if not own["lora_configs"]:
        del own["lora_configs"], own["lora_selection"], own["lora_merged"]
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is call_me]:
            del module._forward_pre_hooks[key]
        module.__class__ = module.host_class  # type: ignore[assignment]
