"""Adapted layers as modules of their own: the constructor that `LoRALinear` and its kin share."""

from typing import ClassVar, TypedDict, Unpack

import torch
from torch import nn

from lora_core._config import check_name
from lora_core._errors import UnsupportedLayerError
from lora_core._layers.attaching import attach, call_me
from lora_core._layers.drawing import drawing, fresh_parts
from lora_core._layers.fitting import checked_settings, layer_config, why_not
from lora_core._layers.mixin import LoRAMixin
from lora_core._layers.state import FROZEN


class Settings(TypedDict, total=False):
    """What `inject` takes as keywords, too."""

    name: str
    dropout: float
    dtype: torch.dtype | None
    rslora: bool
    dora: bool
    bias: bool
    tucker: bool
    rank_dropout: float
    module_dropout: float
    init: str
    reserve_rank: int | None


class Adopting(LoRAMixin):
    """An adapted layer that can be made from a plain one, whose Parameters it adopts."""

    plain_attributes: ClassVar[frozenset[str]]

    def __init__(
        self,
        host: nn.Module,
        rank: int = 4,
        alpha: float | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        plain = self.host_class
        what = f"`{plain.__name__.lower()}`"
        if type(host) is not plain:
            raise UnsupportedLayerError(
                f"{what} must be a plain nn.{plain.__name__}, but is {type(host).__name__}."
                " Use `inject(model, targets=...)`, which keeps a subclass's own forward."
            )
        problem = why_not(host)
        if problem:
            raise UnsupportedLayerError(f"{what} must be adaptable, but {problem}")
        own = vars(host)
        hooks = [key for key in own if key.endswith("_hooks")]
        if set(own) != self.plain_attributes or any(own[key] for key in hooks):
            raise UnsupportedLayerError(
                f"{what} must be without hooks and attributes of its own, but this one has some"
                f" that a new module would lose. Use `inject(..., targets=nn.{plain.__name__})`,"
                " which keeps the object."
            )
        name = settings.pop("name", "default")
        config = layer_config(host, checked_settings({"rank": rank, "alpha": alpha, **settings}))
        with drawing():
            parts = fresh_parts(host, config)
        check_name(name)
        nn.Module.__init__(self)
        for key in own.keys() - vars(self).keys():
            vars(self)[key] = own[key]
        for key, p in host._parameters.items():
            self.register_parameter(key, p)
        self.training = host.training
        trained = {key: True for key, p in self.named_parameters() if p.requires_grad}
        if trained:
            vars(self)[FROZEN] = {name: trained}
        for p in self.parameters():
            p.requires_grad_(False)
            p.grad = None  # an optimiser would go on stepping with it
        attach(self, name, config, parts)
        # placed by hand, nobody tells the nn.TransformerEncoderLayer above
        self.register_forward_pre_hook(call_me)


def plain_attributes(host: nn.Module) -> frozenset[str]:
    """The attributes that a plain host has."""
    return frozenset(vars(host))
