"""Loading an adapter from a file into a model: validate everything, then act."""

import dataclasses
import os
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from lora_core._config import (
    AdapterConfig,
    check_finite,
    check_flag,
    check_name,
    check_rank,
    path_of,
)
from lora_core._errors import ConfigError, listed
from lora_core._files.place import (
    as_models,
    compare_aliases,
    compare_base,
    is_placed,
    matched,
    placed,
    whole,
)
from lora_core._formats import Adapter, AdapterLayer, read
from lora_core._formats.loralib import Enabled
from lora_core._formats.neutral import part_of
from lora_core._injection import (
    Candidate,
    Graft,
    describe,
    graft,
    modules_of,
    parameters_of,
    reasons,
    regraft,
    walk,
)
from lora_core._layers import (
    STATE,
    drops_inputs,
    kind_of,
    peek,
    refuse_pinned,
    reserved_parts,
    sizes,
    unread,
)
from lora_core._reports import Report, count


def load(
    model: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike[str] | Adapter,
    name: str | None = None,
    scale: float | None = None,
    strict: bool = True,
    *,
    check_base: bool = True,
    replace: bool = False,
    reserve_rank: int | None = None,
    only: str | None = None,
    alpha: float | Mapping[str, float] | None = None,
    allow_pickle: bool = False,
    enable_lora: Enabled = None,
) -> Report:
    """Puts the adapter of a file, whichever program wrote it, on `model`; all or nothing.

    What the file needs is injected; the adapter is active at strength `scale` beside those that
    are there, and trainable. As with `inject` the host stops training; other adapters keep their
    flags.

    With `replace` it takes the place of adapter `name` instead: strength, activity and what trains
    stay as they are, on layers that both have and for the model. A call of a layer in another
    thread sees the old adapter or the new one, and a compiled model is not compiled again where
    ranks, kinds and layers are the same; `reserve_rank` makes room for files of different ranks.
    The tensors are new ones: make a new optimiser.

    Files of kohya (A1111, Civitai), LyCORIS, PEFT (the folder), diffusers, cloneofsimo, loralib and
    those of the same keys are told by their keys, and their names are looked for among the model's
    own; the report says where each alpha is from. What is no LoRA is refused by its name.

    Args:
        model: The model, bare or with other adapters; or the models of a pipeline by the part that
            each is, as in ``{"unet": unet, "text_encoder": encoder}``.
        path: A file, or the folder of a PEFT adapter; or an adapter that was read already, as
            `combine` and `resize` make them too.
        name: What to call the adapter here; None means as it was saved.
        scale: Its strength; None means 1, or that of the adapter whose place it takes.
        strict: Whether these are errors, rather than warnings and notes beside the rest that is
            loaded: a layer that the model lacks, a base model with other weights, a module that
            the file knows under several names and the model does not, one without both factors, a
            key of no known format, a convolution that PEFT runs otherwise than it merges.
        check_base: Whether to compare the weights with those the adapter was trained on.
        replace: Whether it takes the place of the adapter of its name.
        reserve_rank: Ranks to make room for; None means none but the file's, or as many as the
            adapter whose place it takes made room for.
        only: The part of a pipeline to load, where the file holds several; as "unet".
        alpha: Numerator of the scale where the file has none: a number, or a dict by the file's
            module names.
        allow_pickle: Whether to read a pickle: its tensors, and never code.
        enable_lora: Which projections of loralib's MergedLinear were trained, where not all.

    Returns:
        What was adapted, with the file's own metadata.

    Raises:
        CorruptFileError: If the file is damaged; its subclass UnsupportedFileError if it holds
            something else than LoRA.
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
        >>> trained = lora_core.LoRALinear(base, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lora_core.save(trained, f"{folder}/style.safetensors")
        ...     load(bare, f"{folder}/style.safetensors", name="style").layers[0].rank
        2
    """
    models, strict = as_models(model), check_flag("strict", strict)
    strength = None if scale is None else check_finite("scale", scale)
    if name is not None:
        check_name(name)
    if isinstance(path, Adapter):
        file, path = path, path.name
    else:
        path = path_of(path, " or an `Adapter`")
        file = read(
            path, alpha=alpha, allow_pickle=allow_pickle, enable_lora=enable_lora, strict=strict
        )
    name = file.name if name is None else name
    file, notes = part_of(file, only, repr(path)), list(file.notes)
    host = whole(models)
    candidates = walk(host)
    if not is_placed(file, models):
        file, more = placed(file, models, candidates, path, strict=strict)
        notes += more
    found, missing = matched(host, candidates, file, path, strict)
    notes += [f"not in the model: {listed(missing)}"] if missing else []
    notes += compare_aliases(host, file, found, path, strict)
    if check_base and file.base:
        notes += compare_base(file, found, path, strict)
    modules = modules_of(candidates)
    why = reasons(modules, found.values())
    dry = [
        n
        for n, c in found.items()
        if (config := file.layers[n].config)
        and config.dropout
        and not drops_inputs(c.module, read=config.read or bool(why[c.name]))
    ]
    notes += [f"no input is dropped where a weight is read: {listed(dry)}"] if dry else []
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    known: dict[AdapterConfig, AdapterConfig] = {}  # one object for all layers that are alike
    grafts = [
        _graft(
            c, file.layers[n], _room(n, c, file, name, reserve_rank), known, read=bool(why[c.name])
        )
        for n, c in found.items()
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
        alphas_from=[file.layers[n].alpha_from for n in found],
        why=why,
    )
    refuse_pinned("load", modules)
    if replace:
        regraft(modules, name, grafts, strength)
    else:
        graft(modules, name, grafts, 1.0 if strength is None else strength, others=False)
    every = parameters_of(host.modules())
    return dataclasses.replace(
        report,
        trainable=count([p for p in every if p.requires_grad]),
        total=count(every),
        metadata=file.metadata,
        format=file.format,
    )


def _room(
    name: str, candidate: Candidate, file: Adapter, adapter: str, asked: int | None
) -> int | None:
    """The ranks that a layer of the file makes room for, None for those it has."""
    rank, state = file.layers[name].settings.rank, vars(candidate.module).get(STATE)
    old = {} if state is None else state.configs
    kept = old[adapter].reserve_rank if adapter in old else None
    vector = min(sizes(candidate.module)) == 1  # which no file has more than one rank for
    if vector or (asked is None and kept is None):
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


def _graft(
    candidate: Candidate,
    layer: AdapterLayer,
    room: int | None,
    known: dict[AdapterConfig, AdapterConfig],
    *,
    read: bool,
) -> Graft:
    weight = peek(candidate.module)
    config = layer.settings
    if config.reserve_rank != room:
        config = dataclasses.replace(config, reserve_rank=room)
    kind = kind_of(candidate.module)
    read = (read or config.read) and not kind.is_read  # which such a kind is anyway
    if read is not config.read:
        config = dataclasses.replace(config, read=read)
    if config.dropout and not drops_inputs(candidate.module, read=read):
        config = dataclasses.replace(config, dropout=0.0)
    problem = unread(candidate.module, config) if config.read else ""
    if problem:
        raise ConfigError(f"A setting must fit its layer, but {problem} at {candidate.name!r}.")
    config = known.setdefault(config, config)
    refusal = room and kind.refusal(candidate.module, config)
    if refusal:
        raise ConfigError(f"A setting must fit its layer, but {refusal} at {candidate.name!r}.")
    with torch.inference_mode(mode=False):
        parts = {
            # what was read in inference mode could never be trained
            part: nn.Parameter(
                (p.clone() if p.is_inference() else p).to(weight.device),
                requires_grad=not part.endswith("0"),
            )
            for part, p in reserved_parts(kind, config, layer.parts).items()
        }
        return Graft(candidate.module, config, parts, candidate.name)
