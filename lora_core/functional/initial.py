"""What the factors of a fresh adapter are filled with, and the update that starts from nothing.

Letters in the shape notes: in = in_features, out = out_features, R = rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core._config import STARTS
from lora_core.kernels.norms import sum_dtype

_ANY_RANK = ("kaiming", "gaussian")  # draws each entry by itself
_EXACT = 2048  # a larger matrix takes minutes to decompose whole
_SWEEPS = 12  # of the subspace iteration that larger ones get


def initial_factors(
    init: str,
    weight: Tensor | Sequence[int],
    rank: int,
    scale: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    covariance: Tensor | None = None,
    fan_in: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors that an adapter starts from.

    - "kaiming": `lora_A` uniform within ``1 / sqrt(fan_in)``, `lora_B` zero.
    - "gaussian": `lora_A` normal with a deviation of ``1 / rank``, `lora_B` zero.
    - "orthogonal": the rows of `lora_A` orthonormal, `lora_B` zero.
    - "eva": the rows of `lora_A` are the directions in which the layer's inputs vary most,
      `lora_B` zero.
    - "pissa": ``scale * lora_B @ lora_A`` is the best approximation of `weight` of this rank.
    - "olora": ``weight = Q @ R``; `lora_B` the first columns of Q, `lora_A` the first rows of R.

    The last two change the layer unless what they start from is taken away; see `subtracted`.

    Args:
        init: One of the names above.
        weight: The frozen matrix; its shape is enough for all but "pissa" and "olora".
        rank: The rank of the update.
        scale: What the update is multiplied by, above zero; "pissa" divides by it.
        generator: Where random numbers come from, on the CPU; None is PyTorch's own.
        covariance: The second moments of the layer's inputs, for "eva".
        fan_in: What "kaiming" takes for the number of inputs; None is `in`.

    Shape:
        - weight: ``(out, in)``; covariance: ``(in, in)``
        - Output: ``(R, in)`` and ``(out, R)``, float32, on the CPU: a seed decides the same
          numbers whatever the weight's device and dtype

    Raises:
        ValueError: If `init` is unknown or lacks what it starts from, or `rank` or `scale` is
            outside what it allows.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.
        Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
        Language Models", 2024, section 3.
        Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024.
        Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance
        Adaptation", 2024.

    Example:
        >>> lora_A, lora_B = initial_factors("pissa", torch.eye(5, 3), rank=2)
        >>> lora_A.shape, lora_B.shape
        (torch.Size([2, 3]), torch.Size([5, 2]))
    """
    if init not in STARTS:
        raise ValueError(f"`init` must be one of {', '.join(sorted(STARTS))}, but is {init!r}.")
    out, width = weight.shape if isinstance(weight, Tensor) else weight
    if init not in _ANY_RANK:
        _check_rank(init, rank, out, width)
    if STARTS[init] == "weight":
        if not isinstance(weight, Tensor) or weight.is_meta:
            raise ValueError(
                f"`weight` must have values where `init` is {init!r}, but is a shape alone. Load"
                " the model first."
            )
        wide = weight.detach().to(sum_dtype(weight.dtype))
        with torch.autocast(wide.device.type, enabled=False):
            if init == "olora":
                return _leading_qr(wide, rank)
            if init == "pissa":
                return _principal(wide, rank, scale, generator)
    lora_B = torch.zeros(out, rank, dtype=torch.float32, device="cpu")
    if init == "eva":
        return _directions(covariance, rank, width), lora_B
    if init == "kaiming":
        bound = 1 / math.sqrt(width if fan_in is None else fan_in)
        lora_A = torch.empty(rank, width, dtype=torch.float32, device="cpu")
        return lora_A.uniform_(-bound, bound, generator=generator), lora_B
    normal = torch.randn(rank, width, dtype=torch.float32, device="cpu", generator=generator)
    if init == "gaussian":
        return normal / rank, lora_B
    if init == "orthogonal":
        # in float64, so that another library's rounding decides no bit of the result
        Q, R = torch.linalg.qr(normal.double().T)
        return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T.float().contiguous(), lora_B
    raise ValueError(f"`init` must have a branch in `initial_factors`, but {init!r} has none.")


def subtracted(
    lora_A: Tensor, lora_B: Tensor, lora_A0: Tensor, lora_B0: Tensor
) -> tuple[Tensor, Tensor]:
    """The update ``lora_B @ lora_A - lora_B0 @ lora_A0`` as the factors of one plain adapter.

    Written ``(lora_B - lora_B0) @ lora_A + lora_B0 @ (lora_A - lora_A0)``: each term is exactly
    zero until its factor is trained, so that a layer that starts from factors of its own weight
    still starts from its base, bit for bit. A gain per rank must be given twice over.

    Args:
        lora_A: Down-projection.
        lora_B: Up-projection.
        lora_A0: What `lora_A` started from.
        lora_B0: What `lora_B` started from.

    Shape:
        - lora_A, lora_A0: ``(R, in, ...)``; lora_B, lora_B0: ``(out, R, ...)``, with the further
          dimensions of a convolution's factors
        - Output: ``(2R, in, ...)`` and ``(out, 2R, ...)``

    Reference:
        Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
        Language Models", 2024, on turning PiSSA into LoRA: there the two pairs are stacked as they
        are, which is zero but for rounding.

    Example:
        >>> A, B = torch.ones(2, 3), torch.ones(5, 2)
        >>> down, up = subtracted(A, B, A, B)
        >>> down.shape, up.shape, (up @ down).any().item()
        (torch.Size([4, 3]), torch.Size([5, 4]), False)
    """
    down = torch.cat([lora_A, lora_A - lora_A0])
    return down, torch.cat([lora_B - lora_B0, lora_B0], dim=1)


def _check_rank(init: str, rank: int, out: int, width: int) -> None:
    of_weight = STARTS[init] == "weight"
    limit, bound = (min(out, width), "min(out, in)") if of_weight else (width, "in")
    if rank > limit:
        raise ValueError(
            f"`rank` must be at most {bound} = {limit} where `init` is {init!r}, but is {rank}."
        )


def _principal(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if not scale > 0:
        raise ValueError(f"`scale` must be above 0 where `init` is 'pissa', but is {scale:g}.")
    small = min(weight.shape)
    wanted = 2 * rank + 16
    if small <= _EXACT or wanted >= small:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        # by hand, because `torch.svd_lowrank` takes no generator
        shape = weight.shape[1], wanted
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        Q = start.to(weight)
        for _ in range(_SWEEPS):
            Q = torch.linalg.qr(weight @ Q).Q
            Q = torch.linalg.qr(weight.T @ Q).Q
        U, S, Vh = torch.linalg.svd(weight @ Q, full_matrices=False)
        Vh = Vh @ Q.T
    root = (S[:rank] / scale).sqrt()
    return (root[:, None] * Vh[:rank]).float().cpu(), (U[:, :rank] * root).float().cpu()


def _leading_qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # the first columns of Q are those of the first columns of the weight alone
    Q = torch.linalg.qr(weight[:, :rank]).Q
    R = (Q.T @ weight).triu()
    return R.float().cpu(), Q.float().cpu().contiguous()


def _directions(covariance: Tensor | None, rank: int, width: int) -> Tensor:
    if covariance is None or covariance.shape != (width, width):
        seen = "None" if covariance is None else f"{tuple(covariance.shape)}"
        raise ValueError(
            f"`covariance` must be (in, in) = ({width}, {width}) where `init` is 'eva', but is"
            f" {seen}. Average x.T @ x over some inputs of the layer."
        )
    vectors: Tensor = torch.linalg.eigh(covariance.detach().double()).eigenvectors  # ascending
    rows = vectors.flip(1)[:, :rank].T
    # of the two signs the one whose largest entry is positive, so that every machine agrees
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return (rows * largest.sign()).float().cpu().contiguous()
