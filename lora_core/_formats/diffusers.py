"""diffusers' keys, in four dialects that one file may mix.

Those of PEFT after a component, whose alphas are in the file's metadata; ``.lora.down`` and
``.lora_linear_layer.down``; those of attention processors, which leave out the index of ``to_out``;
and any of these without a component, as one model saves them. Without metadata the scale is 1.
"""

import re
from collections.abc import Mapping
from typing import Any

from lora_core._errors import CorruptFileError
from lora_core._formats.container import strict_json
from lora_core._formats.keys import COMPONENT, HALVES, Key, dotted
from lora_core._formats.settings import PeftSettings

ENTRY = "lora_adapter_metadata"
_PROCESSOR = re.compile(
    rf"{COMPONENT}(?P<path>.+?)(?:\.processor)?\.(?P<projection>to_[qkv]|to_out)_lora"
    r"\.(?P<half>down|up)\.weight"
)
_UP_DOWN = re.compile(
    rf"{COMPONENT}(?P<path>.+)\.lora(?:_linear_layer)?\.(?P<half>down|up)\.weight"
)
_A_B = re.compile(
    rf"{COMPONENT}(?P<path>.+)\.lora_(?P<half>[AB])"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?\.(?P<leaf>weight|bias)"
)
_MAGNITUDE = re.compile(rf"{COMPONENT}(?P<path>.+)\.lora_magnitude_vector(?:\.weight)?")
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse(key: str) -> Key | None:
    """A key of any dialect, None if it is none."""
    if found := _PROCESSOR.fullmatch(key):
        in_text = "text" in (found["component"] or "") or found["path"].endswith("self_attn")
        projection = found["projection"]
        there = _IN_TEXT[projection] if in_text else projection.replace("to_out", "to_out.0")
        path = f"{found['path']}.{there}"
        return dotted("diffusers", HALVES[found["half"]], found.groupdict(), path)
    if found := _UP_DOWN.fullmatch(key):
        return dotted("diffusers", HALVES[found["half"]], found.groupdict())
    if found := _A_B.fullmatch(key):
        if found["leaf"] == "bias" and found["half"] == "A":
            return None
        leaf = "bias" if found["leaf"] == "bias" else HALVES[found["half"]]
        return dotted("A/B", leaf, found.groupdict())
    if found := _MAGNITUDE.fullmatch(key):
        return dotted("A/B", "magnitude", found.groupdict())
    return None


def settings(metadata: Mapping[str, str], where: str) -> dict[str, PeftSettings]:
    """The settings by component, "" for a file of one model; empty where there is no metadata.

    Raises:
        CorruptFileError: If they can't be understood.
        UnsupportedFileError: If one asks for what plain LoRA is not.
    """
    if ENTRY not in metadata:
        return {}
    try:
        about = strict_json(metadata[ENTRY])
        if not isinstance(about, dict):
            raise ValueError(f"it is a {type(about).__name__}")
    except ValueError as error:
        raise CorruptFileError(
            f"{where!r} must describe its adapters in {ENTRY!r}, but {error}. Save it again."
        ) from None
    split: dict[str, dict[str, Any]] = {}
    for key, value in about.items():
        component, _, setting = key.rpartition(".")
        split.setdefault(component, {})[setting] = value
    source = f"the file's {ENTRY}"
    return {name: PeftSettings.parse(s, where, source) for name, s in split.items()}
