"""Which family of base models an adapter is for, told by what it adapts."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.spelling import CLIP, UNET, Place, places_of

# stems that one family alone has
_XL_ONLY = re.compile(
    r"(?:add_embedding|label_emb|up_blocks_0_attentions|output_blocks_[01]_1)_.+"
    r"|.+_transformer_blocks_[1-9]\d*_.+"
)
_SMALL_ONLY = re.compile(
    r"(?:down_blocks_0_attentions|up_blocks_3|input_blocks_[12]_1|input_blocks_1[01]"
    r"|output_blocks_(?:9|10|11))_.+"
)
_CROSS = re.compile(r".+_attn2_to_[kv]")
_TEXT = re.compile(r".*self_attn_[qkv]_proj")
_ENDS = re.compile(r".+_proj_(?:in|out)")
_OF_TEXT = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # by the width that a UNet sees
# in kohya's words; a UNet that may be either is taken for the one that far more files are for
_BASES = {
    "SD1.x": "sd_v1",
    "SD2.x": "sd_v2",
    "SDXL": "sdxl_base_v1-0",
    "SD1.x or SD2.x": "sd_v1",
}


class Family(NamedTuple):
    """A family, and how it was told.

    Attributes:
        name: "SD1.x", "SD2.x", "SDXL", "SD1.x or SD2.x", "text encoder only" or "unknown".
        because: What it was told by.
        claimed: What the file itself says; "" where it doesn't.
    """

    name: str
    because: str
    claimed: str = ""


def family_of(adapter: Adapter) -> Family:
    """The family of an adapter's base, by names and sizes; what its metadata claim is apart."""
    name, because = _told(adapter.layers, places_of(adapter.layers))
    about = adapter.metadata
    claimed = about.get("ss_base_model_version") or about.get("modelspec.architecture") or ""
    return Family(name, because, claimed)


def base_of(layers: Mapping[str, AdapterLayer], found: Mapping[str, Place]) -> str | None:
    """The family in kohya's words; None where nothing tells.

    Args:
        layers: An adapter's layers.
        found: Where each belongs.
    """
    return _BASES.get(_told(layers, found)[0])


def _told(layers: Mapping[str, AdapterLayer], found: Mapping[str, Place]) -> tuple[str, str]:
    stems = {name: place.stem for name, place in found.items()}
    parts = {place.component for place in found.values()}
    unet = {
        name: layers[name]
        for name, stem in stems.items()
        if found[name].component in ("", "unet") and UNET.fullmatch(stem)
    }
    if unet:
        return _of_unet(unet, stems, parts)
    text = [
        name
        for name, stem in stems.items()
        if found[name].component.startswith("text_encoder")
        or (not found[name].component and CLIP.fullmatch(stem))
    ]
    if len(text) == len(stems):
        widths = sorted({_width(layers[n]) for n in text if _TEXT.fullmatch(stems[n])} - {0})
        named = sorted(parts - {""})
        what = f"is one of {', '.join(named)}" if named else "has a name of CLIP's text encoders"
        wide = f", of width {', '.join(map(str, widths))}" if widths else ""
        return "text encoder only", f"every layer {what}{wide}"
    if any(place.spelling == "index" for place in found.values()):
        return "unknown", "the file has numbers in place of names"
    named = sorted(parts - {""})
    return "unknown", (
        f"the file says {', '.join(named)}, and no layer has a name of Stable Diffusion's UNet"
        if named
        else "no layer has a name of Stable Diffusion's UNet"
    )


def _of_unet(
    unet: Mapping[str, AdapterLayer], stems: Mapping[str, str], parts: set[str]
) -> tuple[str, str]:
    widths = sorted({_width(unet[n]) for n in unet if _CROSS.fullmatch(stems[n])} - {0})
    if len(widths) == 1 and widths[0] in _OF_TEXT:
        return _OF_TEXT[widths[0]], f"cross-attention takes text of width {widths[0]}"
    xl = next((stems[n] for n in unet if _XL_ONLY.fullmatch(stems[n])), "")
    small = next((stems[n] for n in unet if _SMALL_ONLY.fullmatch(stems[n])), "")
    odd = f", though cross-attention takes text of width {widths[0]}" if len(widths) == 1 else ""
    if xl and not small:
        return "SDXL", f"it alone has {xl}{odd}"
    if "text_encoder_2" in parts and not small:
        return "SDXL", f"it alone has a second text encoder{odd}"
    if not small or xl:
        return "unknown", "the UNet's layers here are in several families" + odd
    ends = {unet[n].parts["lora_A"].ndim for n in unet if _is_end(unet[n], stems[n])}
    if ends == {4}:
        return "SD1.x", f"there is {small}, and proj_in and proj_out are convolutions{odd}"
    if ends == {2}:
        return "SD2.x", f"there is {small}, and proj_in and proj_out are matrices{odd}"
    return "SD1.x or SD2.x", f"both have {small}{odd}"


def _is_end(layer: AdapterLayer, stem: str) -> bool:
    return layer.config is not None and _ENDS.fullmatch(stem) is not None


def _width(layer: AdapterLayer) -> int:
    part = layer.parts.get("weight" if layer.config is None else "lora_A")
    return int(part.shape[1]) if part is not None and part.ndim > 1 else 0
