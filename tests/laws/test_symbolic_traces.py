"""torch.fx runs a model on placeholders: no layer may insist on tensors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lora_core import UnsupportedLayerError, inject, parameters


def test_a_symbolic_trace_computes_the_same_and_shares_the_parameters(kind):
    model = kind.adapted().eval()
    graph = torch.fx.symbolic_trace(model)
    for batch in (3, 5):
        x = kind.sample(batch)
        assert_close(graph(x), model(x))
    before = graph(x)
    with torch.no_grad():
        for p in parameters(model):
            p.add_(1)
    assert_close(graph(x), model(x))
    assert not torch.allclose(graph(x), before)
    graph(x).sum().backward()
    assert all(p.grad is not None for p in parameters(model))


class Twice(nn.Module):
    """Reads its parameter twice in a forward."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.w + x @ self.w.T


def test_every_read_of_a_parameter_is_in_the_graph():
    model = nn.Sequential(Twice(), Twice())
    inject(model, rank=2, targets=["0.w", "1.w"])
    for p in parameters(model):
        p.data.normal_()
    graph, x = torch.fx.symbolic_trace(model), torch.randn(3, 4)
    graph.graph.lint()
    assert_close(graph(x), model(x))
    assert sorted(graph.state_dict()) == sorted(model.state_dict())


def test_a_module_that_is_traced_alone_is_refused():
    said = r"^A module with an adapted parameter must stand in a model to be traced by torch\.fx"
    model = Twice()
    inject(model, rank=2, targets="w")
    with pytest.raises(UnsupportedLayerError, match=said):
        torch.fx.symbolic_trace(model)


def test_a_parameter_that_is_read_elsewhere_without_its_adapter_is_refused():
    model = nn.Sequential(Twice(), Twice())
    model[0].w = model[1].w
    inject(model, rank=2, targets="0.w")
    backwards = nn.Sequential(*reversed(model))
    said = r"^An adapted parameter must be read under one name to be traced by torch\.fx, but 'w'"
    with pytest.raises(UnsupportedLayerError, match=said):
        torch.fx.symbolic_trace(backwards)
