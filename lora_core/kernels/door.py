"""From a call's tensors to its form, and by a form to the answer."""

import functools
import importlib.util
import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lora_core.kernels import linear
from lora_core.kernels.forms import Form, choose
from lora_core.kernels.linear import Factor, Gain, computed_in, stacked

_EXPORT = Form("composed", "torch.export and tracers get plain operations")
_TRANSFORM = Form(
    "composed", "a torch.func transform is active, which plain operations compose with"
)
_FORWARD_AD = Form("composed", "forward-mode differentiation needs plain operations")
_SUBCLASS = Form("composed", "an operand is a tensor subclass, nested or not strided")
_TRAINED = Form(
    "composed", "the base or the gain takes a gradient, which the fused forms do not make"
)
_DTYPES = Form(
    "composed", "the operands differ in dtype, or it is not a floating type of 16 bits or more"
)
_BATCH = Form("composed", "the gains per sample do not fit the batch of x")
_SHAPES = Form("composed", "x has no features, or a size that is not known yet")
_CACHED = Form("composed", "selective checkpointing keeps products that must not change")
_COMPILED = Form("operator", "under torch.compile the low-rank form is one graph for every size")

_PLAIN = frozenset((Tensor, nn.Parameter))
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TYPICAL_TOKENS = 4096  # what a compiled graph is planned for, whatever it is called with
_chosen = functools.lru_cache(maxsize=1024)(choose)
_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Factor,
    lora_B: Factor,
    gain: Gain,
    dropout: float,
) -> Form:
    """The form of one call; "composed" wherever the others would be wrong or refused.

    Shape:
        As for `functional.fused_lora_linear`.
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        if torch.compiler.is_exporting():
            return _EXPORT
    elif torch._C._get_tracing_state() is not None:
        return _EXPORT
    elif torch._C._len_torch_dispatch_stack():
        form = _under_a_mode()
        if form is not None:
            return form
    if torch._C._are_functorch_transforms_active():
        return _TRANSFORM
    if forward_ad._current_level >= 0:
        return _FORWARD_AD
    if {type(x), type(weight), type(lora_A), type(lora_B)} <= _PLAIN:
        rank = lora_A.shape[0]  # type: ignore[union-attr]
    else:
        downs = (lora_A,) if isinstance(lora_A, Tensor) else lora_A
        ups = (lora_B,) if isinstance(lora_B, Tensor) else lora_B
        rank = sum([A.shape[0] for A in downs])
        for operand in (x, weight, *downs, *ups):
            if type(operand) not in _PLAIN and (compiling or not _is_fake(operand)):
                return _SUBCLASS
    if x.is_nested or x.layout is not torch.strided or weight.layout is not torch.strided:
        return _SUBCLASS
    shape, grad = weight.shape, torch.is_grad_enabled()
    size = shape[1]
    if x.ndim == 0 or size == 0:
        return _SHAPES
    per_sample = False
    if isinstance(gain, Tensor):
        per_sample = gain.ndim == 2
        if grad and gain.requires_grad:
            return _TRAINED
        if per_sample and (x.ndim < 2 or gain.shape[0] != x.shape[0]):
            return _BATCH
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _TRAINED
    dtype = x.dtype
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (dtype, weight.dtype) or weight.dtype not in _FLOATS:
            return _DTYPES
        if dtype in _FLOATS:
            dtype = computed_in(x)
    elif dtype is not weight.dtype or (bias is not None and bias.dtype is not dtype):
        return _DTYPES
    if dtype not in _FLOATS:
        return _DTYPES
    if compiling:
        if not x.is_cuda:
            return _COMPILED
        # thresholds on the tokens would become guards, and every other batch another graph
        flags = dtype, "cuda", capability(x.device), dropout > 0, per_sample
        form = choose(_TYPICAL_TOKENS, size, shape[0], rank, *flags)
        return _COMPILED if form.form in ("addmm", "merge") else form
    tokens = x.numel() // size
    device, able = ("cuda", capability(x.device)) if x.is_cuda else ("cpu", None)
    if not isinstance(tokens, int) or (dropout > 0 and not x.is_cuda and _is_fake(x)):
        return _SHAPES
    return _chosen(tokens, size, shape[0], rank, dtype, device, able, dropout > 0, per_sample)


def run(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Factor,
    lora_B: Factor,
    gain: Gain,
    dropout: float,
) -> Tensor:
    """The answer by a form of `route` that is not "composed".

    Shape:
        As for `functional.fused_lora_linear`.
    """
    if form.form == "addmm":
        return linear.low_rank(x, weight, bias, lora_A, lora_B, gain, dropout)
    if form.form == "merge":
        return linear.merged(x, weight, bias, lora_A, lora_B, gain)
    from lora_core.kernels import ops  # 10 ms that only tracers and GPUs need

    A, B = stacked(lora_A), stacked(lora_B, 1)
    return ops.lora_linear(
        *(x, weight, bias, A, B, _tensor(gain, x)),
        dtype=computed_in(x),
        form=form.form,
        dropout=dropout,
    )


def _is_fake(operand: Tensor) -> bool:
    """Whether this is a fake tensor, which has the operations of a plain one."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and type(operand) is module.FakeTensor


def _under_a_mode() -> Form | None:
    """The form that an active dispatch mode asks for, None if any will do."""
    modes = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
    if "ProxyTorchDispatchMode" in modes:
        return _EXPORT
    if modes & {"_CachingTorchDispatchMode", "_CachedTorchDispatchMode"}:
        return _CACHED
    return None


def _tensor(gain: Gain, x: Tensor) -> Tensor:
    """The gain as a tensor where x is; a number is copied there once, not once per call."""
    if isinstance(gain, Tensor):
        return gain
    if torch.compiler.is_compiling() or _is_fake(x):
        return torch.full((), gain, dtype=torch.float64, device=x.device)
    return _copied(gain, x.device)


@functools.lru_cache(maxsize=4096)
def _copied(gain: float, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(gain, dtype=torch.float64, device=device)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device where Triton can be used, else None."""
    return torch.cuda.get_device_capability(device) if _HAS_TRITON else None
