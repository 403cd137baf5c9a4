"""Adapted bilinear layers."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_core import functional
from lora_core._config import AdapterConfig
from lora_core._layers.kind import KINDS, NAMED, Kind, Shape, Update, peek


class BilinearKind(Kind):
    """Adapters on a bilinear layer: a bilinear map to the rank, then up to the outputs.

    ``lora_A_<name>`` is (rank, in1_features, in2_features) and ``lora_B_<name>`` (out_features,
    rank).
    """

    name = "bilinear"
    also = ()
    words = "a bilinear layer"
    formats = ("lora_core",)
    own_layout = True
    is_matrix = False

    def sizes(self, host: Any) -> tuple[int, int]:
        """The products of two inputs that an output sees, and the outputs."""
        out_features, *seen = peek(host).shape
        return math.prod(seen), out_features

    def shapes(self, host: Any, config: AdapterConfig) -> dict[str, Shape]:
        """The shapes of the parts, of a bilinear map and of a matrix."""
        return self.fitting(tuple(peek(host).shape), config)

    def fitting(self, shape: Shape, config: AdapterConfig) -> dict[str, Shape]:
        """The same for a weight of this shape."""
        out, *seen = shape
        return self._of(config, (config.room, *seen), (out, config.room), math.prod(seen), out)

    def blank(self, shape: Shape) -> nn.Module:
        """A bilinear layer of these sizes."""
        out, first, second = shape
        return nn.Bilinear(first, second, out, device="meta")

    def refusal(self, host: Any, config: AdapterConfig) -> str:  # noqa: ARG002
        """What is for layers with one input."""
        asked = {
            "`tucker` is for convolutions": config.tucker,
            "`init='eva'` is for layers of one input": config.starts_from == "inputs",
        }
        return next((why for why, wrong in asked.items() if wrong), "")

    def matrix(self, weight: Tensor) -> Tensor:
        """All that one output sees in a row."""
        return weight.flatten(1)

    def like_weight(self, dense: Tensor, weight: Tensor) -> Tensor:
        """The rows as matrices."""
        return dense.view(weight.shape)

    def kernel(self, parts: Mapping[str, Tensor]) -> Shape:
        """The two inputs."""
        return tuple(parts["lora_A"].shape[1:])

    def update(self, layer: Any, x: Tensor, update: Update, *more: Any) -> Tensor:  # noqa: ARG002
        """The low-rank update of two inputs, of which the first is dropped out."""
        lora_A, lora_B, gain, dropout = update
        return functional.bilinear_update(x, more[0], lora_A, lora_B, gain, dropout=dropout)

    def inputs(self, layer: Any, x: Tensor) -> tuple[str, bool]:
        """Of the first input."""
        size = int(layer.in1_features)
        return f"(..., {size})", x.ndim > 0 and x.shape[-1] == size


NAMED["bilinear"] = KINDS[nn.Bilinear] = BilinearKind()
