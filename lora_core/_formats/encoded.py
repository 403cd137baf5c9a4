"""What is to be written, still without a path."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_core._errors import ConfigError, listed
from lora_core._formats import container, peft
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import non_finite


@dataclass(frozen=True, slots=True)
class Encoded:
    """The content of a file, or of PEFT's folder.

    Attributes:
        tensors: The tensors of the safetensors file by key.
        metadata: Its metadata.
        layers: The layers as they are written, by the adapter's own names.
        config: PEFT's settings, where the format is a folder of two files; else None.
        notes: How the layers differ from the adapter's, one sentence each.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, str]
    layers: Mapping[str, AdapterLayer] = field(repr=False)
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def files(self) -> dict[str, bytes | bytearray]:
        """The bytes by file name, "" for a file that is named by its path alone.

        Raises:
            ConfigError: If a factor is not finite, or the header would be too large.
        """
        try:
            data = container.pack(self.tensors, self.metadata)
        except container.NonFiniteError:
            check_values(self.layers)
            raise
        if self.config is None:
            return {"": data}
        text = json.dumps(self.config, indent=2, sort_keys=True)
        return {peft.WEIGHTS[0]: data, peft.CONFIG: text.encode()}


def check_values(layers: Mapping[str, AdapterLayer]) -> None:
    """Refuses what is not finite.

    Raises:
        ConfigError: If a factor holds NaN or infinity.
    """
    bad = non_finite({name: list(layer.parts.values()) for name, layer in layers.items()})
    if bad:
        raise ConfigError(
            f"An adapter must be finite to be written, but that of {listed(bad)} holds NaN or"
            " infinity. Go back to an earlier state; lower the learning rate."
        )
