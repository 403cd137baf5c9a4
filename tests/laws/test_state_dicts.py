"""State dicts: the host's keys stay, old checkpoints load, and the meta device comes to life."""

import re

import pytest
import torch
from torch.testing import assert_close

from lora_core import ConfigError, disabled, eject, inject, parameters
from tests.laws.zoo import adapter_keys, bits, flags, gradients, loss_of, plain, same_bits


def test_the_hosts_keys_stay_in_their_order_and_the_adapters_come_beside(kind):
    bare, model = kind.bare(), kind.adapted()
    mine = adapter_keys(model)
    assert same_bits(bits(model, adapters=False), bits(bare))
    assert sorted(model.state_dict()) == sorted([*bare.state_dict(), *mine])
    host = [n for n, _ in model.named_parameters() if n not in mine]
    assert host == [n for n, _ in bare.named_parameters()]


def test_an_old_checkpoint_loads_before_injection(kind):
    old, model, x = kind.bare(seed=11), kind.bare(), kind.sample()
    model.load_state_dict(old.state_dict())
    kind.inject(model)
    with disabled(model.eval()):
        assert_close(model(x), plain(kind, x, seed=11))


def test_an_old_checkpoint_loads_after_injection_and_lacks_the_adapters_alone(kind):
    old, model, x = kind.bare(seed=11), kind.adapted(), kind.sample()
    mine = adapter_keys(model)
    before, trains = bits(model), flags(model)
    missing, unexpected = model.load_state_dict(old.state_dict(), strict=False)
    assert sorted(missing) == sorted(mine)
    assert unexpected == []
    assert same_bits(bits(model, adapters=False), bits(old))
    assert all(torch.equal(t, before[n]) for n, t in bits(model).items() if n in mine)
    assert flags(model) == trains
    # it is what it would have been, had the adapters come to the checkpoint
    expected = kind.inject(kind.bare(seed=11)).eval()
    expected.load_state_dict({n: before[n] for n in mine}, strict=False)
    assert torch.equal(model.eval()(x), expected(x))
    eject(model)
    assert torch.equal(model(x), old.eval()(x))


def test_a_strict_load_of_an_old_checkpoint_names_the_adapters_alone(kind):
    model = kind.adapted()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: ") as error:
        model.load_state_dict(kind.bare().state_dict())
    assert "Unexpected" not in str(error.value)
    assert sorted(re.findall(r'"([^"]+)"', str(error.value))) == sorted(adapter_keys(model))


def test_an_old_checkpoint_loads_strictly_after_eject(kind):
    old, model, x = kind.bare(seed=11), kind.adapted(), kind.sample()
    eject(model)
    model.load_state_dict(old.state_dict())
    assert torch.equal(model.eval()(x), old.eval()(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_whole_state_dict_loads_strictly_into_a_model_that_was_injected_alike(kind, assign):
    source, x = kind.inject(kind.bare(seed=11), seed=13), kind.sample()
    model = kind.adapted()
    optimiser_sees = parameters(model)
    model.load_state_dict(source.state_dict(), assign=assign)
    assert same_bits(bits(model), bits(source))
    assert torch.equal(model.eval()(x), source.eval()(x))
    kept = [a is b for a, b in zip(parameters(model), optimiser_sees, strict=True)]
    assert not any(kept) if assign else all(kept)


def test_assigning_keeps_what_trains_and_what_is_frozen(kind):
    source, model, x = kind.inject(kind.bare(seed=11), seed=13), kind.adapted(), kind.sample()
    trains = flags(model)
    state = {n: t.detach().clone() for n, t in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert flags(model) == trains
    assert all(p.is_leaf for p in model.parameters())
    for mine, theirs in zip(gradients(model, x), gradients(source, x), strict=True):
        assert mine.abs().max() > 0
        assert torch.equal(mine, theirs)
    eject(model)
    assert flags(model) == flags(kind.bare())


def test_assigning_an_old_checkpoint_keeps_the_host_frozen(kind):
    old, model, x = kind.bare(seed=11), kind.adapted().eval(), kind.sample()
    trains, mine, before = flags(model), parameters(model), bits(model)
    model.load_state_dict(old.state_dict(), strict=False, assign=True)
    assert flags(model) == trains
    assert all(a is b for a, b in zip(parameters(model), mine, strict=True))
    expected = kind.inject(kind.bare(seed=11)).eval()
    expected.load_state_dict({n: before[n] for n in adapter_keys(model)}, strict=False)
    assert torch.equal(model(x), expected(x))


def on_meta(kind):
    kind.excuse("meta")
    with torch.device("meta"):
        return kind.bare()


def test_what_is_drawn_from_a_weights_values_is_refused_where_there_are_none(kind):
    with torch.device("meta"):
        model = kind.bare()
    if "meta" not in kind.excused:
        kind.inject(model)
        return
    with pytest.raises(ConfigError, match=r"needs the weight's values, which the meta device has"):
        kind.inject(model)
    assert list(model.state_dict()) == list(kind.bare().state_dict())


def test_a_model_built_and_injected_on_the_meta_device_loads_into_memory(kind):
    source, x = kind.adapted(), kind.sample()
    model = kind.inject(on_meta(kind))
    assert all(t.is_meta for t in model.state_dict().values())
    trains = flags(model)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    assert flags(model) == trains == flags(source)
    assert torch.equal(model.eval()(x), source.eval()(x))
    assert all(g.abs().max() > 0 for g in gradients(model, x))


def test_a_model_on_the_meta_device_takes_the_tensors_of_a_checkpoint_as_they_are(kind):
    kind.excuse("meta call")
    source, x = kind.adapted(), kind.sample()
    model = kind.inject(on_meta(kind))
    trains = flags(model)
    state = {n: t.detach().clone() for n, t in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert flags(model) == trains
    assert torch.equal(model.eval()(x), source.eval()(x))
    assert all(g.abs().max() > 0 for g in gradients(model, x))


@pytest.fixture
def _nan_in_empty_memory():
    """Fills new memory, which is often zero by chance."""
    torch.use_deterministic_algorithms(mode=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.usefixtures("_nan_in_empty_memory")
def test_a_fresh_adapter_that_comes_from_the_meta_device_starts_at_nothing(kind):
    old, x = kind.bare(seed=11), kind.sample()
    model = kind.inject(on_meta(kind)).to_empty(device="cpu")
    model.load_state_dict(old.state_dict(), strict=False)
    assert_close(model.eval()(x), plain(kind, x, seed=11))
    loss_of(model(x)).backward()
    assert any(p.grad.abs().max() > 0 for p in parameters(model))


def test_an_adapter_that_comes_from_the_meta_device_is_drawn_as_widely_as_a_fresh_one(kind):
    kind.excuse("meta")
    wide, hollow = kind.bare(), on_meta(kind)
    for model in (wide, hollow):
        inject(model, **{"rank": 4, **kind.options})
    fresh = dict(wide.named_parameters())
    drawn = dict(hollow.to_empty(device="cpu").named_parameters())
    for name, p in fresh.items():
        if "lora_A_" in name or "lora_mid_" in name:
            assert 0.6 < drawn[name].abs().max() / p.abs().max() < 1.7


def test_a_bare_model_from_the_meta_device_is_adapted_once_it_is_loaded(kind):
    source, x = kind.adapted(), kind.sample()
    with torch.device("meta"):
        model = kind.bare()
    model.to_empty(device="cpu")
    model.load_state_dict(kind.bare().state_dict())
    kind.inject(model)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_an_adapted_model_goes_to_the_meta_device_whole(kind):
    kind.excuse("meta call")
    model, x = kind.adapted().eval(), kind.sample()
    shape = model(x).shape
    trains = flags(model)
    model.to("meta")
    assert all(t.is_meta for t in model.state_dict().values())
    assert flags(model) == trains
    y = model(x.to("meta"))
    assert y.is_meta
    assert y.shape == shape
