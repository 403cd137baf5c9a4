"""An adapter in the neutral form into the files of any format.

Nothing of it is dropped in silence: what a format has no place for is refused, or with `fold`
expressed in plainer terms where that is possible without changing the function.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core._config import SETTINGS, AdapterConfig, check_flag, path_of
from lora_core._errors import ConfigError, listed
from lora_core._formats import (
    container,
    holding,
    peft,
    writing_diffusers,
    writing_kohya,
    writing_native,
    writing_peft,
)
from lora_core._formats.encoded import Encoded, check_values
from lora_core._formats.folding import folded
from lora_core._formats.metadata import carried, check_base, check_metadata
from lora_core._formats.neutral import Adapter, AdapterLayer
from lora_core._formats.spelling import SPELLINGS

_WRITABLE = 0o222


def encode(
    adapter: Adapter,
    format: str = "lora_core",  # noqa: A002
    *,
    fold: bool = False,
    base: str | None = None,
    metadata: Mapping[str, str] | None = None,
    spelling: str | None = None,
) -> Encoded:
    """The files of an adapter; equal for equal adapters, whatever the order of their layers.

    Args:
        adapter: What to write, its modules by dotted names. Stems do for kohya's keys.
        format: "lora_core", "kohya" (the programs for Stable Diffusion and their readers),
            "lycoris" (the same with Tucker cores, differences, and names for any model), "peft" (a
            folder, for one model) or "diffusers" (a file for a pipeline).
        fold: Whether to multiply the scale into `lora_B`, so that readers who know of no alpha are
            right too; and to express what the format has no place for in plainer terms: a Tucker
            core as a larger kernel, first factors that are subtracted as twice the rank.
        base: The family that it is for, "sd_v1", "sd_v2", "sd_v2_v" or "sdxl_base_v1-0", for
            kohya's metadata and spelling; None tells it by the modules.
        metadata: Entries to write beside those that the adapter brought.
        spelling: How kohya's keys spell a UNet: "diffusers" or "ldm"; None is the family's own.

    Raises:
        ConfigError: If the format can't hold the adapter, a name is ambiguous in it, a factor is
            not finite, or an argument is no such value.
    """
    if format not in holding.FORMATS:
        raise ConfigError(f"`format` must be one of {listed(holding.FORMATS)}, but is {format!r}.")
    if spelling is not None and (spelling not in SPELLINGS or format not in ("kohya", "lycoris")):
        raise ConfigError(
            f"`spelling` must be one of {listed(SPELLINGS)}, of 'kohya' and 'lycoris' alone, but is"
            f" {spelling!r} for {format!r}. Leave it out for the one that is usual."
        )
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"`adapter` must be an `Adapter`, as `adapter_of` and `read` give it, but is"
            f" {type(adapter).__name__}. `save` writes that of a model."
        )
    if not adapter.layers:
        raise ConfigError("An adapter must have a layer to be written, but has none. Add one.")
    if format != "lora_core":  # whose values are seen when they are packed
        check_values(adapter.layers)
    given, base = check_metadata({} if metadata is None else metadata), check_base(base)
    if format in ("kohya", "lycoris"):
        writing_kohya.check_given(given, base)
    about = {**carried(adapter.metadata), **given}
    # sorted, so that what is chosen among several is the same for every order
    layers = holding.held(
        dict(sorted(adapter.layers.items())), format, fold=check_flag("fold", fold)
    )
    if fold:
        layers = {n: x if x.config is None else folded(n, x) for n, x in layers.items()}
    plain = replace(adapter, layers=layers, metadata=about)
    match format:
        case "lora_core":
            found = writing_native.file(plain)
        case "peft":
            found = writing_peft.file(plain)
        case "diffusers":
            found = writing_diffusers.file(plain)
        case _:
            found = writing_kohya.file(plain, format, base, spelling)
    return replace(found, notes=tuple(_notes(adapter.layers, found, format)))


def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "lora_core",  # noqa: A002
    *,
    fold: bool = False,
    base: str | None = None,
    metadata: Mapping[str, str] | None = None,
    spelling: str | None = None,
) -> Encoded:
    """Encodes an adapter and puts its file, for PEFT its folder, at `path`.

    A file is replaced in one step. A folder's two files can't be: where its settings stay as they
    are, the tensors alone are replaced, in one step; where they change, the old ones go first and
    the new ones come last. A crash in between leaves a folder without settings, which no reader
    takes for an adapter, and never one that mixes the old and the new. Other files in the folder
    are left alone.

    Returns:
        What was written; see `encode` for the arguments.

    Raises:
        ConfigError: As `encode` does; nothing is then written.
        OSError: If it can't be written, or what is there is read-only.
    """
    found = encode(adapter, format, fold=fold, base=base, metadata=metadata, spelling=spelling)
    files = found.files()
    if found.config is None:
        container.write(path, files[""])
        return found
    folder = Path(path_of(path))
    if folder.suffix == ".safetensors":
        raise ConfigError(
            f"`path` must be a folder for the two files of format={format!r}, but"
            f" {str(folder)!r} is named as a file. Name a folder, or choose a format of one file."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        there = folder / name
        if there.exists() and not there.stat().st_mode & _WRITABLE:
            raise PermissionError(errno.EACCES, "the file there is read-only", str(there))
    config = folder / peft.CONFIG
    same = config.exists() and config.read_bytes() == files[peft.CONFIG]
    if not same:
        config.unlink(missing_ok=True)
    container.write(folder / peft.WEIGHTS[0], files[peft.WEIGHTS[0]])
    if not same:
        container.write(config, files[peft.CONFIG])
    return found


def _notes(before: Mapping[str, AdapterLayer], found: Encoded, format: str) -> Iterator[str]:  # noqa: A002
    """What was made plainer, and what acts in training alone and has no place."""
    pairs = {
        name: (layer, found.layers[name])
        for name, layer in before.items()
        if layer.config is not None
        and name in found.layers
        and not (format == "lora_core" and found.layers[name].config is layer.config)
    }

    def named(differs: Callable[[AdapterConfig, AdapterConfig], bool]) -> list[str]:
        return [n for n, (old, new) in pairs.items() if differs(old.settings, new.settings)]

    said = {
        "the scale is multiplied into lora_B": named(lambda old, new: _gain(old) != _gain(new)),
        "alpha is multiplied by the root of the rank, for there is no rsLoRA": named(
            lambda old, new: old.rslora and not new.rslora and _gain(old) == _gain(new)
        ),
        "the Tucker core is a part of lora_A": named(lambda old, new: old.tucker > new.tucker),
        "the first factors are a part of twice the rank": named(
            lambda old, new: old.subtracted > new.subtracted
        ),
        "what acts in training alone, as dropout does, is left out": named(
            lambda old, _: format != "lora_core" and _drops(old, found.config)
        ),
    }
    for words, names in said.items():
        if names:
            yield f"{words}: {listed(names)}"


def _gain(config: AdapterConfig) -> float:
    return float(f"{config.scale:.9g}")


def _drops(config: AdapterConfig, settings: Mapping[str, Any] | None) -> bool:
    kept = 0.0 if settings is None else settings["lora_dropout"]
    return config.dropout != kept or any(
        getattr(config, key) != setting.default
        for key, setting in SETTINGS.items()
        if setting.trains and key != "dropout"
    )
