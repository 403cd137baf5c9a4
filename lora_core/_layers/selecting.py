"""Which adapters of a layer are active, and the numbers that follow from it."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lora_core._config import AdapterConfig
from lora_core._errors import ConfigError
from lora_core._layers.anatomy import Anatomy, peek
from lora_core._layers.state import Gain, Selection, Strength


class Selecting(Anatomy):
    """Makes the values that stand for a choice; nothing here changes the layer."""

    lora_selection: Selection

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
        weight = peek(self)
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        names, _, _, bank = self.lora_selection
        for known, gain in zip(self.lora_configs, bank, strict=True) if name not in names else ():
            if known == name and _fits(gain, config, device, dtype):
                return gain
        return _gain(0.0, config, device, dtype)

    def _lora_gain(self, name: str, config: AdapterConfig, strength: Strength) -> Gain:
        weight = peek(self)
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
