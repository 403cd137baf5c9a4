"""kohya's keys, as on Civitai: ``<prefix>_<stem>.<leaf>``, a stem being a path without its dots.

LyCORIS writes the same with more leaves, and ``lycoris_`` for whole models of any kind. Its rsLoRA
files hold ``alpha * sqrt(rank)`` and its scalars are in ``lora_up``, so the plain rule
``alpha / rank`` holds for all. ComfyUI and OneTrainer write the leaves after dotted paths.
"""

import re

from lora_core._formats.keys import COMPONENT, DIFFERENCES, LEAVES, Key, alternatives, dotted

_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
    "lora_prior_unet": "prior",
    "lora_prior_te": "prior_text_encoder",
    "lycoris": "",
}
_LEAF = f"(?P<leaf>{alternatives(LEAVES)})"
_DIFFERENCE = f"(?P<leaf>{alternatives(DIFFERENCES)})"
_PREFIX = rf"(?P<prefix>{alternatives(_PREFIXES)})_"
_STEM = re.compile(rf"{_PREFIX}(?P<stem>[^.]+)\.{_LEAF}")
# diffusers' converter leaves the last dots of a stem, and PEFT's name for a magnitude
_MAGNITUDE = re.compile(rf"{_PREFIX}(?P<stem>.+)\.lora_magnitude_vector")
_STEM_DIFFERENCE = re.compile(rf"{_PREFIX}(?P<stem>[^.]+)\.{_DIFFERENCE}")
_DOTTED = re.compile(rf"{COMPONENT}(?P<path>.+)\.{_LEAF}")
_DOTTED_DIFFERENCE = re.compile(rf"{COMPONENT}(?P<path>.+)\.{_DIFFERENCE}")


def parse(key: str) -> Key | None:
    """A key with a stem, None if it is none."""
    if found := _STEM.fullmatch(key):
        return _stem("kohya", found, LEAVES[found["leaf"]])
    if found := _MAGNITUDE.fullmatch(key):
        return _stem("kohya", found, "magnitude")
    if found := _STEM_DIFFERENCE.fullmatch(key):
        return _stem("difference", found, DIFFERENCES[found["leaf"]])
    return None


def parse_dotted(key: str) -> Key | None:
    """A key with a dotted path and one of kohya's leaves, None if it is none."""
    if found := _DOTTED.fullmatch(key):
        return dotted("dotted", LEAVES[found["leaf"]], found.groupdict())
    if found := _DOTTED_DIFFERENCE.fullmatch(key):
        return dotted("difference", DIFFERENCES[found["leaf"]], found.groupdict())
    return None


def _stem(family: str, found: re.Match[str], leaf: str) -> Key:
    stem = found["stem"].replace(".", "_")
    module = f"{found['prefix']}_{stem}"
    return Key(family, module, leaf, _PREFIXES[found["prefix"]], stem, "stem")
