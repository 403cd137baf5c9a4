"""A small conditional U-Net that predicts noise, laid out and named like Stable Diffusion's."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lora_core.models._checks import check_sizes
from lora_core.models.attention import CrossAttention


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then a two-layer perceptron.

    Shape:
        - t: ``(batch,)``
        - Output: ``(batch, time_dim)``

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B.
    """

    def __init__(self, frequencies: int, time_dim: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = nn.Linear(2 * frequencies, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps."""
        steps = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        rates = torch.exp(-math.log(10_000.0) * steps / self.frequencies)
        angles = t.float()[:, None] * rates  # (b, frequencies)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.linear_1.weight.dtype)
        embedded: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return embedded


class ResnetBlock(nn.Module):
    """Two normalised convolutions around the timestep, plus a shortcut.

    Shape:
        - x: ``(batch, in_channels, height, width)``
        - time: ``(batch, time_dim)``
        - Output: ``(batch, out_channels, height, width)``
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Transform `x`, told the time."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        out: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each normalised and residual.

    Shape:
        - x: ``(batch, n, dim)``
        - context: ``(batch, m, context_dim)``
        - Output: ``(batch, n, dim)``
    """

    def __init__(self, dim: int, context_dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, heads=heads, dim_head=dim_head)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads=heads, dim_head=dim_head)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Mix `x` with itself and with `context`."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, plus a shortcut.

    Shape:
        - x: ``(batch, channels, height, width)``
        - context: ``(batch, m, context_dim)``
        - Output: ``(batch, channels, height, width)``

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        section 3.3 and appendix E.2.1.
    """

    def __init__(
        self, channels: int, context_dim: int, heads: int, dim_head: int, groups: int
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, heads, dim_head)]
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Let every position attend to every other and to `context`."""
        height = x.shape[-2]
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        out: Tensor = self.proj_out(tokens)
        return x + rearrange(out, "b (h w) c -> b c h w", h=height)


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer where there are any.

    Shape:
        - x: ``(batch, in_channels, height, width)``
        - Output: ``(batch, out_channels, height, width)``
    """

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Run the blocks in order."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if index < len(self.attentions):
                x = self.attentions[index](x, context)
        return x


class UNet(nn.Module):
    """Predicts the noise in `z`, given the timestep and a context to attend to.

    ``down_blocks`` halve the resolution between them, ``up_blocks`` double it again and see the
    matching down block's output beside their own. The defaults build the shipped digit model for
    1 x 28 x 28 images, with attention at 14 x 14 and 7 x 7. Any height and width work: going up
    resizes to the skip connection's size.

    Args:
        in_channels: Channels of `z` and of the prediction.
        context_dim: Width of the context's tokens.
        channels: Width of each resolution, from the finest to the coarsest.
        attention: Whether each resolution has transformers; the middle always has one.
        heads: Attention heads.
        dim_head: Width of one attention head.
        time_dim: Width of the timestep's embedding.
        groups: Groups of the group norms; must divide every width in `channels`.

    Shape:
        - z: ``(batch, in_channels, height, width)``
        - t: ``(batch,)``, or one timestep for all: a number or a tensor without dimensions
        - context: ``(batch, m, context_dim)``
        - Output: ``(batch, in_channels, height, width)``

    Raises:
        ValueError: If a setting or an input's shape does not fit.
        TypeError: If the image or the context is no tensor.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B; Rombach et al.,
        "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, section 3.3.

    Example:
        >>> import torch
        >>> unet = UNet()
        >>> z, context = torch.randn(2, 1, 28, 28), torch.randn(2, 4, unet.context_dim)
        >>> unet(z, torch.tensor([0, 999]), context).shape
        torch.Size([2, 1, 28, 28])
        >>> unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
        Linear(in_features=64, out_features=64, bias=False)
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        context_dim: int = 64,
        channels: Sequence[int] = (16, 48, 64),
        attention: Sequence[bool] = (False, True, True),
        heads: int = 2,
        dim_head: int = 32,
        time_dim: int = 128,
        groups: int = 8,
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=in_channels,
            context_dim=context_dim,
            heads=heads,
            dim_head=dim_head,
            time_dim=time_dim,
            groups=groups,
        )
        _check_settings(channels, attention, groups)
        self.in_channels = in_channels
        self.context_dim = context_dim

        def stage(entering: int, width: int, attends: bool, resnets: int = 1) -> Stage:
            widths = [entering, *[width] * resnets]
            return Stage(
                [ResnetBlock(a, width, time_dim, groups) for a in widths[:-1]],
                [SpatialTransformer(width, context_dim, heads, dim_head, groups)] * attends,
            )

        first, last = channels[0], channels[-1]
        self.time_embedding = TimeEmbedding(first, time_dim)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            stage(entering, width, attends)
            for entering, width, attends in zip(
                [first, *channels[:-1]], channels, attention, strict=True
            )
        )
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for width in channels[:-1]
        )
        self.mid_block = stage(last, last, attends=True)
        self.up_blocks = nn.ModuleList(
            stage(2 * width, width, attends)
            for width, attends in zip(channels[::-1], attention[::-1], strict=True)
        )
        # narrowed before the resize: the finest resolution is where channels cost the most
        self.upsamplers = nn.ModuleList(
            nn.Conv2d(below, width, 1)
            for below, width in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.conv_norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, in_channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """Predict the noise in `z` at timestep `t`."""
        t = self._check_inputs(z, t, context)
        time = self.time_embedding(t)
        h = self.conv_in(z)
        skips: list[Tensor] = []
        for index, block in enumerate(self.down_blocks):
            if index > 0:
                h = self.downsamplers[index - 1](h)
            h = block(h, time, context)
            skips.append(h)
        h = self.mid_block(h, time, context)
        for index, block in enumerate(self.up_blocks):
            skip = skips.pop()
            if index > 0:
                h = self.upsamplers[index - 1](h)
            if h.shape[-2:] != skip.shape[-2:]:
                h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = block(torch.cat([h, skip], dim=1), time, context)
        noise: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return noise

    def _check_inputs(self, z: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """The timesteps as ``(batch,)``, once every shape has been found to fit."""
        for name, given in (("z", z), ("context", context)):
            if not isinstance(given, Tensor):
                raise TypeError(f"`{name}` must be a tensor, but is {given!r}.")
        if z.ndim != 4 or z.shape[1] != self.in_channels or 0 in z.shape[2:]:
            raise ValueError(
                f"`z` must have shape (batch, {self.in_channels}, height, width) with both at "
                f"least 1, but has {tuple(z.shape)}."
            )
        batch = z.shape[0]
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != self.context_dim:
            raise ValueError(
                f"`context` must have shape ({batch}, tokens, {self.context_dim}), "
                f"but has {tuple(context.shape)}."
            )
        t = torch.as_tensor(t, device=z.device)
        if t.ndim == 0:
            return t.expand(batch)
        if t.shape != (batch,):
            raise ValueError(
                f"`t` must be one timestep or have shape ({batch},), but has {tuple(t.shape)}."
            )
        return t


def _check_settings(channels: Sequence[int], attention: Sequence[bool], groups: int) -> None:
    if not channels or any(width < 1 or width % groups for width in channels):
        raise ValueError(
            f"`channels` must be multiples of `groups` = {groups}, but is {tuple(channels)}."
        )
    if len(attention) != len(channels):
        raise ValueError(
            f"`attention` must have one entry per width in `channels` = {len(channels)}, "
            f"but has {len(attention)}."
        )
