"""The verbs take time in proportion to the layers; counted in calls, not seconds."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import lora_core


def calls(verb: Callable[[], object]) -> int:
    """How many functions `verb` calls, those of torch included."""
    seen = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        verb()
    finally:
        sys.setprofile(before)
    return seen


def flat(layers: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])


def nested(layers: int) -> nn.Module:
    def block() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("to_q", "to_k", "to_v", "mlp")})

    return nn.Sequential(*[nn.Sequential(block()) for _ in range(layers // 4)])


VERBS: dict[str, Callable[[nn.Module, Path], object]] = {
    "inject": lambda m, _: lora_core.inject(m, rank=1, targets="*", name="new"),
    "second": lambda m, _: lora_core.inject(m, rank=1, targets=nn.Linear, name="second"),
    "save": lambda m, path: lora_core.save(m, path / "b", "new"),
    "eject": lambda m, _: lora_core.eject(m, "second"),
    "scales": lambda m, _: lora_core.scales(m, new=0.5),
    "merge": lambda m, _: lora_core.merge(m),
    "unmerge": lambda m, _: lora_core.unmerge(m),
    "eject all": lambda m, _: lora_core.eject(m),
    "load": lambda m, path: lora_core.load(m, path / "b", check_base=False),
}
# calls per layer of any verb, a quarter above the most that is counted
MOST = 700


@pytest.mark.parametrize("make", [flat, nested])
def test_twice_the_layers_take_twice_the_calls(
    make: Callable[[int], nn.Module], tmp_path: Path
) -> None:
    counts: dict[str, list[int]] = {name: [] for name in VERBS}
    for layers in (8, 64, 128):  # the first round imports and caches
        model = make(layers)
        for name, verb in VERBS.items():
            counts[name].append(calls(lambda v=verb, m=model: v(m, tmp_path)))
    for name, (_, once, twice) in counts.items():
        assert twice <= 2.1 * once, (name, once, twice)
        assert twice <= MOST * 128, (name, twice / 128)
