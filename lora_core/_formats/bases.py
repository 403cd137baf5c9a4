"""The fingerprint of the weights that an adapter was trained on, as a file holds it."""

import base64
import binascii
import struct
from collections.abc import Iterable, Mapping
from typing import Any

SAMPLES = 4  # values per layer, in the order of the layers' names
_ROW = struct.calcsize(f"<{SAMPLES}d")


def rebased(
    base: Mapping[str, Any], names: Iterable[str], kept: Mapping[str, str]
) -> Mapping[str, Any]:
    """The fingerprint of some of the layers, under other names.

    Args:
        base: The fingerprint of all; one that is malformed stays so.
        names: The layers it is of.
        kept: By its new name the old one of each layer that stays.
    """
    order = {name: i for i, name in enumerate(sorted(names))}
    try:
        data = base64.b64decode(base["samples"], validate=True)
    except (binascii.Error, KeyError, TypeError, ValueError):
        return base
    if len(data) != _ROW * len(order):
        return base
    rows = [data[_ROW * order[kept[new]] :][:_ROW] for new in sorted(kept)]
    return {**base, "samples": base64.b64encode(b"".join(rows)).decode()}
