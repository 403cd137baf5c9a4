"""The modules that cloneofsimo's files mean by numbers: those it adapts, in the models' order.

Of a UNet its attention and the first projection of each feed-forward, and of extended files the
resnets too; of a text encoder its attention. Within a transformer block the files of the era have
the feed-forward between the two attentions, where that diffusers registered it; later ones have it
last. The factors' shapes tell which of the two holds.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from lora_core._errors import MismatchError, listed
from lora_core._formats.neutral import AdapterLayer

_ATTENTION = re.compile(r"(?P<block>.+)\.(?P<part>attn1|attn2|ff)\.(?:to_.+|net\.0\.proj)")
_IN_TEXT = re.compile(r"(?P<block>.+)\.(?P<part>self_attn)\..+")
_RESNET = re.compile(r"(?P<block>.+)\.resnets\.\d+\..+")
_ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))  # of the era, and later


class _Host(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def numbered(
    layers: Mapping[str, AdapterLayer], hosts: Sequence[_Host], where: str, *, must: bool = True
) -> dict[str, str]:
    """The path of each layer's module, whose number is its `path`.

    Args:
        layers: The layers for one model.
        hosts: Its modules, in the order of `named_modules`.
        where: The file, for messages.
        must: Whether it is an error that none of the orders fits; else nothing is found.

    Raises:
        MismatchError: If `must`, and in none of the orders every factor has its module's sizes.
    """
    last = max(int(layer.path) for layer in layers.values())
    lengths = []
    for order in _orders(hosts):
        lengths.append(len(order))
        if last < len(order) and all(_fits(x, order[int(x.path)]) for x in layers.values()):
            return {name: order[int(layer.path)].path for name, layer in layers.items()}
    if not must:
        return {}
    raise MismatchError(
        f"The modules that {where!r} means by numbers must have the sizes of its factors, but"
        f" {listed(layers, 2)} fit none of the orders, which have {listed(dict.fromkeys(lengths))}"
        " modules. Load it into the model it was made for, Stable Diffusion 1 in diffusers' form."
    )


def _orders(hosts: Sequence[_Host]) -> Iterator[list[_Host]]:
    if any(_IN_TEXT.fullmatch(host.path) for host in hosts):
        yield [host for host in hosts if _IN_TEXT.fullmatch(host.path)]
    for extended in (False, True):
        chosen = [
            host
            for host in hosts
            if _ATTENTION.fullmatch(host.path) or (extended and _RESNET.fullmatch(host.path))
        ]
        for order in _ORDERS:
            yield list(_sorted(chosen, order))


def _sorted(hosts: Sequence[_Host], order: Sequence[str]) -> Iterator[_Host]:
    def block(host: _Host) -> str:
        found = _ATTENTION.fullmatch(host.path)
        return found["block"] if found else ""

    def place(host: _Host) -> int:
        found = _ATTENTION.fullmatch(host.path)
        return order.index(found["part"]) if found else 0

    for _, together in groupby(hosts, block):
        yield from sorted(together, key=place)


def _fits(layer: AdapterLayer, host: _Host) -> bool:
    down, up = layer.parts["lora_A"].shape, layer.parts["lora_B"].shape
    kernel = tuple(down[2:])
    alike = kernel == tuple(host.shape[2:]) or {*kernel, *host.shape[2:]} == {1}
    return alike and (up[0], down[1]) == tuple(host.shape[:2])
