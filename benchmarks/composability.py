"""What else an adapted layer must live with: one check per cell of goal G11.

Each check builds its own small `LoRALinear` and raises if the cell does not hold.
"""

import copy
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lora_core

_TOKENS, _IN, _OUT, _RANK = 48, 40, 56, 4  # all different: a buffer is known by its shape


class NotMeasuredError(Exception):
    """The cell can't be checked here; the message says why."""


def _layer(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (_IN, _OUT)) -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(*size, dtype=dtype)
    rank = min(_RANK, *size)
    layer: Any = lora_core.LoRALinear(linear, rank=rank, alpha=2.0 * rank)
    nn.init.normal_(layer.lora_B_default)
    return layer


def _as_function(layer: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        factors = {"lora_A_default": lora_A, "lora_B_default": lora_B}
        y: Tensor = functional_call(layer, factors, (x,))
        return y

    return call


def _inputs(layer: Any, *leading: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*leading, layer.in_features, dtype=layer.weight.dtype)
    leaves = x, layer.lora_A_default.detach().clone(), layer.lora_B_default.detach().clone()
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def _dense(layer: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The formula, written once more."""
    return nn.functional.linear(x, layer.weight + 2.0 * lora_B @ lora_A, layer.bias)


def _second_order() -> None:
    layer = _layer(torch.float64, (5, 6))
    assert torch.autograd.gradgradcheck(_as_function(layer), _inputs(layer, 3))


def _forward_mode() -> None:
    layer = _layer(torch.float64, (5, 6))
    call, inputs = _as_function(layer), _inputs(layer, 3)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_backward_ad=False)


def _func_grad() -> None:
    layer = _layer(torch.float64)
    x, lora_A, lora_B = _inputs(layer, 7)
    call = _as_function(layer)

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: f(*args).square().sum()

    got = grad(loss(call), argnums=(0, 1, 2))(x, lora_A, lora_B)
    dense = loss(lambda *args: _dense(layer, *args))
    torch.testing.assert_close(
        got, torch.autograd.grad(dense(x, lora_A, lora_B), [x, lora_A, lora_B])
    )


def _vmap() -> None:
    layer = _layer(torch.float64)
    x, lora_A, lora_B = (t.detach() for t in _inputs(layer, 3, 7))
    many_A = torch.stack([lora_A, 2 * lora_A, -lora_A])
    many_B = torch.stack([lora_B, lora_B.flip(0), lora_B])
    got = vmap(_as_function(layer))(x, many_A, many_B)
    expected = [_dense(layer, *args) for args in zip(x, many_A, many_B, strict=True)]
    torch.testing.assert_close(got, torch.stack(expected))


def _autocast() -> None:
    layer = _layer()
    x, lora_A, lora_B = _inputs(layer, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.autograd.backward(y, torch.ones_like(y))
    assert x.grad is not None
    assert x.grad.dtype == layer.lora_A_default.grad.dtype == torch.float32
    expected = _dense(layer, x, lora_A, lora_B)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.2)


def _half_base() -> None:
    layer = _layer(torch.bfloat16)
    x = torch.randn(7, _IN, dtype=torch.bfloat16, requires_grad=True)
    assert layer.lora_A_default.dtype == torch.float32
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.autograd.backward(y, torch.ones_like(y))
    assert layer.lora_A_default.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def _compile() -> None:
    if not shutil.which("g++") and not shutil.which("clang++"):
        raise NotMeasuredError("no C++ compiler")
    from torch._inductor import utils as inductor

    layer = _layer()
    x = torch.randn(_TOKENS, _IN, requires_grad=True)
    dy = torch.randn(_TOKENS, _OUT)
    expected = copy.deepcopy(layer)(x)
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True)

    def step() -> Tensor:
        y: Tensor = compiled(x)
        torch.autograd.backward(y, dy)
        return y

    y, sources = inductor.run_and_get_code(step)
    torch.testing.assert_close(y, expected)
    for rows, columns in ((_TOKENS, _OUT), (_TOKENS, _IN)):
        pattern = rf"empty_strided\w*\(\({rows}, {columns}\)"
        most = max(len(re.findall(pattern, source)) for source in sources)
        assert most <= 1, f"compiled code makes {most} buffers of {rows} x {columns} in one pass"


def _tensor_parallel() -> None:
    raise NotMeasuredError("wants two processes; a matter of the tests")


CELLS: dict[str, Callable[[], None]] = {
    "second-order gradients": _second_order,
    "forward-mode AD": _forward_mode,
    "func.grad": _func_grad,
    "vmap over x, A and B": _vmap,
    "autocast": _autocast,
    "bfloat16 base, float32 factors": _half_base,
    "tensor parallelism": _tensor_parallel,
    "compile: one graph, no second (M, N) buffer": _compile,
}
