"""What a call of an adapted layer is beside its arithmetic: traced, checkpointed, or pinned."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lora_core._errors import AdapterError, ConfigError, UnsupportedLayerError, listed
from lora_core._layers.state import STATE, Change, State, set_changes

_MOMENT = 1e-4  # seconds between two looks at a change that another thread makes
_LARGEST = 2**31  # a size of a dimension stays below

BARE = State()  # of a module without adapters


class _Pins(threading.local):
    """What the running thread has pinned of every module, the innermost block last."""

    blocks: tuple[Mapping[nn.Module, State], ...] = ()


PINS = _Pins()


def is_ordinary(x: object) -> bool:
    """Whether a call is nothing but arithmetic: not traced or pinned."""
    return not (torch.compiler.is_compiling() or type(x) is not Tensor or PINS.blocks)


Operands = tuple[State, tuple[Any, Any], tuple[Any, Any, Any, float]]


def ordinary(layer: nn.Module, x: object) -> Operands | None:
    """What a call that is nothing but arithmetic reads: state, weight and bias, and the update.

    None where a call has to look closer: traced, pinned, merged, or amid a change.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or PINS.blocks:  # `is_ordinary`
        return None
    state = layer.__dict__.get(STATE)
    if state is None or state.pair is None:
        return None
    own: Any = layer._parameters
    try:
        return state, (own["weight"], own["bias"]), state.pair.row(layer)
    except KeyError:  # of what another thread takes off, or torch computes
        return None


def seen_state(layer: nn.Module) -> State:
    """The state of a layer, as the running thread sees it.

    Raises:
        AdapterError: If an adapter that is pinned was taken off, or replaced.
    """
    state: State = layer.lora_state  # type: ignore[assignment]
    pin = pin_of(layer) if PINS.blocks else None
    if pin is None:
        return state
    names, here = pin.selection.names, state.configs
    gone = [name for name in names if here.get(name) is not pin.configs[name]]
    if gone:
        raise AdapterError(
            f"An adapter must stay while it is pinned, but {listed(gone)} was taken off or"
            " replaced. Eject or replace it after `with pinned(model)`."
        )
    return state._replace(selection=pin.selection)


def pin_of(layer: nn.Module) -> State | None:
    """What the running thread pinned of a layer; None where it pinned nothing."""
    pins = PINS.blocks[-1]
    # a parameter that was adapted since then was a bare one of its owner
    owned = vars(layer).get("lora_owner", ())
    return pins.get(layer) or next((BARE for owner in owned if owner in pins), None)


def refuse_pinned(what: str, modules: Iterable[nn.Module]) -> None:
    """Raises where the running thread would not see what the function called `what` does."""
    if PINS.blocks and any(module in PINS.blocks[-1] for module in modules):
        raise ConfigError(
            f"`{what}` must be called outside `with pinned(model)`, but is inside, where this"
            " thread would not see what it does. Call it first, then pin."
        )


def refuse_pins() -> None:
    """Raises where a graph that is being compiled would not look at what is pinned."""
    if PINS.blocks:
        raise ConfigError(
            "A compiled model must run outside `with pinned(model)`, but runs in one. Choose with"
            " `scales` alone, which compiled models follow; checkpoints inside one need no pin."
        )


@contextmanager
def changing(*layers: nn.Module) -> Iterator[None]:
    """While the values of layers change together with what they know of them.

    Calls in other threads that begin meanwhile wait, and those under way run again: see `settled`.
    """
    begun, over = Change(threading.get_ident()), Change()
    try:
        set_changes(layers, begun)
        yield
    finally:
        set_changes(layers, over)


@contextmanager
def at_rest(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Ends what an interrupt left of changes, so that no other thread waits for ever."""
    try:
        yield
    finally:
        for layer in layers:
            state: State = layer.lora_state  # type: ignore[assignment]
            thread = state.change.thread
            if thread is not None and thread == threading.get_ident():
                set_changes([layer], Change())


def settled(layers: Sequence[Any], compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives for these layers, all of it before a change or after it."""
    if torch.compiler.is_compiling():  # where a graph would take each change for another model
        return compute()
    while True:
        before: list[Any] = [layer.lora_state.change for layer in layers]
        if any(found.thread not in (None, threading.get_ident()) for found in before):
            time.sleep(_MOMENT)
            continue
        try:
            out = compute()
        except (AttributeError, KeyError):  # of an adapter that another thread took off
            if all(layer.lora_state.change is b for layer, b in zip(layers, before, strict=True)):
                raise
            continue
        if all(layer.lora_state.change is b for layer, b in zip(layers, before, strict=True)):
            return out


def recorded(layer: nn.Module, x: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
    """The call of a layer as nodes of the torch.fx graph that is being traced.

    One call, as of torch's own layers: the graph shares the layer, its adapters and strengths.
    Hooks were run by the tracer, so the graph calls the forward alone.

    Raises:
        UnsupportedLayerError: If the layer is the very module that is traced.
    """
    shared = node_of(x.tracer, layer, "An adapted layer")
    return x.tracer.create_proxy("call_function", run, (shared, *args), kwargs)


def node_of(tracer: Any, module: nn.Module, what: str) -> Proxy:
    """A module itself as a node of the graph, which shares it.

    Raises:
        UnsupportedLayerError: If the module is the very one that is traced.
    """
    if tracer.root is module:
        raise UnsupportedLayerError(
            f"{what} must stand in a model to be traced by torch.fx, but this"
            f" {type(module).__name__} is the whole of it. Trace nn.Sequential(module)."
        )
    return tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})  # type: ignore[no-any-return]


def recorded_read(owner: nn.Module, parameter: str, found: Proxy) -> Proxy:
    """A read of an adapted parameter as nodes of the torch.fx graph that is being traced.

    Of the module, and not of the parameter as torch.fx itself found it: a graph would copy what
    that reads as, once and for all.

    Raises:
        UnsupportedLayerError: If the graph holds the parameter already, or only it is traced.
    """
    shared = node_of(found.tracer, owner, "A module with an adapted parameter")
    if found.node.users:
        raise UnsupportedLayerError(
            f"An adapted parameter must be read under one name to be traced by torch.fx, but"
            f" {parameter!r} of a {type(owner).__name__} is read elsewhere as"
            f" {found.node.target!r}. Untie the two, or eject the adapter first."
        )
    if not found.node._erased:  # by an earlier read
        found.node.graph.erase_node(found.node)
    return found.tracer.create_proxy("call_function", getattr, (shared, parameter), {})


def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer's class, without hooks."""
    return type(layer).forward(layer, *args, **kwargs)


def checked(layer: nn.Module, out: Tensor) -> Tensor:
    """`marked`, but for what is compiled: a graph keeps the strengths that it ran with."""
    return out if torch.compiler.is_compiling() else marked(layer, out)


def marked(layer: nn.Module, out: Tensor) -> Tensor:
    """An output that non-reentrant checkpointing recomputes with the same adapters or not at all.

    Checkpointing compares the shapes of what it recomputes with those of what it saw at first and
    raises CheckpointError where they differ; so what is active is made a shape.
    """
    # no checkpoint, nor another, is told of what autograd keeps
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None or not out.requires_grad:
        return out
    names, strengths, *_ = seen_state(layer).selection
    mark = hash((names, strengths)) % _LARGEST
    same: Tensor = _Marked.apply(out, mark)  # type: ignore[no-untyped-call]
    return same


class _Marked(torch.autograd.Function):
    """The identity, which saves a tensor without numbers and with a shape that says something."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, mark: int) -> Tensor:
        ctx.mark_dirty(out)  # itself, or what comes after could not work on it in place
        ctx.save_for_backward(out.new_empty(0, mark))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors  # a checkpoint compares when it is asked for them
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, mark: None) -> Tensor:  # noqa: ARG004
        return tangent
