"""What trains, how fast, and how far it may go."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lora_core import AdapterError, ConfigError, inject, parameter_groups, parameters
from lora_core.testing.laws import train_pretend


def adapted(*names: str, seed: int = 0, **options: object) -> nn.Sequential:
    """Three linear layers with trained adapters, every factor of which trains."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    for name in names:
        inject(model, **{"rank": 2, "targets": nn.Linear, "name": name, **options})
        train_pretend(model, name)
    for p in parameters(model):
        p.requires_grad_(True)
    return model


# -- parameter groups


def moves(model: nn.Module, groups: object) -> list[torch.Tensor]:
    """How far one step of plain gradient descent moves each factor."""
    before = [p.detach().clone() for p in parameters(model)]
    optimizer = torch.optim.SGD(groups, lr=2.0**-4)
    model(torch.ones(5, 3).double()).square().sum().backward()
    optimizer.step()
    return [p.detach() - b for p, b in zip(parameters(model), before, strict=True)]


@given(st.sampled_from([0.25, 1.0, 3.0, 16.0]), st.integers(0, 9))
def test_a_step_moves_the_up_projection_as_much_further_as_the_ratio_says(ratio, seed):
    model = adapted("a", seed=seed)
    twin = copy.deepcopy(model)
    plain = moves(twin, parameters(twin))
    found = moves(model, parameter_groups(model, lr=2.0**-4, lr_ratio=ratio))
    assert all(move.abs().max() > 1e-6 for move in plain)
    assert_close(found[0::2], plain[0::2])
    assert_close(found[1::2], [ratio * move for move in plain[1::2]])


@given(st.sets(st.integers(0, 11)), st.sampled_from([None, "a", "b"]))
def test_the_groups_hold_what_trains_once_and_nothing_else(frozen, name):
    model = adapted("a", "b")
    for i in frozen:
        parameters(model)[i].requires_grad_(False)
    expected = {id(p) for p in parameters(model, name) if p.requires_grad}
    if not expected:
        return
    groups = parameter_groups(model, name, lr=0.25, weight_decay=0.5)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(expected)
    assert {id(p) for p in held} == expected
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for key, p in model.named_parameters():
        if id(p) in expected:
            assert rates[id(p)] == (0.25 if "lora_A_" in key else 4.0)
    assert all(group["params"] and group["weight_decay"] == 0.5 for group in groups)


def test_an_optimiser_takes_the_groups_as_they_are():
    optimizer = torch.optim.AdamW(parameter_groups(adapted("a"), lr=0.5))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0), (8.0, 0)]


def test_a_factor_that_two_layers_share_comes_once():
    model = adapted("a")
    model[1].lora_B_a = model[0].lora_B_a
    held = [p for group in parameter_groups(model, lr=1.0) for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0}, "`lr` must be above 0, but is 0."),
        ({"lr": -0.5}, "`lr` must be above 0, but is -0.5."),
        ({"lr": float("nan")}, "`lr` must be a finite number, but is nan."),
        ({"lr": "1e-4"}, "`lr` must be a finite number, but is '1e-4'."),
        ({"lr": True}, "`lr` must be a finite number, but is True."),
        ({"lr": 1.0, "lr_ratio": 0.0}, "`lr_ratio` must be above 0, but is 0.0."),
        ({"lr": 1e200, "lr_ratio": 1e200}, "`lr * lr_ratio` must be a finite number, but is inf."),
        ({"lr": 1.0, "weight_decay": -1}, "`weight_decay` must be at least 0, but is -1."),
    ],
)
def test_a_rate_out_of_range_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parameter_groups(adapted("a"), **wrong)


@pytest.mark.parametrize("name", [None, "a"])
def test_an_adapter_that_nowhere_trains_has_no_groups(name):
    model = adapted("a").requires_grad_(False)
    whose = "'a'" if name else "the model"
    message = (
        f"An adapter must train to be optimised, but all 6 factors of {whose} are frozen."
        " Set `requires_grad` on those that are to train."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parameter_groups(model, name, lr=1.0)


def test_groups_of_an_unknown_adapter_are_an_error():
    with pytest.raises(AdapterError, match="^`name` must be an adapter of the model, but is 'c'"):
        parameter_groups(adapted("a"), "c", lr=1.0)
