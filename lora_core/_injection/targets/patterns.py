"""What the user writes to name layers, and whether it names this one."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from torch import nn

from lora_core._errors import ConfigError
from lora_core._injection.targets.walking import Candidate

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
        pattern = _glob(pattern)
    if isinstance(pattern, re.Pattern):
        return any(map(pattern.fullmatch, candidate.names))
    if isinstance(pattern, type_):
        return any(isinstance(owner, pattern) for owner in candidate.owners)
    return any(bool(pattern(name, candidate.owners[0])) for name in candidate.names)


@lru_cache
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?s:.*\.)?(?:{fnmatch.translate(pattern)})")


def shown(pattern: Pattern) -> str:
    """A pattern as a message names it."""
    if isinstance(pattern, re.Pattern):
        return f"the regex {pattern.pattern!r}"
    if isinstance(pattern, str):
        return repr(pattern)
    return getattr(pattern, "__name__", repr(pattern))
