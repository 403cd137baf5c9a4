"""Which layers to adapt: the user's patterns, and attention projections in every dialect."""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from lora_core._adapters import clean
from lora_core._errors import ConfigError, TargetError, UnsupportedLayerError, listed
from lora_core._layers import CHILD, LoRAWeight, Slot, mixin_for, slots, why_not

type_ = type
_MOST_NAMES = 16  # names of one module that are told apart
Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Sequence[Pattern]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module or parameter, all its dotted names, and why it can't be adapted ("" if it can).

    Attributes:
        names: Every dotted name under which it is reached, the first one first.
        module: The module, or the place of a parameter that is read and never called.
        adaptable: Whether its kind can carry an adapter.
        problem: What stands in the way on a layer of an adaptable kind.
        owners: The modules by whose class it is found.
        raw: Whether it is a parameter that only its own name finds.
    """

    names: tuple[str, ...]
    module: nn.Module | Slot
    adaptable: bool
    problem: str
    owners: tuple[nn.Module, ...]
    raw: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of models names the projections of an attention block.

    Attributes:
        title: The families that use it.
        inputs: Names of the input projections, relative to the block.
        outputs: Names of the output projections; they count only beside an input. One that begins
            with "../" is relative to the block's parent, which then must say attention.
        whole: Whether all the inputs must be there, for names too short to mean attention alone.
        place: Whether the block's own name or class must say attention.
    """

    title: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    whole: bool = False
    place: bool = False


DIALECTS = (
    Dialect(
        "Stable Diffusion, SDXL, SD3, Flux (diffusers, LDM)",
        (
            *("to_q", "to_k", "to_v", "to_kv", "to_qkv", "to_qkv_mlp_proj"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv"),
            *("to_q_t", "to_k_t", "to_v_t"),
        ),
        ("to_out.0", "to_out", "to_add_out", "to_out_t"),
    ),
    Dialect("Kandinsky 5", ("to_query", "to_key", "to_value"), ("out_layer",), whole=True),
    Dialect(
        "Llama, Mistral, Qwen, Gemma, Phi, OPT, CLIP, Whisper, ViT since transformers 5",
        ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        ("o_proj", "out_proj", "output_proj", "dense", "proj", "projection_layer", "Wo"),
    ),
    Dialect(
        "DeepSeek, with latent attention",
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        ("o_proj",),
    ),
    Dialect(
        "Gemma 4 vision and audio, Moshi",
        ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
        ("o_proj.linear", "post.linear"),
    ),
    Dialect(
        "BERT, RoBERTa, Swin, ALBERT, PVT",
        ("query", "key", "value"),
        ("../output.dense", "dense", "output", "out_proj", "proj", "proj_attn"),
        whole=True,
    ),
    Dialect(
        "DeBERTa, ProphetNet, Deformable DETR",
        (
            *("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"),
            *("in_proj", "pos_proj", "pos_q_proj"),
        ),
        ("../output.dense", "out_proj", "output_proj"),
        place=True,
    ),
    Dialect("T5, MPNet", ("q", "k", "v"), ("o", "proj"), whole=True),
    Dialect("timm ViT, BLIP", ("qkv",), ("proj", "projection", "../output.dense"), place=True),
    Dialect("MPT, ModernBERT, CTRL", ("Wqkv", "Wq", "Wk", "Wv"), ("Wo", "out_proj", "dense")),
    Dialect("GPT-2", ("c_attn", "q_attn"), ("c_proj",)),
    Dialect("DistilBERT, XLM", ("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    Dialect("GPT-NeoX, BLOOM, Falcon", ("query_key_value",), ("dense",)),
    Dialect(
        "Wav2Vec2-BERT, SeamlessM4T",
        ("linear_q", "linear_k", "linear_v", "linear_pos"),
        ("linear_out",),
    ),
)

_LAST_NAMES = {
    name.rpartition("/")[2].rpartition(".")[2] for d in DIALECTS for name in d.inputs + d.outputs
}


def walk(model: nn.Module) -> list[Candidate]:
    """Every module of `model` once, with all its names, in the order of `named_modules`.

    A module's parameters that can be adapted where they are read come right after it.
    """
    seen: _Seen = {}
    _visit(model, "", (), seen)
    found = []
    for module, (names, parents) in seen.items():
        if isinstance(module, LoRAWeight):
            owners = (module.owner, *_readers(seen[module.owner][1]))
            found.append(
                Candidate(
                    tuple(names), module, True, "", owners, _is_raw(module.owner, module.lora_label)
                )
            )
            continue
        adaptable = mixin_for(module) is not None
        readers = _readers(parents) if adaptable else []
        there = CHILD in module._modules
        problem = why_not(module) if adaptable and not (readers and there) else ""
        is_read = bool(readers) and not problem
        owners = (module, *readers)
        found.append(Candidate(tuple(names), module, adaptable and not is_read, problem, (module,)))
        if is_read and not there:
            found.append(Candidate(tuple(names), Slot(module, "weight", ""), True, "", owners))
        for slot in slots(module):
            if slot.child not in module._modules:
                labelled = tuple(f"{name}.{slot.label}".lstrip(".") for name in names)
                raw = _is_raw(module, slot.label)
                found.append(Candidate(labelled, slot, True, why_not(slot), (module,), raw))
    return found


def modules_of(candidates: Iterable[Candidate]) -> list[nn.Module]:
    """The modules among these, each once."""
    return [c.module for c in candidates if isinstance(c.module, nn.Module)]


def _is_raw(owner: nn.Module, label: str) -> bool:
    """Whether a parameter is none of those that a known kind of module is made of."""
    packed = isinstance(owner, nn.MultiheadAttention) and label in _PROJECTIONS
    return bool(label) and not packed and not isinstance(owner, nn.RNNBase | nn.RNNCellBase)


# a module, its dotted names, and its parents with what they call it
_Seen = dict[nn.Module, tuple[list[str], list[tuple[nn.Module, str]]]]


def _visit(module: nn.Module, name: str, above: tuple[nn.Module, ...], seen: _Seen) -> None:
    names, parents = seen.setdefault(module, ([], []))
    # a module that contains itself, or whose names would multiply without end
    if module in above or len(names) == _MOST_NAMES:
        return
    names.append(name)
    parents += [(parent, name.rpartition(".")[2]) for parent in above[-1:]]
    for child, part in [(c, n) for n, c in module._modules.items() if c is not None]:
        dotted = clean(f"{name}.{part}".lstrip("."))
        _visit(child, dotted, (*above, module), seen)


def _readers(parents: list[tuple[nn.Module, str]]) -> list[nn.Module]:
    """The parents that read this layer's weight themselves and never call the layer."""
    return [p for p, name in parents if name in _LAST_NAMES and _reads_weights(type(p))]  # type: ignore[arg-type]


@lru_cache
def _reads_weights(cls: type) -> bool:
    """Whether this class hands weights to `F.multi_head_attention_forward` instead of calling."""
    kinds = cls.__mro__
    methods = [m for kind in kinds[: kinds.index(nn.Module)] for m in vars(kind).values()]
    code = [inspect.unwrap(m).__code__ for m in methods if inspect.isfunction(m)]
    return any("multi_head_attention_forward" in c.co_names for c in code)


def _kind(module: nn.Module) -> str:
    torchs = isinstance(module, nn.MultiheadAttention)
    return "nn.MultiheadAttention" if torchs else type(module).__name__


_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_projections(candidates: Sequence[Candidate]) -> dict[str, str]:
    """The attention projections by first name, with the title of the dialect that found each."""
    by_name = {name: c for c in candidates for name in c.names}
    found: dict[str, str] = {}
    for name, block in by_name.items():
        if not isinstance(block.module, nn.Module):
            continue
        if isinstance(block.module, nn.MultiheadAttention):
            here = [_child(by_name, name, child) for child in (*_PROJECTIONS, "out_proj")]
            found.update({c.name: "nn.MultiheadAttention" for c in here if c})
        children = block.module._modules
        for dialect in DIALECTS:
            if not any(child.partition(".")[0] in children for child in dialect.inputs):
                continue
            if dialect.place and not _says_attention(name, block.module):
                continue
            here = [_child(by_name, name, child) for child in dialect.inputs]
            if dialect.whole and not all(here):
                continue
            if any(here):
                here += [_child(by_name, name, child) for child in dialect.outputs]
                found.update({c.name: dialect.title for c in here if c})
    return found


def _child(by_name: dict[str, Candidate], block: str, child: str) -> Candidate | None:
    if child.startswith("../"):
        block, child = block.rpartition(".")[0], child.removeprefix("../")
        parent = by_name[block].module
        if not isinstance(parent, nn.Module) or not _says_attention(block, parent):
            return None
    candidate = by_name.get(f"{block}.{child}".lstrip("."))
    mixin = mixin_for(candidate.module) if candidate and candidate.adaptable else None
    return candidate if mixin and mixin.lora_kind in ("linear", "weight") else None


def _says_attention(name: str, module: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return "attn" in words or "attention" in words


def as_patterns(what: str, patterns: Patterns) -> list[Pattern]:
    """`patterns` as a list, each of a kind that can be matched."""
    single = isinstance(patterns, str | re.Pattern | type_) or not isinstance(patterns, Iterable)
    items: list[Pattern] = [patterns] if single else list(patterns)  # type: ignore[list-item, arg-type]
    for item in items:
        module_class = isinstance(item, type_) and issubclass(item, nn.Module)
        is_name = isinstance(item, re.Pattern) or (isinstance(item, str) and item)
        predicate = callable(item) and not isinstance(item, type_ | nn.Module)
        if not (is_name or module_class or predicate):
            raise ConfigError(
                f"`{what}` must hold glob strings, compiled regexes, module classes or predicates"
                f" (name, module), but holds {item!r}."
            )
    return items


def matches(pattern: Pattern, candidate: Candidate) -> bool:
    """Whether a pattern names this module under any of its names.

    A string is a glob over the dotted name, or over any tail of it that begins after a dot, so
    that a bare word is the last segment and "to_out.0" finds every such pair of segments. A raw
    parameter must be called by its own name at the end of such a pattern; nothing else finds it.
    """
    if candidate.raw and not (
        isinstance(pattern, str) and pattern.rpartition(".")[2] == candidate.name.rpartition(".")[2]
    ):
        return False
    if isinstance(pattern, str):
        pattern = _glob(pattern)
    if isinstance(pattern, re.Pattern):
        return any(pattern.fullmatch(name) for name in candidate.names)
    if isinstance(pattern, type_):
        return any(isinstance(owner, pattern) for owner in candidate.owners)
    return any(bool(pattern(name, candidate.owners[0])) for name in candidate.names)


@lru_cache
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?s:.*\.)?(?:{fnmatch.translate(pattern)})")


def choose(
    candidates: Sequence[Candidate], targets: Patterns | None, exclude: Patterns
) -> tuple[list[Candidate], dict[str, str]]:
    """The layers to adapt, and why each other adaptable layer was left out.

    Raises:
        TargetError: If a pattern matches nothing, or nothing is left.
        UnsupportedLayerError: If a pattern asks for a layer that can't be adapted.
    """
    adaptable = [c for c in candidates if c.adaptable]
    if targets is None:
        projections = attention_projections(candidates)
        chosen = {c.name for c in adaptable if c.name in projections and not c.problem}
        reason = "no attention projection"
        if not chosen:
            raise _no_attention(adaptable)
        asked: set[str] = set()
    else:
        patterns = as_patterns("targets", targets)
        if not patterns:
            raise ConfigError(
                "`targets` must hold a pattern, but is empty."
                " Leave it out (None) to adapt the attention projections."
            )
        asked = _targeted(patterns, candidates, adaptable)
        chosen, reason = asked, "not matched by `targets`"
    excluded = _excluded(exclude, [c for c in adaptable if c.name in chosen])
    chosen = chosen - excluded.keys()
    hazards = [c for c in adaptable if c.name in chosen and c.problem]
    if hazards:
        raise UnsupportedLayerError(
            f"Every layer that `targets` names must be adaptable, but {hazards[0].name!r}"
            f" ({type(hazards[0].owners[0]).__name__}) {hazards[0].problem}"
            + (f" So are {len(hazards) - 1} more." if len(hazards) > 1 else "")
        )
    if not chosen:
        raise TargetError(f"`exclude` must leave a layer, but takes away all {len(excluded)}.")
    left_out = {
        c.name: excluded.get(c.name) or c.problem or reason
        for c in adaptable
        if c.name not in chosen and not c.raw
    }
    return [c for c in adaptable if c.name in chosen], left_out


def _targeted(
    patterns: list[Pattern], candidates: Sequence[Candidate], adaptable: Sequence[Candidate]
) -> set[str]:
    asked: set[str] = set()
    for pattern in patterns:
        hits = [c for c in adaptable if matches(pattern, c)]
        others = [] if hits else [c for c in candidates if not c.adaptable and matches(pattern, c)]
        if others:
            first = others[0]
            inside = [c.name for c in adaptable if c.name.startswith(f"{first.name}.".lstrip("."))]
            raise UnsupportedLayerError(
                f"`targets` must match an adaptable layer or parameter, but {_shown(pattern)}"
                f" matches only {type(first.module).__name__} at {first.name!r}."
                + (f" It holds {listed(inside)}: write '{first.name}.*'." if inside else "")
            )
        if not hits:
            raise _no_match("targets", pattern, adaptable, "adaptable layers")
        asked.update(c.name for c in hits)
    return asked


def _excluded(exclude: Patterns, chosen: Sequence[Candidate]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in as_patterns("exclude", exclude):
        hits = [c for c in chosen if matches(pattern, c)]
        if not hits:
            raise _no_match("exclude", pattern, chosen, "chosen layers")
        for c in hits:
            found.setdefault(c.name, f"excluded by {_shown(pattern)}")
    return found


def no_rule_match(pattern: Pattern, chosen: Sequence[Candidate]) -> TargetError:
    """The error for a rule that no chosen layer falls under."""
    return _no_match("rules", pattern, chosen, "chosen layers")


def _no_match(what: str, pattern: Pattern, among: Sequence[Candidate], kind: str) -> TargetError:
    hint = ""
    if isinstance(pattern, str):
        names = [name for c in among for name in c.names]
        tails = [".".join(name.split(".")[-size:]) for name in names for size in (1, 2)]
        close = difflib.get_close_matches(pattern, [*dict.fromkeys([*tails, *names])], n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if not hint:
        tails = sorted({c.name.rpartition(".")[2] for c in among if not c.raw})
        hint = f" Their names end in {listed(tails)}." if any(tails) else ""
    layers = [c for c in among if not c.raw]
    return TargetError(
        f"`{what}` must match a layer, but {_shown(pattern)} matches none of"
        f" {len(layers)} {kind}.{hint}"
    )


def _no_attention(adaptable: Sequence[Candidate]) -> TargetError:
    layers = [c for c in adaptable if not c.raw]
    tails = sorted({c.name.rpartition(".")[2] for c in layers} - {""})
    repair = f" Name layers with `targets=`: {listed(tails)}." if tails else ""
    return TargetError(
        "The model must have attention projections that `inject` knows by name and place, but"
        f" none of its {len(layers)} adaptable layers is one.{repair}"
    )


def _shown(pattern: Pattern) -> str:
    if isinstance(pattern, re.Pattern):
        return f"the regex {pattern.pattern!r}"
    if isinstance(pattern, str):
        return repr(pattern)
    return getattr(pattern, "__name__", repr(pattern))
