"""Multi-head attention between a sequence and a context, with the field's usual module names."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention whose queries come from `x` and whose keys and values from `context`.

    Computes ``to_out(softmax(q @ k.T / sqrt(dim_head)) @ v)`` per head. Without a context it is
    self-attention.

    Args:
        query_dim: Width of `x` and of the output.
        context_dim: Width of `context`; `query_dim` when None.
        heads: Number of heads.
        dim_head: Width of one head; the inner width is ``heads * dim_head``.
        dropout: Dropout after the output projection.

    Shape:
        - x: ``(batch, n, query_dim)``
        - context: ``(batch, m, context_dim)``; ``m = n`` in self-attention
        - mask: boolean, True where a query may attend: ``(batch, m)``, ``(batch, n, m)`` or
          ``(batch, heads, n, m)``. Every dimension but the last may be 1. A query that may attend
          to nothing receives zeros, from which `to_out` makes its bias.
        - Output: ``(batch, n, query_dim)``

    Raises:
        ValueError: If a size is not positive, or a shape does not fit.
        TypeError: If `mask` is not boolean.

    Reference:
        Vaswani et al., "Attention Is All You Need", 2017, section 3.2; Rombach et al.,
        "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, section 3.3.

    Example:
        >>> import torch
        >>> attention = CrossAttention(query_dim=32, context_dim=16, heads=4, dim_head=8)
        >>> attention(torch.randn(2, 49, 32), torch.randn(2, 5, 16)).shape
        torch.Size([2, 49, 32])
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        sizes = {
            "query_dim": query_dim,
            "context_dim": context_dim,
            "heads": heads,
            "dim_head": dim_head,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {size}.")
        inner_dim = heads * dim_head
        self.query_dim = query_dim
        self.context_dim = context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from `x` to `context`, or to `x` itself."""
        _check_sequence("x", x, self.query_dim)
        if context is None:
            if self.context_dim != self.query_dim:
                raise ValueError(
                    "`context` must be given when `context_dim` differs from `query_dim` "
                    f"({self.context_dim} and {self.query_dim}), but is None."
                )
            context = x
        _check_sequence("context", context, self.context_dim)
        if context.shape[0] != x.shape[0]:
            raise ValueError(
                f"`context` must have the batch size of `x` = {x.shape[0]}, "
                f"but has {context.shape[0]}."
            )
        if mask is not None:
            mask = _broadcastable(mask, x.shape[0], self.heads, x.shape[1], context.shape[1])
        q, k, v = (
            rearrange(projected, "b n (h d) -> b h n d", h=self.heads)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        attended = masked_attention(q, k, v, mask)
        out: Tensor = self.to_out(rearrange(attended, "b h n d -> b n (h d)"))
        return out


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention in which a query without any key yields zeros, never NaN.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True where a query may attend, or None for everywhere.

    Shape:
        - q: ``(batch, heads, n, d)``
        - k, v: ``(batch, heads, m, d)``
        - mask: boolean, broadcastable to ``(batch, heads, n, m)``
        - Output: ``(batch, heads, n, d)``

    Returns:
        ``softmax(q @ k.T / sqrt(d)) @ v``.
    """
    if k.shape[-2] == 0:
        # nothing to attend to; the sum keeps the (zero) gradients of all three flowing
        return q * 0 + (k.sum() + v.sum())
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    # a softmax over nothing is 0 / 0, so such a row attends to everything and is then zeroed,
    # which zeroes its gradients too
    empty = ~mask.any(dim=-1, keepdim=True)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty)
    return attended.masked_fill(empty, 0.0)


def _check_sequence(name: str, sequence: Tensor, width: int) -> None:
    if sequence.ndim != 3 or sequence.shape[-1] != width:
        raise ValueError(
            f"`{name}` must have shape (batch, tokens, {width}), but has {tuple(sequence.shape)}."
        )


def _broadcastable(mask: Tensor, batch: int, heads: int, n: int, m: int) -> Tensor:
    """`mask` with four dimensions, ready to broadcast over ``(batch, heads, n, m)``."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"`mask` must be boolean (True = attend), but has dtype {mask.dtype}. "
            "Write `mask != 0`, or `mask.bool()`."
        )
    if mask.ndim == 2:
        four = rearrange(mask, "b m -> b 1 1 m")
    elif mask.ndim == 3:
        four = rearrange(mask, "b n m -> b 1 n m")
    else:
        four = mask
    if (
        four.ndim != 4
        or four.shape[-1] != m
        or any(
            have not in {1, want}
            for have, want in zip(four.shape[:-1], (batch, heads, n), strict=True)
        )
    ):
        raise ValueError(
            f"`mask` must have shape (batch, m) = {(batch, m)}, (batch, n, m) = {(batch, n, m)} or "
            f"(batch, heads, n, m) = {(batch, heads, n, m)}, but has {tuple(mask.shape)}. "
            "Every dimension but the last may be 1."
        )
    return four
