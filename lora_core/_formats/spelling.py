"""What a file is to call a module: its component, its path there, and the path's spelling.

The reader's `naming` finds these names again in a live model; here there is none, so that what a
model is must show by the names and sizes of what was adapted.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from lora_core._errors import ConfigError, listed
from lora_core._formats.keys import COMPONENT, dotted
from lora_core._formats.ldm import other_names
from lora_core._formats.neutral import AdapterLayer

SPELLINGS = ("diffusers", "ldm")
_PREFIXED = re.compile(rf"{COMPONENT}(?P<path>.+)")
UNET = re.compile(r"(?:(?:down|up|input|output)_blocks|mid_block|middle_block)_.+")
_LDM = re.compile(r"(?:input_blocks|middle_block|output_blocks)[._]")
CLIP = re.compile(r"(?:text_model_)?encoder_layers_\d+_(?:self_attn|mlp)_.+")
TEXT_MODEL = "text_model."  # a wrapper that transformers had in all of CLIP's text encoders
IN_TEXT = ("encoder.layers.", "embeddings.", "final_layer_norm")  # what was in it
# blocks on the way up that hold attention, which an adapter may leave out
_DEEP = {"sdxl_base_v1-0": (0, 1)}
_DEEP_SD = (1, 2, 3)


class Place(NamedTuple):
    """Where a layer belongs, in a file's words.

    Attributes:
        component: Which model of a pipeline; "" where that is unknown.
        path: The module there, with dots, or as a stem.
        spelling: "dotted", "stem" or "index", as in `AdapterLayer`.
    """

    component: str
    path: str
    spelling: str

    @property
    def stem(self) -> str:
        """The path with its dots as underscores."""
        return self.path.replace(".", "_")


def places(layers: Mapping[str, AdapterLayer]) -> dict[str, Place]:
    """Where each layer belongs, as far as the adapter says."""
    return {n: Place(x.component, x.path or n, x.spelling) for n, x in layers.items()}


def places_of(layers: Mapping[str, AdapterLayer]) -> dict[str, Place]:
    """Where each layer belongs, as far as the adapter or all its names say."""
    return parted(places(layers))


def parted(found: Mapping[str, Place]) -> dict[str, Place]:
    """The places with the components that all names of an adapter begin with, if all do.

    So are those of a file of several models, which says no more of them.
    """
    if any(place.component or place.spelling != "dotted" for place in found.values()):
        return dict(found)
    split = {name: _PREFIXED.fullmatch(place.path) for name, place in found.items()}
    keys = {name: dotted("", "", m.groupdict()) for name, m in split.items() if m is not None}
    if len(keys) < len(found) or not all(key.component for key in keys.values()):
        return dict(found)
    return {name: Place(key.component, key.path, "dotted") for name, key in keys.items()}


def recognised(found: Mapping[str, Place], format: str) -> dict[str, Place]:  # noqa: A002
    """The places with a component each: a UNet and a text encoder are known by their names.

    Raises:
        ConfigError: If a model is none of the two.
    """
    nameless = [name for name, place in found.items() if not place.component]
    if not nameless:
        return dict(found)
    stems = [found[name].stem for name in nameless]
    component = next(
        (
            component
            for component, pattern in (("unet", UNET), ("text_encoder", CLIP))
            if any(pattern.fullmatch(stem) for stem in stems)
        ),
        "",
    )
    if not component:
        raise ConfigError(
            f"A module must be of a known part of a pipeline to be written as {format!r}, but"
            f" {listed(nameless)} may be of any model. Save the models by their parts, as in"
            " {\"unet\": model}, or use format='lycoris' or format='peft'."
        )
    return dict(found) | {n: found[n]._replace(component=component) for n in nameless}


def respelled(
    found: Mapping[str, Place], spelling: str, base: str | None = None, *, must: bool = False
) -> dict[str, Place]:
    """The places as files spell them: a UNet in one spelling, CLIP's text encoders wrapped.

    Args:
        found: Places with components.
        spelling: One of `SPELLINGS`.
        base: The family, as `families.base_of` gives it.
        must: Whether stems, which can't be taken apart, must be spelled so already.

    Raises:
        ConfigError: If they must, and are not.
    """
    unet = {name: place for name, place in found.items() if place.component == "unet"}
    stems = [n for n, x in unet.items() if x.spelling == "stem" and UNET.fullmatch(x.stem)]
    odd = [name for name in stems if bool(_LDM.match(unet[name].stem)) != (spelling == "ldm")]
    if must and odd:
        raise ConfigError(
            f"A module must be known by its dotted name to be spelled otherwise, but {listed(odd)}"
            f" is known by a stem alone, which is not of {spelling!r}. Load it into its model, and"
            " save that."
        )
    paths = [place.path for place in unet.values() if place.spelling == "dotted"]
    is_ldm = any(_LDM.match(path) for path in paths)
    deep = [f"up_blocks.{block}.attentions.0.norm" for block in _DEEP.get(base or "", _DEEP_SD)]
    others: Mapping[str, str] = {}
    if paths and is_ldm != (spelling == "ldm"):
        others = other_names(paths if is_ldm else [*paths, *deep])

    def file_path(place: Place) -> str:
        if place.spelling != "dotted":
            return place.path
        if place.component == "unet":
            return others.get(place.path, place.path)
        if place.component.startswith("text_encoder") and place.path.startswith(IN_TEXT):
            return TEXT_MODEL + place.path  # files name it
        return place.path

    return {name: place._replace(path=file_path(place)) for name, place in found.items()}


def check_dotted(
    found: Mapping[str, Place],
    format: str,  # noqa: A002
    spellings: Collection[str] = ("dotted",),
) -> None:
    """Refuses layers whose modules are known only by other names than their dotted ones.

    Raises:
        ConfigError: If there are any.
    """
    odd = [name for name, place in found.items() if place.spelling not in spellings]
    if odd:
        raise ConfigError(
            f"A module must be known by its dotted name to be written as {format!r}, but"
            f" {listed(odd)} is known by a {found[odd[0]].spelling} alone. Load it into its model,"
            " and save that."
        )


def check_names(
    names: Mapping[str, str],
    layers: Mapping[str, AdapterLayer],
    format: str,  # noqa: A002
    reads_back: Callable[[str], bool],
) -> None:
    """Refuses names that a reader would take for others, or that two modules share.

    Args:
        names: What a file calls each layer's module.
        layers: The layers.
        format: The file's format, for messages.
        reads_back: Whether a reader finds a layer's own name in the file again.

    Raises:
        ConfigError: If there are any.
    """
    odd = [name for name in names if not reads_back(name)]
    if odd:
        raise ConfigError(
            f"A module must have a name that the keys of {format!r} can spell, but {listed(odd)}"
            " has none. Rename it, or use format='lora_core'."
        )
    first: dict[tuple[str, bool], str] = {}
    for name, spelled in names.items():
        whole = layers[name].config is None  # beside factors a module may have values
        other = first.setdefault((spelled, whole), name)
        if other != name:
            raise ConfigError(
                "Each module must have a name of its own in a file, but"
                f" {listed([other, name])} are both {spelled!a} in {format!r}. Rename one."
            )
