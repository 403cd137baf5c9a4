"""The low-rank update of a convolution, in one, two or three dimensions.

Letters in the shape notes: in, out = channels, R = rank, spatial = the one to three axes that the
kernel slides along, g = groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import dropped

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_update(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """The low-rank update of a convolution: down to the rank, then up at every place.

    Equals `x` convolved with the weight ``(lora_B.flatten(1) * gain) @ lora_A.flatten(1)``, seen
    as ``(out, in / groups, *kernel)``, in the same geometry. Every group shares `lora_A` and has
    rows of `lora_B` to itself, so that any rank goes with any number of groups.

    Args:
        x: Input.
        lora_A: Down-projection, a kernel; cast to the dtype of `x`, never the other way round.
        lora_B: Up-projection, one number per pair of channels; likewise.
        gain: What each rank's channel is multiplied by.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`, "same" and "valid" included.
        dilation: As in `nn.Conv2d`.
        groups: As in `nn.Conv2d`.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        dropout: Probability of dropping an element of `x`; 0 is none.
        seed: Decides what is dropped; None draws from PyTorch's own dropout.

    Shape:
        - x: ``(batch, in, *spatial)`` or ``(in, *spatial)``
        - lora_A: ``(R, in / groups, *kernel)``; lora_B: ``(out, R, 1, ...)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` for a different mix per sample
        - Output: ``(batch, out, *spatial)`` or ``(out, *spatial)``

    Raises:
        ValueError: If `padding` is "same" and a stride is not 1, or is another word.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1, with
        the kernel kept in the down-projection as in Yeh et al., "Navigating Text-To-Image
        Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023, section 3.1.

    Example:
        >>> x, A, B = torch.ones(2, 4, 8, 8), torch.ones(3, 4, 3, 3), torch.zeros(6, 3, 1, 1)
        >>> conv_update(x, A, B, stride=2, padding=1).shape
        torch.Size([2, 6, 4, 4])
    """
    if dropout > 0:
        x = F.dropout(x, dropout) if seed is None else dropped(x, dropout, seed)
    kernel = lora_A.shape[2:]
    conv = _CONVOLUTIONS[len(kernel)]
    x, width = _padded(x, kernel, stride, padding, dilation, padding_mode)
    down = lora_A.to(x.dtype)
    if groups > 1:
        down = down.repeat(groups, *[1] * (down.ndim - 1))  # (g*R, in/g, *kernel)
    h = conv(x, down, None, stride, width, dilation, groups)  # (b, g*R, *spatial)
    if isinstance(gain, Tensor) and gain.ndim > 0:
        gain = gain.repeat(*[1] * (gain.ndim - 1), groups)
        gain = gain.reshape(*gain.shape, *[1] * len(kernel))
    h = (h * gain).to(h.dtype)  # a gain of several entries would promote h
    return conv(h, lora_B.to(h.dtype), groups=groups)


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """A convolution plus a low-rank update.

    Computes ``conv(x, weight) + bias + conv_update(x, lora_A, lora_B, gain)``.

    Args:
        x: Input, of the weight's dtype.
        weight: The frozen kernel.
        bias: The frozen bias, or None.
        lora_A: Down-projection.
        lora_B: Up-projection.
        gain: What each rank's channel is multiplied by.
        stride: As in `nn.Conv2d`; so are the rest of the geometry's.
        padding: See `conv_update`.
        dilation: See `conv_update`.
        groups: See `conv_update`.
        padding_mode: See `conv_update`.
        dropout: Probability of dropping an element of `x` in the update alone; 0 is none.
        seed: Decides what is dropped; None draws from PyTorch's own dropout.

    Shape:
        - weight: ``(out, in / groups, *kernel)``; bias: ``(out,)``
        - The rest as in `conv_update`

    Raises:
        ValueError: As `conv_update` does.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> x, W = torch.ones(2, 4, 8), torch.ones(6, 4, 3)
        >>> lora_conv(x, W, None, torch.ones(3, 4, 3), torch.zeros(6, 3, 1), padding="same").shape
        torch.Size([2, 6, 8])
    """
    kernel = weight.shape[2:]
    padded, width = _padded(x, kernel, stride, padding, dilation, padding_mode)
    base = _CONVOLUTIONS[len(kernel)](padded, weight, bias, stride, width, dilation, groups)
    update = conv_update(
        x,
        lora_A,
        lora_B,
        gain,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        dropout=dropout,
        seed=seed,
    )
    return base + update.to(base.dtype)


def conv_transpose_update(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """The low-rank update of a transposed convolution: down to the rank at every place, then up.

    Equals `x` under the transposed convolution with the weight ``lora_A.flatten(1).T @ (gain *
    lora_B.flatten(1))``, seen as ``(in, out / groups, *kernel)``. Every group shares `lora_B` and
    has columns of `lora_A` to itself.

    Args:
        x: Input.
        lora_A: Down-projection, one number per pair of channels; cast to the dtype of `x`.
        lora_B: Up-projection, a kernel; likewise.
        gain: What each rank's channel is multiplied by.
        stride: As in `nn.ConvTranspose2d`; so are the rest of the geometry's.
        padding: See there.
        output_padding: See there.
        dilation: See there.
        groups: See there.
        dropout: Probability of dropping an element of `x`; 0 is none.

    Shape:
        - x: ``(batch, in, *spatial)`` or ``(in, *spatial)``
        - lora_A: ``(R, in, 1, ...)``; lora_B: ``(R, out / groups, *kernel)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` for a different mix per sample
        - Output: ``(batch, out, *spatial)`` or ``(out, *spatial)``

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> x, A, B = torch.ones(2, 4, 8, 8), torch.ones(3, 4, 1, 1), torch.zeros(3, 6, 2, 2)
        >>> conv_transpose_update(x, A, B, stride=2).shape
        torch.Size([2, 6, 16, 16])
    """
    if dropout > 0:
        x = F.dropout(x, dropout)
    places, rank = lora_B.ndim - 2, lora_A.shape[0]
    down = lora_A.to(x.dtype)
    if groups > 1:
        down = down.view(rank, groups, -1, *lora_A.shape[2:]).transpose(0, 1).flatten(0, 1)
    h = _CONVOLUTIONS[places](x, down, groups=groups)  # (b, g*R, *spatial)
    if isinstance(gain, Tensor) and gain.ndim > 0:
        gain = gain.repeat(*[1] * (gain.ndim - 1), groups)
        gain = gain.reshape(*gain.shape, *[1] * places)
    h = (h * gain).to(h.dtype)  # a gain of several entries would promote h
    up = lora_B.to(h.dtype).expand(groups, *lora_B.shape).reshape(groups * rank, *lora_B.shape[1:])
    conv = _TRANSPOSED[places]
    return conv(h, up, None, stride, padding, output_padding, groups, dilation)


def tucker_down(lora_A: Tensor, lora_mid: Tensor) -> Tensor:
    """The down-projection of a Tucker-decomposed convolution, as one plain kernel.

    Convolving with `lora_A` and then with `lora_mid` is convolving with
    ``einsum("or..., ri -> oi...", lora_mid, lora_A)``, wherever no padding stands between the two.

    Args:
        lora_A: Down-projection, one number per pair of channels.
        lora_mid: The kernel between the ranks.

    Shape:
        - lora_A: ``(R_in, in / groups, 1, ...)``; lora_mid: ``(R_out, R_in, *kernel)``
        - Output: ``(R_out, in / groups, *kernel)``

    Reference:
        Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
        Evaluation", 2023, section 3.2.

    Example:
        >>> tucker_down(torch.ones(2, 4, 1, 1), torch.ones(3, 2, 3, 3)).shape
        torch.Size([3, 4, 3, 3])
    """
    return torch.einsum("or...,ri->oi...", lora_mid, lora_A.flatten(1))


def _padded(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    padding_mode: str,
) -> tuple[Tensor, list[int]]:
    """`x`, padded as `nn.Conv2d` does it first, and the width left to the convolution itself."""
    if padding == "same":
        if any(step != 1 for step in _each(stride, kernel)):
            raise ValueError(
                f"`stride` must be 1 where `padding` is 'same', but is {stride!r}. Give `padding`"
                " as numbers."
            )
        spare = [d * (k - 1) for d, k in zip(_each(dilation, kernel), kernel, strict=True)]
        ends = [(total // 2, total - total // 2) for total in spare]
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(
            f"`padding` must be a number, one per axis, 'same' or 'valid', but is {padding!r}."
        )
    else:
        each = _each(0 if isinstance(padding, str) else padding, kernel)
        ends = [(width, width) for width in each]
    if padding_mode == "zeros" and all(before == after for before, after in ends):
        return x, [before for before, _ in ends]
    around = [width for pair in reversed(ends) for width in pair]  # counted from the last axis
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return F.pad(x, around, mode=mode), [0] * len(kernel)


def _each(value: int | Sequence[int], kernel: Sequence[int]) -> Sequence[int]:
    return [value] * len(kernel) if isinstance(value, int) else value
