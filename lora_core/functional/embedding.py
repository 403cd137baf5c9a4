"""The low-rank update of an embedding: an entry has a few numbers, which one matrix widens.

Letters in the shape notes: entries = num_embeddings, dim = embedding_dim, R = rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding_update(
    index: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """The low-rank update of an embedding, ``(gain * lora_A.T[index]) @ lora_B.T``.

    What `lora_update` makes of one-hot rows, which are never made. Computed in the dtype of
    `lora_A`: an index has none.

    Args:
        index: The entries to look up.
        lora_A: Down-projection, a column per entry.
        lora_B: Up-projection; cast to the dtype of `lora_A`.
        gain: What each rank's number is multiplied by.
        padding_idx: The entry whose column gets no gradient. It is looked up like any other, so
            its column must start at zero where its update is to stay zero.
        scale_grad_by_freq: Whether a column's gradient is divided by how often it was looked up.
        sparse: Whether the gradient of `lora_A` is sparse: a COO tensor with a place for every
            number (PyTorch cannot keep whole columns), of use to `torch.optim.SGD` and
            `SparseAdam`. The gradient of `lora_B` is always dense; under torch.compile, which
            cannot trace the sparse one, so is that of `lora_A`.
        dropout: Probability of dropping the update of an entry looked up, which is the one element
            of its one-hot row; 0 is none.

    Shape:
        - index: integers below `entries`, ``(...)``
        - lora_A: ``(R, entries)``; lora_B: ``(dim, R)``
        - gain: a scalar, ``(R,)``, or ``(batch, R)`` for a different mix per sample, where
          `batch` is the first dimension of `index`
        - Output: ``(..., dim)``

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> A, B = torch.ones(2, 100), torch.zeros(5, 2)
        >>> embedding_update(torch.tensor([[3, 1, 4]]), A, B).shape
        torch.Size([1, 3, 5])
    """
    sparse = sparse and not torch.compiler.is_compiling()
    table = _SparseTranspose.apply(lora_A) if sparse else lora_A.T  # type: ignore[no-untyped-call]
    h = F.embedding(  # (..., R)
        index, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )
    if dropout > 0:
        h = h * F.dropout(h.new_ones(*index.shape, 1), dropout)
    if isinstance(gain, Tensor) and gain.ndim == 2:
        gain = gain.reshape(gain.shape[0], *[1] * (h.ndim - 2), gain.shape[1])
    h = (h * gain).to(h.dtype)  # a gain of several entries would promote h
    return F.linear(h, lora_B.to(h.dtype))


def lora_embedding(
    index: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float = 1.0,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """An embedding plus a low-rank update.

    Computes ``weight[index] + embedding_update(index, lora_A, lora_B, gain)``.

    Args:
        index: The entries to look up.
        weight: The frozen table.
        lora_A: Down-projection, a column per entry.
        lora_B: Up-projection.
        gain: What each rank's number is multiplied by.
        padding_idx: The entry that gets no gradient; see `embedding_update`.
        scale_grad_by_freq: See `embedding_update`.
        sparse: Whether the gradients of `weight` and `lora_A` are sparse.
        dropout: Probability of dropping the update of an entry looked up.

    Shape:
        - weight: ``(entries, dim)``
        - The rest as in `embedding_update`

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> W, A, B = torch.ones(100, 5), torch.ones(2, 100), torch.zeros(5, 2)
        >>> lora_embedding(torch.tensor([3, 1, 4]), W, A, B).shape
        torch.Size([3, 5])
    """
    base = F.embedding(
        index, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )
    update = embedding_update(
        index,
        lora_A,
        lora_B,
        gain,
        padding_idx=padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
        sparse=sparse,
        dropout=dropout,
    )
    return base + update.to(base.dtype)


class _SparseTranspose(torch.autograd.Function):
    """A transpose whose sparse gradient is turned back, which PyTorch's own refuses.

    Whole rows, the dense axis of the gradient, would become columns, which COO cannot keep.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:  # noqa: ARG004
        return matrix.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        if not grad.is_sparse:
            return grad.T
        (rows,), values = grad._indices(), grad._values()  # (n,), (n, R)
        width = values.shape[1]
        across = torch.arange(width, device=rows.device).repeat(len(rows))
        places = torch.stack([across, rows.repeat_interleave(width)])  # (2, n*R)
        shape = grad.shape[1], grad.shape[0]
        return torch.sparse_coo_tensor(places, values.reshape(-1), shape, check_invariants=False)
