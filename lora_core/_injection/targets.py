"""The layers that patterns name, or attention's projections, and an error that helps where none."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from lora_core._adapters import glob
from lora_core._errors import ConfigError, TargetError, UnsupportedLayerError, listed
from lora_core._injection.candidates import Candidate, unregistered
from lora_core._injection.dialects import DIALECTS
from lora_core._layers import PROJECTIONS, Slot

type_ = type
Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Sequence[Pattern]


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
        pattern = glob(pattern)
    if isinstance(pattern, re.Pattern):
        return any(map(pattern.fullmatch, candidate.names))
    if isinstance(pattern, type_):
        first, *others = candidate.owners
        return isinstance(first, pattern) or any(isinstance(owner, pattern) for owner in others)
    return any(bool(pattern(name, candidate.owners[0])) for name in candidate.names)


def shown(pattern: Pattern) -> str:
    """A pattern as a message names it."""
    if isinstance(pattern, re.Pattern):
        return f"the regex {pattern.pattern!r}"
    if isinstance(pattern, str):
        return repr(pattern)
    return getattr(pattern, "__name__", repr(pattern))


def choose(
    candidates: Sequence[Candidate], targets: Patterns | None, exclude: Patterns
) -> tuple[list[Candidate], dict[str, str], set[str]]:
    """The layers to adapt, why others were left out, and which were asked for by their weights.

    Raises:
        TargetError: If a pattern matches nothing, or nothing is left.
        UnsupportedLayerError: If a pattern asks for a layer that can't be adapted.
    """
    adaptable, unseen = [c for c in candidates if c.adaptable], unregistered(candidates)
    read: set[str] = set()
    if targets is None:
        projections = attention_projections(candidates)
        chosen = {c.name for c in adaptable if c.name in projections and not c.problem}
        reason = "no attention projection"
        if not chosen:
            blocked = [c for c in adaptable if c.name in projections]
            if blocked:
                raise _unadaptable(blocked, "is an attention projection")
            raise _no_attention(adaptable, unseen)
        asked: set[str] = set()
    else:
        patterns = as_patterns("targets", targets)
        if not patterns:
            raise ConfigError(
                "`targets` must hold a pattern, but is empty."
                " Leave it out (None) to adapt the attention projections."
            )
        asked, read = _targeted(patterns, candidates, adaptable, unseen)
        chosen, reason = asked, "not matched by `targets`"
    excluded = _excluded(exclude, [c for c in adaptable if c.name in chosen])
    chosen = chosen - excluded.keys()
    hazards = [c for c in adaptable if c.name in chosen and c.problem]
    if hazards:
        raise _unadaptable(hazards)
    if not chosen:
        raise TargetError(f"`exclude` must leave a layer, but takes away all {len(excluded)}.")
    left_out = {
        c.name: excluded.get(c.name) or c.problem or reason
        for c in adaptable
        if c.name not in chosen and not c.raw
    }
    left_out |= {c.name: c.problem for c in unseen}
    return [c for c in adaptable if c.name in chosen], left_out, read


def _unadaptable(
    hazards: Sequence[Candidate], chosen: str = "`targets` names"
) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"Every layer that {chosen} must be adaptable, but {hazards[0].name!r}"
        f" ({type(hazards[0].owners[0]).__name__}) {hazards[0].problem}"
        + (f" The same holds for {len(hazards) - 1} more." if len(hazards) > 1 else "")
    )


def _targeted(
    patterns: list[Pattern],
    candidates: Sequence[Candidate],
    adaptable: Sequence[Candidate],
    unseen: Sequence[Candidate],
) -> tuple[set[str], set[str]]:
    asked: set[str] = set()
    read: set[str] = set()
    for pattern in patterns:
        hits = [c for c in adaptable if matches(pattern, c)]
        if not hits and isinstance(pattern, str) and pattern.endswith(".weight"):
            layer = pattern.removesuffix(".weight")
            hits = [c for c in adaptable if not isinstance(c.module, Slot) and matches(layer, c)]
            read.update(c.name for c in hits)
        hidden = [] if hits else [c for c in unseen if matches(pattern, c)]
        if hidden:
            raise _unadaptable(hidden)
        others = [] if hits else [c for c in candidates if not c.adaptable and matches(pattern, c)]
        if others:
            first = others[0]
            inside = [c for c in adaptable if c.name.startswith(f"{first.name}.".lstrip("."))]
            every = f"{first.name}.*".lstrip(".")
            # a raw parameter answers to its own name alone
            named = every if any(not c.raw for c in inside) else inside[0].name if inside else ""
            raise UnsupportedLayerError(
                f"`targets` must match an adaptable layer or parameter, but {shown(pattern)}"
                f" matches only {type(first.module).__name__} at {first.name!r}."
                + (f" It holds {listed(c.name for c in inside)}: write {named!r}." if named else "")
            )
        if not hits:
            raise _no_match("targets", pattern, adaptable, "adaptable layers")
        asked.update(c.name for c in hits)
    return asked, read


def _excluded(exclude: Patterns, chosen: Sequence[Candidate]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in as_patterns("exclude", exclude):
        hits = [c for c in chosen if matches(pattern, c)]
        if not hits:
            raise _no_match("exclude", pattern, chosen, "chosen layers")
        for c in hits:
            found.setdefault(c.name, f"excluded by {shown(pattern)}")
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
        f"`{what}` must match a layer, but {shown(pattern)} matches none of"
        f" {len(layers)} {kind}.{hint}"
    )


def _no_attention(adaptable: Sequence[Candidate], unseen: Sequence[Candidate]) -> TargetError:
    layers = [c for c in adaptable if not c.raw]
    tails = sorted({c.name.rpartition(".")[2] for c in layers} - {""})
    repair = f" Name layers with `targets=`: {listed(tails)}." if tails else ""
    more = f" Also {unseen[0].name!r} {unseen[0].problem}" if unseen else ""
    return TargetError(
        "The model must have attention projections that `inject` knows by name and place, but"
        f" none of its {len(layers)} adaptable layers is one.{repair}{more}"
    )


def attention_projections(candidates: Sequence[Candidate]) -> dict[str, str]:
    """The attention projections by first name, with the title of the dialect that found each."""
    by_name = {name: c for c in candidates for name in c.names}
    found: dict[str, str] = {}
    for name, block in by_name.items():
        if not isinstance(block.module, nn.Module):
            continue
        if isinstance(block.module, nn.MultiheadAttention):
            here = _matrices(by_name, name, (*PROJECTIONS, "out_proj"))
            found |= dict.fromkeys(here, "nn.MultiheadAttention")
        children = block.module._modules
        for dialect in DIALECTS if children else ():
            if dialect.heads.isdisjoint(children):
                continue
            if dialect.place and not _says_attention(name, block.module):
                continue
            here = _matrices(by_name, name, dialect.inputs)
            if here and not (dialect.whole and len(here) < len(dialect.inputs)):
                here += _matrices(by_name, name, dialect.outputs)
                found |= dict.fromkeys(here, dialect.title)
    return found


def _matrices(by_name: dict[str, Candidate], block: str, children: Sequence[str]) -> list[str]:
    """The first names of those of a block's children that are there, and adapt matrices."""
    found = []
    for child in children:
        place, own = block, child
        if child.startswith("../"):
            place, own = block.rpartition(".")[0], child.removeprefix("../")
            parent = by_name[place].module
            if not isinstance(parent, nn.Module) or not _says_attention(place, parent):
                continue
        candidate = by_name.get(f"{place}.{own}" if place else own)
        if candidate and candidate.kind and candidate.kind.is_matrix:
            found.append(candidate.name)
    return found


def _says_attention(name: str, module: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return "attn" in words or "attention" in words
