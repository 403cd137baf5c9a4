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
            "difference" where `parts` are added to the module's parameters of the same names, and
            "values" where they replace them.
        config: Its settings; None where there are no factors.
        parts: Its tensors by what they are: ``lora_A`` and ``lora_B`` always, ``lora_mid``,
            ``lora_magnitude`` (over outputs), ``lora_in_magnitude`` (over inputs) and
            ``lora_bias`` where the file has them; of a difference or of values ``weight`` and
            ``bias``, either or both.
        aliases: Other dotted names of the same module.
        component: Which model of a pipeline the file says it is for, as "unet", "text_encoder",
            "text_encoder_2", "transformer" or "prior"; "" where it does not say.
        path: The module's name in that model, as the file spells it; "" where that is its key.
        spelling: How `path` is spelled: "dotted", "stem" with underscores for the dots, or "index"
            for the number that the module has among those that were adapted.
        alpha_from: Where alpha is from, in words for a report; "" where there is none.
        transposed: Whether the file says that the module stores its weight ``(in, out)``, as
            GPT-2's Conv1D does; the factors are as ever.
    """

    kind: str
    config: AdapterConfig | None
    parts: Mapping[str, Tensor]
    aliases: tuple[str, ...] = ()
    component: str = ""
    path: str = ""
    spelling: str = "dotted"
    alpha_from: str = "the file"
    transposed: bool = False

    @property
    def settings(self) -> AdapterConfig:
        """The settings of its factors, of a layer that has some."""
        assert self.config is not None
        return self.config


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter outside any model: the neutral form between files and layers.

    Attributes:
        name: The name it was saved under.
        layers: Its parts by the file's own module names.
        base: Fingerprint of the weights that it was trained on, empty where a file has none.
        metadata: The file's other entries, verbatim.
        format: What wrote it, as "kohya" or "peft".
        notes: What a reader should know about it, one sentence each.
    """

    name: str
    layers: Mapping[str, AdapterLayer]
    base: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "lora_core"
    notes: tuple[str, ...] = ()
