"""The adapted linear layer, as a module of its own."""

from typing import Any, Unpack

from torch import Tensor, nn

from lora_core._config import NamedSettings
from lora_core._layers.attachment import adopt, plain_attributes
from lora_core._layers.context import checked, marked, ordinary
from lora_core._layers.kind import LINEAR, own_weight
from lora_core._layers.mixin import ADAPTED, READ, LoRAMixin, LoRARead, call
from lora_core._layers.parts import refuse_resized
from lora_core._layers.state import STATE
from lora_core._layers.updates import Active, added
from lora_core.functional import fused_lora_linear


class LoRALinear(LoRAMixin, nn.Linear):
    """A frozen linear layer plus a trainable low-rank update.

    Computes ``x @ weight.T + bias + scale * (x @ lora_A.T) @ lora_B.T`` with a scale of alpha /
    rank; equal to the wrapped layer until trained, because `lora_B` starts at zero. The new module
    adopts the Parameters of the host and freezes them; `inject` does the same in place.

    Args:
        host: The layer to adapt.
        rank: Inner dimension of the update.
        alpha: Numerator of the scale; None means `rank`, a scale of 1.
        settings: As in `inject`: name, dropout, dtype, rslora, dora and so on.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Raises:
        ConfigError: If `rank` is outside ``1 .. min(in_features, out_features)``, or another
            setting is out of range.
        UnsupportedLayerError: If `host` is no plain `nn.Linear`.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.

    Example:
        >>> layer = LoRALinear(nn.Linear(2000, 1000, bias=False), rank=2)
        >>> layer.lora_A_default.shape, layer.lora_B_default.shape
        (torch.Size([2, 2000]), torch.Size([1000, 2]))
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        6000
    """

    lora_host_class, lora_kind = nn.Linear, LINEAR
    lora_plain_attributes = plain_attributes(nn.Linear(1, 1, device="meta"))

    def __init__(
        self,
        host: nn.Linear,
        rank: int = 4,
        alpha: float | None = None,
        **settings: Unpack[NamedSettings],
    ) -> None:
        adopt(self, host, rank, alpha, settings)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        if (found := ordinary(self, input)) is not None:
            state, (W, b), (lora_A, lora_B, gain, p) = found
            try:
                out = fused_lora_linear(input, W, b, lora_A, lora_B, gain, dropout=p)
            except RuntimeError:
                refuse_resized(self)
                raise
            if (now := self.__dict__.get(STATE)) and now.change is state.change:
                return marked(self, out)
        return call(self, input, (input,), {})

    def lora_sum(self, found: Active, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output, by a fused form where all that is active is one pair of products."""
        if not found.is_one_update:
            return super().lora_sum(found, args, kwargs)
        (x,), (lora_A, lora_B, gain, dropout) = (*args, *kwargs.values()), found.updates[0]
        weight = own_weight(self)
        out = fused_lora_linear(x, weight, self.bias, lora_A, lora_B, gain, dropout=dropout)
        return checked(self, out)


class LoRAReadLinear(LoRARead, LoRALinear):  # type: ignore[override]
    """A linear layer whose weight others read: for them the sum, while its own call adds as ever.

    So what it is called with is dropped as asked, and costs what it costs any other layer.
    """

    lora_host_class = nn.Linear
    forward = LoRALinear.forward

    def lora_sum(self, found: Active, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The same; the base is made of the weight without the update."""
        if found.is_one_update:
            return LoRALinear.lora_sum(self, found, args, kwargs)
        (x,) = (*args, *kwargs.values())
        base = nn.functional.linear(x, own_weight(self), self.bias)
        return checked(self, added(self, x, base, found))


ADAPTED[nn.Linear], READ[nn.Linear] = LoRALinear, LoRAReadLinear
