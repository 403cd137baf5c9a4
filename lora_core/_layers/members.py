"""Which layers an adapter was put on, kept apart from the model, where a layer may be replaced."""

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


class Members:
    """The layers of one adapter: one object on all of them, which tells it from any other.

    A module that takes a layer's place, as a head that is made anew for more tokens, takes the
    adapter away without a word. Here its name stays.

    Args:
        names: The layers by their dotted names, in a copy of a model that has not been looked at.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._layers: dict[str, weakref.ref[nn.Module] | None] = dict.fromkeys(names)
        self._names: dict[int, str] = {}  # by the ids of layers

    def join(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        """Takes layers in, by their names."""
        for name, layer in layers:
            self._layers[name] = weakref.ref(layer)
            self._names[id(layer)] = name

    def leave(self, layer: nn.Module) -> None:
        """Lets a layer go that the adapter is taken off."""
        name = self._names.pop(id(layer), None)
        found = None if name is None else self._layers[name]
        if name is not None and (found is None or found() is layer):  # an id may come again
            del self._layers[name]

    def gone(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """The names of those that are no more.

        Args:
            layers: The layers of a model that it is on; a copy of a model is known from here on.
        """
        if self._layers and not self._names:
            here = [(name, layers[name]) for name in self._layers if name in layers]
            self._layers.clear()
            self.join(here)
        if len(self._layers) > len(layers):
            gc.collect()  # what was replaced may hold itself
        return [name for name, found in self._layers.items() if found is None or found() is None]

    def __reduce__(self) -> Any:
        return Members, (tuple(self._layers),)
