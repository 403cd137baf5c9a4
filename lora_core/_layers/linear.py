"""The adapted linear layer, as a module of its own."""

import torch
from torch import Tensor, nn

from lora_core import functional
from lora_core._config import check_name
from lora_core._errors import UnsupportedLayerError
from lora_core._layers.attaching import attach, call_me, fresh_factors, layer_config, why_not
from lora_core._layers.mixin import ADAPTED, FROZEN, LoRAMixin


class LoRALinear(LoRAMixin, nn.Linear):
    """A frozen linear layer plus a trainable low-rank update.

    Computes ``x @ weight.T + bias + scale * (x @ lora_A.T) @ lora_B.T`` with a scale of alpha /
    rank; equal to the wrapped layer until trained, because `lora_B` starts at zero. The new module
    adopts the Parameters of `linear` and freezes them; `inject` does the same in place.

    Args:
        linear: The layer to adapt.
        rank: Inner dimension of the update.
        alpha: Numerator of the scale; None means `rank`, a scale of 1.
        name: The adapter's name.
        dropout: Probability of dropping an input element of the update while training.
        dtype: Type of the factors; None means the weight's, but float32 at least.
        rslora: Whether the scale is alpha / sqrt(rank), so that a larger rank learns as fast.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Raises:
        ConfigError: If `rank` is outside ``1 .. min(in_features, out_features)``, or another
            setting is out of range.
        UnsupportedLayerError: If `linear` is no plain `nn.Linear`.

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

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 4,
        alpha: float | None = None,
        *,
        name: str = "default",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        rslora: bool = False,
    ) -> None:
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(
                f"`linear` must be a plain nn.Linear, but is {type(linear).__name__}."
                " Use `inject(model, targets=...)`, which keeps a subclass's own forward."
            )
        problem = why_not(linear)
        if problem:
            raise UnsupportedLayerError(f"`linear` must be adaptable, but {problem}")
        if set(vars(linear)) != _PLAIN or any(vars(linear)[hooks] for hooks in _HOOKS):
            raise UnsupportedLayerError(
                "`linear` must be without hooks and attributes of its own, but this one has some"
                " that a new module would lose. Use `inject(linear, targets=nn.Linear)`, which"
                " keeps the object."
            )
        config = layer_config(linear, rank, alpha, dropout, dtype, rslora)
        factors = fresh_factors(linear, config)
        check_name(name)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        frozen = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if frozen:
            vars(self)[FROZEN] = {name: dict.fromkeys((n for n, _ in frozen), True)}
        for p in self.parameters():
            p.requires_grad_(False)
            p.grad = None  # an optimiser would go on stepping with it
        attach(self, name, config, *factors)
        # placed by hand, nobody tells the nn.TransformerEncoderLayer above
        self.register_forward_pre_hook(call_me)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        active = self.active_factors()
        if len(active) != 1:
            return super().forward(input)
        lora_A, lora_B, gain, dropout = active[0]
        return functional.fused_lora_linear(
            input, self.weight, self.bias, lora_A, lora_B, gain, dropout=dropout
        )


ADAPTED[nn.Linear] = LoRALinear
# on the meta device, so that an import draws no random number
_PLAIN = set(vars(nn.Linear(1, 1, device="meta")))
_HOOKS = [name for name in _PLAIN if name.endswith("_hooks")]
