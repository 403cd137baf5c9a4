"""Loading an adapter from a file into a model: validate everything, then act."""

import dataclasses
import os
import warnings

import torch
from torch import nn

from lora_core._config import check_finite, check_name, check_rank
from lora_core._errors import ConfigError, CorruptFileError, listed
from lora_core._files.fitting import compare_aliases, compare_base, resolve
from lora_core._formats import Adapter, AdapterLayer, container, native
from lora_core._injection import Candidate, Graft, graft, modules_of, regraft, walk
from lora_core._injection.planning import describe
from lora_core._layers import refuse_choice, reserved, sizes
from lora_core._reports import Report, count


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    scale: float | None = None,
    strict: bool = True,
    *,
    check_base: bool = True,
    replace: bool = False,
    reserve_rank: int | None = None,
) -> Report:
    """Puts the adapter of a file on `model`, in place, all or nothing.

    What the file needs is injected; the adapter is active at strength `scale` beside those that
    are there, and trainable. As with `inject` the host stops training; other adapters keep their
    flags.

    With `replace` it takes the place of adapter `name` instead: strength, activity and what trains
    stay as they are, on layers that both have and for the model. A call of a layer in another
    thread sees the old adapter or the new one, and a compiled model is not compiled again where
    ranks, kinds and layers are the same; `reserve_rank` makes room for files of different ranks.
    The tensors are new ones: make a new optimiser.

    Args:
        model: The model, bare or with other adapters.
        path: A file written by `save`.
        name: What to call the adapter here; None means as it was saved.
        scale: Its strength; None means 1, or that of the adapter whose place it takes.
        strict: Whether a layer that the model lacks, or a base model with other weights, is an
            error, or a module that the file knows under several names and the model does not; else
            the rest is loaded, and all are warned of and noted in the report.
        check_base: Whether to compare the weights with those the adapter was trained on.
        replace: Whether it takes the place of the adapter of its name.
        reserve_rank: Ranks to make room for; None means none but the file's, or as many as the
            adapter whose place it takes made room for.

    Returns:
        What was adapted, with the file's own metadata.

    Raises:
        CorruptFileError: If the file is damaged or of another kind.
        MismatchError: If file and model don't belong together.
        AdapterError: If the name is taken, or with `replace` isn't.
        ConfigError: If the name, the scale or the reserve is out of range.
        MergeError: If a layer that is needed is merged.
        OSError: If the file can't be read.
        Whatever is raised, the model is as it was.

    Example:
        >>> import tempfile, lora_core
        >>> base, bare = nn.Linear(3, 5), nn.Linear(3, 5)
        >>> _ = bare.load_state_dict(base.state_dict())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(lora_core.LoRALinear(base, rank=2), f"{folder}/style.safetensors")
        ...     load(bare, f"{folder}/style.safetensors", name="style").layers[0].rank
        2
    """
    path = os.fsdecode(path)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be an nn.Module, but is {type(model).__name__}.")
    strength = None if scale is None else check_finite("scale", scale)
    if name is not None:
        check_name(name)
    file = _read(path)
    name = file.name if name is None else name
    candidates = walk(model)
    found, missing = resolve(model, candidates, file, os.fspath(path), strict)
    notes = [f"not in the model: {listed(missing)}"] if missing else []
    notes += compare_aliases(model, file, found, os.fspath(path), strict)
    if check_base:
        notes += compare_base(file, found, os.fspath(path), strict)
    for note in notes:
        warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)
    grafts = [
        _graft(candidate, file.layers[n], _room(n, candidate, file, name, reserve_rank))
        for n, candidate in found.items()
    ]
    configs = [g.config for g in grafts]
    report = describe(
        candidates,
        name,
        list(found.values()),
        configs,
        dict.fromkeys(missing, "not in the model"),
        freeze=True,
        notes=tuple(notes),
        replaced=replace,
    )
    modules = modules_of(candidates)
    refuse_choice("load", modules)
    if replace:
        regraft(modules, name, grafts, strength)
    else:
        graft(modules, name, grafts, 1.0 if strength is None else strength, others=False)
    every = list(model.parameters())
    training = count([p for p in every if p.requires_grad])
    return dataclasses.replace(
        report, trainable=training, total=count(every), metadata=file.metadata
    )


def _room(
    name: str, candidate: Candidate, file: Adapter, adapter: str, asked: int | None
) -> int | None:
    """The ranks that a layer of the file makes room for, None for those it has."""
    rank, old = file.layers[name].settings.rank, vars(candidate.module).get("lora_configs", {})
    kept = old[adapter].reserve_rank if adapter in old else None
    if asked is None and kept is None:
        return None
    where, what = f" at {name!r}", "reserve_rank"
    room = check_rank(kept if asked is None else asked, *sizes(candidate.module), where, what)
    if room < rank:
        raise ConfigError(
            f"`reserve_rank` must be at least the rank {rank} of the file, but is"
            f" {room}{where}. Pass reserve_rank={rank} or more; a compiled model is compiled"
            " once more then."
        )
    return room


def _read(path: str | os.PathLike[str]) -> Adapter:
    tensors, metadata = container.read(path)
    where = os.fspath(path)
    if "lora_core" not in metadata:
        raise CorruptFileError(
            f"{where!r} must be a file written by `lora_core.save`, but has no 'lora_core' entry;"
            f" it holds {len(tensors)} tensors: {listed(tensors)}."
        )
    try:
        about = container.strict_json(metadata["lora_core"])
    except ValueError as error:
        raise CorruptFileError(f"{where!r} must describe its tensors, but {error}.") from error
    return native.decode(tensors, metadata, about, where)


def _graft(candidate: Candidate, layer: AdapterLayer, room: int | None) -> Graft:
    weight: torch.Tensor = candidate.module.weight  # type: ignore[assignment]
    config = dataclasses.replace(layer.settings, reserve_rank=room)
    with torch.inference_mode(mode=False):
        parts = {
            # what was read in inference mode could never be trained
            part: nn.Parameter(
                (p.clone() if p.is_inference() else p).to(weight.device),
                requires_grad=not part.endswith("0"),
            )
            for part, p in reserved(candidate.module, config, layer.parts).items()
        }
        return Graft(candidate.module, config, parts)
