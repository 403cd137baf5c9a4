"""The adapted linear layer, as a module of its own."""

from typing import ClassVar

from torch import Tensor, nn
from torch.fx import Proxy

from lora_core import functional
from lora_core._layers.adopting import Adopting, plain_attributes
from lora_core._layers.calling import checked, settled
from lora_core._layers.mixin import ADAPTED, KINDS, LoRAMixin, call_host, has_left
from lora_core._layers.state import Active


class LoRALinear(Adopting, nn.Linear):
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

    host_class = nn.Linear
    lora_linear_in_weight: ClassVar[bool] = True
    plain_attributes = plain_attributes(nn.Linear(1, 1, device="meta"))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        if isinstance(input, Proxy):  # type: ignore[unreachable]
            return super().forward(input)  # type: ignore[unreachable]

        def compute() -> Tensor:
            active = self.lora_active(input)
            if not is_fused(active):
                return self.lora_added(input, nn.Linear.forward(self, input), active)
            lora_A, lora_B, gain, dropout = active.updates[0]
            out = functional.fused_lora_linear(
                input, self.weight, self.bias, lora_A, lora_B, gain, dropout=dropout
            )
            return checked(self, out)

        try:
            return settled([self], compute)
        except (AttributeError, KeyError):
            if not has_left(self):
                raise
            return call_host(self, input)


def is_fused(active: Active) -> bool:
    """Whether all that is active is one update, which a fused form adds to the base itself."""
    return len(active.updates) == 1 and not any(part is not None for part in active[1:])


ADAPTED[nn.Linear] = LoRALinear
KINDS[nn.Linear] = LoRAMixin
