"""LoRA for any PyTorch module, in place, with its whole life cycle.

Every public name is loaded on first use, so that `import lora_core` costs next to nothing and a
pytest run that merely finds the plugin installed does not pay for PyTorch.

Example:
    >>> import torch, lora_core
    >>> unet = lora_core.models.UNet()
    >>> report = lora_core.inject(unet, rank=4)
    >>> report.layers[0].name
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_core._version import __version__ as __version__

if TYPE_CHECKING:
    from lora_core import functional as functional
    from lora_core import models as models
    from lora_core import testing as testing
    from lora_core._adapters import checkpoint_context as checkpoint_context
    from lora_core._adapters import disabled as disabled
    from lora_core._adapters import parameters as parameters
    from lora_core._adapters import pinned as pinned
    from lora_core._adapters import scales as scales
    from lora_core._adapters import summary as summary
    from lora_core._algebra import combine as combine
    from lora_core._algebra import extract as extract
    from lora_core._algebra import merge_file as merge_file
    from lora_core._algebra import resize as resize
    from lora_core._errors import AdapterError as AdapterError
    from lora_core._errors import ConfigError as ConfigError
    from lora_core._errors import CorruptFileError as CorruptFileError
    from lora_core._errors import LoRAError as LoRAError
    from lora_core._errors import MergeError as MergeError
    from lora_core._errors import MismatchError as MismatchError
    from lora_core._errors import TargetError as TargetError
    from lora_core._errors import UnsupportedFileError as UnsupportedFileError
    from lora_core._errors import UnsupportedLayerError as UnsupportedLayerError
    from lora_core._files import adapter_of as adapter_of
    from lora_core._files import load as load
    from lora_core._files import save as save
    from lora_core._formats import Adapter as Adapter
    from lora_core._formats import read as read
    from lora_core._formats import write as write
    from lora_core._injection import eject as eject
    from lora_core._injection import inject as inject
    from lora_core._injection import plan as plan
    from lora_core._layers import LoRAConv1d as LoRAConv1d
    from lora_core._layers import LoRAConv2d as LoRAConv2d
    from lora_core._layers import LoRAConv3d as LoRAConv3d
    from lora_core._layers import LoRAEmbedding as LoRAEmbedding
    from lora_core._layers import LoRALinear as LoRALinear
    from lora_core._layers import explain as explain
    from lora_core._merging import merge as merge
    from lora_core._merging import unmerge as unmerge
    from lora_core._training import limit_norm as limit_norm
    from lora_core._training import parameter_groups as parameter_groups
    from lora_core._training import trainable as trainable

_ROOMS = {
    "_adapters": (
        *("checkpoint_context", "disabled", "parameters", "pinned", "scales", "summary"),
    ),
    "_algebra": ("combine", "extract", "merge_file", "resize"),
    "_errors": (
        "AdapterError",
        "ConfigError",
        "CorruptFileError",
        "LoRAError",
        "MergeError",
        "MismatchError",
        "TargetError",
        "UnsupportedFileError",
        "UnsupportedLayerError",
    ),
    "_files": ("adapter_of", "load", "save"),
    "_formats": ("Adapter", "read", "write"),
    "_injection": ("eject", "inject", "plan"),
    "_layers": (
        *("LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding", "LoRALinear"),
        "explain",
    ),
    "_merging": ("merge", "unmerge"),
    "_training": ("limit_norm", "parameter_groups", "trainable"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_DOORS = ("functional", "models", "testing")

__all__ = ["__version__", *_DOORS, *sorted(_ROOM_OF)]  # noqa: PLE0604  # names, from one table


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return importlib.import_module(f"lora_core.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_core.{_ROOM_OF[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return __all__
