"""Whether a file's adapter belongs to a model: every layer found, of the right kind and size."""

from collections.abc import Mapping, Sequence

from torch import nn

from lora_core._errors import CorruptFileError, MismatchError, listed
from lora_core._files.fingerprint import differing
from lora_core._formats import Adapter, AdapterLayer
from lora_core._injection import Candidate
from lora_core._layers import Slot, kind_of, peek


def resolve(
    model: nn.Module,
    candidates: Sequence[Candidate],
    file: Adapter,
    where: str,
    strict: bool,
) -> tuple[dict[str, Candidate], list[str]]:
    """The model's layer for each of the file's, and the names that the model lacks."""
    by_name = {name: c for c in candidates if c.adaptable for name in c.names}
    # in the model's order, which is that of the factors that an optimiser is given
    found = {name: c for name, c in by_name.items() if name in file.layers}
    missing = [name for name in file.layers if name not in by_name]
    if missing and (strict or not found):
        raise MismatchError(
            f"The model must have all {len(file.layers)} layers of {where!r}, but"
            f" {len(missing)} are no layers of this {type(model).__name__}:"
            f" {listed(missing)}; it has {len(by_name)}: {listed(by_name)}."
            + (" Load it into the model it was made for, or pass strict=False." if found else "")
        )
    wrong = [said for n, c in found.items() if (said := _misfit(n, c, file.layers[n]))]
    if wrong:
        raise MismatchError(
            f"Layers must have the sizes that {where!r} was made for, but {len(wrong)} of"
            f" {len(found)} differ: {listed(wrong)}. Load it into the model it was made for."
        )
    hollow = [n for n, c in found.items() if peek(c.module).is_meta]
    if hollow:
        raise MismatchError(
            f"Every layer of {where!r} must be materialised in the model, but {listed(hollow)} is"
            " on the meta device. Call `model.to_empty(device=...)`, load the base, then this."
        )
    hazards = [c for c in found.values() if c.problem]
    if hazards:
        raise MismatchError(
            f"Every layer of {where!r} must be adaptable, but {hazards[0].name!r}"
            f" {hazards[0].problem}"
        )
    if len({id(c.module) for c in found.values()}) < len(found):
        raise MismatchError(
            f"Every layer of {where!r} must be a module of its own, but two names of the file are"
            " one shared module of the model. Untie it, or load into the model it was made for."
        )
    return found, missing


def compare_aliases(
    model: nn.Module, file: Adapter, found: Mapping[str, Candidate], where: str, strict: bool
) -> list[str]:
    """A shared module's adapter works under every name: where the model has two, half is lost."""
    apart = [
        f"{alias} (file {name}, model another or none)"
        for name, c in found.items()
        for alias in file.layers[name].aliases
        if alias not in c.names and not _is_at(model, alias, c.module)
    ]
    if not apart:
        return []
    if strict:
        raise MismatchError(
            f"The model must share the layers that {where!r} shares, but {len(apart)} names are not"
            f" the same module: {listed(apart)}. Load it into the model it was made for, or pass"
            " strict=False to adapt the first name alone."
        )
    return [f"shared in the file, not in the model: {listed(apart)}"]


def _is_at(model: nn.Module, name: str, module: nn.Module | Slot) -> bool:
    """Whether a module is found under a name, of which a walk notes only the first so many."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def compare_base(
    file: Adapter, found: Mapping[str, Candidate], where: str, strict: bool
) -> list[str]:
    modules = {name: found[name].module if name in found else None for name in file.layers}
    try:
        other = differing(file.base, modules)
    except ValueError as error:
        raise CorruptFileError(f"{where!r} must describe its base, but {error}.") from error
    if not other:
        return []
    said = f"base weights differ at {len(other)} of {len(found)} layers: {listed(other, 2)}"
    if strict:
        raise MismatchError(
            f"The model must be the one that {where!r} was trained on, but its {said}."
            " Load that base first, or pass check_base=False."
        )
    return [said]


def _misfit(name: str, candidate: Candidate, layer: AdapterLayer) -> str:
    """How a layer differs from the one that its adapter was made for; "" if it doesn't."""
    module = candidate.module
    kind = kind_of(module)
    if kind.name != layer.kind:
        # a matrix is the same whether it is called or read
        kinds = {"linear", "weight"} if layer.parts["lora_A"].ndim == 2 else {layer.kind}
        if not {kind.name, layer.kind} <= kinds:
            return f"{name} (file a layer of kind {layer.kind!r}, model {kind.name!r})"
    try:
        mine = kind.shapes(module, layer.settings)
    except ValueError:  # too few dimensions for this form
        mine = {}
    theirs = {part: p.shape for part, p in layer.parts.items()}
    if mine == theirs:
        return ""
    if layer.kind == "linear":
        sizes_there = (layer.parts["lora_A"].shape[1], layer.parts["lora_B"].shape[0])
        return "{} (file {} -> {}, model {} -> {})".format(name, *sizes_there, *kind.sizes(module))
    part = next((p for p in theirs if theirs[p] != mine.get(p)), "lora_A")
    return f"{name} (file {part} {tuple(theirs[part])}, model {mine.get(part)})"
