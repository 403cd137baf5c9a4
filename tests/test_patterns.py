"""Strengths by pattern, and an adapter on some of its layers alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_core
from lora_core import ConfigError, TargetError, scales
from lora_core._layers import delta_of


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = {
        n: nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for n in ("down", "mid")
    }
    made = nn.ModuleDict(parts)
    for name in ("style", "other"):
        lora_core.inject(made, targets=["q", "k"] if name == "style" else "q", rank=2, name=name)
    for p in lora_core.parameters(made):
        p.data.normal_()
    return made


def deltas(made: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": delta_of(made[n][k]) for n in ("down", "mid") for k in ("q", "k")}


def test_each_layer_has_the_strength_of_the_first_pattern_that_matches() -> None:
    made = model()
    with scales(made, style=1.0):
        whole = deltas(made)
    with scales(made, other=1.0):
        other = {n: delta_of(made[n]["q"]) for n in ("down", "mid")}
    with scales(made, style={"*mid*": 0.25, "k": 0.0, "*": 1.0}, other=2.0) as chosen:
        assert repr(chosen) == "scales(style=by layer, other=2)"
        found = deltas(made)
        for name, factor in {"down.q": 1.0, "down.k": 0.0, "mid.q": 0.25, "mid.k": 0.25}.items():
            part, key = name.split(".")
            wanted = factor * whole[name] + (2.0 * other[part] if key == "q" else 0.0)
            torch.testing.assert_close(found[name], wanted)
        (style, _) = lora_core.summary(made).adapters
        assert style.strengths == (1.0, 0.0, 0.25)
    assert lora_core.summary(made).adapters[1].strengths == (1.0,)
    x = torch.randn(3, 4)
    with scales(made, style={"*mid*": 0.25, "*": 1.0}):
        out = made["mid"]["q"](x)
        lora_core.merge(made)
        torch.testing.assert_close(made["mid"]["q"].eval()(x), out)
        lora_core.unmerge(made)


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (
            {"*up*": 1.0, "*": 1.0},
            TargetError,
            "`style` must match a layer with each pattern, but '*up*' matches none of 4: 'down.q',",
        ),
        (
            {"*mid*": 1.0},
            TargetError,
            "`style` must have a value for every layer, but none for 'down.q', 'down.k'. Add",
        ),
        ({}, ConfigError, "`style` must map globs to numbers, as in {'*mid*': 0.3, '*': 1.0}, but"),
        (
            {3: 1.0},
            ConfigError,
            "`style` must map globs to numbers, as in {'*mid*': 0.3, '*': 1.0}",
        ),
        ({"*": "a"}, ConfigError, "`style` must be a finite number, but is 'a'."),
    ],
)
def test_patterns_that_leave_something_open_are_errors(
    values: Any, kind: type[Exception], said: str
) -> None:
    made = model()
    before = lora_core.summary(made)
    with pytest.raises(kind, match=f"^{re.escape(said)}"):
        scales(made, style=values)
    assert lora_core.summary(made) == before


def test_each_layer_learns_at_the_rate_of_the_first_pattern_that_matches() -> None:
    made = model()
    lora_core.trainable(made, "style")
    groups = lora_core.parameter_groups(
        made, "style", lr={"mid.*": 0.5, "*": 0.25}, lr_ratio=2.0, weight_decay=0.125
    )
    assert [(g["lr"], len(g["params"])) for g in groups] == [
        (0.25, 2),
        (0.5, 2),
        (0.5, 2),
        (1.0, 2),
    ]
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for part, slow in (("down", 0.25), ("mid", 0.5)):
        for layer in made[part].values():
            assert rates[id(layer.lora_A_style)] == slow
            assert rates[id(layer.lora_B_style)] == 2 * slow
    torch.optim.AdamW(groups)
    with pytest.raises(TargetError, match="^`lr` must have a value for every layer, but none for"):
        lora_core.parameter_groups(made, "style", lr={"mid.*": 0.5})


def test_a_part_of_an_adapter_is_an_adapter(tmp_path: Path) -> None:
    made = model()
    whole = lora_core.adapter_of(made, "style")
    part = whole.select("mid.*", "*down.q")
    assert list(part.layers) == ["down.q", "mid.q", "mid.k"]
    bare = nn.ModuleDict(
        {n: nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for n in ("down", "mid")}
    )
    bare.load_state_dict({k: t for k, t in made.state_dict().items() if "lora" not in k})
    report = lora_core.load(bare, part)  # the base is looked at, of these layers
    assert [layer.name for layer in report.layers] == ["down.q", "mid.q", "mid.k"]
    lora_core.write(part, tmp_path / "part.safetensors")
    assert lora_core.read(tmp_path / "part.safetensors").layers.keys() == part.layers.keys()
    said = "`select` must match a layer with each pattern, but 'up' matches none of 4: 'down.q',"
    with pytest.raises(TargetError, match=f"^{re.escape(said)}"):
        whole.select("up")
