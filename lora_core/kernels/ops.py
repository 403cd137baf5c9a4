"""The forms as opaque operators, for what PyTorch traces: torch.compile, fake tensors, CUDA graphs.

Traced through, an in-place product becomes a functional one that Inductor does not undo: a copy of
the whole (M, N) output. An opaque node stays in place. On a CPU every form answers in the eager
arithmetic, and on fake tensors in shapes alone, so that the CUDA branch can be traced and checked
on a machine without one.

A number would be baked into a graph, so a gain is a tensor here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.linear import differentiable_gradients, forward, gradients
from lora_core.kernels.planning import TRITON

torch.library.define(
    "lora_core::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor gain,"
    " ScalarType dtype, str form) -> (Tensor, Tensor)",
)
torch.library.define(
    "lora_core::linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor h, Tensor gain,"
    " ScalarType dtype, str form, bool[] needed) -> (Tensor, Tensor, Tensor)",
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    *,
    dtype: torch.dtype,
    form: str,
) -> Tensor:
    """The forward operator on x of any shape, differentiable.

    Shape:
        As for `linear.low_rank`.
    """
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.lora_core.linear(flat, weight, bias, lora_A, lora_B, gain, dtype, form)[0]
    return y.reshape(*x.shape[:-1], y.shape[-1])


@torch.library.impl("lora_core::linear", ("cpu", "cuda"))
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    dtype: torch.dtype,
    form: str,
) -> tuple[Tensor, Tensor]:
    if form not in TRITON or not x.is_cuda:
        return forward(x, weight, bias, lora_A, lora_B, gain, dtype)
    from lora_core.kernels.triton import launch

    run = launch.one_kernel_forward if form == "triton1" else launch.two_kernel_forward
    shift = None if bias is None else bias.to(dtype)
    return run(x.to(dtype), weight.to(dtype), shift, lora_A.to(dtype), lora_B.to(dtype), gain)


@torch.library.impl("lora_core::linear_backward", ("cpu", "cuda"))
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    gain: Tensor,
    dtype: torch.dtype,
    form: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    found: Sequence[Tensor | None]
    if form not in TRITON or not x.is_cuda:
        found = gradients(dy, x, weight, lora_A, lora_B, h, gain, dtype, needed=needed)
    else:
        found = _by_triton(dy, x, weight, lora_A, lora_B, h, gain, dtype, form, needed)
    dx, dA, dB = (dy.new_empty(0) if t is None else t.contiguous() for t in found)
    return dx, dA, dB


def _by_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    gain: Tensor,
    dtype: torch.dtype,
    form: str,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    from lora_core.kernels.triton import launch

    cast = [t.to(dtype) for t in (dy, x, weight, lora_A, lora_B)]
    wide = lora_A.dtype
    if not needed[0]:
        dA, dB, _ = launch.factor_gradients(cast[0], cast[1], cast[4], gain, h, grad_dtype=wide)
        return None, dA, dB
    run = launch.one_kernel_backward if form == "triton1" else launch.two_kernel_backward
    dx, dA, dB, _ = run(*cast, gain, h, grad_dtype=wide)
    return dx.to(x.dtype), dA, dB


@torch.library.register_fake("lora_core::linear")  # type: ignore[untyped-decorator]
def _shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    lora_A: Tensor,
    lora_B: Tensor,  # noqa: ARG001
    gain: Tensor,  # noqa: ARG001
    dtype: torch.dtype,
    form: str,
) -> tuple[Tensor, Tensor]:
    tokens, rank = x.shape[0], lora_A.shape[0]
    shape = (tokens, rank) if form in TRITON and x.is_cuda else (rank, tokens)
    return x.new_empty(tokens, weight.shape[0], dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.register_fake("lora_core::linear_backward")  # type: ignore[untyped-decorator]
def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,  # noqa: ARG001
    gain: Tensor,  # noqa: ARG001
    dtype: torch.dtype,  # noqa: ARG001
    form: str,  # noqa: ARG001
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    like = zip((x, lora_A, lora_B), needed, strict=True)
    dx, dA, dB = (t.new_empty(t.shape) if wanted else dy.new_empty(0) for t, wanted in like)
    return dx, dA, dB


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, gain, dtype, form = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], gain)
    ctx.settings = dtype, form
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    x, weight, lora_A, lora_B, h, gain = ctx.saved_tensors
    dtype, form = ctx.settings
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    found: Sequence[Tensor]
    # a graph of the gradients, which no tracer makes, needs differentiable operations
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = differentiable_gradients(dy, x, weight, lora_A, lora_B, gain, dtype)
    else:
        found = torch.ops.lora_core.linear_backward(
            dy, x, weight, lora_A, lora_B, h, gain, dtype, form, wanted
        )
    dx, dA, dB = (t if asked else None for t, asked in zip(found, wanted, strict=True))
    return dx, None, None, dA, dB, None, None, None


torch.library.register_autograd("lora_core::linear", _differentiate, setup_context=_keep)
