"""Strengths that a thread, or a checkpoint's second run, keeps whatever is chosen meanwhile."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from lora_core import (
    AdapterError,
    ConfigError,
    checkpoint_context,
    disabled,
    eject,
    inject,
    parameters,
    pinned,
    scales,
)


class Attending(nn.MultiheadAttention):
    """Self-attention that takes one tensor and gives one."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def built(kind):
    """A model of two adapted layers of one kind with two trained adapters, and an input."""
    torch.manual_seed(0)
    make, x = {
        "linear": (lambda: nn.Linear(8, 8), torch.randn(3, 8)),
        "dora": (lambda: nn.Linear(8, 8), torch.randn(3, 8)),
        "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 5, 5)),
        "embedding": (lambda: nn.Embedding(9, 8), torch.randint(9, (3, 4))),
        "attention": (lambda: Attending(8, 2), torch.randn(3, 4, 8)),
    }[kind]
    chain = [make()] if kind == "embedding" else [make(), nn.Tanh(), make()]
    model = nn.Sequential(*chain)
    for name in "ab":
        inject(model, 2, targets=type(chain[0]), name=name, dora=kind == "dora", freeze=name == "a")
    with torch.no_grad():
        for p in parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    scales(model, a=1.0)
    return model, x


KINDS = ["linear", "dora", "conv", "embedding", "attention"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def gradients(model, y):
    """The gradients of a loss of an output, which are then dropped."""
    y.square().sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in parameters(model)]
    model.zero_grad()
    return found


def same(these, those):
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(these, those, strict=True)
    )


def test_a_pinned_thread_sees_one_choice_while_another_thread_chooses(kind):
    model, x = built(kind)
    first = model(x)
    scales(model, b=1.0)
    second = model(x)
    assert not torch.equal(first, second)
    scales(model, a=1.0)
    with pinned(model):
        thread = threading.Thread(target=lambda: scales(model, b=1.0))
        thread.start()
        thread.join()
        assert torch.equal(model(x), first)
    assert torch.equal(model(x), second)


def test_a_switch_in_the_middle_of_a_pinned_call_leaves_that_call_alone():
    model, x = built("linear")
    first = model(x)

    def switch(*_):
        thread = threading.Thread(target=lambda: scales(model, b=1.0))
        thread.start()
        thread.join()

    handle = model[1].register_forward_hook(switch)
    with pinned(model):
        assert torch.equal(model(x), first)
    scales(model, a=1.0)
    assert not torch.equal(model(x), first)  # unpinned, the second layer sees the later choice
    handle.remove()


def test_outputs_of_a_pinned_thread_are_of_one_choice_under_a_switching_thread():
    model, x = built("linear")
    outputs = []
    for name in "ab":
        scales(model, **{name: 1.0})
        outputs.append(model(x))
    done = threading.Event()

    def switching():
        while not done.is_set():
            scales(model, a=1.0)
            scales(model, b=1.0)

    thread = threading.Thread(target=switching)
    thread.start()
    try:
        for _ in range(300):
            with pinned(model):
                y = model(x)
            assert any(torch.equal(y, output) for output in outputs)
    finally:
        done.set()
        thread.join()


def test_blocks_nest_and_end_with_an_error():
    model, x = built("linear")
    first = model(x)
    with pytest.raises(ZeroDivisionError), pinned(model):
        with pinned(model[0]):
            pass
        raise ZeroDivisionError
    scales(model, b=1.0)
    assert not torch.equal(model(x), first)


@pytest.mark.parametrize(
    ("what", "choose"),
    [
        ("scales", lambda m: scales(m, b=1.0)),
        ("disabled", lambda m: disabled(m).__enter__()),
        ("inject", lambda m: inject(m, 2, name="c", targets="0")),
    ],
)
def test_choosing_inside_is_refused(what, choose):
    model, x = built("linear")
    y = model(x)
    with (
        pinned(model),
        pytest.raises(ConfigError, match=f"^`{what}` must be called outside `with pinned"),
    ):
        choose(model)
    assert torch.equal(model(x), y)


def test_a_pinned_adapter_that_was_taken_off_is_an_error():
    model, x = built("linear")
    with (
        pinned(model),
        pytest.raises(AdapterError, match=r"^An adapter must stay while it is pinned, but 'a'"),
    ):
        eject(model, "a")
        model(x)


def test_a_model_without_adapters_is_an_error():
    with pytest.raises(AdapterError, match="must have an adapter"), pinned(nn.Linear(2, 2)):
        pass


def test_a_compiled_model_refuses_to_be_pinned():
    model, x = built("linear")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    with pinned(model), pytest.raises(Exception, match="must run outside `with pinned"):
        compiled(x)
    assert torch.equal(compiled(x), compiled(x))


# -- checkpoints that are run again when strengths have changed


def test_a_checkpoint_is_run_again_with_the_strengths_of_the_forward(kind):
    model, x = built(kind)
    with scales(model, a=0.5):
        expected = gradients(model, model(x))
    again = checkpoint_context(model)
    with scales(model, a=0.5):
        y = checkpoint(model, x, use_reentrant=False, context_fn=again)
    assert same(gradients(model, y), expected)
    with scales(model, a=0.5):
        y = checkpoint(model, x, use_reentrant=False)
        assert same(gradients(model, y), expected)
    assert not same(gradients(model, model(x)), expected)


def test_without_it_other_strengths_are_an_error_and_never_wrong_gradients(kind):
    model, x = built(kind)
    with scales(model, a=0.5):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(CheckpointError, match=r"different metadata[\s\S]*torch.Size\(\[0, "):
        gradients(model, y)
    model.zero_grad()
    ys = []
    for strength in (0.5, 2.0):
        scales(model, a=strength)
        ys.append(checkpoint(model, x, use_reentrant=False))
    with pytest.raises(CheckpointError):
        gradients(model, ys[0])


def test_equal_strengths_are_the_same_whenever_chosen(kind):
    model, x = built(kind)
    with scales(model, a=0.5):
        y = checkpoint(model, x, use_reentrant=False)
    with scales(model, a=0.5):
        gradients(model, y)


def test_a_re_entrant_checkpoint_is_pinned_by_a_decorator():
    model, x = built("linear")
    x.requires_grad_()
    with scales(model, a=0.5):
        expected = gradients(model, model(x))
    with scales(model, a=0.5):
        run = pinned(model)(model.forward)
        y = checkpoint(run, x, use_reentrant=True)
    assert same(gradients(model, y), expected)
