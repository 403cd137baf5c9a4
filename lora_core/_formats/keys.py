"""One key of a file, taken apart: which module it is of, and what of that module it holds."""

import re
from collections.abc import Mapping
from typing import NamedTuple

COMPONENT = (
    r"(?:(?P<component>unet|text_encoder(?:_[23])?|transformer|prior|diffusion_model"
    r"|text_encoders\.clip_[lg]\.transformer)\.)?"
)
_COMPONENTS = {
    "diffusion_model": "unet",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
}
HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# what kohya's programs and their descendants call the tensors of a module
LEAVES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "scale": "scale",
    "dora_scale": "dora_scale",
}
# what is added to a parameter as it stands
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


class Key(NamedTuple):
    """A key taken apart.

    Attributes:
        family: The grammar that it follows.
        module: The file's own name for the module.
        leaf: What it holds, in one vocabulary for all formats: "down", "up", "mid", "alpha",
            "scale", "dora_scale" (over an axis that its shape tells), "magnitude" (over the
            outputs), "bias", or the parameter of a difference or a value.
        component: See `AdapterLayer`; so are the rest.
        path: The module's name in the component, "" where that is `module`.
        spelling: How `path` is spelled.
    """

    family: str
    module: str
    leaf: str
    component: str = ""
    path: str = ""
    spelling: str = "dotted"


def dotted(family: str, leaf: str, found: Mapping[str, str | None], path: str = "") -> Key:
    """A key whose module is named with dots, after a component or none."""
    prefix, path = found["component"] or "", path or str(found["path"])
    if not prefix:
        return Key(family, path, leaf)
    return Key(family, f"{prefix}.{path}", leaf, _COMPONENTS.get(prefix, prefix), path)


def alternatives(names: Mapping[str, str]) -> str:
    """A pattern for any of these names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
