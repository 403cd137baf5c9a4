"""From a call's tensors to its plan, and from a plan to the answer."""

import functools
import importlib.util
import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_core.kernels import linear
from lora_core.kernels.linear import Gain
from lora_core.kernels.planning import TRITON, Plan, choose

_EXPORT = Plan("composed", "torch.export and tracers get plain operations")
_TRANSFORM = Plan(
    "composed", "a torch.func transform is active, which plain operations compose with"
)
_FORWARD_AD = Plan("composed", "forward-mode differentiation needs plain operations")
_SUBCLASS = Plan("composed", "an operand is a tensor subclass, nested or not strided")
_TRAINED = Plan(
    "composed", "the base or the gain takes a gradient, which the fused forms do not make"
)
_DTYPES = Plan(
    "composed", "the operands differ in dtype, or it is not a floating type of 16 bits or more"
)
_BATCH = Plan("composed", "the gains per sample do not fit the batch of x")
_COMPILED = Plan("addmm", "under torch.compile the low-rank form is one graph for every size")

_PLAIN = (Tensor, nn.Parameter)
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain,
    dropout: float,
) -> Plan:
    """The plan of one call; "composed" wherever the others would be wrong or refused.

    Shape:
        As for `functional.lora_linear`.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        if torch.compiler.is_exporting():
            return _EXPORT
    elif torch._C._get_tracing_state() is not None:
        return _EXPORT
    if torch._C._are_functorch_transforms_active():
        return _TRANSFORM
    if forward_ad._current_level >= 0:
        return _FORWARD_AD
    if not compiling:
        for operand in (x, weight, lora_A, lora_B):
            if type(operand) not in _PLAIN and not _is_fake(operand):
                return _SUBCLASS
        if x.is_nested or weight.layout is not torch.strided:
            return _SUBCLASS
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return _TRAINED
    if isinstance(gain, Tensor):
        if gain.requires_grad:
            return _TRAINED
        if gain.ndim == 2 and (x.ndim < 2 or gain.shape[0] != x.shape[0]):
            return _BATCH
    dtype, cast = x.dtype, torch._C._is_any_autocast_enabled()
    if cast:
        dtype = computed_in(x)
    elif dtype is not weight.dtype or (bias is not None and bias.dtype is not dtype):
        return _DTYPES
    if dtype not in _FLOATS:
        return _DTYPES
    on_gpu = x.is_cuda
    arch = capability(x.device) if on_gpu else None
    if compiling and not on_gpu:
        return _COMPILED
    size = x.shape[-1]
    return choose(
        x.numel() // size if size else 0,
        size,
        weight.shape[0],
        lora_A.shape[0],
        dtype,
        "cuda" if on_gpu else "cpu",
        arch,
        dropout > 0,
        isinstance(gain, Tensor) and gain.ndim == 2,
    )


def run(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Gain,
    dropout: float,
) -> Tensor:
    """The answer by a plan of `route` that is not "composed".

    Shape:
        As for `functional.lora_linear`.
    """
    dtype = computed_in(x) if torch._C._is_any_autocast_enabled() else x.dtype
    if plan.form in TRITON or torch.compiler.is_compiling():
        from lora_core.kernels import ops  # 10 ms that only tracers and GPUs need

        traced = gain if isinstance(gain, Tensor) else torch.tensor(gain, device=x.device)
        operands = x, weight, bias, lora_A, lora_B, traced
        return ops.lora_linear(*operands, dtype=dtype, form=plan.form, dropout=dropout)
    if plan.form == "merge":
        return linear.merged(x, weight, bias, lora_A, lora_B, gain, dtype=dtype)
    return linear.low_rank(x, weight, bias, lora_A, lora_B, gain, dropout=dropout, dtype=dtype)


def computed_in(x: Tensor) -> torch.dtype:
    """What the products of a call are computed in: the dtype of x, or autocast's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _is_fake(operand: Tensor) -> bool:
    """Whether this is a fake tensor, which has the operations of a plain one."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and type(operand) is module.FakeTensor


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device where Triton can be used, else None."""
    if importlib.util.find_spec("triton") is None:
        return None
    return torch.cuda.get_device_capability(device)
