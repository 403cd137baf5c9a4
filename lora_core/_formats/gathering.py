"""A file's keys sorted by module, whatever their grammar; what is no LoRA is refused."""

from collections.abc import Callable

from torch import Tensor

from lora_core._errors import CorruptFileError, UnsupportedFileError, listed
from lora_core._formats import cloneofsimo, diffusers, kohya, loralib, minlora, peft, refusing
from lora_core._formats.assembling import Module
from lora_core._formats.keys import Key
from lora_core._formats.neutral import is_same
from lora_core._formats.opening import Opened

# the first that takes a key has it
_PARSERS: tuple[Callable[[str], Key | None], ...] = (
    cloneofsimo.parse,
    kohya.parse,
    minlora.parse,
    peft.parse,
    diffusers.parse,
    kohya.parse_dotted,
    loralib.parse,
)
# grammars that programs mix in one file; each other one stands alone
_MIXED = frozenset(("kohya", "difference", "diffusers", "A/B", "dotted"))


def gathered(
    opened: Opened, *, strict: bool = True
) -> tuple[dict[str, Module], list[tuple[str, Module]], list[str]]:
    """The modules that have factors, what is whole with its family, and notes.

    Args:
        opened: The file.
        strict: Whether keys of no known format beside LoRA are an error; else they are noted.

    Raises:
        CorruptFileError: If two keys hold the same.
        UnsupportedFileError: If a key is of no LoRA, or the formats don't go together.
    """
    where = str(opened.path)
    modules: dict[str, Module] = {}
    wholes: dict[tuple[str, str], Module] = {}
    others: dict[str, Tensor] = {}
    embeddings = []
    # a reader of safetensors gives them in any order
    parsed = {key: _parsed(key, opened.tensors[key]) for key in sorted(opened.tensors)}
    if any(found and found.family == "loralib" for found in parsed.values()):
        parsed = {key: found or loralib.parse_bias(key) for key, found in parsed.items()}
    for key, found in parsed.items():
        if found is None and refusing.is_embedding(key):
            embeddings.append(key)
        elif found is None:
            others[key] = opened.tensors[key]
        elif found.leaf != "ignored":
            whole_of = found.family == "difference" or found.family.endswith(" values")
            module = (
                wholes.setdefault((found.family, found.module), Module(found))
                if whole_of
                else modules.setdefault(found.module, Module(found))
            )
            twice = module.parts.get(found.leaf)
            # PEFT stores the bias of what was trained whole under two keys
            if twice is not None and not (whole_of and is_same(twice, opened.tensors[key])):
                raise CorruptFileError(
                    f"{where!r} must hold one adapter, but has two keys for the {found.leaf} of"
                    f" {listed([found.module])}. Save each adapter to a file of its own."
                )
            module.parts[found.leaf] = opened.tensors[key]
            module.families.add(found.family)
    _complete(modules)
    for _, name in wholes:
        if name in modules and set(modules[name].parts) == {"alpha"}:
            del modules[name]  # a difference has no scale
    notes = {"embeddings of textual inversion": embeddings}
    if not strict and (modules or wholes):
        unknown = [key for key, t in others.items() if not refusing.algorithm_of(key, t)]
        notes["keys of no known format"] = unknown
        others = {key: t for key, t in others.items() if key not in unknown}
    if others or not (modules or wholes):
        pairs = [name for name, module in modules.items() if {"down", "up"} & set(module.parts)]
        refusing.refuse(where, others, pairs, embeddings)
    families = {f for module in modules.values() for f in module.families}
    families |= {family.removesuffix(" values") for family, _ in wholes}
    if len(families) > 1 and not families <= _MIXED:
        raise UnsupportedFileError(
            f"{where!r} must be of one format, but has keys of {listed(sorted(families))}. Save"
            " each adapter to a file of its own."
        )
    found_wholes = [(family, module) for (family, _), module in wholes.items()]
    said = [f"left out, {what}: {listed(keys)}" for what, keys in notes.items() if keys]
    return modules, found_wholes, said


def _parsed(key: str, tensor: Tensor) -> Key | None:
    if refusing.algorithm_of(key, tensor):
        return None
    return next((found for parse in _PARSERS if (found := parse(key))), None)


def _complete(modules: dict[str, Module]) -> None:
    """Gives a lone magnitude to the module that it is of: diffusers leaves out ``.0``."""
    for name in [n for n in modules if n.endswith((".to_out", "_to_out"))]:
        first = modules.get(f"{name}{'_' if modules[name].key.spelling == 'stem' else '.'}0")
        if first is not None and set(modules[name].parts) == {"magnitude"}:
            first.parts.setdefault("magnitude", modules.pop(name).parts["magnitude"])
