"""Coming and going: nothing of an adapter outlives it."""

import gc

import pytest

from lora_core import disabled, eject, inject, scales
from tests.laws.zoo import bits, flags, same_bits


@pytest.mark.slow
def test_500_cycles_of_inject_and_eject_leave_nothing_behind(kind, portrait):
    model, x = kind.bare(), kind.sample()
    before, seen = bits(model), portrait(model)

    def cycle():
        inject(model, **{"rank": 2, **kind.options})
        with scales(model, default=0.5), disabled(model):
            pass
        eject(model)

    for _ in range(5):
        cycle()
    model(x)
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(500):
        cycle()
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert portrait(model) == seen
    assert same_bits(bits(model), before)
    assert flags(model) == flags(kind.bare())
