"""Adapted convolutions."""

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig, NamedSettings
from lora_core._layers.attachment import adopt, plain_attributes
from lora_core._layers.kind import KINDS, NAMED, Kind, Shape, Update, own_weight, peek
from lora_core._layers.mixin import ADAPTED, LoRAMixin


class ConvKind(Kind):
    """Adapters on a convolution: down to the rank in its own geometry, then up at every place.

    ``lora_A_<name>`` is (rank, in_channels / groups, *kernel) and ``lora_B_<name>`` (out_channels,
    rank, 1, ...); in the Tucker form ``lora_A`` is 1x1 and ``lora_mid_<name>`` (rank, rank,
    *kernel) stands between them.
    """

    name = "conv"
    also = ("matrix",)
    is_matrix = False

    def sizes(self, host: Any) -> tuple[int, int]:
        """What one output sees, in numbers, and the output channels."""
        out_channels, *seen = peek(host).shape
        return math.prod(seen), out_channels

    def shapes(self, host: Any, config: AdapterConfig) -> dict[str, Shape]:
        """The shapes of the parts, as weights of convolutions."""
        return self.fitting(tuple(peek(host).shape), config)

    def fitting(self, shape: Shape, config: AdapterConfig) -> dict[str, Shape]:
        """The kernel is the down-projection's, or the core's."""
        out, size, *kernel = shape
        rank, ones = config.room, [1] * len(kernel)
        down = (rank, size, *(ones if config.tucker else kernel))
        return self._of(config, down, (out, rank, *ones), size, out, (rank, rank, *kernel))

    def blank(self, shape: Shape) -> nn.Module:
        """A convolution of one group."""
        out, size, *kernel = shape
        host: type[nn.Module] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
        return host(size, out, tuple(kernel), device="meta")

    def refusal(self, host: Any, config: AdapterConfig) -> str:
        """The Tucker form needs a channel for each rank."""
        if not config.tucker:
            return ""
        _, size, *_ = peek(host).shape
        if config.starts_from != "numbers":
            return f"`init={config.init!r}` gives two factors, and `tucker=True` asks for three"
        return (
            f"`tucker=True` needs a rank of at most the {size} channels that an output sees, not"
            f" {config.room}"
            if config.room > size
            else ""
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """All that one output sees in a row."""
        return weight.flatten(1)

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:
        """The rows as kernels."""
        return dense.view(weight.shape)

    def kernel(self, parts: Mapping[str, Tensor]) -> Shape:
        """That of the update; of a kernel of one number the factors are a matrix's, too."""
        sizes = tuple(parts.get("lora_mid", parts["lora_A"]).shape[2:])
        return sizes if any(size > 1 for size in sizes) else ()

    def update(self, layer: Any, x: Tensor, update: Update, *more: Any) -> Tensor:  # noqa: ARG002
        """The low-rank update in the convolution's own geometry."""
        lora_A, lora_B, gain, dropout = update
        return functional.conv_update(
            x,
            lora_A,
            lora_B,
            gain,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            dropout=dropout,
        )

    def columns(self, layer: Any, values: Tensor) -> Tensor:
        """Values per input channel."""
        return values.view(-1, *[1] * len(layer.kernel_size))

    def channels(self, layer: Any, values: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002
        """Values per output channel, as they broadcast to an output, batched or not."""
        return values.view(*values.shape, *[1] * len(layer.kernel_size))

    def through_weight(self, layer: Any, x: Tensor, columns: Tensor) -> Tensor:
        """The convolution of an input whose channels are multiplied by `columns`."""
        weight = own_weight(layer).to(columns.dtype)
        scaled = x.to(columns.dtype) * self.columns(layer, columns)
        through: Tensor = layer._conv_forward(scaled, weight, None)
        return through

    def samples(self, layer: Any, x: Tensor) -> int | None:
        """The batch, None for an input without one."""
        return x.shape[0] if x.ndim == len(layer.kernel_size) + 2 else None

    def rows(self, layer: Any, x: Tensor) -> Tensor:
        """A row for each place, and for each group."""
        x = x if x.ndim == peek(layer).ndim else x[None]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        x = x.unflatten(1, (layer.groups, -1))  # type: ignore[no-untyped-call]  # (b, g, c, *places)
        for axis, (kernel, stride, step) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            x = x.unfold(3 + axis, (kernel - 1) * step + 1, stride)[..., ::step]
        places = peek(layer).ndim - 2
        x = x.movedim(2, 2 + places)  # (b, g, *places, c, *kernel)
        return x.flatten(2 + places).flatten(0, -2)

    def inputs(self, layer: Any, x: Tensor) -> tuple[str, bool]:
        """Channels first, batched or not."""
        channels, places = int(layer.in_channels), peek(layer).ndim - 2
        shape = f"(batch, {channels}, {', '.join(['size'] * places)}), or the same without batch"
        return shape, x.ndim - places in (1, 2) and x.shape[-places - 1] == channels

    def probe(self, layer: Any, generator: torch.Generator) -> Tensor:
        """A small image, as large as two kernels."""
        spans = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        x = torch.randn(2, layer.in_channels, *[2 * s + 1 for s in spans], generator=generator)
        weight = peek(layer)
        return x.to(weight.device, weight.dtype)


CONV = KINDS[nn.Conv1d] = KINDS[nn.Conv2d] = KINDS[nn.Conv3d] = NAMED["conv"] = ConvKind()


class LoRAConv1d(LoRAMixin, nn.Conv1d):
    """A frozen 1-d convolution plus a trainable low-rank update; see `LoRAConv2d`.

    Example:
        >>> layer = LoRAConv1d(nn.Conv1d(4, 8, 5), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 4, 5]), torch.Size([8, 2, 1]))
    """

    lora_host_class, lora_kind = nn.Conv1d, CONV
    lora_plain_attributes = plain_attributes(nn.Conv1d(1, 1, 1, device="meta"))

    def __init__(
        self,
        host: nn.Conv1d,
        rank: int = 4,
        alpha: float | None = None,
        **settings: Unpack[NamedSettings],
    ) -> None:
        adopt(self, host, rank, alpha, settings)


class LoRAConv2d(LoRAMixin, nn.Conv2d):
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

    lora_host_class, lora_kind = nn.Conv2d, CONV
    lora_plain_attributes = plain_attributes(nn.Conv2d(1, 1, 1, device="meta"))

    def __init__(
        self,
        host: nn.Conv2d,
        rank: int = 4,
        alpha: float | None = None,
        **settings: Unpack[NamedSettings],
    ) -> None:
        adopt(self, host, rank, alpha, settings)


class LoRAConv3d(LoRAMixin, nn.Conv3d):
    """A frozen 3-d convolution plus a trainable low-rank update; see `LoRAConv2d`.

    Example:
        >>> layer = LoRAConv3d(nn.Conv3d(4, 8, 3), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 4, 3, 3, 3]), torch.Size([8, 2, 1, 1, 1]))
    """

    lora_host_class, lora_kind = nn.Conv3d, CONV
    lora_plain_attributes = plain_attributes(nn.Conv3d(1, 1, 1, device="meta"))

    def __init__(
        self,
        host: nn.Conv3d,
        rank: int = 4,
        alpha: float | None = None,
        **settings: Unpack[NamedSettings],
    ) -> None:
        adopt(self, host, rank, alpha, settings)


ADAPTED |= {nn.Conv1d: LoRAConv1d, nn.Conv2d: LoRAConv2d, nn.Conv3d: LoRAConv3d}
