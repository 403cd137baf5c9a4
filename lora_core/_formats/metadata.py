"""What kohya's programs and their readers expect beside the tensors: ``ss_*``, ModelSpec, hashes.

None of it decides a number. Entries that a file had before are kept, but for those that describe
the tensors, which are made anew.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lora_core._errors import ConfigError, listed
from lora_core._formats import container
from lora_core._formats.diffusers import ENTRY
from lora_core._formats.native import RESERVED
from lora_core._formats.neutral import AdapterLayer

_HASHES = ("sshs_model_hash", "sshs_legacy_hash")
_DIMS = ("ss_network_dim", "ss_network_alpha")
ARGS = "ss_network_args"
# what only an encoder may set, since it follows from the tensors
COMPUTED = (*RESERVED, ENTRY, *_HASHES, *_DIMS)
# of other tensors, or of another format's: they would be wrong beside these
_STALE = re.compile(
    "|".join((*map(re.escape, COMPUTED), r"modelspec\.hash_sha256", "ss_network_module"))
    # cloneofsimo's, where modules are numbers
    + r"|(?:unet|text_encoder)(?::\d+:rank)?|<.+>"
)


class Base(NamedTuple):
    """What metadata say of a family of models."""

    architecture: str
    implementation: str
    resolution: str


_SGM = "https://github.com/Stability-AI/generative-models"
BASES = {
    "sd_v1": Base("stable-diffusion-v1", "diffusers", "512x512"),
    "sd_v2": Base("stable-diffusion-v2-512", "diffusers", "512x512"),
    "sd_v2_v": Base("stable-diffusion-v2-768-v", "diffusers", "768x768"),
    "sdxl_base_v1-0": Base("stable-diffusion-xl-v1-base", _SGM, "1024x1024"),
}


def check_base(base: object) -> str | None:
    """Returns `base` if it is None or a family that metadata have a name for."""
    if base is not None and base not in BASES:
        raise ConfigError(
            f"`base` must be one of {listed(BASES)}, but is {base!r}. Leave it out, and pass"
            " metadata={'ss_base_model_version': ...} for another model."
        )
    return base if isinstance(base, str) else None


def check_metadata(metadata: object) -> dict[str, str]:
    """Returns entries of text that leave to the format what follows from the tensors."""
    if not isinstance(metadata, Mapping):
        raise ConfigError(
            f"`metadata` must map strings to strings, but is {metadata!r}."
            " Write {'note': 'text'}, for example."
        )
    odd = [k for k, v in metadata.items() if not (_is_text(k) and _is_text(v))]
    if odd:
        raise ConfigError(
            f"`metadata` must map strings to strings, but {listed(odd)} does not."
            " Write other values as text, with json.dumps for example."
        )
    taken = [key for key in metadata if key in COMPUTED]
    if taken:
        raise ConfigError(
            f"`metadata` must leave {listed(COMPUTED, len(COMPUTED))} to the format, but sets"
            f" {listed(taken)}. Choose other keys."
        )
    return dict(metadata)


def _is_text(value: object) -> bool:
    # a lone surrogate is a str that no file can hold
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a file that hold for another file of the same adapter."""
    return {key: value for key, value in metadata.items() if not _STALE.fullmatch(key)}


def training(
    module: str, base: str | None, title: str, layers: Mapping[str, AdapterLayer], args: str
) -> tuple[dict[str, str], dict[str, str]]:
    """What kohya's programs say of a network: what may be overridden, and what may not.

    Args:
        module: The code that trains such a network, as "networks.lora".
        base: A key of `BASES`; None where the family is unknown, of which nothing is then said.
        title: What to call the adapter.
        layers: What is written.
        args: The entry `ARGS` that the adapter brought, "" for none.
    """
    general: dict[str, str] = {}
    if base is not None:
        known = BASES[base]
        general = {
            "ss_v2": str(base.startswith("sd_v2")),
            "ss_base_model_version": base,
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{known.architecture}/lora",
            "modelspec.implementation": known.implementation,
            "modelspec.title": title,
            "modelspec.resolution": known.resolution,
        }
    # larger kernels have settings of their own there
    sizes: dict[bool, set[tuple[int, float]]] = {False: set(), True: set()}
    for layer in layers.values():
        if layer.config is not None:
            wide = "lora_mid" in layer.parts or layer.parts["lora_A"].shape[2:].numel() > 1
            sizes[wide].add((layer.config.rank, layer.config.alpha))
    # what tools that resize and merge say of ranks that differ
    dims = dict.fromkeys(_DIMS, "Dynamic")
    others = {k: v for k, v in _parsed(args).items() if k not in ("conv_dim", "conv_alpha")}
    if len(sizes[False]) == 1 and len(sizes[True]) < 2:
        dims = dict(zip(_DIMS, map(str, sizes[False].pop()), strict=True))
        for rank, alpha in sizes[True]:
            others |= {"conv_dim": str(rank), "conv_alpha": f"{alpha:.12g}"}
    more = {ARGS: json.dumps(others)} if others else {}
    return general, {"ss_network_module": module, **dims, **more}


def _parsed(text: str) -> dict[str, object]:
    try:
        found = container.strict_json(text or "{}")
    except ValueError:  # metadata of other programs may be anything
        return {}
    return found if isinstance(found, dict) else {}


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries, and the two hashes by which programs know a file again.

    ``sshs_model_hash`` is of the data section; ``sshs_legacy_hash`` is of 64 KiB after the first
    1 MiB of the file as it would be with the ``ss_*`` entries alone.
    """
    own = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = memoryview(container.pack(tensors, own))
    start = 8 + int.from_bytes(data[:8], "little")
    model = hashlib.sha256(data[start:]).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return {**metadata, **dict(zip(_HASHES, (model, legacy), strict=True))}
