"""How many Python functions a call of an adapted layer passes, and what a graph may look at."""

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_core


class Model(nn.Module):
    """A layer that its model calls."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.site = kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def frames(call: Callable[[], object]) -> int:
    """The Python functions that a call passes, C functions aside."""
    call()  # what is remembered is made once
    passed = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal passed
        passed += event == "call"

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection may call back into Python, at any call
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return passed - 1  # the lambda's own


@pytest.mark.parametrize(("grad", "most"), [(False, 16), (True, 24)])
@pytest.mark.parametrize(("tokens", "size", "out"), [(1, 64, 64), (8, 320, 320), (77, 768, 320)])
def test_a_call_with_one_plain_adapter_passes_few_functions(tokens, size, out, grad, most):
    model, x = Model(lambda: nn.Linear(size, out)), torch.randn(tokens, size)
    lora_core.inject(model, rank=4, targets="site")
    with torch.set_grad_enabled(grad):
        assert frames(lambda: model.site(x)) <= most


def test_three_adapters_pass_few_more_than_one():
    model, x = Model(lambda: nn.Linear(64, 64)), torch.randn(8, 64)
    lora_core.inject(model, rank=4, targets="site")
    with torch.no_grad():
        one = frames(lambda: model.site(x))
        for name in "ab":
            lora_core.inject(model, rank=4, targets="site", name=name)
        assert frames(lambda: model.site(x)) <= one + 8


@pytest.mark.parametrize("kind", [lambda: nn.Conv2d(4, 4, 3), lambda: nn.Embedding(9, 4)])
def test_other_kinds_call_their_host_and_little_more(kind):
    model, bare = Model(kind), Model(kind)
    x = torch.randn(1, 4, 5, 5) if isinstance(bare.site, nn.Conv2d) else torch.tensor([1, 2])
    lora_core.inject(model, rank=2, targets="site")
    with torch.no_grad():
        assert frames(lambda: model.site(x)) <= frames(lambda: bare.site(x)) + 24


@pytest.mark.parametrize("verb", ["inject", "load"])
def test_layers_that_share_settings_and_layers_that_do_not_are_one_graph(verb, tmp_path: Path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    bare = copy.deepcopy(model)
    lora_core.inject(model, rank=2, targets=nn.Linear, name="slot")
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file in files:
        with torch.no_grad():
            for p in lora_core.parameters(model):
                p.normal_()
        lora_core.save(model, file)
    if verb == "load":
        model = bare
        lora_core.load(model, files[0], "slot")
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.randn(4, 8)
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    for file in files:
        lora_core.load(model, file, "slot", replace=True)
        torch.testing.assert_close(compiled(x), model(x))
    lora_core.scales(model, slot=0.3)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def block() -> nn.ModuleDict:
    return nn.ModuleDict({n: nn.Linear(32, 32) for n in ("to_q", "to_k", "to_v")})


def test_an_injection_of_three_layers_passes_few_functions():
    models = [block(), block()]  # one for what is remembered
    assert frames(lambda: lora_core.inject(models.pop(), rank=4)) <= 312


def test_a_file_of_three_layers_passes_few_functions(tmp_path):
    path, unets = tmp_path / "a.safetensors", [block() for _ in range(3)]
    lora_core.inject(unets[0], rank=4)
    lora_core.save({"unet": unets.pop(0)}, path, format="kohya")
    assert frames(lambda: lora_core.load({"unet": unets.pop()}, path)) <= 910
