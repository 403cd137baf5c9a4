"""microsoft loralib's keys, ``<path>.lora_A`` and ``.lora_B``: alpha is known to the caller alone.

Several projections in one matrix (MergedLinear) have their factors one after the other; which rows
of the matrix they adapt, `enable_lora`, is known to the caller alone, too. Biases beside the
factors are values that replace the base's.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_core._errors import ConfigError, CorruptFileError, listed
from lora_core._formats.keys import HALVES, Key

Enabled = Sequence[bool] | Mapping[str, Sequence[bool]] | None
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])")
_BIAS = re.compile(r"(?P<path>.+)\.bias")


def parse(key: str) -> Key | None:
    """A key of loralib's, None if it is none."""
    if found := _KEY.fullmatch(key):
        return Key("loralib", found["path"], HALVES[found["half"]])
    return None


def parse_bias(key: str) -> Key | None:
    """The key of a bias beside such factors, None if it is none."""
    if found := _BIAS.fullmatch(key):
        return Key("loralib values", found["path"], "bias")
    return None


class Merged:
    """Which slots of which matrices hold an adapter, as the caller gave it.

    Args:
        enable_lora: The slots of every such matrix, or by module name; None where there is none.
        where: The file, for messages.

    Raises:
        ConfigError: If it is no such thing.
    """

    def __init__(self, enable_lora: Enabled, where: str) -> None:
        self._where = where
        self._by_name = dict(enable_lora) if isinstance(enable_lora, Mapping) else None
        self._all = None if isinstance(enable_lora, Mapping) else enable_lora
        for slots in self._by_name.values() if self._by_name is not None else [self._all]:
            given: object = slots  # whatever a caller passes
            whole = isinstance(given, list | tuple) and any(given)
            if given is not None and not (whole and all(type(s) is bool for s in slots or ())):
                raise ConfigError(
                    f"`enable_lora` must be a list of True and False, one True at least, or a dict"
                    f" of such by module name, but is {enable_lora!r}."
                )

    def check(self, names: Sequence[str]) -> None:
        """Refuses names that the file lacks, and slots where no module has any."""
        unknown = sorted(set(self._by_name or ()) - set(names))
        if unknown or (not names and self._all is not None):
            raise ConfigError(
                f"`enable_lora` must name modules of {self._where!r} that loralib wrote, but has"
                f" {listed(unknown) or 'none to be for'}; the file has {listed(names) or 'none'}."
            )

    def unmerged(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, float]:
        """Plain factors of one matrix, and how many times its rank they have.

        The factors of each enabled slot go to its own rows: ``down`` stays, ``up`` becomes a
        block for each.

        Shape:
            - down: ``(rank * enabled, in)``; up: ``(out / slots * enabled, rank)``
            - Output: ``(rank * enabled, in)``, ``(out, rank * enabled)``

        Raises:
            ConfigError: If the factors are such, and the caller says nothing of them.
            CorruptFileError: If they don't fit what the caller says.
        """
        slots = self._by_name.get(name) if self._by_name is not None else None
        plain = down.ndim == 2 and up.ndim == 2 and down.shape[0] == up.shape[1]
        if slots is None and not plain:
            slots = self._all
        if slots is None:
            if plain or down.ndim != 2 or up.ndim != 2 or not up.shape[1]:
                return down, up, 1
            several, rest = divmod(down.shape[0], up.shape[1])
            if rest or several < 2:
                return down, up, 1
            raise ConfigError(
                f"`enable_lora` must be given for {name!a} of {self._where!r}, but is None: its"
                f" factors {tuple(down.shape)} and {tuple(up.shape)} are those of {several}"
                " projections in one matrix. Pass enable_lora={name: [True, False, True]}, as it"
                " was trained."
            )
        enabled = sum(slots)
        rank = up.shape[1] if up.ndim == 2 else 0
        if down.ndim != 2 or down.shape[0] != rank * enabled or up.shape[0] % enabled:
            raise CorruptFileError(
                f"{name!a} of {self._where!r} must have factors for the {enabled} projections of"
                f" `enable_lora`, but has {tuple(down.shape)} and {tuple(up.shape)}."
            )
        height = up.shape[0] // enabled
        whole = up.new_zeros(height * len(slots), rank * enabled)
        places = [n for n, slot in enumerate(slots) if slot]
        for k, (place, block) in enumerate(zip(places, torch.split(up, height), strict=True)):
            whole[place * height : (place + 1) * height, k * rank : (k + 1) * rank] = block
        return down, whole, enabled
