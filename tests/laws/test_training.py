"""What training relies on: flags, optimisers, checkpointing, and tensors that autograd takes."""

from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lora_core import (
    MergeError,
    disabled,
    eject,
    inject,
    load,
    merge,
    parameters,
    save,
    scales,
    unmerge,
)
from tests.laws.zoo import bits, gradients, loss_of, same_bits


@contextmanager
def merged_for_a_while(kind, model):
    """Merges, where this kind of layer can be merged."""
    if "merge" in kind.excused:
        with pytest.raises(MergeError):
            merge(model)
        yield
        return
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


def wanting_gradients(x):
    return x.requires_grad_() if x.is_floating_point() else x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_gradients_of_a_plain_call(kind, reentrant):
    model, x = kind.adapted().train(), wanting_gradients(kind.sample())
    if reentrant and not x.requires_grad:
        pytest.skip("the re-entrant form needs an input that takes a gradient")
    plain = gradients(model, x)
    again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for mine, theirs in zip(again, plain, strict=True):
        assert theirs.abs().max() > 0
        # the re-entrant form runs its forward without gradients, which may take other kernels
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_checkpointing_needs_no_input_that_takes_a_gradient(kind):
    model, x = kind.adapted().train(), kind.sample()
    again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    for mine, theirs in zip(again, gradients(model, x), strict=True):
        assert torch.equal(mine, theirs)


def test_reentrant_checkpointing_of_frozen_inputs_is_never_silent(kind):
    model, x = kind.adapted().train(), kind.sample()
    with pytest.warns(UserWarning, match=r"^None of the inputs have requires_grad=True"):
        y = checkpoint(model, x, use_reentrant=True)
    assert not y.requires_grad
    # the way out: what comes before must take a gradient
    y = checkpoint(
        lambda start, x: model(x) + 0 * start,
        torch.zeros((), requires_grad=True),
        x,
        use_reentrant=True,
    )
    loss_of(y).backward()
    assert all(p.grad.abs().max() > 0 for p in parameters(model))


def test_what_is_injected_and_chosen_in_inference_mode_trains(kind):
    def chosen(model):
        kind.inject(model)
        kind.inject(model, "second", seed=17)
        scales(model, default=0.5, second=0.25)
        return model.eval()

    model, x = kind.bare(), kind.sample()
    with torch.inference_mode():
        chosen(model)(x)
    assert not any(t.is_inference() for t in model.state_dict().values())
    expected = chosen(kind.bare())
    for part in (model, expected):
        for p in parameters(part):
            p.requires_grad_()
    for mine, theirs in zip(gradients(model, x), gradients(expected, x), strict=True):
        assert theirs.abs().max() > 0
        assert torch.equal(mine, theirs)


def test_what_is_merged_and_unmerged_in_inference_mode_trains(kind):
    model, x = kind.adapted().eval(), kind.sample()
    before, expected = bits(model), gradients(model, x)
    with torch.inference_mode():
        apart = model(x)
        with merged_for_a_while(kind, model):
            assert_close(model(x), apart)
    assert same_bits(bits(model), before)
    for mine, theirs in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_an_optimiser_keeps_its_factors_while_adapters_are_switched(kind, tmp_path):
    def train(switch):
        model, x = kind.adapted().train(), kind.sample()
        optimiser = torch.optim.AdamW(parameters(model), lr=0.1)
        for step in range(4):
            switch(model, x, step)
            torch.manual_seed(step)
            loss_of(model(x)).backward()
            optimiser.step()
            optimiser.zero_grad()
        held = [p for group in optimiser.param_groups for p in group["params"]]
        assert all(a is b for a, b in zip(held, parameters(model), strict=True))
        assert set(optimiser.state) == set(held)
        return bits(model)

    def switches(model, x, step):
        with disabled(model):
            model(x)
        with scales(model, default=0.3):
            model(x)
        scales(model, default=0.0)
        scales(model, default=1.0)
        if step == 1:  # one that comes and goes
            model(x)
            inject(model, **{"rank": 1, **kind.options}, name="guest", freeze=False)
            eject(model, "guest")
        if step == 2:
            with merged_for_a_while(kind, model):
                model.eval()(x)
            model.train()

    undisturbed = train(lambda model, x, step: None)
    assert same_bits(train(switches), undisturbed)
    assert not same_bits(undisturbed, bits(kind.adapted()))


def test_an_adapter_that_is_switched_off_keeps_still_and_learns_again(kind):
    model, x = kind.adapted(), kind.sample()
    optimiser = torch.optim.SGD(parameters(model), lr=0.1)
    before = bits(model)
    scales(model, default=0.0)
    torch.autograd.backward(loss_of(model(x)))
    optimiser.step()
    assert same_bits(bits(model), before)
    optimiser.zero_grad()
    with disabled(model):
        assert not model(x).requires_grad
    scales(model, default=1.0)
    loss_of(model(x)).backward()
    optimiser.step()
    mine = parameters(model)
    after = bits(model)
    moved = [n for n in before if not torch.equal(after[n], before[n])]
    assert len(moved) == len(mine)


@pytest.mark.parametrize("training", [True, False])
def test_every_verb_keeps_every_training_flag(kind, tmp_path, training):
    model = kind.bare().train(training)
    model.act.train(not training)
    modes = [(m, m.training) for m in model.modules()]

    def kept():
        return all(m.training is mode for m, mode in modes)

    kind.inject(model)
    assert kept()
    # what an adapter brings along does as its site does
    assert all(m.training is training for m in model.site.modules())
    save(model, tmp_path / "a.safetensors")
    with disabled(model), scales(model, default=0.5):
        assert kept()
    assert kept()
    with merged_for_a_while(kind, model):
        assert kept()
    assert kept()
    eject(model)
    assert kept()
    load(model, tmp_path / "a.safetensors")
    assert kept()
    assert all(not m.training for m in model.eval().modules())
    assert all(m.training for m in model.train().modules())
