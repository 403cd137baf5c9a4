"""PEFT's keys: ``base_model.model.<path>.<leaf>``, its settings in ``adapter_config.json``.

The adapter's name stands in keys only where a whole state dict was saved. Parameters that were
trained whole, and biases, are values that replace the base's.
"""

import re
from pathlib import Path
from typing import Any

from lora_core._errors import CorruptFileError
from lora_core._formats.container import strict_json
from lora_core._formats.keys import HALVES, Key
from lora_core._formats.settings import PeftSettings
from lora_core._formats.sniffing import content

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ROOT = r"base_model\.model\.(?P<path>.+)"
_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
_FACTOR = re.compile(rf"{_ROOT}\.lora_(?P<half>[AB]){_NAME}\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(rf"{_ROOT}\.lora_embedding_(?P<half>[AB])(?:\.[^.]+)?")
_MAGNITUDE = re.compile(rf"{_ROOT}\.lora_magnitude_vector{_NAME}(?:\.weight)?")
_VALUE = re.compile(
    r"base_model\.model\.(?P<path>.+?)"
    r"(?P<whole>\.base_layer|\.original_module|\.modules_to_save(?:\.[^.]+)?)?"
    r"\.(?P<leaf>weight|bias)"
)
_MAX_CONFIG = 8 * 2**20  # bytes


def parse(key: str) -> Key | None:
    """A key of PEFT's, None if it is none."""
    if found := _FACTOR.fullmatch(key):
        if found["leaf"] == "bias" and found["half"] == "A":
            return None
        leaf = "bias" if found["leaf"] == "bias" else HALVES[found["half"]]
        return Key("PEFT", _bare(found["path"]), leaf)
    if found := _EMBEDDING.fullmatch(key):
        return Key("PEFT", _bare(found["path"]), f"embedding {HALVES[found['half']]}")
    if found := _MAGNITUDE.fullmatch(key):
        return Key("PEFT", _bare(found["path"]), "magnitude")
    if (found := _VALUE.fullmatch(key)) and ".lora_" not in key:
        # beside what was trained whole PEFT may store what the base had there
        leaf = "ignored" if found["whole"] == ".original_module" else found["leaf"]
        return Key("PEFT values", _bare(found["path"]), leaf)
    return None


def settings(path: Path) -> PeftSettings:
    """The settings in a folder's `CONFIG`.

    Raises:
        CorruptFileError: If they can't be understood.
        UnsupportedFileError: If one asks for what plain LoRA is not.
        OSError: If the file can't be read.
    """
    size = path.stat().st_size
    try:
        if size > _MAX_CONFIG:  # before anything of it is read
            raise ValueError(f"it has {size:,} bytes")
        config: Any = strict_json(content(path))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}")
    except ValueError as error:
        raise CorruptFileError(
            f"{str(path)!r} must be PEFT's settings, a JSON object, but {error}. Save it again."
        ) from None
    return PeftSettings.parse(config, str(path), CONFIG)


def _bare(path: str) -> str:
    """A path without what PEFT wraps around a module."""
    return path.replace(".base_layer", "")
