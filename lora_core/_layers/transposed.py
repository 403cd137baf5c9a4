"""Adapted transposed convolutions."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._layers.kind import KINDS, NAMED, Kind, Shape, Update, peek


class TransposedConvKind(Kind):
    """Adapters on a transposed convolution: 1x1 down to the rank, then up in its own geometry.

    The mirror of a convolution: ``lora_A_<name>`` is (rank, in_channels, 1, ...), and
    ``lora_B_<name>`` (rank, out_channels / groups, *kernel), which the groups share.
    """

    name = "conv_transpose"
    also = ()
    words = "a transposed convolution"
    formats = ("lora_core",)
    rank_dims = (0, 0)
    own_layout = True
    out_dim = 1
    is_matrix = False

    def sizes(self, host: Any) -> tuple[int, int]:
        """The input channels, and what one of them reaches, in numbers."""
        in_channels, *reached = peek(host).shape
        return in_channels, math.prod(reached)

    def shapes(self, host: Any, config: AdapterConfig) -> dict[str, Shape]:
        """The shapes of the parts, as weights of a convolution and of a transposed one."""
        found = self.fitting(tuple(peek(host).shape), config)
        return found | {part: (host.out_channels,) for part in found if part == "lora_bias"}

    def fitting(self, shape: Shape, config: AdapterConfig) -> dict[str, Shape]:
        """The same for a weight of one group."""
        size, *reached = shape
        down = (config.room, size, *[1] * (len(reached) - 1))
        return self._of(config, down, (config.room, *reached), size, reached[0])

    def blank(self, shape: Shape) -> nn.Module:
        """A transposed convolution of one group."""
        hosts = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
        size, out, *kernel = shape
        return hosts[len(shape)](size, out, tuple(kernel), device="meta")  # type: ignore[arg-type]

    def refusal(self, host: Any, config: AdapterConfig) -> str:  # noqa: ARG002
        """No lengths of rows, which are no channels here, and no form of convolutions alone."""
        asked = {
            "`dora` gives lengths to outputs, which no row of this layer's matrix is": config.dora,
            "`tucker` is for convolutions that are not transposed": config.tucker,
            "`init='eva'` is for layers that see an input as a row": (
                config.starts_from == "inputs"
            ),
        }
        return next((why for why, wrong in asked.items() if wrong), "")

    def matrix(self, weight: Tensor) -> Tensor:
        """All that an input channel reaches in a column."""
        return weight.flatten(1).T

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:
        """The columns as kernels."""
        return dense.T.reshape(weight.shape)

    def as_matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """The rank is the first dimension of both."""
        return lora_A.flatten(1), lora_B.flatten(1).T

    def laid_out(self, part: str, matrix: Tensor, shape: Shape) -> Tensor:
        """The rank stands first in both factors."""
        return (matrix.T if part == "lora_B" else matrix).reshape(shape)

    def kernel(self, parts: Mapping[str, Tensor]) -> Shape:
        """What an input channel reaches: channels, and the kernel."""
        return tuple(parts["lora_B"].shape[1:])

    def subtracted(self, lora_A: Tensor, lora_B: Tensor, *first: Tensor) -> tuple[Tensor, Tensor]:
        """`functional.subtracted` with the rank first in the up-projection, too."""
        down, up = functional.subtracted(
            lora_A, lora_B.transpose(0, 1), first[0], first[1].transpose(0, 1)
        )
        return down, up.transpose(0, 1)

    def update(self, layer: Any, x: Tensor, update: Update, *more: Any) -> Tensor:
        """The low-rank update in the layer's own geometry; `more` is the size of its output."""
        lora_A, lora_B, gain, dropout = update
        size = more[0] if more else None
        spare = layer._output_padding(
            x,
            size,
            layer.stride,
            layer.padding,
            layer.kernel_size,
            len(layer.kernel_size),
            layer.dilation,
        )
        return functional.conv_transpose_update(
            x,
            lora_A,
            lora_B,
            gain,
            stride=layer.stride,
            padding=layer.padding,
            output_padding=spare,
            dilation=layer.dilation,
            groups=layer.groups,
            dropout=dropout,
        )

    def channels(self, layer: Any, values: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002
        """Values per output channel, as they broadcast to an output, batched or not."""
        return values.view(*values.shape, *[1] * len(layer.kernel_size))

    def samples(self, layer: Any, x: Tensor) -> int | None:
        """The batch, None for an input without one."""
        return x.shape[0] if x.ndim == len(layer.kernel_size) + 2 else None

    def inputs(self, layer: Any, x: Tensor) -> tuple[str, bool]:
        """Channels first, batched or not."""
        channels, places = int(layer.in_channels), len(layer.kernel_size)
        shape = f"(batch, {channels}, {', '.join(['size'] * places)}), or the same without batch"
        return shape, x.ndim - places in (1, 2) and x.shape[-places - 1] == channels

    def probe(self, layer: Any, generator: torch.Generator) -> Tensor:
        """A small image."""
        weight, places = peek(layer), [3] * len(layer.kernel_size)
        x = torch.randn(2, layer.in_channels, *places, generator=generator)
        return x.to(weight.device, weight.dtype)


NAMED["conv_transpose"] = TransposedConvKind()
KINDS |= dict.fromkeys(
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), NAMED["conv_transpose"]
)
