"""The fingerprint of the weights that an adapter was trained on, as a file holds it."""

import base64
import binascii
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

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


class Row(NamedTuple):
    """What was read of one weight.

    Attributes:
        dtype: Its type.
        values: Those at its `places`; not-a-number where none can be read.
    """

    dtype: torch.dtype
    values: Sequence[float]


def places(numbers: int) -> list[int]:
    """Which numbers of a weight are sampled."""
    return [(2 * i + 1) * numbers // (2 * SAMPLES) for i in range(SAMPLES)]


def differing_rows(
    base: Mapping[str, Any], names: Iterable[str], rows: Mapping[str, Row]
) -> list[str]:
    """The layers whose weights are not those that were sampled, as "name (file ..., model ...)".

    Weights of one dtype must be equal; across dtypes they may differ by what rounding explains.

    Args:
        base: The fingerprint.
        names: The layers it is of.
        rows: What was read of those that are looked at.

    Raises:
        ValueError: If the fingerprint is malformed.
    """
    order = sorted(names)
    try:
        data = base64.b64decode(base["samples"], validate=True)
        stored = struct.unpack(f"<{len(order) * SAMPLES}d", data)
        eps = precision_of(base["dtype"])
    except (binascii.Error, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the base fingerprint is malformed ({error})") from error
    # the same for thousands of layers
    dtypes = {row.dtype for row in rows.values()}
    own = {d: precision_of(name_of(d)) if d.is_floating_point else eps for d in dtypes}
    found = []
    for i, name in enumerate(order):
        if name not in rows:
            continue
        dtype, values = rows[name]
        theirs = stored[i * SAMPLES : (i + 1) * SAMPLES]
        if theirs == tuple(values):
            continue
        tolerance = 0.0 if own[dtype] == eps else 2 * max(own[dtype], eps)
        for a, b in zip(theirs, values, strict=True):
            # not-a-number stands for a weight without readable values, as on the meta device
            if abs(a - b) > tolerance * max(abs(a), 2**-14):
                found.append(f"{name} (file {a:.6g}, model {b:.6g})")
                break
    return found


def name_of(dtype: torch.dtype) -> str:
    """A dtype as a fingerprint names it."""
    return str(dtype).removeprefix("torch.")


def precision_of(dtype: str) -> float:
    """The step from 1 to the next number of a type."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 1:
        raise TypeError(f"{dtype!a} is no floating type")
    try:
        return torch.finfo(kind).eps
    except (TypeError, NotImplementedError) as error:
        raise TypeError(f"{dtype!a} has no precision") from error
