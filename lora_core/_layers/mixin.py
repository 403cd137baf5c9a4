"""What an adapted layer is: a mixin that joins the class of the very object it adapts.

A layer is adapted by swapping its class for a subclass of that class, so its keys, hooks, flags,
attributes and identity survive.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import (
    ConfigError,
    MergeError,
    UnsupportedLayerError,
    listed,
)
from lora_core._layers.calling import checked, recorded, refuse_pins, selection_of
from lora_core._layers.norms import length_of, norm_of
from lora_core._layers.state import Active, Gain, Selection, Strength, Update

_MARK = "lora_merged"  # key beside a merged weight in a state dict
Shape = tuple[int, ...]


class LoRAMixin(nn.Module):
    """Adapters on a layer; this one on a matrix that maps ``in_features`` to ``out_features``.

    The parameters of adapter `name` are ``lora_A_<name>`` (rank, in_features) and
    ``lora_B_<name>`` (out_features, rank), flat on the layer itself; what else its settings ask
    for (``lora_mid``, ``lora_magnitude``, ``lora_bias``, ``lora_A0``, ``lora_B0``) likewise.
    """

    host_class: ClassVar[type[nn.Module]]
    lora_kind: ClassVar[str] = "linear"
    lora_linear_in_weight: ClassVar[bool] = False  # whether the host's forward is known to be
    lora_rank_dims: ClassVar[tuple[int, int]] = (0, 1)  # where lora_A and lora_B have their rank

    weight: Tensor
    lora_configs: dict[str, AdapterConfig]
    lora_selection: Selection
    lora_merged: Any

    @classmethod
    def lora_sizes(cls, host: nn.Module) -> tuple[int, int]:
        """``(in, out)`` of the matrix that is adapted; in is all that one output sees."""
        # a quantised weight may have another shape
        return int(host.in_features), int(host.out_features)  # type: ignore[arg-type]

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: AdapterConfig) -> dict[str, Shape]:
        """The shape of each part of an adapter."""
        size, out = cls.lora_sizes(host)
        rank = config.room
        every = {
            "lora_A": (rank, size),
            "lora_B": (out, rank),
            "lora_magnitude": (out,),
            "lora_bias": (out,),
            "lora_A0": (rank, size),
            "lora_B0": (out, rank),
        }
        return {part: every[part] for part in config.parts}

    @classmethod
    def lora_refusal(cls, host: nn.Module, config: AdapterConfig) -> str:  # noqa: ARG003
        """Which setting this kind of layer can't have, and why; "" if it can have all."""
        return "`tucker` needs a convolution" if config.tucker else ""

    @classmethod
    def lora_matrix(cls, weight: Tensor) -> Tensor:
        """A weight of this kind as ``(out, in)``, a view."""
        return weight

    @classmethod
    def lora_like_weight(cls, dense: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG003
        """An ``(out, in)`` matrix in the layout of a weight of this kind."""
        return dense

    @classmethod
    def lora_fan_in(cls, size: int) -> int:
        """How many entries of its input a rank sums over."""
        return size

    @classmethod
    def lora_tidy(cls, host: nn.Module, values: dict[str, Tensor]) -> None:
        """Changes the tensors of a fresh adapter as this kind of layer needs it, in place."""

    def lora_reset(self, name: str) -> None:
        """Fills the factors of an adapter that lost its values: `lora_B` zero, in place."""
        with torch.no_grad():
            for part, p in self.lora_parts(name).items():
                p.zero_()
                if part in ("lora_A", "lora_mid"):
                    bound = 1 / math.sqrt(self.lora_fan_in(p[0].numel()))
                    p.uniform_(-bound, bound)

    def lora_probe(self, generator: torch.Generator) -> Tensor:
        """An input on which a host can be tried."""
        weight = self.weight
        x = torch.randn(4, self.lora_sizes(self)[0], generator=generator)
        return x.to(weight.device, weight.dtype)

    def lora_addition(self, x: Tensor, base: Tensor) -> Tensor:
        """What the active updates add to the host's output for `x` by way of the weight, wide."""
        (update,), stretch, _ = self._lora_wide()
        x = x.double() if x.is_floating_point() else x
        added = self.lora_update(
            x, update._replace(gain=cast(Tensor, update.gain).double())
        ).double()
        if stretch is None:
            return added
        own = getattr(self, "bias", None)
        directed = base.double() if own is None else base.double() - self.lora_channels(own, base)
        return added + self.lora_channels(stretch.double(), base) * directed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Proxy):
            return recorded(self, x, args, kwargs)  # type: ignore[return-value]
        base: Tensor = super().forward(*args, **kwargs)  # the host's
        if not isinstance(base, Tensor):
            raise UnsupportedLayerError(
                f"An adapted layer's host must return a tensor, but {self.host_class.__name__}"
                f" returns {type(base).__name__}. Eject the adapter from this layer."
            )
        return self.lora_added(x, base, self.lora_active(x))

    def lora_added(self, x: Tensor, base: Tensor, active: Active) -> Tensor:
        """The host's output for `x` plus what is active."""
        updates, stretch, bias = active
        out = base
        if stretch is not None:
            own = getattr(self, "bias", None)
            directed = base if own is None else base - self.lora_channels(own, base).to(base.dtype)
            out = out + (self.lora_channels(stretch, base) * directed).to(base.dtype)
        for update in updates:
            out = out + self.lora_update(x, update).to(base.dtype)
        if bias is not None:
            out = out + self.lora_channels(bias, base).to(base.dtype)
        return checked(self, out)

    def lora_update(self, x: Tensor, update: Update) -> Tensor:
        """What one update adds to the host's output."""
        lora_A, lora_B, gain, dropout = update
        return functional.lora_update(x, lora_A, lora_B, gain, dropout=dropout)

    def lora_channels(self, values: Tensor, out: Tensor) -> Tensor:
        """Values per output feature, ``(out,)`` or ``(batch, out)``, as they broadcast to `out`."""
        if values.ndim == 1:
            return values
        return values.view(values.shape[0], *[1] * (out.ndim - 2), values.shape[1])

    def lora_samples(self, x: Tensor) -> int | None:
        """How many samples an input holds, None where it has no batch dimension."""
        return x.shape[0] if x.ndim > 1 else None

    def lora_factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``(lora_A, lora_B)`` of one adapter."""
        own, down, up = self._parameters, f"lora_A_{name}", f"lora_B_{name}"
        if down in own and up in own:  # at a tenth of what `getattr` takes
            return own[down], own[up]  # type: ignore[return-value]
        return getattr(self, down), getattr(self, up)

    def lora_parts(self, name: str) -> dict[str, nn.Parameter]:
        """All tensors of one adapter, by what they are."""
        return {part: getattr(self, f"{part}_{name}") for part in self.lora_configs[name].parts}

    def lora_trained_parts(self, name: str) -> dict[str, nn.Parameter]:
        """Those that an optimiser is given."""
        return {part: p for part, p in self.lora_parts(name).items() if not part.endswith("0")}

    def lora_stored(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter as a file holds them, without ranks that are only reserved."""
        config, parts = self.lora_configs[name], self.lora_parts(name)
        if config.room == config.rank:
            return dict(parts)
        cut: dict[str, Tensor] = {}
        for part, p in parts.items():
            values = p.detach()
            for dim in self.lora_ranks_of(part):
                values = values.narrow(dim, 0, config.rank)
            cut[part] = values
        return cut

    @classmethod
    def lora_ranks_of(cls, part: str) -> tuple[int, ...]:
        """The dimensions of a part that count its ranks."""
        down, up = cls.lora_rank_dims
        dims = {"lora_A": (down,), "lora_B": (up,), "lora_mid": (0, 1)}
        return dims.get(part.removesuffix("0"), ())

    def lora_active(self, x: Tensor | None = None) -> Active:
        """What a forward of `x` adds: stacked where dropout allows, so one pair of products.

        Adapters that drop the same share of the input are one pair; merged ones are in the weight
        already and none. A gain is a number where one will do, which costs a fast path nothing;
        under torch.compile it is a tensor, so that another value recompiles nothing, and every
        adapter on the layer takes part, so that another choice doesn't either.

        Raises:
            MergeError: If the layer is merged and this forward would train an adapter.
            ConfigError: If strengths per sample don't fit the batch of `x`.
            AdapterError: If an adapter that is pinned was taken off.
        """
        if self.lora_merged is not None:
            self._lora_refuse_training(tuple(self.lora_merged.strengths))
            return Active([])
        if torch.compiler.is_compiling():
            refuse_pins()
            # unpacked at once: a graph would guard on the strengths of a tuple that is passed on
            _, _, _, bank = self.lora_selection
            return self._lora_collect(tuple(self.lora_configs), bank, x, training=self.training)
        while True:
            configs, seen = self.lora_configs, selection_of(self)
            try:
                gains = self._lora_gains(seen)
                found = self._lora_collect(seen.names, gains, x, training=self.training)
            except (AttributeError, KeyError):  # of an adapter that another thread took off
                if self.lora_configs is configs:
                    raise
                continue
            if self.lora_configs is configs:  # all of one adapter, though a name be taken again
                return found

    def _lora_gains(self, seen: Selection) -> Sequence[Gain]:
        """What each active adapter is multiplied by; numbers where all are one number."""
        names, strengths, gains, _ = seen
        if any(isinstance(s, tuple) for s in strengths):
            return gains
        numbers = [
            Gain(s * self.lora_configs[name].scale, s)  # type: ignore[operator, arg-type]
            for name, s in zip(names, strengths, strict=True)
        ]
        return numbers if len({value for value, _ in numbers}) == 1 else gains

    def _lora_collect(
        self,
        names: Sequence[str],
        gains: Sequence[Gain],
        x: Tensor | None,
        *,
        training: bool,
    ) -> Active:
        if len(names) == 1:
            config, value = self.lora_configs[names[0]], gains[0].value
            if config.plain and not _is_per_sample(value):
                dropout = config.dropout if training else 0.0
                return Active([Update(*self.lora_factors(names[0]), value, dropout)])
        groups: dict[float, list[tuple[Tensor, Tensor, Tensor | float]]] = {}
        stretch = bias = None
        for name, (value, strength) in zip(names, gains, strict=True):
            config = self.lora_configs[name]
            gain = self._lora_per_sample(value, x)
            lora_A, lora_B = self._lora_low_rank(name, config)
            if config.bias:
                own = self._lora_bias_term(name, self._lora_per_sample(strength, x))
                bias = own if bias is None else bias + own
            if config.dora:
                ratio = self._lora_ratio(name, Gain(gain, strength), lora_A, lora_B)
                lora_B = lora_B * ratio.view(-1, *[1] * (lora_B.ndim - 1)).to(lora_B.dtype)
                stretch = ratio - 1 if stretch is None else stretch + (ratio - 1)
            if training:
                gain = self._lora_dropped(gain, config, lora_A, x)
            dropout = config.dropout if training else 0.0
            if _is_per_sample(gain) and not (training and config.rank_dropout):
                gain = gain[:, None].expand(-1, lora_A.shape[self.lora_rank_dims[0]])  # type: ignore[index]
            groups.setdefault(dropout, []).append((lora_A, lora_B, gain))
        dims = self.lora_rank_dims
        updates = [Update(*functional.stack_factors(g, dims), p) for p, g in groups.items()]
        return Active(updates, stretch, bias)

    def _lora_low_rank(self, name: str, config: AdapterConfig) -> tuple[Tensor, Tensor]:
        """The update as two factors, whatever parts it consists of."""
        lora_A: Tensor
        lora_B: Tensor
        lora_A, lora_B = self.lora_factors(name)
        if config.tucker:
            lora_A = functional.tucker_down(lora_A, getattr(self, f"lora_mid_{name}"))
        if config.subtracted:
            first = getattr(self, f"lora_A0_{name}"), getattr(self, f"lora_B0_{name}")
            return self.lora_subtracted(lora_A, lora_B, *first)
        return lora_A, lora_B

    @staticmethod
    def lora_subtracted(lora_A: Tensor, lora_B: Tensor, *first: Tensor) -> tuple[Tensor, Tensor]:
        """`functional.subtracted` for factors of this kind."""
        return functional.subtracted(lora_A, lora_B, *first)

    def _lora_per_sample(self, gain: Tensor | float | None, x: Tensor | None) -> Tensor | float:
        """A gain per sample for the batch of `x`, which guidance may have doubled."""
        assert gain is not None
        if not isinstance(gain, Tensor) or gain.ndim == 0 or x is None:
            return gain
        batch, given = self.lora_samples(x), gain.shape[0]
        if batch == given:
            return gain
        if batch == 2 * given:  # the samples without a prompt, then those with one
            return gain.repeat(2)
        raise ConfigError(
            f"Strengths per sample must fit the batch, but `scales` gave {given} and the input of a"
            f" {self.host_class.__name__} has shape {tuple(x.shape)}. Give as many strengths as"
            " samples (or half as many, under guidance's doubled batch)."
        )

    def _lora_bias_term(self, name: str, strength: Tensor | float) -> Tensor:
        values: Tensor = getattr(self, f"lora_bias_{name}")
        return values * (strength[:, None] if _is_per_sample(strength) else strength)  # type: ignore[index]

    def _lora_ratio(
        self,
        name: str,
        gain: Gain,
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> Tensor:
        if _is_per_sample(gain.value):
            raise ConfigError(
                f"A DoRA adapter must have one strength for all samples, but {name!r} has one for"
                " each: the lengths of a weight's rows belong to no sample. Use `scales` with a"
                " number."
            )
        matrix = self.lora_matrix(self.weight)
        norm = norm_of(self, name, matrix, lora_A.flatten(1), lora_B.flatten(1), gain.value)
        magnitude: Tensor = getattr(self, f"lora_magnitude_{name}")
        strength = cast(Tensor | float, gain.strength)
        return functional.dora_ratio(
            magnitude.to(norm.dtype), length_of(self, matrix), norm, strength
        )

    def _lora_dropped(
        self, gain: Tensor | float, config: AdapterConfig, lora_A: Tensor, x: Tensor | None
    ) -> Tensor | float:
        """A gain with whole ranks, or all of them, dropped at random."""
        if config.rank_dropout:
            rank = config.room  # those that are subtracted are dropped with theirs
            batch = None if x is None else self.lora_samples(x)
            shape = (rank,) if batch is None else (batch, rank)
            kept = torch.rand(shape, device=lora_A.device) >= config.rank_dropout
            halves = lora_A.shape[self.lora_rank_dims[0]] // rank
            mask = kept.repeat(*[1] * (kept.ndim - 1), halves) / (1 - config.rank_dropout)
            gain = mask * (gain[:, None] if _is_per_sample(gain) else gain)  # type: ignore[index]
        if config.module_dropout:
            gain = gain * (torch.rand((), device=lora_A.device) >= config.module_dropout)
        return gain

    def _lora_refuse_training(self, names: tuple[str, ...]) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for name in names for p in self.lora_trained_parts(name).values()):
            raise MergeError(
                f"A layer in training mode must be unmerged, but {listed(names)} is merged into its"
                " weight and would get no gradient. Call `unmerge(model)`, or `model.eval()`."
            )

    def lora_delta(self) -> Tensor:
        """The sum of the active updates in the weight's own layout, float32 or wider."""
        updates, stretch, _ = self._lora_wide()
        lora_A, lora_B, gain, _ = updates[0]
        dense = functional.lora_delta(*self.lora_as_matrices(lora_A, lora_B), gain)
        if stretch is not None:
            matrix = self.lora_matrix(self.weight)
            dense = dense + stretch[:, None] * matrix.to(dense.dtype)
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
            (update,), stretch, bias = self._lora_collect(names, gains, None, training=False)
        lora_A, lora_B = (f.detach().to(wide) for f in update[:2])
        gain = cast(Tensor, update.gain).to(wide)
        found = Update(lora_A, lora_B, gain, 0.0)
        return Active([found], stretch, None if bias is None else bias.detach())

    @staticmethod
    def lora_as_matrices(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors as the matrices whose product the update is."""
        return lora_A.flatten(1), lora_B.flatten(1)

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

    def lora_strengths(self) -> dict[str, Strength]:
        """The active adapters and their strengths, in order."""
        names, strengths, _, _ = self.lora_selection
        return dict(zip(names, strengths, strict=True))

    def lora_select(
        self,
        strengths: Mapping[str, Strength],
        configs: Mapping[str, AdapterConfig] | None = None,
    ) -> Selection:
        """The selection with these strengths, of the adapters that this layer has, or will have."""
        configs = self.lora_configs if configs is None else configs
        mine = {name: s for name, s in strengths.items() if name in configs}
        gains = {name: self._lora_gain(name, configs[name], s) for name, s in mine.items()}
        bank = tuple(
            gains[n] if n in gains else self._lora_nothing(n, c) for n, c in configs.items()
        )
        return Selection(tuple(mine), tuple(mine.values()), tuple(gains.values()), bank)

    def _lora_nothing(self, name: str, config: AdapterConfig) -> Gain:
        """The gain of an inactive adapter.

        One of its own on every layer: a compiled graph guards on which tensors are the same, so
        one that all shared would make it compile again when the choice changes.
        """
        device, dtype = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        names, _, _, bank = self.lora_selection
        for known, gain in zip(self.lora_configs, bank, strict=True) if name not in names else ():
            if known == name and _fits(gain, config, device, dtype):
                return gain
        return _gain(0.0, config, device, dtype)

    def _lora_gain(self, name: str, config: AdapterConfig, strength: Strength) -> Gain:
        weight = self.weight
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        for known, s, gain in zip(*self.lora_selection[:3], strict=True):
            same = (known, s) == (name, strength) and _fits(gain, config, device, dtype)
            if same and self.lora_configs[name].scale == config.scale:
                return gain
        scale, limit = config.scale, torch.finfo(dtype).max
        values = strength if isinstance(strength, tuple) else (strength,)
        value = max((abs(s * scale) for s in values), default=0.0)
        if not value <= limit:
            raise ConfigError(
                f"`strength * scale` must be at most {limit:.3g}, but is {value:.3g} for"
                f" {name!r}. Choose smaller values."
            )
        return _gain(strength, config, device, dtype)

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
        for name in hollow:  # now with memory, perhaps, but never with values
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
        in_features, out_features = host.weight.shape  # type: ignore[misc]
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


def _gain(
    strength: Strength, config: AdapterConfig, device: torch.device, dtype: torch.dtype
) -> Gain:
    scale = config.scale
    product = [s * scale for s in strength] if isinstance(strength, tuple) else strength * scale
    # a selection made in inference mode must be usable in training
    with torch.inference_mode(mode=False):
        value = torch.tensor(product, dtype=dtype, device=device)
        alone = None if config.plain_sum else torch.tensor(strength, dtype=dtype, device=device)
    return Gain(value, alone)


def _fits(gain: Gain, config: AdapterConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a gain that was made earlier will do for an adapter of these settings."""
    value = cast(Tensor, gain.value)
    return (value.device, value.dtype) == (device, dtype) and (
        (gain.strength is None) == config.plain_sum
    )


def _is_per_sample(gain: Tensor | float) -> bool:
    return isinstance(gain, Tensor) and gain.ndim == 1
