"""What an adapted layer is: a mixin that joins the class of the very object it adapts.

A layer is adapted by swapping its class for a subclass of that class, so its keys, hooks, flags,
attributes and identity survive.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import (
    MergeError,
    UnsupportedLayerError,
)
from lora_core._layers.anatomy import peek
from lora_core._layers.calling import checked, recorded, settled
from lora_core._layers.collecting import Collecting
from lora_core._layers.state import Active, Update

_MARK = "lora_merged"  # key beside a merged weight in a state dict


class LoRAMixin(Collecting):
    """Adapters on a layer; this one on a matrix that maps ``in_features`` to ``out_features``.

    The parameters of adapter `name` are ``lora_A_<name>`` (rank, in_features) and
    ``lora_B_<name>`` (out_features, rank), flat on the layer itself; what else its settings ask
    for (``lora_mid``, ``lora_magnitude``, ``lora_bias``, ``lora_A0``, ``lora_B0``) likewise.
    """

    def lora_addition(self, x: Tensor, base: Tensor) -> Tensor:
        """What the active updates add to the host's output for `x` by way of the weight, wide."""
        (update,), stretch, _, columns = self._lora_wide()
        x = x.double() if x.is_floating_point() else x
        added = self.lora_update(
            x, update._replace(gain=cast(Tensor, update.gain).double())
        ).double()
        if columns is not None:
            added = added + self.lora_through_weight(x, columns.double()).double()
        if stretch is None:
            return added
        own = getattr(self, "bias", None)
        directed = base.double() if own is None else base.double() - self.lora_channels(own, base)
        return added + self.lora_channels(stretch.double(), base) * directed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Proxy):
            return recorded(self, x, args, kwargs)  # type: ignore[return-value]
        if not isinstance(x, Tensor):
            raise UnsupportedLayerError(
                "An adapted layer must be called with its input first, but"
                f" {self.host_class.__name__} is called with a {type(x).__name__}. Eject the"
                " adapter from this layer."
            )

        def compute() -> Tensor:
            active, base = self.lora_active(x), super(LoRAMixin, self).forward(*args, **kwargs)
            if not isinstance(base, Tensor):
                raise UnsupportedLayerError(
                    f"An adapted layer's host must return a tensor, but {self.host_class.__name__}"
                    f" returns {type(base).__name__}. Eject the adapter from this layer."
                )
            return self.lora_added(x, base, active)

        try:
            return settled([self], compute)
        except (AttributeError, KeyError, TypeError):
            if not has_left(self):
                raise
            return call_host(self, *args, **kwargs)

    def lora_added(self, x: Tensor, base: Tensor, active: Active) -> Tensor:
        """The host's output for `x` plus what is active."""
        updates, stretch, bias, columns = active
        out = base
        if columns is not None:
            out = out + self.lora_through_weight(x, columns).to(base.dtype)
        if stretch is not None:
            own = getattr(self, "bias", None)
            directed = base if own is None else base - self.lora_channels(own, base).to(base.dtype)
            out = out + (self.lora_channels(stretch, base) * directed).to(base.dtype)
        for update in updates:
            out = out + self.lora_update(x, update).to(base.dtype)
        if bias is not None:
            out = out + self.lora_channels(bias, base).to(base.dtype)
        return checked(self, out)

    def lora_through_weight(self, x: Tensor, columns: Tensor) -> Tensor:
        """What the host's matrix gives for `x` with its features multiplied by `columns`."""
        weight = self.weight.to(columns.dtype)
        return nn.functional.linear(x.to(columns.dtype) * columns, weight)

    def lora_update(self, x: Tensor, update: Update) -> Tensor:
        """What one update adds to the host's output."""
        lora_A, lora_B, gain, dropout = update
        return functional.lora_update(x, lora_A, lora_B, gain, dropout=dropout)

    def lora_channels(self, values: Tensor, out: Tensor) -> Tensor:
        """Values per output feature, ``(out,)`` or ``(batch, out)``, as they broadcast to `out`."""
        if values.ndim == 1:
            return values
        return values.view(values.shape[0], *[1] * (out.ndim - 2), values.shape[1])

    def lora_delta(self) -> Tensor:
        """The sum of the active updates in the weight's own layout, float32 or wider."""
        updates, stretch, _, columns = self._lora_wide()
        lora_A, lora_B, gain, _ = updates[0]
        dense = functional.lora_delta(*self.lora_as_matrices(lora_A, lora_B), gain)
        matrix = self.lora_matrix(self.weight)
        if stretch is not None:
            dense = dense + stretch[:, None] * matrix.to(dense.dtype)
        if columns is not None:
            weight = self.weight.to(dense.dtype) * self.lora_columns(columns)
            dense = dense + self.lora_matrix(weight)
        return self.lora_like_weight(dense, self.weight)

    def lora_bias_delta(self) -> Tensor | None:
        """What the active adapters add to the bias, None if nothing."""
        return self._lora_wide().bias

    def lora_stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(lora_A, lora_B, gain)`` of what is active as one adapter of matrices, detached.

        In the weight's precision, float32 or wider, as a forward multiplies them. A DoRA adapter
        adds more than these: see `lora_delta`.
        """
        lora_A, lora_B, gain, _ = self._lora_wide().updates[0]
        return (*self.lora_as_matrices(lora_A, lora_B), cast(Tensor, gain))

    def _lora_wide(self) -> Active:
        names, _, gains, _ = self.lora_selection
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            (update,), stretch, bias, columns = self._lora_collect(
                names, gains, None, training=False
            )
        lora_A, lora_B = (f.detach().to(wide) for f in update[:2])
        gain = cast(Tensor, update.gain).to(wide)
        found = Update(lora_A, lora_B, gain, 0.0)
        return Active([found], stretch, None if bias is None else bias.detach(), columns)

    def lora_norm(self, name: str, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """The norm that an adapter's update would have with these factors, by Frobenius."""
        config = self.lora_configs[name]
        if config.tucker:
            lora_A = functional.tucker_down(lora_A, getattr(self, f"lora_mid_{name}"))
        return functional.delta_norm(*self.lora_as_matrices(lora_A, lora_B), config.scale)

    def lora_home(self) -> tuple[nn.Module, str]:
        """The module that has the adapted Parameter, and its name there."""
        return self, "weight"

    def lora_held(self) -> Tensor:
        """The weight's values, to be kept: no later `lora_put` changes them."""
        return self.weight.data

    def lora_held_bias(self) -> Tensor | None:
        """The bias's values, likewise; None where there is none."""
        bias = self._parameters.get("bias")
        return None if bias is None else bias.data

    def lora_put(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Gives the weight other values, and the bias where they are given; in place."""
        swap(self.weight, weight)
        if bias is not None:
            own = self._parameters["bias"]
            assert own is not None
            swap(own, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        hollow = [name for name in self.lora_configs if self.lora_factors(name)[0].is_meta]
        stored = {
            t: config.dtype
            for name, config in self.lora_configs.items()
            for p in self.lora_parts(name).values()
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
            if not self.lora_factors(name)[0].is_meta:
                self.lora_reset(name)
        self.lora_selection = self.lora_select(self.lora_strengths())
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
        state = self.lora_merged
        # where the weights hold the update, which they don't inside `disabled`, the dict says so
        if state is not None and state.merged is None:
            destination[f"{prefix}{_MARK}"] = torch.tensor(True)

    def extra_repr(self) -> str:
        adapters = (
            f"{name}: rank={c.rank}, alpha={c.alpha:g}"
            + ", rslora" * c.rslora
            + ", dora" * c.dora
            + ", bias" * c.bias
            for name, c in _configs(self)
        )
        return ", ".join(filter(None, [super().extra_repr(), *adapters]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, state, *rest = reduced
        if type(self) is adapted_class(self.host_class):
            make, arguments = _blank, (self.host_class,)
        merged = vars(self).get("lora_merged")
        if merged is not None and merged.merged is not None:
            # inside `disabled`: the copy is the base that is shown, unmerged
            shared = {} if merged.parameter is None else {"weight": merged.parameter}
            state = {
                **state,
                "_parameters": {**self._parameters, **shared},
                "lora_selection": self.lora_select({}),
                "lora_merged": None,
            }
        return (make, arguments, state, *rest)


def has_left(layer: nn.Module) -> bool:
    """Whether the last adapter of a layer was taken off since its forward began."""
    return not isinstance(layer, LoRAMixin)


def call_host(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of the class that a layer has now."""
    out: Tensor = type(layer).forward(layer, *args, **kwargs)
    return out


def swap(weight: Tensor, values: Tensor) -> None:
    """Gives a Parameter other values without a copy, and lets autograd know.

    A backward through a forward made before the swap raises instead of using wrong values.
    """
    weight.data = values.to(weight.device, weight.dtype)
    if not weight.is_inference():
        torch.autograd.graph.increment_version(weight)


def refuse_merged(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises if a module below is merged, or the part of a state dict that is meant for it."""
    here = [n for n, m in module.named_modules() if vars(m).get("lora_merged") is not None]
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


def _configs(layer: LoRAMixin) -> list[tuple[str, AdapterConfig]]:
    return list(getattr(layer, "lora_configs", {}).items())


# host class -> what adapts it and its subclasses
KINDS: dict[type[nn.Module], type[LoRAMixin]] = {}
# host class -> the class that its objects take on when adapted; others are made on demand
ADAPTED: dict[type[nn.Module], type[LoRAMixin]] = {}


def adapted_class(host: type[nn.Module]) -> type[LoRAMixin]:
    """The class that objects of class `host` take on when adapted; one per host class."""
    if host not in ADAPTED:
        mixin = next((mixin for kind, mixin in KINDS.items() if issubclass(host, kind)), None)
        names = {"host_class": host, "__module__": host.__module__, "__doc__": host.__doc__}
        made = type(f"LoRA{host.__name__}", (mixin or TransposedLoRAMixin, host), names)
        ADAPTED[host] = cast(type[LoRAMixin], made)
    return ADAPTED[host]


class TransposedLoRAMixin(LoRAMixin):
    """The mixin for layers that store their matrix (in, out), as GPT-2's Conv1D does."""

    lora_linear_in_weight = True

    @classmethod
    def lora_sizes(cls, host: nn.Module) -> tuple[int, int]:
        """The weight's own order."""
        in_features, out_features = peek(host).shape
        return in_features, out_features

    @classmethod
    def lora_matrix(cls, weight: Tensor) -> Tensor:
        """The transposed weight."""
        return weight.T

    @classmethod
    def lora_like_weight(cls, dense: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG003
        """The transposed matrix."""
        return dense.T


def _blank(host: type[nn.Module]) -> LoRAMixin:
    """An adapted object without its state: pickle and deepcopy fill it."""
    cls = adapted_class(host)
    return cls.__new__(cls)
