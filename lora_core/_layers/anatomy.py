"""What an adapter consists of on a kind of layer: its tensors, their shapes and their layouts."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._errors import UnsupportedLayerError

Shape = tuple[int, ...]


def peek(module: Any) -> Tensor:
    """A layer's weight as a forward would find it, read without moving anything.

    A parametrization may change when it is read in training mode, as a spectral norm does.
    """
    computed = module._modules.get("parametrizations") if isinstance(module, nn.Module) else None
    weight: Tensor
    if computed is None:
        weight = module.weight
        return weight
    moving = [m for m in computed.modules() if m.training]
    try:
        for m in moving:
            m.training = False
        weight = module.weight
        return weight
    finally:
        for m in moving:
            m.training = True


class Anatomy(nn.Module):
    """The tensors of the adapters on a layer; here of a matrix, other kinds say what differs."""

    host_class: ClassVar[type[nn.Module]]
    lora_kind: ClassVar[str] = "linear"
    lora_linear_in_weight: ClassVar[bool] = False  # whether the host's forward is known to be
    lora_rank_dims: ClassVar[tuple[int, int]] = (0, 1)  # where lora_A and lora_B have their rank

    weight: Tensor
    lora_configs: dict[str, AdapterConfig]
    lora_slots: dict[str, object]

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
        down, up, outs = (rank, size), (out, rank), (out,)
        every = {
            "lora_A": down,
            "lora_B": up,
            "lora_magnitude": outs,
            "lora_in_magnitude": (size,),
            "lora_bias": outs,
            "lora_A0": down,
            "lora_B0": up,
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

    @classmethod
    def lora_ranks_of(cls, part: str) -> tuple[int, ...]:
        """The dimensions of a part that count its ranks."""
        down, up = cls.lora_rank_dims
        dims = {"lora_A": (down,), "lora_B": (up,), "lora_mid": (0, 1)}
        return dims.get(part.removesuffix("0"), ())

    @staticmethod
    def lora_as_matrices(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors as the matrices whose product the update is."""
        return lora_A.flatten(1), lora_B.flatten(1)

    @staticmethod
    def lora_subtracted(lora_A: Tensor, lora_B: Tensor, *first: Tensor) -> tuple[Tensor, Tensor]:
        """`functional.subtracted` for factors of this kind."""
        return functional.subtracted(lora_A, lora_B, *first)

    def lora_factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``(lora_A, lora_B)`` of one adapter."""
        own, down, up = self._parameters, f"lora_A_{name}", f"lora_B_{name}"
        if down in own and up in own:  # at a tenth of what `getattr` takes
            return own[down], own[up]  # type: ignore[return-value]
        return getattr(self, down), getattr(self, up)

    def lora_parts(self, name: str) -> dict[str, nn.Parameter]:
        """All tensors of one adapter, by what they are."""
        own, keys = self._parameters, {p: f"{p}_{name}" for p in self.lora_configs[name].parts}
        # at a tenth of what `getattr` takes
        return {p: own[k] if k in own else getattr(self, k) for p, k in keys.items()}  # type: ignore[misc]

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

    def lora_reset(self, name: str) -> None:
        """Makes an adapter that lost its values a fresh one again, in place.

        Raises:
            UnsupportedLayerError: If it was made from values of its host, which may be gone too.
        """
        config = self.lora_configs[name]
        if config.dora or config.subtracted or config.init == "eva":
            what = "DoRA" if config.dora else f"init={config.init!r}"
            raise UnsupportedLayerError(
                f"An adapter must keep what it was made from, but {name!r} ({what}) lost it on the"
                " meta device. Eject it, load the base, and inject or load it then."
            )
        with torch.no_grad():
            for part, p in self.lora_parts(name).items():
                p.zero_()
                if part in ("lora_A", "lora_mid"):
                    self._lora_fill(p, part, config)

    def _lora_fill(self, p: Tensor, part: str, config: AdapterConfig) -> None:
        """Draws the first values of a part, but for ranks that are only reserved."""
        for dim in self.lora_ranks_of(part):
            p = p.narrow(dim, 0, config.rank)
        if part == "lora_A" and config.init != "kaiming":
            for matrix in p.flatten(0, -3) if p.ndim > 2 and self.lora_kind == "weight" else [p]:
                like = torch.empty(self.lora_sizes(self)[1], matrix[0].numel(), device="meta")
                drawn, _ = functional.initial_factors(config.init, like, config.rank, config.scale)
                matrix.copy_(drawn.view(matrix.shape))
            return
        bound = 1 / math.sqrt(self.lora_fan_in(p[0].numel()))
        p.uniform_(-bound, bound)

    def lora_probe(self, generator: torch.Generator) -> Tensor:
        """An input on which a host can be tried."""
        weight = peek(self)
        x = torch.randn(4, self.lora_sizes(self)[0], generator=generator)
        return x.to(weight.device, weight.dtype)

    def lora_columns(self, values: Tensor) -> Tensor:
        """Values per input feature, ``(in,)``, as they broadcast to ``lora_A`` and to an input."""
        return values

    def lora_samples(self, x: Tensor) -> int | None:
        """How many samples an input holds, None where it has no batch dimension."""
        return x.shape[0] if x.ndim > 1 else None
