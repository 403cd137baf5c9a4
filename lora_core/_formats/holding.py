"""What each format has a place for, beside plain factors; all else is refused or made plainer."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from lora_core._errors import ConfigError, listed
from lora_core._formats.folding import as_differences, without_core, without_first
from lora_core._formats.neutral import AdapterLayer
from lora_core._layers import filed_kinds, kind_named

FORMATS = ("lora_core", "kohya", "lycoris", "peft", "diffusers")


class Feature(NamedTuple):
    """Something that a layer may have, and not every format a place for.

    Attributes:
        words: What it is, in a message.
        has: Whether a layer has it.
        formats: Those that hold it.
        plainer: The same function without it, where there is such a layer.
    """

    words: str
    has: Callable[[AdapterLayer], bool]
    formats: Sequence[str]
    plainer: Callable[[AdapterLayer], AdapterLayer] | None = None


def _part(name: str) -> Callable[[AdapterLayer], bool]:
    return lambda layer: layer.config is not None and name in layer.parts


def _kind(name: str) -> Callable[[AdapterLayer], bool]:
    return lambda layer: layer.kind == name


_FEATURES = (
    *(
        Feature(kind.words, _kind(kind.name), kind.formats)
        for kind in map(kind_named, filed_kinds())
        if kind.words
    ),
    Feature("a whole difference", _kind("difference"), ("lycoris",)),
    Feature("values in place of the base's", _kind("values"), ("peft",)),
    Feature("first factors that are subtracted", _part("lora_A0"), ("lora_core",), without_first),
    Feature("a Tucker core", _part("lora_mid"), ("lora_core", "lycoris"), without_core),
    Feature("lengths of columns", _part("lora_in_magnitude"), ("lora_core", "lycoris")),
    Feature("a bias", _part("lora_bias"), ("lora_core", "peft", "diffusers")),
)


def held(
    layers: Mapping[str, AdapterLayer],
    format: str,  # noqa: A002
    *,
    fold: bool,
) -> dict[str, AdapterLayer]:
    """The layers as a format can hold them.

    Args:
        layers: An adapter's.
        format: One of `FORMATS`.
        fold: Whether what has no place may be expressed in plainer terms, where that is possible.

    Raises:
        ConfigError: If something has no place; the message has the layers and the repair.
    """
    out = as_differences(layers) if format == "lycoris" else dict(layers)
    for feature in _FEATURES:
        if format in feature.formats:
            continue
        names = [name for name, layer in out.items() if feature.has(layer)]
        if not names:
            continue
        if feature.plainer is None or not fold:
            refuse(format, feature.words, names, feature.formats, foldable=bool(feature.plainer))
        out |= {name: feature.plainer(out[name]) for name in names}
    return out


def refuse(
    format: str,  # noqa: A002
    words: str,
    names: Sequence[str],
    formats: Sequence[str],
    *,
    foldable: bool = False,
) -> NoReturn:
    """Says what a format has no place for, whose it is, and what to do.

    Raises:
        ConfigError: Always.
    """
    others = " or ".join(f"format={name!r}" for name in formats)
    raise ConfigError(
        f"`format` must have a place for all of the adapter, but {format!r} has none for {words},"
        f" which {listed(names)} {'has' if len(names) == 1 else 'have'}."
        f" {'Pass fold=True, or ' if foldable else 'Pass '}{others}."
    )
