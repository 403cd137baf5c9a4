"""Which adapters of a layer are active, and the numbers that follow from it."""

from collections.abc import Mapping
from itertools import zip_longest

import torch

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
        weight = peek(self)
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        known = self._lora_known(configs, device, dtype)
        mine = {name: s for name, s in strengths.items() if name in configs}
        bank = {}
        for name, config in configs.items():
            wanted = mine.get(name, 0.0)
            was, gain = known.get(name, (None, None))
            if gain is None or was != wanted:
                if wanted:
                    _check_gain(name, config, wanted, dtype)
                gain = _gain(wanted, config, device, dtype)
            bank[name] = gain
        gains, every = tuple(bank[name] for name in mine), tuple(bank.values())
        if all(one is other for one, other in zip_longest(gains, every)):
            gains = every  # one object on each of many layers, and not two
        return Selection(tuple(mine), tuple(mine.values()), gains, every)

    def _lora_known(
        self, configs: Mapping[str, AdapterConfig], device: torch.device, dtype: torch.dtype
    ) -> dict[str, tuple[Strength, Gain]]:
        """The gains that are there, by adapter with their strengths, of those that still hold.

        An inactive adapter has one of its own on every layer, of strength 0: a compiled graph
        guards on which tensors are the same, so one that all shared would make it compile again
        when the choice changes.
        """
        names, strengths, _, bank = self.lora_selection
        if not bank or (bank[0].value.device, bank[0].value.dtype) != (device, dtype):  # type: ignore[union-attr]
            return {}
        active = dict(zip(names, strengths, strict=True))
        return {
            name: (active.get(name, 0.0), gain)
            for (name, config), gain in zip(self.lora_configs.items(), bank, strict=True)
            if configs.get(name) is config
        }


def _check_gain(name: str, config: AdapterConfig, strength: Strength, dtype: torch.dtype) -> None:
    scale, limit = config.scale, torch.finfo(dtype).max
    values = strength if isinstance(strength, tuple) else (strength,)
    value = max((abs(s * scale) for s in values), default=0.0)
    if not value <= limit:
        raise ConfigError(
            f"`strength * scale` must be at most {limit:.3g}, but is {value:.3g} for"
            f" {name!r}. Choose smaller values."
        )


def _gain(
    strength: Strength, config: AdapterConfig, device: torch.device, dtype: torch.dtype
) -> Gain:
    scale = config.scale
    product = [s * scale for s in strength] if isinstance(strength, tuple) else strength * scale
    if torch.is_inference_mode_enabled():  # a selection made there must be usable in training
        with torch.inference_mode(mode=False):
            return _gain(strength, config, device, dtype)
    value = torch.tensor(product, dtype=dtype, device=device)
    alone = None if config.plain_sum else torch.tensor(strength, dtype=dtype, device=device)
    return Gain(value, alone)
