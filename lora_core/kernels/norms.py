"""The norms of an adapted matrix's rows, without the matrix where values can be read."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# below this share of |W|^2 the factored norm loses digits to cancellation
_CANCELLED = 0.4


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What numbers of these types are added up in: float64 if one of them is that, else float32.

    Types of 8 bits too, of which torch itself promotes none.
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def row_norms(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | float,
    squared: Tensor | None,
) -> Tensor:
    """`functional.dora_norm`: densely where no value can be read, else from the factors.

    Shape:
        As for `functional.dora_norm`.
    """
    dtype = sum_dtype(weight.dtype)
    with without_autocast(weight):
        W, A, B = weight.to(dtype), lora_A.to(dtype), (lora_B.to(dtype) * gain).to(dtype)
        if _is_traced(weight):
            dense = W + B @ A
            return _root(torch.linalg.vecdot(dense, dense))
        squared = torch.linalg.vecdot(W, W) if squared is None else squared.to(dtype)
        total = squared + torch.linalg.vecdot(2 * (W @ A.T) + B @ (A @ A.T), B)
        rows = (total < _CANCELLED * squared).nonzero().squeeze(1)
        if rows.numel():
            wide = W[rows].double() + B[rows].double() @ A.double()
            total = total.index_put((rows,), wide.square().sum(1).to(dtype))
        return _root(total)


def without_autocast(t: Tensor) -> torch.autocast:
    """Autocast off for a tensor's device, which may be the meta device."""
    # autocast itself knows no meta device
    return torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False)


def _root(total: Tensor) -> Tensor:
    some = total != 0  # at zero a square root has no gradient
    return torch.where(some, total, 1).sqrt() * some


def _is_traced(weight: Tensor) -> bool:
    """Whether which rows cancel cannot be read: there are no values, or not only these."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if weight.is_meta or torch._C._are_functorch_transforms_active():
        return True
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    kinds = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
    return bool(kinds & {"ProxyTorchDispatchMode", "FakeTensorMode"}) or (
        type(weight).__name__ == "FakeTensor"
    )
