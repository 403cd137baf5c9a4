"""Copies of an adapted model: each is whole, and none shares anything with its original."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lora_core import disabled, eject, parameters, scales
from tests.laws.zoo import bits, flags, gradients, moves, same_bits, trained_keys


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def pickled_as_of_old(model):
    return pickle.loads(pickle.dumps(model, protocol=2))


def saved_by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(model):
    return AveragedModel(model).module


COPIES = [copy.deepcopy, pickled, saved_by_torch, averaged]


@pytest.mark.parametrize("duplicate", [*COPIES, pickled_as_of_old])
def test_a_copy_is_the_model_and_shares_nothing_with_it(kind, duplicate):
    model, x = kind.adapted().eval(), kind.sample()
    scales(model, default=0.7)
    before = model(x)
    twin = duplicate(model)

    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert same_bits(bits(twin), bits(model))
    assert flags(twin) == flags(model)
    assert torch.equal(twin(x), before)
    mine = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not any(t.untyped_storage().data_ptr() in mine for t in twin.state_dict().values())

    with torch.no_grad():
        for p in parameters(twin):
            p.add_(1)
    assert not torch.allclose(twin(x), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copys_adapters_are_chosen_and_ejected_by_themselves(kind, duplicate):
    model, x = kind.adapted().eval(), kind.sample()
    before, plain = model(x), kind.bare().eval()(x)
    twin = duplicate(model)
    scales(twin, default=0.0)
    assert torch.equal(model(x), before)
    with disabled(model):
        scales(twin, default=1.0)
        assert torch.equal(twin(x), before)
    eject(twin)
    assert torch.equal(twin(x), plain)
    assert flags(twin) == flags(kind.bare())
    assert torch.equal(model(x), before)
    eject(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_trains_as_its_original_does(kind, duplicate):
    model, x = kind.adapted().train(), kind.sample()
    for mine, theirs in zip(gradients(model, x), gradients(duplicate(model), x), strict=True):
        assert mine.abs().max() > 0
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_made_while_disabled_is_the_base_with_its_adapters_at_rest(kind, duplicate):
    model, x = kind.adapted().eval(), kind.sample()
    before = model(x)
    with disabled(model):
        plain, twin = model(x), duplicate(model)
    assert not torch.allclose(plain, before)
    assert torch.equal(twin(x), plain)
    scales(twin, default=1.0)
    assert torch.equal(twin(x), before)
    assert torch.equal(model(x), before)


def test_a_moving_average_follows_the_adapters_and_leaves_the_base(kind):
    model, x = kind.adapted().eval(), kind.sample()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    assert moves(average.module, x)
    average.update_parameters(model)  # the first update copies
    first = bits(model)
    with torch.no_grad():
        for p in parameters(model):
            p.add_(torch.randn_like(p))
    average.update_parameters(model)

    mine, host = set(trained_keys(model)), bits(model)
    for key, value in bits(average.module).items():
        if key in mine:
            expected = 0.75 * first[key] + 0.25 * model.state_dict()[key]
            torch.testing.assert_close(value, expected)
            assert not torch.equal(value, first[key])
        else:
            assert torch.equal(value, host[key])
    twin = kind.adapted().eval()
    twin.load_state_dict(average.module.state_dict())
    assert torch.equal(average(x), twin(x))
