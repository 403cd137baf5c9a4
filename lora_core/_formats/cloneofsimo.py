"""cloneofsimo's files: modules have no names but numbers, ``unet:<number>:up`` and ``:down``.

In a ``.pt`` file the factors stand in a plain list, up before down, and the file's name says which
model they are for. No file holds an alpha: the scale is 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_core._errors import CorruptFileError
from lora_core._formats.keys import HALVES, Key

_KEY = re.compile(r"(?P<component>[A-Za-z_]\w*):(?P<index>\d{1,6}):(?P<half>up|down)")


def parse(key: str) -> Key | None:
    """A key of cloneofsimo's, None if it is none."""
    if found := _KEY.fullmatch(key):
        component, index = found["component"], str(int(found["index"]))
        module = f"{component}:{index}"
        return Key("cloneofsimo", module, HALVES[found["half"]], component, index, "index")
    return None


def is_list(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a list."""
    return list(tensors) == [str(n) for n in range(len(tensors))]


def named(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A list's tensors under the keys that they would have.

    Raises:
        CorruptFileError: If one has no other half.
    """
    if len(tensors) % 2:
        raise CorruptFileError(
            f"{str(path)!r} must be a list of factors in pairs, but has {len(tensors)}. Save it"
            " again."
        )
    component = "text_encoder" if path.stem.endswith(".text_encoder") else "unet"
    halves = ("up", "down")
    return {f"{component}:{n // 2}:{halves[n % 2]}": t for n, t in enumerate(tensors.values())}
