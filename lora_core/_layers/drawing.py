"""The tensors of a fresh adapter."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._layers.anatomy import Shape, peek
from lora_core._layers.fitting import mixin_of, part_shapes, wide_dtype
from lora_core._layers.norms import length_of
from lora_core._layers.weights import LoRAWeight, Slot

_OWN = ("kaiming", "gaussian")  # what is drawn is a tensor of its own


@contextmanager
def drawing() -> Iterator[None]:
    """What fresh tensors are made under: no graph, and not the inference mode of a caller."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def fresh_parts(
    module: nn.Module | Slot,
    config: AdapterConfig,
    generator: torch.Generator | None = None,
    covariance: Tensor | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> dict[str, nn.Parameter]:
    """New tensors for an adapter of one layer, of which a forward adds nothing.

    Drawn on the CPU in float32, so that a seed gives the same bits on every device. To be called
    under `drawing`.

    Args:
        module: The layer.
        config: Its settings.
        generator: What draws.
        covariance: Of the layer's inputs, where `init` is made from them.
        shapes: The shapes of its tensors, where they are known.
    """
    weight = peek(module)
    wide = wide_dtype(weight)  # a length that is rounded would change a fresh adapter's output
    shapes = part_shapes(module, config) if shapes is None else shapes
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
    mixin, weight = mixin_of(module), peek(module)
    size, out = mixin.lora_sizes(module)  # type: ignore[arg-type]
    rank, room, batch = config.rank, config.room, shapes["lora_A"][:-2] * (mixin is LoRAWeight)
    down = size if not config.tucker else shapes["lora_A"][1]
    by_values = config.subtracted
    # but for what is made from the weight's values, its shape is enough
    matrices: Sequence[Tensor | Sequence[int]] = [(out, down)] * math.prod(batch)
    if by_values:
        matrix = mixin.lora_matrix(weight)
        matrices = list(matrix.reshape(-1, *matrix.shape[-2:])) if batch else [matrix]
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
        for m in matrices
    ]
    lora_A, lora_B = drawn[0]
    if batch or config.init not in _OWN:
        # a copy each: what was drawn may be a part of something larger
        lora_A, lora_B = torch.stack([A for A, _ in drawn]), torch.stack([B for _, B in drawn])
    if room > rank:
        lora_A = nn.functional.pad(lora_A, (0, 0, 0, room - rank))
        lora_B = nn.functional.pad(lora_B, (0, room - rank))
    values = {"lora_A": lora_A.view(shapes["lora_A"]), "lora_B": lora_B.view(shapes["lora_B"])}
    values |= {part: torch.zeros(shape) for part, shape in shapes.items() if part not in values}
    if config.tucker:
        core = values["lora_mid"][:rank, :rank]
        bound = 1 / math.sqrt(core[0].numel())
        core.uniform_(-bound, bound, generator=generator)
    if config.dora and not config.dora_in:
        assert isinstance(module, nn.Module)
        values["lora_magnitude"] = length_of(module, mixin.lora_matrix(weight)).clone()
    mixin.lora_tidy(module, values)  # type: ignore[arg-type]
    return values
