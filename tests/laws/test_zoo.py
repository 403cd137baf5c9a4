"""The zoo itself: what every law takes for granted of its rows."""

import torch
from torch import nn
from torch.testing import assert_close

import lora_core
from tests.laws.zoo import adapter_keys, bits, flags, moves, plain, same_bits, trained_keys


def test_a_row_builds_the_same_model_and_adapter_each_time(kind):
    x = kind.sample()
    assert torch.equal(x, kind.sample())
    assert same_bits(bits(kind.bare()), bits(kind.bare()))
    assert same_bits(bits(kind.adapted()), bits(kind.adapted()))
    assert torch.equal(kind.adapted().eval()(x), kind.adapted().eval()(x))


def test_a_rows_adapter_shows_in_the_output_of_every_sample(kind):
    model = kind.adapted()
    for batch in (1, 3):
        assert moves(model, kind.sample(batch))


def test_a_row_has_host_parameters_that_no_adapter_touches_and_a_buffer(kind):
    model = kind.adapted()
    mine = set(trained_keys(model))
    assert mine
    assert mine <= set(adapter_keys(model))
    assert set(flags(model)) - mine
    assert all(train is (n in mine) for n, train in flags(model).items())
    assert list(model.buffers())


def test_a_rows_fresh_adapter_changes_nothing(kind):
    model, x = kind.bare(), kind.sample()
    lora_core.inject(model, **{"rank": 2, **kind.options})
    assert_close(model.eval()(x), plain(kind, x))


def test_a_row_is_bare_again_after_eject(kind):
    model, bare = kind.bare(), kind.bare()
    kind.inject(model)
    lora_core.eject(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert same_bits(bits(model), bits(bare))
    assert flags(model) == flags(bare)


def test_a_model_that_ignores_its_adapter_would_be_noticed():
    layer = lora_core.LoRALinear(nn.Linear(4, 4), rank=2)
    assert not moves(layer, torch.randn(3, 4))
