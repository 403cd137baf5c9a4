"""What a forward adds: the active adapters as one update where dropout allows it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import ConfigError, MergeError, listed
from lora_core._layers.calling import refuse_pins, selection_of
from lora_core._layers.norms import column_norm_of, length_of, norm_of
from lora_core._layers.selecting import Selecting
from lora_core._layers.state import Active, Change, Gain, Selection, Update


class Collecting(Selecting):
    """Collects what is active on a layer into products, and refuses what could not be right."""

    lora_merged: Any
    lora_changes: Change

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
        stretch = bias = columns = None
        for name, (value, strength) in zip(names, gains, strict=True):
            config = self.lora_configs[name]
            gain = self._lora_per_sample(value, x)
            lora_A, lora_B = self._lora_low_rank(name, config)
            if config.bias:
                own = self._lora_bias_term(name, self._lora_per_sample(strength, x))
                bias = own if bias is None else bias + own
            if config.dora_in:
                ratio = self._lora_column_ratio(name, Gain(gain, strength), lora_A, lora_B)
                lora_A = lora_A * self.lora_columns(ratio).to(lora_A.dtype)
                columns = ratio - 1 if columns is None else columns + (ratio - 1)
            elif config.dora:
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
        return Active(updates, stretch, bias, columns)

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
        self._lora_refuse_samples(name, gain)
        matrix = self.lora_matrix(self.weight)
        norm = norm_of(self, name, matrix, lora_A.flatten(1), lora_B.flatten(1), gain.value)
        magnitude: Tensor = getattr(self, f"lora_magnitude_{name}")
        strength = cast(Tensor | float, gain.strength)
        return functional.dora_ratio(
            magnitude.to(norm.dtype), length_of(self, matrix), norm, strength
        )

    def _lora_column_ratio(self, name: str, gain: Gain, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """What each column is multiplied by; the sum is made dense, which no new adapter needs."""
        self._lora_refuse_samples(name, gain)
        matrix = self.lora_matrix(self.weight)

        def adapted() -> Tensor:
            dense = functional.lora_delta(*self.lora_as_matrices(lora_A, lora_B), gain.value)
            return self.lora_like_weight(dense + matrix.to(dense.dtype), self.weight)

        norm = column_norm_of(self, name, gain.value, adapted)
        magnitude: Tensor = getattr(self, f"lora_in_magnitude_{name}")
        return functional.dora_ratio(
            magnitude.to(norm.dtype),
            column_norm_of(self, "", 1.0, lambda: self.weight),
            norm,
            cast(Tensor | float, gain.strength),
        )

    @staticmethod
    def _lora_refuse_samples(name: str, gain: Gain) -> None:
        if _is_per_sample(gain.value):
            raise ConfigError(
                f"A DoRA adapter must have one strength for all samples, but {name!r} has one for"
                " each: the lengths of a weight's rows belong to no sample. Use `scales` with a"
                " number."
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


def _is_per_sample(gain: Tensor | float) -> bool:
    return isinstance(gain, Tensor) and gain.ndim == 1
