"""The tensors of the adapters on a layer: which there are, their first values, what is stored."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import PARTS, AdapterConfig
from lora_core._errors import AdapterError, UnsupportedLayerError
from lora_core._layers.kind import Kind, Shape, own_weight, peek
from lora_core._layers.lengths import length_of


def factors_of(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """``(lora_A, lora_B)`` of one adapter."""
    own, down, up = layer._parameters, f"lora_A_{name}", f"lora_B_{name}"
    if down in own and up in own:  # at a tenth of what `getattr` takes
        return own[down], own[up]
    return getattr(layer, down), getattr(layer, up)


def parts_of(layer: Any, name: str) -> dict[str, nn.Parameter]:
    """All tensors of one adapter, by what they are."""
    own = layer._parameters
    keys = {part: f"{part}_{name}" for part in layer.lora_state.configs[name].parts}
    # at a tenth of what `getattr` takes
    return {part: own[k] if k in own else getattr(layer, k) for part, k in keys.items()}


def trained_parts(layer: Any, name: str) -> dict[str, nn.Parameter]:
    """Those that an optimiser is given."""
    return {part: p for part, p in parts_of(layer, name).items() if not part.endswith("0")}


def stored_parts(layer: Any, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter as a file holds them, without ranks that are only reserved."""
    config, whole = layer.lora_state.configs[name], parts_of(layer, name)
    if config.room == config.rank:
        return dict(whole)
    cut: dict[str, Tensor] = {}
    for part, p in whole.items():
        values = p.detach()
        for dim in layer.lora_kind.ranks_of(part):
            values = values.narrow(dim, 0, config.rank)
        cut[part] = values
    return cut


def reserved_parts(
    kind: Kind, config: AdapterConfig, held: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter with zeros for the ranks that its settings reserve."""
    wide = dict(held)
    for part in held if config.room > config.rank else ():
        for dim in kind.ranks_of(part):
            shape = list(wide[part].shape)
            shape[dim] = config.room - config.rank
            wide[part] = torch.cat([wide[part], wide[part].new_zeros(shape)], dim)
    return wide


def misfits(layer: Any) -> str:
    """Where a layer and its adapters have other sizes, as after it was resized; "" if nowhere."""
    for name, config in layer.lora_state.configs.items():
        parts = parts_of(layer, name)
        for part, shape in layer.lora_kind.shapes(layer, config).items():
            if tuple(parts[part].shape) != tuple(shape):
                has = tuple(parts[part].shape)
                return f"{part} of {name!r} has {has}, and the weight {tuple(peek(layer).shape)}"
    return ""


def refuse_resized(layer: Any) -> None:
    """Raises where a layer was resized under its adapters: called where a forward stumbles.

    Raises:
        AdapterError: If it was.
    """
    wrong = misfits(layer)
    if wrong:
        raise AdapterError(
            f"A layer must keep its size while it carries an adapter, but in this"
            f" {layer.lora_host_class.__name__} {wrong}. Resize before `inject`; or eject, resize"
            " and inject again."
        )


def factor_names(adapters: Iterable[str]) -> set[str]:
    """The names that the parameters of these adapters may have on a layer."""
    return {f"{part}_{name}" for name in adapters for part in PARTS}


def non_finite(layers: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """The layers one of whose factors holds NaN or infinity; few operations where none does."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for f in (f for held in layers.values() for f in held):
        groups.setdefault((f.device, f.dtype), []).append(f.detach().reshape(-1))
    # a sum is finite only of finite numbers; where it isn't, it may have overflowed
    if all(bool(torch.cat(group).sum().isfinite()) for group in groups.values()):
        return []
    return [n for n, held in layers.items() if not all(bool(f.isfinite().all()) for f in held)]


def idle(layers: Mapping[str, Any], name: str) -> list[str]:
    """The layers on which an adapter is as it began, and adds nothing; few operations.

    On the meta device none is: there is nothing to tell it by.
    """
    ups = {n: factors_of(layer, name)[1] for n, layer in layers.items()}
    moved = [n for n, layer in layers.items() if layer.lora_state.configs[name].subtracted]
    found = {n for n in (*zeros(ups), *moved) if _is_fresh(layers[n], name)}
    return [n for n in layers if n in found and not ups[n].is_meta]


def zeros(values: Mapping[str, Tensor]) -> list[str]:
    """Those of nothing but zeros, which none on the meta device is; few operations."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for n, t in values.items():
        if not t.is_meta and t.numel():
            groups.setdefault((t.device, t.dtype), {})[n] = t.detach()
    found: list[str] = []
    for held in groups.values():
        # the largest number, as the sum of squares of small ones may be zero
        largest = torch.stack(torch._foreach_norm(list(held.values()), math.inf)).tolist()
        found += [n for n, most in zip(held, largest, strict=True) if most == 0]
    return found


def _is_fresh(layer: Any, name: str) -> bool:
    """Whether all that an adapter adds to where it began is nothing."""
    parts = {part: p.detach() for part, p in parts_of(layer, name).items()}
    config: AdapterConfig = layer.lora_state.configs[name]
    if config.subtracted and not all(
        torch.equal(parts[part], parts[f"{part}0"]) for part in ("lora_A", "lora_B")
    ):
        return False
    if "lora_bias" in parts and bool(parts["lora_bias"].any()):
        return False
    if "lora_in_magnitude" in parts:  # of another program's file, which was trained
        return False
    if "lora_magnitude" not in parts:
        return True
    with torch.no_grad():
        length = length_of(layer, layer.lora_kind.matrix(own_weight(layer)))
    return torch.equal(parts["lora_magnitude"], length.to(parts["lora_magnitude"].dtype))


def wide_dtype(weight: Tensor) -> torch.dtype:
    """The type of an adapter over a weight: its own, but float32 at least."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


@contextmanager
def drawing() -> Iterator[None]:
    """What fresh tensors are made under: no graph, and not the inference mode of a caller."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def fresh_parts(
    module: Any,
    kind: Kind,
    config: AdapterConfig,
    generator: torch.Generator | None = None,
    covariance: Tensor | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> dict[str, nn.Parameter]:
    """New tensors for an adapter of one layer, of which a forward adds nothing.

    Drawn on the CPU in float32, so that a seed gives the same bits on every device. To be called
    under `drawing`.

    Args:
        module: The layer, or the place of a parameter.
        kind: Its kind.
        config: The adapter's settings.
        generator: What draws.
        covariance: Of the layer's inputs, where `init` is made from them.
        shapes: The shapes of its tensors, where they are known.
    """
    weight = peek(module)
    shapes = kind.shapes(module, config) if shapes is None else shapes
    if weight.is_meta:
        values = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
    else:
        values = _values(module, weight, kind, config, shapes, generator, covariance)
    made = {}
    for part, value in values.items():
        # a length that is rounded would change a fresh adapter's output
        dtype = wide_dtype(weight) if part == "lora_magnitude" else config.dtype
        moved = value.to(weight.device, dtype)
        made[part] = nn.Parameter(moved, requires_grad=not part.endswith("0"))
    if config.subtracted:
        for first, part in (("lora_A0", "lora_A"), ("lora_B0", "lora_B")):
            made[first].copy_(made[part])
    return made


def _values(
    module: Any,
    weight: Tensor,
    kind: Kind,
    config: AdapterConfig,
    shapes: Mapping[str, Shape],
    generator: torch.Generator | None,
    covariance: Tensor | None,
) -> dict[str, Tensor]:
    size, out = kind.sizes(module)
    rank, room = config.rank, config.room
    batch = shapes["lora_A"][:-2] if kind.is_batched else ()
    down = size if not config.tucker else shapes["lora_A"][1]
    # but for what is made from the weight's values, its shape is enough
    matrices: Sequence[Tensor | Sequence[int]] = [(out, down)] * math.prod(batch)
    if config.subtracted:
        matrix = kind.matrix(weight)
        matrices = list(matrix.reshape(-1, *matrix.shape[-2:])) if batch else [matrix]
    draw = partial(
        functional.initial_factors,
        config.init,
        rank=rank,
        scale=config.scale,
        generator=generator,
        covariance=covariance,
        fan_in=kind.fan_in(down),
    )
    if batch:
        lora_A, lora_B = map(torch.stack, zip(*map(draw, matrices), strict=True))
    else:
        lora_A, lora_B = draw(matrices[0])
    if room > rank:
        lora_A = nn.functional.pad(lora_A, (0, 0, 0, room - rank))
        lora_B = nn.functional.pad(lora_B, (0, room - rank))
    values = {"lora_A": lora_A, "lora_B": lora_B}
    for part, drawn in values.items():
        if drawn.shape != shapes[part]:  # most are matrices on a layer, too
            values[part] = kind.laid_out(part, drawn, shapes[part])
    for part, shape in shapes.items():
        if part not in values:
            values[part] = torch.zeros(shape)
    if config.tucker:
        core = values["lora_mid"][:rank, :rank]
        drawn, _ = functional.initial_factors(
            "kaiming", (0, core[0].numel()), rank, generator=generator
        )
        core.copy_(drawn.view(core.shape))
    if config.dora and not config.dora_in:
        values["lora_magnitude"] = length_of(module, kind.matrix(weight)).clone()
    kind.tidy(module, values)
    return values


def reset_parts(layer: Any, name: str) -> None:
    """Makes an adapter that lost its values a fresh one again, in place.

    Raises:
        UnsupportedLayerError: If it was made from values of its host, which may be gone too.
    """
    config: AdapterConfig = layer.lora_state.configs[name]
    if config.dora or config.starts_from != "numbers":
        what = "DoRA" if config.dora else f"init={config.init!r}"
        raise UnsupportedLayerError(
            f"An adapter must keep what it was made from, but {name!r} ({what}) lost it on the"
            " meta device. Eject it, load the base, and inject or load it then."
        )
    kind: Kind = layer.lora_kind
    parts = parts_of(layer, name)
    shapes = {part: tuple(p.shape) for part, p in parts.items()}
    with drawing():
        values = _values(layer, peek(layer), kind, config, shapes, None, None)
        for part, p in parts.items():
            p.copy_(values[part])
