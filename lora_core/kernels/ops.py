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

from lora_core.kernels.forms import TRITON
from lora_core.kernels.linear import forward, gradients
from lora_core.kernels.norms import row_norms, sum_dtype

torch.library.define(
    "lora_core::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor gain,"
    " ScalarType dtype, str form, float dropout, Tensor? seed) -> (Tensor, Tensor)",
)
torch.library.define(
    "lora_core::linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor h, Tensor gain,"
    " ScalarType dtype, str form, float dropout, Tensor? seed, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lora_core::dora_norm",
    "(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor gain, Tensor? squared) -> Tensor",
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
    dropout: float = 0.0,
) -> Tensor:
    """The forward operator on x of any shape, differentiable.

    Shape:
        As for `linear.low_rank`.
    """
    flat = x.reshape(-1, x.shape[-1])
    # drawn on the device by its own generator, so that graphs and checkpoints replay it
    seed = torch.randint(2**62, (1,), device=x.device) if dropout > 0 else None
    y: Tensor = torch.ops.lora_core.linear(
        flat, weight, bias, lora_A, lora_B, gain, dtype, form, dropout, seed
    )[0]
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
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_shapes(x, weight, bias, lora_A, lora_B, gain)
    if not by_triton(x, form):
        operands = x, weight, bias, lora_A, lora_B, gain
        y, h = forward(*operands, dtype, dropout, _number(seed))
        return y, h.contiguous()
    from lora_core.kernels.triton import launch

    shift = None if bias is None else bias.to(dtype)
    cast = x.to(dtype), weight.to(dtype), shift, lora_A.to(dtype), lora_B.to(dtype)
    if form == "triton1":
        return launch.one_kernel_forward(*cast, gain)
    return launch.two_kernel_forward(*cast, gain, dropout=dropout, seed=seed)


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
    dropout: float,
    seed: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    found: Sequence[Tensor | None]
    if not by_triton(x, form):
        operands = dy, x, weight, lora_A, lora_B, h, gain
        seed_number = _number(seed)
        found = gradients(*operands, dtype, dropout, seed_number, needed=needed, wide=x.dtype)
    else:
        from lora_core.kernels.triton import launch

        seen, W, A, B = x.to(dtype), weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
        wide, dx = lora_A.dtype, None
        if not needed[0]:
            dA, dB, _ = launch.factor_gradients(
                dy, seen, B, gain, h, dropout=dropout, seed=seed, grad_dtype=wide
            )
        elif form == "triton1":
            dx, dA, dB, _ = launch.one_kernel_backward(dy, seen, W, A, B, gain, h, grad_dtype=wide)
        else:
            dx, dA, dB, _ = launch.two_kernel_backward(
                dy, seen, W, A, B, gain, h, dropout=dropout, seed=seed, grad_dtype=wide
            )
        found = None if dx is None else dx.to(x.dtype), dA, dB
    asked = (t if wanted else None for t, wanted in zip(found, needed, strict=True))
    dx, dA, dB = (dy.new_empty(0) if t is None else t.contiguous() for t in asked)
    return dx, dA, dB


def by_triton(x: Tensor, form: str) -> bool:
    """Whether the Triton kernels answer, rather than eager arithmetic."""
    return form in TRITON and x.is_cuda


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
) -> None:
    """Refuses operands that do not fit: a kernel would read beyond them."""
    (out_features, in_features), rank = weight.shape, lora_A.shape[0]
    fit = (
        x.ndim == 2
        and x.shape[1] == in_features
        and lora_A.shape == (rank, in_features)
        and lora_B.shape == (out_features, rank)
        and (bias is None or bias.shape == (out_features,))
        and (gain.ndim == 0 or gain.shape[-1] == rank)
    )
    if not fit:
        shapes = {
            name: None if t is None else tuple(t.shape)
            for name, t in zip(
                ("x", "weight", "bias", "lora_A", "lora_B", "gain"),
                (x, weight, bias, lora_A, lora_B, gain),
                strict=True,
            )
        }
        raise ValueError(
            "The operands must have shapes (M, in), (out, in), (out,), (R, in), (out, R) and () or"
            f" (R,), but have {shapes}."
        )


def _number(seed: Tensor | None) -> int | None:
    return None if seed is None else int(seed.item())


@torch.library.register_fake("lora_core::linear")  # type: ignore[untyped-decorator]
def _shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor,
    dtype: torch.dtype,
    form: str,  # noqa: ARG001
    dropout: float,  # noqa: ARG001
    seed: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check_shapes(x, weight, bias, lora_A, lora_B, gain)
    tokens, rank = x.shape[0], lora_A.shape[0]
    y = x.new_empty(tokens, weight.shape[0], dtype=dtype)
    return y, x.new_empty(tokens, rank, dtype=dtype)


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
    dropout: float,  # noqa: ARG001
    seed: Tensor | None,  # noqa: ARG001
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    like = zip((x, lora_A, lora_B), needed, strict=True)
    dx, dA, dB = (t.new_empty(t.shape) if wanted else dy.new_empty(0) for t, wanted in like)
    return dx, dA, dB


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, gain, *settings, seed = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], gain, seed)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, weight, lora_A, lora_B, h, gain, seed = ctx.saved_tensors
    dtype, form, dropout = ctx.settings
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    found: Sequence[Tensor]
    # a graph of the gradients, which no tracer makes, needs differentiable operations
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if seed is not None and by_triton(x, form):
            raise NotImplementedError(
                "Second derivatives must be taken without dropout where a Triton kernel drew the"
                f" mask, but dropout is {dropout:g}. Call `model.eval()` or set dropout to 0."
            )
        operands = dy, x, weight, lora_A, lora_B, None, gain
        found = gradients(  # type: ignore[assignment]
            *operands, dtype, dropout, _number(seed), needed=wanted, wide=x.dtype
        )
    else:
        found = torch.ops.lora_core.linear_backward(
            dy, x, weight, lora_A, lora_B, h, gain, dtype, form, dropout, seed, wanted
        )
    dx, dA, dB = (t if asked else None for t, asked in zip(found, wanted, strict=True))
    return dx, None, None, dA, dB, None, None, None, None, None


torch.library.register_autograd("lora_core::linear", _differentiate, setup_context=_keep)


def dora_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float,
    squared: Tensor | None,
) -> Tensor:
    """The operator of `functional.dora_norm`, a constant to autograd.

    Which rows cancel is read from the values, at which a graph would break.

    Shape:
        As for `functional.dora_norm`.
    """
    if not isinstance(gain, Tensor):
        gain = torch.full((), gain, dtype=torch.float64, device=weight.device)
    operands = weight.detach(), lora_A.detach(), lora_B.detach(), gain.detach()
    known = None if squared is None else squared.detach()
    norm: Tensor = torch.ops.lora_core.dora_norm(*operands, known)
    return norm


@torch.library.impl("lora_core::dora_norm", ("cpu", "cuda"))
def _row_norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor, squared: Tensor | None
) -> Tensor:
    return row_norms(weight, lora_A, lora_B, gain, squared)


@torch.library.register_fake("lora_core::dora_norm")  # type: ignore[untyped-decorator]
def _one_per_row(
    weight: Tensor,
    lora_A: Tensor,  # noqa: ARG001
    lora_B: Tensor,  # noqa: ARG001
    gain: Tensor,  # noqa: ARG001
    squared: Tensor | None,  # noqa: ARG001
) -> Tensor:
    dtype = sum_dtype(weight.dtype)
    return weight.new_empty(weight.shape[0], dtype=dtype)
