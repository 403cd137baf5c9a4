"""Which form a call takes: one pure function of shapes, dtype, device and flags.

Multiply-adds, with M tokens, K in_features, N out_features, R ranks in all:

    frozen layer     forward M K N                 backward M K N (for x alone)
    "addmm"          forward + M R (K + N)         backward + 2 M R (K + N)
    "merge"          forward + K N R               backward + K N R + 2 M R (K + N)

and the (M, K) or (M, N) sized traffic that each adds on top of the frozen layer's:

    "addmm"          forward: x once, y twice      backward: dy twice, x and dx three times
    "merge"          forward: W twice              backward: W and dy twice, x twice
    "triton2"        forward: x once               backward: dy and x once
    "triton1"        forward: next to nothing      backward: dy and x once

"merge" wins where the tokens outweigh the matrix, which is what `MERGE_RATIO` says; the one-kernel
form recomputes ``x A^T`` in every column of tiles, so it pays only while a call is bound by memory
or by launches. Whether a gradient is wanted decides nothing: a checkpoint that computes a call
twice, without and with, is to get the same bits.
"""

from typing import NamedTuple

import torch

from lora_core.kernels.triton.configs import LEAST_CAPABILITY, MAX_RANK

MERGE_RATIO = 4.0  # merge on the fly above this M (K + N) / (K N)
SMALL_MATRIX = 2**14  # numbers in a matrix whose fold costs a forward less than one more call
SMALL_FOLD = 2**17  # and multiply-adds that such a fold may take
ONE_KERNEL_RANK = 32  # the widest rank that the one-kernel form carries along
ONE_KERNEL_WORK = 2**33  # multiply-adds above which a call is bound by arithmetic


class Form(NamedTuple):
    """The form that a call takes.

    Attributes:
        form: "addmm", "merge", "triton1", "triton2", "operator" or "composed".
        why: The reason, a phrase.
    """

    form: str
    why: str

    def __str__(self) -> str:
        return f"{self.form}: {self.why}"


LOW_RANK = Form("addmm", "two skinny products accumulate in place beside the frozen one")
MERGE = Form("merge", "many tokens over a small matrix: W + g B A in scratch is the cheaper sum")
MERGE_SMALL = Form("merge", "a small matrix: folding the update in is cheaper than one more call")
PYTORCHS_DROPOUT = Form("composed", "dropout on CUDA without a Triton kernel is PyTorch's own")
TRITON = frozenset(("triton1", "triton2"))
ONE_KERNEL = Form("triton1", "bound by memory or launches, small rank: one kernel reads x once")
TWO_KERNELS = Form("triton2", "bound by arithmetic or wide rank: split at the rank")


def choose(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    device: str = "cpu",
    capability: tuple[int, int] | None = None,
    dropout: bool = False,
    per_sample: bool = False,
) -> Form:
    """The fastest form that is right for these sizes.

    Args:
        tokens: Rows of x, all leading dimensions together (M).
        in_features: K.
        out_features: N.
        rank: The sum of the active ranks (R).
        dtype: What the products are computed in.
        device: Type of the device.
        capability: Of the CUDA device if Triton can be used there, else None.
        dropout: Whether the update's input is dropped out.
        per_sample: Whether each sample has gains of its own.

    Example:
        >>> choose(4096, 320, 320, 4, dtype=torch.float32).form
        'merge'
        >>> choose(77, 768, 320, 4, dtype=torch.float32).form
        'addmm'
        >>> choose(4096, 320, 320, 4, dtype=torch.bfloat16, device="cuda", capability=(9, 0)).form
        'triton1'
    """
    # a dropped input, or a mix of its own per sample, belongs to no one merged matrix
    shared_matrix = not dropout and not per_sample
    half = dtype in (torch.float16, torch.bfloat16)
    tensor_cores = device == "cuda" and half and (capability or (0, 0)) >= LEAST_CAPABILITY
    if tensor_cores and not per_sample and rank <= MAX_RANK:
        light = tokens * in_features * out_features <= ONE_KERNEL_WORK and rank <= ONE_KERNEL_RANK
        return ONE_KERNEL if light and not dropout else TWO_KERNELS
    if dropout and device == "cuda":
        return PYTORCHS_DROPOUT
    # in 16 bits W + g B A would round small updates away, the same ones at every step
    if half or not shared_matrix or tokens == 0:
        return LOW_RANK
    matrix = in_features * out_features
    if device == "cpu" and matrix <= SMALL_MATRIX and matrix * rank <= SMALL_FOLD:
        return MERGE_SMALL
    outweighed = tokens * (in_features + out_features) > MERGE_RATIO * matrix
    return MERGE if outweighed else LOW_RANK
