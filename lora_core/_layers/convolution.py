"""Adapted convolutions."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._layers.adopting import Adopting, plain_attributes
from lora_core._layers.anatomy import Shape, peek
from lora_core._layers.mixin import ADAPTED, KINDS, LoRAMixin
from lora_core._layers.state import Update


class ConvMixin(LoRAMixin):
    """Adapters on a convolution: down to the rank in its own geometry, then up at every place.

    ``lora_A_<name>`` is (rank, in_channels / groups, *kernel) and ``lora_B_<name>`` (out_channels,
    rank, 1, ...); in the Tucker form ``lora_A`` is 1x1 and ``lora_mid_<name>`` (rank, rank,
    *kernel) stands between them.
    """

    lora_kind: ClassVar[str] = "conv"

    kernel_size: tuple[int, ...]

    @classmethod
    def lora_sizes(cls, host: nn.Module) -> tuple[int, int]:
        """What one output sees, in numbers, and the output channels."""
        out_channels, *seen = peek(host).shape
        return math.prod(seen), out_channels

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: AdapterConfig) -> dict[str, Shape]:
        """The shapes of the parts, as weights of convolutions."""
        out, size, *kernel = peek(host).shape
        rank, ones = config.room, [1] * len(kernel)
        down = (rank, size, *(ones if config.tucker else kernel))
        every = {
            "lora_A": down,
            "lora_B": (out, rank, *ones),
            "lora_mid": (rank, rank, *kernel),
            "lora_magnitude": (out,),
            "lora_in_magnitude": (size,),
            "lora_bias": (out,),
            "lora_A0": down,
            "lora_B0": (out, rank, *ones),
        }
        return {part: every[part] for part in config.parts}

    @classmethod
    def lora_refusal(cls, host: nn.Module, config: AdapterConfig) -> str:
        """The Tucker form needs a channel for each rank."""
        if not config.tucker:
            return ""
        _, size, *_ = peek(host).shape
        if config.init in ("eva", "pissa", "olora"):
            return f"`init={config.init!r}` gives two factors, and `tucker=True` asks for three"
        return (
            f"`tucker=True` needs a rank of at most the {size} channels that an output sees, not"
            f" {config.room}"
            if config.room > size
            else ""
        )

    @classmethod
    def lora_matrix(cls, weight: Tensor) -> Tensor:
        """All that one output sees in a row."""
        return weight.flatten(1)

    @classmethod
    def lora_like_weight(cls, dense: Tensor, weight: Tensor) -> Tensor:
        """The rows as kernels."""
        return dense.view(weight.shape)

    def lora_update(self, x: Tensor, update: Update) -> Tensor:
        """The low-rank update in the convolution's own geometry."""
        host: Any = self
        lora_A, lora_B, gain, dropout = update
        return functional.conv_update(
            x,
            lora_A,
            lora_B,
            gain,
            stride=host.stride,
            padding=host.padding,
            dilation=host.dilation,
            groups=host.groups,
            padding_mode=host.padding_mode,
            dropout=dropout,
        )

    def lora_probe(self, generator: torch.Generator) -> Tensor:
        """A small image, as large as two kernels."""
        host: Any = self
        spans = [(k - 1) * d + 1 for k, d in zip(host.kernel_size, host.dilation, strict=True)]
        x = torch.randn(2, host.in_channels, *[2 * s + 1 for s in spans], generator=generator)
        weight = peek(self)
        return x.to(weight.device, weight.dtype)

    def lora_channels(self, values: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002
        """Values per output channel, as they broadcast to an output, batched or not."""
        return values.view(*values.shape, *[1] * len(self.kernel_size))

    def lora_columns(self, values: Tensor) -> Tensor:
        """Values per input channel."""
        return values.view(-1, *[1] * len(self.kernel_size))

    def lora_through_weight(self, x: Tensor, columns: Tensor) -> Tensor:
        """The convolution of an input whose channels are multiplied by `columns`."""
        host: Any = self
        weight = self.weight.to(columns.dtype)
        through: Tensor = host._conv_forward(
            x.to(columns.dtype) * self.lora_columns(columns), weight, None
        )
        return through

    def lora_samples(self, x: Tensor) -> int | None:
        """The batch, None for an input without one."""
        return x.shape[0] if x.ndim == len(self.kernel_size) + 2 else None


class LoRAConv1d(Adopting, ConvMixin, nn.Conv1d):
    """A frozen 1-d convolution plus a trainable low-rank update; see `LoRAConv2d`.

    Example:
        >>> layer = LoRAConv1d(nn.Conv1d(4, 8, 5), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 4, 5]), torch.Size([8, 2, 1]))
    """

    host_class = nn.Conv1d
    plain_attributes = plain_attributes(nn.Conv1d(1, 1, 1, device="meta"))


class LoRAConv2d(Adopting, ConvMixin, nn.Conv2d):
    """A frozen 2-d convolution plus a trainable low-rank update.

    The update is a convolution to `rank` channels with the geometry of the host (stride, padding
    and its mode, dilation, groups), then one by 1x1 to the output's channels. Every group shares
    ``lora_A``, so that any rank goes with any number of groups. The new module adopts the
    Parameters of the host and freezes them; `inject` does the same in place.

    Args:
        host: The convolution to adapt.
        rank: Inner dimension of the update.
        alpha: Numerator of the scale; None means `rank`, a scale of 1.
        settings: As in `inject`: name, dropout, dora, tucker and so on.

    Shape:
        - Input: ``(batch, in_channels, height, width)``, or without batch
        - Output: ``(batch, out_channels, height, width)``, or without batch

    Raises:
        ConfigError: If a setting is out of range for this layer.
        UnsupportedLayerError: If `host` is no plain `nn.Conv2d`.

    Reference:
        Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
        Evaluation", 2023 (LoCon, and its Tucker form).

    Example:
        >>> layer = LoRAConv2d(nn.Conv2d(4, 8, 3, padding=1), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([8, 2, 1, 1]))
    """

    host_class = nn.Conv2d
    plain_attributes = plain_attributes(nn.Conv2d(1, 1, 1, device="meta"))


class LoRAConv3d(Adopting, ConvMixin, nn.Conv3d):
    """A frozen 3-d convolution plus a trainable low-rank update; see `LoRAConv2d`.

    Example:
        >>> layer = LoRAConv3d(nn.Conv3d(4, 8, 3), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 4, 3, 3, 3]), torch.Size([8, 2, 1, 1, 1]))
    """

    host_class = nn.Conv3d
    plain_attributes = plain_attributes(nn.Conv3d(1, 1, 1, device="meta"))


ADAPTED |= {nn.Conv1d: LoRAConv1d, nn.Conv2d: LoRAConv2d, nn.Conv3d: LoRAConv3d}
KINDS |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvMixin)
