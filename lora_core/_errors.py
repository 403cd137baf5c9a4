"""The errors, and the one way to shorten a list inside their messages."""

from collections.abc import Iterable


class LoRAError(Exception):
    """Everything this library raises on purpose; each child is also the fitting built-in."""


class ConfigError(LoRAError, ValueError):
    """A setting is out of range: rank, alpha, dropout, a strength, an adapter's name."""


class TargetError(LoRAError, LookupError):
    """A pattern or rule matches nothing, or nothing is left to adapt."""


class UnsupportedLayerError(LoRAError, TypeError):
    """A layer was asked for on which an adapter could have no effect, or a wrong one."""


class AdapterError(LoRAError, LookupError):
    """An adapter is not there, or its name is taken."""


class MergeError(LoRAError, RuntimeError):
    """The operation does not fit the model's merged state, or a merge would do harm."""


class MismatchError(LoRAError, ValueError):
    """A file and a model do not belong together."""


class CorruptFileError(LoRAError, ValueError):
    """A file is not what its reader expects: damaged, hostile, or of another kind."""


class UnsupportedFileError(CorruptFileError):
    """A file is sound, but holds something that is no LoRA, or that this library does not read."""


def listed(names: Iterable[object], limit: int = 5) -> str:
    """Joins `names` for a message, cut at `limit` with the count of the rest.

    Control and bidirectional characters are escaped: some of these strings come from files.

    Example:
        >>> listed(["a", "b"])
        "'a', 'b'"
        >>> listed("abcdefg", limit=2)
        "'a', 'b' and 5 more"
    """
    names = list(names)
    shown = ", ".join(
        ascii(name) if isinstance(name, str) else repr(name) for name in names[:limit]
    )
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
