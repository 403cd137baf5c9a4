"""Coming and going: nothing of an adapter outlives it."""

import gc

import pytest

from lora_core import disabled, eject, inject, scales
from tests.laws.zoo import bits, flags, same_bits


@pytest.mark.slow
def test_500_cycles_of_inject_and_eject_leave_nothing_behind(kind, portrait):
    model, x = kind.bare(), kind.sample()
    before, seen = bits(model), portrait(model)

    def cycle(number):
        inject(model, **{"rank": 2, **kind.options})
        if number % 10 == 0:
            with scales(model, default=0.5), disabled(model):
                model(x)
        eject(model)

    for number in range(21):  # caches fill
        cycle(number)
    gc.collect()
    gc.freeze()  # what is there already takes no part in counting
    try:
        for number in range(500):
            cycle(number)
        gc.collect()
        assert len(gc.get_objects()) < 100
    finally:
        gc.unfreeze()
    assert portrait(model) == seen
    assert same_bits(bits(model), before)
    assert flags(model) == flags(kind.bare())
