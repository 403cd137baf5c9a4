"""What an adapted layer is: a mixin that joins the class of the very object it adapts.

A layer is adapted by swapping its class for a subclass of that class, so its keys, hooks, flags,
attributes and identity survive.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lora_core import functional
from lora_core._errors import MergeError, UnsupportedLayerError
from lora_core._layers.context import (
    checked,
    is_ordinary,
    marked,
    recorded,
    recorded_read,
    settled,
)
from lora_core._layers.kind import KINDS, TRANSPOSED, Kind, host_kind
from lora_core._layers.parts import factors_of, parts_of, refuse_resized, reset_parts
from lora_core._layers.state import STATE, State, change, is_settled, lock, select, state_of
from lora_core._layers.updates import Active, active, added, dense
from lora_core.kernels.norms import without_autocast

_MARK = "lora_merged"  # key beside a merged weight in a state dict


class LoRAMixin(nn.Module):
    """Adapters on a layer, flat on the layer itself.

    The parameters of adapter `name` are ``lora_A_<name>`` and ``lora_B_<name>``; what else its
    settings ask for (``lora_mid``, ``lora_magnitude``, ``lora_bias``, ``lora_A0``, ``lora_B0``)
    likewise.

    Attributes:
        lora_host_class: The class that the layer had.
        lora_kind: What its adapters are.
        lora_is_read: Whether its weight reads as the sum, and no update stands beside its output.
        lora_state: What it knows of them.
    """

    lora_host_class: ClassVar[type[nn.Module]]
    lora_kind: ClassVar[Kind]
    lora_is_read: ClassVar[bool] = False
    lora_state: State

    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if args else inputs_of(self, args, kwargs)[0]
        state = state_of(self) if is_ordinary(x) else None
        if state is None or state.pair is None or kwargs:
            return call(self, x, args, kwargs)
        try:
            host, kind, update = self.lora_host_class.forward, self.lora_kind, state.pair.read(self)
        except (AttributeError, KeyError):  # of an adapter that another thread takes off
            return call(self, x, args, kwargs)
        try:
            base = _tensor(self, host(self, *args))
            out = base + kind.update(self, x, update, *args[1:]).to(base.dtype)
        except (IndexError, RuntimeError):
            refuse_resized(self)
            raise
        if is_settled(self, state):
            return marked(self, out)
        return call(self, x, args, kwargs)

    def lora_sum(self, found: Active, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output of the host's own forward plus what is active."""
        x, *more = inputs_of(self, args, kwargs) if kwargs else args
        base = _tensor(self, self.lora_host_class.forward(self, *args, **kwargs))
        return checked(self, added(self, x, base, found, *more))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        configs = self.lora_state.configs
        hollow = [name for name in configs if factors_of(self, name)[0].is_meta]
        stored = {
            t: config.dtype
            for name, config in configs.items()
            for p in parts_of(self, name).values()
            for t in (p, p.grad)
            if t is not None
        }

        def kept(t: Tensor) -> Tensor:
            """What `fn` makes of a tensor; an adapter's stays as wide as it was asked to be."""
            moved, dtype = fn(t), stored.get(t)
            if dtype is None or moved.dtype.itemsize >= dtype.itemsize:
                return moved
            return t.to(moved.device, dtype)

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        for name in hollow:  # with memory now, perhaps, but never with values
            if not factors_of(self, name)[0].is_meta:
                reset_parts(self, name)
        with lock():
            change(self, selection=select(self, self.lora_state.strengths))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_merged(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        merged = self.lora_state.merged
        # where the weights hold the update, which they don't inside `disabled`, the dict says so
        if merged is not None and merged.merged is None:
            destination[f"{prefix}{_MARK}"] = torch.tensor(True)

    def extra_repr(self) -> str:
        state = state_of(self)
        told = [
            f"{name}: {config.shown}" for name, config in (state.configs if state else {}).items()
        ]
        return ", ".join(filter(None, [super().extra_repr(), *told]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, held, *rest = reduced
        if has_our_class(self):
            make, arguments = _blank, (self.lora_host_class, self.lora_is_read)
        state = state_of(self)
        if state is not None and state.merged is not None and state.merged.merged is not None:
            # inside `disabled`: the copy is the base that is shown, unmerged
            own = state.merged.parameter
            shared = {} if own is None else {"weight": own}
            held = {
                **held,
                "_parameters": {**self._parameters, **shared},
                STATE: state.having(selection=select(self, {}), merged=None),
            }
        return (make, arguments, held, *rest)


class LoRARead(LoRAMixin):
    """Adapters on a layer's weight as it reads, whoever reads it: the layer's own host or another.

    For a host beside whose output no update may stand, because its forward does more with it than
    torch's, or because another module reads its weight and never calls it.
    """

    lora_is_read = True

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight plus the active updates."""
        # by torch's own look-up, which gives tracers of torch.fx a node of their graph
        own: Any = nn.Module.__getattr__(self, "weight")
        if isinstance(own, Proxy):
            return recorded_read(self, "weight", own)  # type: ignore[return-value]
        if not torch.compiler.is_compiling() and self in _CALLED.sums:
            return _CALLED.sums[self]
        return settled([self], lambda: _sum(self, own))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        host, weight = self.lora_host_class.forward, cast(Any, self.weight)
        if torch.compiler.is_compiling() or isinstance(weight, Proxy):
            return host(self, *args, **kwargs)
        before = _CALLED.sums
        _CALLED.sums = {**before, self: weight}
        try:
            return host(self, *args, **kwargs)
        finally:
            _CALLED.sums = before


class _Called(threading.local):
    """The sums of the layers that a thread is calling: a call reads one, however often."""

    sums: Mapping[nn.Module, Tensor] = MappingProxyType({})


_CALLED = _Called()


def _sum(layer: LoRARead, own: Tensor) -> Tensor:
    found = active(layer)
    if found.updates:
        with without_autocast(own):
            return checked(layer, functional.merged_weight(own, dense(layer, found)))
    # what an unmerge gives the Parameter must not reach who reads it now
    return own if layer.lora_state.merged is None else own.view_as(own)


# all that a class gains by it; a host may have none of these
OWN_NAMES = frozenset(
    name
    for name in (*vars(LoRAMixin), *LoRAMixin.__annotations__, "lora_plain_attributes")
    if name.startswith("lora_")
)


def _tensor(layer: Any, out: object) -> Tensor:
    """What a host returned, if it is a tensor."""
    if isinstance(out, Tensor):
        return out
    raise UnsupportedLayerError(
        f"An adapted layer's host must return a tensor, but {layer.lora_host_class.__name__}"
        f" returns {type(out).__name__}. Eject the adapter from this layer."
    )


def inputs_of(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a layer is called with, in the order of its host's forward."""
    try:
        bound = inspect.signature(layer.lora_host_class.forward).bind(layer, *args, **kwargs)
    except TypeError:  # the host itself says what is wrong, or a forward of any keywords is right
        return (*args, *kwargs.values())
    bound.apply_defaults()  # or what is given by keyword after one that is left out would be lost
    _, *given = bound.args
    return tuple(given) or tuple(kwargs.values())


def call(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The call of a layer in every case: traced, pinned, merged, or amid a change."""
    if isinstance(x, Proxy):
        return recorded(layer, x, args, kwargs)  # type: ignore[return-value]
    if not isinstance(x, Tensor):
        raise UnsupportedLayerError(
            "An adapted layer must be called with its input first, but"
            f" {layer.lora_host_class.__name__} is called with a {type(x).__name__}. Eject the"
            " adapter from this layer."
        )
    try:
        return settled([layer], lambda: layer.lora_sum(active(layer, x), args, kwargs))
    except (IndexError, RuntimeError):
        refuse_resized(layer)
        raise
    except (AttributeError, KeyError, TypeError):
        if isinstance(layer, LoRAMixin):
            raise
        # the last adapter was taken off since the call began
        out: Tensor = type(layer).forward(layer, *args, **kwargs)
        return out


def refuse_merged(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises if a module below is merged, or the part of a state dict that is meant for it."""
    here = [
        n for n, m in module.named_modules() if (state := state_of(m)) and state.merged is not None
    ]
    there = [
        key.removeprefix(prefix).removesuffix(_MARK).rstrip(".")
        for key in state_dict
        if key.startswith(prefix) and f".{key}".endswith(f".{_MARK}")
    ]
    if here or there:
        raise MergeError(
            "A state dict must be saved and loaded unmerged, but {} is merged at {!r}: an update"
            " could be lost or applied twice. Call `unmerge(model)` {}.".format(
                "the model" if here else "the state dict",
                (prefix + (here or there)[0]).rstrip("."),
                "first" if here else "before `state_dict()`",
            )
        )


# host class -> the class that its objects take on when adapted; most are made on demand
ADAPTED: dict[type[nn.Module], type[LoRAMixin]] = {}
READ: dict[type[nn.Module], type[LoRAMixin]] = {}  # the same where the weight reads as the sum


def has_our_class(layer: LoRAMixin) -> bool:
    """Whether a layer's class is the one that it was given, and no other made of it since."""
    return type(layer) is adapted_class(layer.lora_host_class, read=layer.lora_is_read)


def adapted_class(host: type[nn.Module], *, read: bool = False) -> type[LoRAMixin]:
    """The class that objects of class `host` take on when adapted; one per host class and form."""
    made, form, word = (READ, LoRARead, "Read") if read else (ADAPTED, LoRAMixin, "")
    if host not in made:
        known = host_kind(host)  # type: ignore[arg-type]
        names = {
            "lora_host_class": host,
            "lora_kind": TRANSPOSED if known is None else KINDS[known],
            "__module__": host.__module__,
            "__doc__": host.__doc__,
        }
        cls = type(f"LoRA{word}{host.__name__}", (form, host), names)
        made[host] = cast(type[LoRAMixin], cls)
    return made[host]


def _blank(host: type[nn.Module], read: bool = False) -> LoRAMixin:
    """An adapted object without its state: pickle and deepcopy fill it."""
    cls = adapted_class(host, read=read)
    return cls.__new__(cls)
