"""The neutral form between files and models: an adapter without a model, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_core._config import AdapterConfig


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """One module's adapter as a file holds it, its tensors in the layouts of the layers here.

    Attributes:
        kind: What kind of layer it is for: "linear", "conv", "embedding", or "weight" for a
            parameter that is read; "matrix" where factors of two dimensions are all that is known.
        config: Its settings.
        parts: Its tensors by what they are, ``lora_A`` and ``lora_B`` always.
        aliases: Other dotted names of the same module.
    """

    kind: str
    config: AdapterConfig
    parts: Mapping[str, Tensor]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter outside any model: the neutral form between files and layers.

    Attributes:
        name: The name it was saved under.
        layers: Its parts by dotted module name.
        base: Fingerprint of the weights that it was trained on, empty where a file has none.
        metadata: The file's other entries, verbatim.
    """

    name: str
    layers: Mapping[str, AdapterLayer]
    base: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
