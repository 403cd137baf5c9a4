"""Putting an adapter on one layer and taking it off, with the checks that come before."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import (
    AdapterConfig,
    check_alpha,
    check_dropout,
    check_dtype,
    check_flag,
    check_init,
    check_rank,
)
from lora_core._errors import ConfigError
from lora_core._layers.anatomy import Shape, peek
from lora_core._layers.mixin import (
    KINDS,
    LoRAMixin,
    TransposedLoRAMixin,
    adapted_class,
)
from lora_core._layers.norms import length_of
from lora_core._layers.state import NOTHING, Change, Strength
from lora_core._layers.weights import LoRAWeight, Slot

OWN = (
    "lora_configs",
    "lora_selection",
    "lora_merged",
    "lora_changes",
)  # what every adapted layer has
PARTS = (
    *("lora_A", "lora_B", "lora_mid", "lora_magnitude", "lora_in_magnitude", "lora_bias"),
    *("lora_A0", "lora_B0"),
)


def mixin_for(module: nn.Module | Slot) -> type[LoRAMixin] | None:
    """The mixin that adapts modules of this kind, None if none does."""
    if isinstance(module, LoRAMixin):
        return type(module)
    if isinstance(module, Slot):
        return LoRAWeight
    for kind, mixin in KINDS.items():
        if isinstance(module, kind):
            return mixin
    # transformers' Conv1D, known by its looks so that transformers need not be installed
    weight = getattr(module, "weight", None)
    looks = type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2
    return TransposedLoRAMixin if looks and hasattr(module, "nf") else None


def _mixin(module: nn.Module | Slot) -> type[LoRAMixin]:
    mixin = mixin_for(module)
    assert mixin is not None
    return mixin


def sizes(module: nn.Module | Slot) -> tuple[int, int]:
    """``(in, out)`` of the matrix that an adapter of this layer changes."""
    return _mixin(module).lora_sizes(module)  # type: ignore[arg-type]


def part_shapes(module: nn.Module | Slot, config: AdapterConfig) -> dict[str, Shape]:
    """The shape of each tensor of an adapter with these settings."""
    return _mixin(module).lora_shapes(module, config)  # type: ignore[arg-type]


def why_not(module: nn.Module | Slot) -> str:
    """Why a layer of an adaptable kind can't be adapted, with the repair; "" if it can."""
    if isinstance(module, Slot):
        return _why_not_weight(module.weight)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and has no shape yet. Run one batch through the model first."
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module, whose class can't change. Adapt it before scripting."
    if "forward" in vars(module):
        return (
            "has a `forward` patched onto the instance (offloading hooks do this), which would"
            " bypass the adapter. Remove that patch, adapt, and put it back."
        )
    if getattr(module, "max_norm", None) is not None:
        return (
            "has a `max_norm`, which rewrites rows of its weight in every forward. Renormalise the"
            " table once, set `max_norm = None`, and adapt it then."
        )
    if any(vars(m).get("lora_owner") for m in module._modules.values() if m is not None):
        return "has an adapter on a parameter of its own. Eject that first, or exclude the layer."
    weight = getattr(module, "weight", None) if _has_own_forward(module) else peek(module)
    if _has_own_forward(module) and isinstance(weight, Tensor) and not _is_sharded(weight):
        return ""  # whatever the weight is stored as, the host's forward knows
    return _why_not_weight(weight)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass computes its output itself, as layers with 4-bit weights do."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    host = module.host_class if isinstance(module, LoRAMixin) else type(module)
    return kind is not None and host.forward is not kind.forward


def _is_sharded(weight: Tensor) -> bool:
    return type(weight).__name__ == "DTensor"


def _why_not_weight(weight: object) -> str:
    if isinstance(weight, Tensor) and _is_sharded(weight):
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
    """The names that the parameters of these adapters may have on a layer."""
    return {f"{part}_{name}" for name in adapters for part in PARTS}


def non_finite(factors: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """The layers one of whose factors holds NaN or infinity; few operations where none does."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for f in (f for pair in factors.values() for f in pair):
        groups.setdefault((f.device, f.dtype), []).append(f.detach().reshape(-1))
    # a sum is finite only of finite numbers; where it isn't, it may have overflowed
    if all(bool(torch.cat(group).sum().isfinite()) for group in groups.values()):
        return []
    return [n for n, pair in factors.items() if not all(bool(f.isfinite().all()) for f in pair)]


def layer_config(
    module: nn.Module | Slot, settings: Mapping[str, Any], where: str = ""
) -> AdapterConfig:
    """Checks the settings for one layer and fills in what follows from the layer."""
    given = dict(settings)
    rank = check_rank(given.pop("rank"), *sizes(module), where)
    reserve, alpha = given.pop("reserve_rank", None), given.pop("alpha", None)
    if reserve is not None:
        reserve = check_rank(reserve, *sizes(module), where, what="reserve_rank")
        if reserve < rank:
            raise ConfigError(
                f"`reserve_rank` must be at least the rank {rank}, but is {reserve}{where}."
            )
    if check_alpha(alpha, rank) == 0:  # a file may hold it: what was saved comes back
        raise ConfigError(
            f"`alpha` must not be 0, but is {alpha!r}{where}: the adapter could have no effect and"
            " no gradient. Use `scales` to turn an adapter off."
        )
    wide = _wide_dtype(peek(module))
    config = AdapterConfig(
        rank=rank,
        alpha=check_alpha(alpha, rank),
        dropout=check_dropout(given.pop("dropout", 0.0)),
        dtype=check_dtype(given.pop("dtype", None)) or wide,
        rank_dropout=check_dropout(given.pop("rank_dropout", 0.0), "rank_dropout"),
        module_dropout=check_dropout(given.pop("module_dropout", 0.0), "module_dropout"),
        init=check_init(given.pop("init", "kaiming")),
        reserve_rank=reserve,
        **{what: check_flag(what, value) for what, value in given.items()},
    )
    refusal = _mixin(module).lora_refusal(module, config) or _unreadable(module, config)  # type: ignore[arg-type]
    if refusal:
        raise ConfigError(f"A setting must fit its layer, but {refusal}{where}.")
    return config


def _unreadable(module: nn.Module | Slot, config: AdapterConfig) -> str:
    """Which setting needs values of the weight that can't be read; "" if none."""
    weight = peek(module)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if config.dora or config.subtracted:
        what = "`dora=True`" if config.dora else f"`init={config.init!r}`"
        if not plain:
            found = f"a {type(weight).__name__} of {weight.dtype}"
            return f"{what} needs a weight of plain floating numbers, not {found}"
        if weight.is_meta:
            return f"{what} needs the weight's values, which the meta device has none of"
        if config.subtracted and config.scale <= 0:
            return f"{what} needs a scale above 0, not {config.scale:g}"
    return ""


def _wide_dtype(weight: Tensor) -> torch.dtype:
    """The type of an adapter over a weight: its own, but float32 at least."""
    if not weight.is_floating_point():  # quantised
        return torch.float32
    return torch.promote_types(weight.dtype, torch.float32)


def fresh_parts(
    module: nn.Module | Slot,
    config: AdapterConfig,
    generator: torch.Generator | None = None,
    covariance: Tensor | None = None,
) -> dict[str, nn.Parameter]:
    """New tensors for an adapter of one layer, of which a forward adds nothing.

    Drawn on the CPU in float32, so that a seed gives the same bits on every device.

    Args:
        module: The layer.
        config: Its settings.
        generator: What draws.
        covariance: Of the layer's inputs, where `init` is made from them.
    """
    weight = peek(module)
    wide = _wide_dtype(weight)  # a length that is rounded would change a fresh adapter's output
    shapes = part_shapes(module, config)
    with torch.inference_mode(mode=False), torch.no_grad():
        if weight.is_meta:
            values = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
        else:
            values = _values(module, config, shapes, generator, covariance)
        made = {
            part: nn.Parameter(
                value.to(weight.device, wide if part == "lora_magnitude" else config.dtype),
                requires_grad=not part.endswith("0"),
            )
            for part, value in values.items()
        }
        for first, part in (("lora_A0", "lora_A"), ("lora_B0", "lora_B")):
            if first in made:
                made[first].copy_(made[part])
    return made


def _values(
    module: nn.Module | Slot,
    config: AdapterConfig,
    shapes: Mapping[str, Shape],
    generator: torch.Generator | None,
    covariance: Tensor | None,
) -> dict[str, Tensor]:
    mixin, weight = _mixin(module), peek(module)
    size, out = mixin.lora_sizes(module)  # type: ignore[arg-type]
    rank, room, batch = config.rank, config.room, shapes["lora_A"][:-2] * (mixin is LoRAWeight)
    down = size if not config.tucker else shapes["lora_A"][1]
    by_values = config.subtracted
    matrix = mixin.lora_matrix(weight) if by_values else torch.empty(out, down, device="meta")
    matrices = matrix.reshape(-1, *matrix.shape[-2:]) if batch and by_values else [matrix]
    drawn = [
        functional.initial_factors(
            config.init,
            m,
            rank,
            config.scale,
            generator=generator,
            covariance=covariance,
            fan_in=mixin.lora_fan_in(down),
        )
        for m in (matrices if by_values else [matrix] * math.prod(batch))
    ]
    lora_A, lora_B = torch.zeros(*batch, room, down), torch.zeros(*batch, out, room)
    lora_A[..., :rank, :] = torch.stack([A for A, _ in drawn]).view(*batch, rank, down)
    lora_B[..., :rank] = torch.stack([B for _, B in drawn]).view(*batch, out, rank)
    values = {part: torch.zeros(shape) for part, shape in shapes.items()}
    values["lora_A"] = lora_A.view(shapes["lora_A"])
    values["lora_B"] = lora_B.view(shapes["lora_B"])
    if config.tucker:
        core = values["lora_mid"][:rank, :rank]
        bound = 1 / math.sqrt(core[0].numel())
        core.uniform_(-bound, bound, generator=generator)
    if config.dora and not config.dora_in:
        assert isinstance(module, nn.Module)
        values["lora_magnitude"] = length_of(module, mixin.lora_matrix(weight)).clone()
    mixin.lora_tidy(module, values)  # type: ignore[arg-type]
    return values


def call_me(module: nn.Module, args: tuple[object, ...]) -> None:
    """A forward pre-hook that does nothing: torch's fused paths call a layer that has one."""


def attach(
    module: nn.Module | Slot,
    name: str,
    config: AdapterConfig,
    parts: Mapping[str, nn.Parameter],
    strength: Strength | None = 1.0,
) -> None:
    """Puts one adapter on a layer, in place; active beside those that are, but for None."""
    if isinstance(module, Slot):
        layer: LoRAMixin = module.occupy()
    else:
        if not isinstance(module, LoRAMixin):
            module.__class__ = adapted_class(type(module))
        assert isinstance(module, LoRAMixin)
        layer = module
    own = vars(layer)  # torch's own way to set an attribute looks for parameters first
    if "lora_configs" not in own:
        own |= {"lora_configs": {}, "lora_selection": NOTHING}
        own |= {"lora_merged": None, "lora_changes": Change(None)}
    for part in config.parts:
        layer.register_parameter(f"{part}_{name}", parts[part])
    configs = {**layer.lora_configs, name: config}
    chosen = layer.lora_strengths() | ({} if strength is None else {name: strength})
    # at once: another thread sees the layer before or after
    own.update(lora_configs=configs, lora_selection=layer.lora_select(chosen, configs))


def exchange(
    layer: LoRAMixin, name: str, config: AdapterConfig, parts: Mapping[str, nn.Parameter]
) -> None:
    """Puts another adapter in the place of one on a layer, which keeps its strength; in place.

    What of it trains stays, part by part; a part that the old one had not trains if any of it did.
    """
    old, held = layer.lora_parts(name), dict(layer._parameters)
    training = any(p.requires_grad for p in old.values())
    for part in old.keys() - parts.keys():
        del held[f"{part}_{name}"]
    for part, p in parts.items():
        known = old[part].requires_grad if part in old else training
        p.requires_grad_(known and not part.endswith("0"))
        held[f"{part}_{name}"] = p
    configs = {**layer.lora_configs, name: config}
    selection = layer.lora_select(layer.lora_strengths(), configs)
    # at once: another thread sees the layer before or after
    vars(layer).update(_parameters=held, lora_configs=configs, lora_selection=selection)


def reserved(
    module: nn.Module | Slot, config: AdapterConfig, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter with zeros for the ranks that its settings reserve."""
    mixin, wide = _mixin(module), dict(parts)
    for part in parts if config.room > config.rank else ():
        for dim in mixin.lora_ranks_of(part):
            shape = list(wide[part].shape)
            shape[dim] = config.room - config.rank
            wide[part] = torch.cat([wide[part], wide[part].new_zeros(shape)], dim)
    return wide


def detach(module: LoRAMixin, name: str) -> None:
    """Takes one adapter off a layer, in place; with the last one goes every trace."""
    own = vars(module)
    parts = module.lora_configs[name].parts
    configs = {n: c for n, c in module.lora_configs.items() if n != name}
    selection = module.lora_select(module.lora_strengths(), configs)
    own.update(lora_configs=configs, lora_selection=selection)
    for part in parts:
        del module._parameters[f"{part}_{name}"]
    if not own["lora_configs"]:
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is call_me]:
            del module._forward_pre_hooks[key]
        if isinstance(module, LoRAWeight):
            module.leave()
            return
        for attribute in OWN:
            del own[attribute]
        module.__class__ = module.host_class  # type: ignore[assignment]
