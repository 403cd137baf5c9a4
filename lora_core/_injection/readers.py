"""Which layers' weights are read by whom: by their own forward, or by another module's."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora_core._injection.candidates import Candidate
from lora_core._injection.code import weights_read
from lora_core._layers import LoRAMixin, Slot, computes_as_torch, why_read


def reasons(modules: Iterable[nn.Module], chosen: Iterable[Candidate]) -> dict[str, str]:
    """Why the weight of each layer must read as the sum, by name; "" where it need not.

    Args:
        modules: Every module of the model.
        chosen: The layers.
    """
    by: dict[nn.Module | Slot, str] = {}
    for reader in modules:
        cls: Any = type(reader)
        for name in weights_read(cls):
            for layer in _called(reader, name):
                by.setdefault(layer, f"{cls.__name__} reads it")
    found = {}
    for c in chosen:
        module: Any = c.module
        if isinstance(module, LoRAMixin):
            read = module.lora_is_read and not module.lora_kind.is_read
            why = "as that of the adapters there" * read
        else:
            why = by.get(module, "")
            cls = type(module)
            if not why and not isinstance(module, Slot) and not computes_as_torch(cls):
                why = why_read(module)
        found[c.name] = why
    return found


def _called(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that go by a name in one, or below it where it has none itself."""
    found = [module._modules[name]] if name in module._modules else []
    if not found:
        found = [m._modules[name] for m in module.modules() if name in m._modules]
    for child in found:
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from (m for m in child._modules.values() if m is not None)
        elif child is not None:
            yield child
