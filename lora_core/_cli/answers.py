"""What a command has to say, as text for people or as one JSON document for programs."""

import json
import math
import sys
from collections.abc import Mapping
from typing import NamedTuple, TextIO

# the exit codes, and what they mean
DONE = 0
ERROR = 1
USAGE = 2
DIFFERENT = 3
FAULT = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

MEANINGS = {
    DONE: "done; of `diff`: the same function",
    ERROR: "an error that is yours to repair, which one sentence on stderr says how",
    USAGE: "the words make no command",
    DIFFERENT: "of `diff`: not the same function",
    FAULT: "a fault of the program itself; --debug shows where",
    INTERRUPTED: "stopped by Ctrl-C",
    BROKEN_PIPE: "whoever read the output closed it",
}


class Answer(NamedTuple):
    """The end of a command.

    Attributes:
        document: What ``--json`` prints, beside the command's name.
        text: What is printed without it.
        code: The exit code.
    """

    document: Mapping[str, object]
    text: str
    code: int = 0


def show(answer: Answer, command: str, *, as_json: bool) -> None:
    """Prints an answer."""
    if as_json:
        document = _plain({"command": command, **answer.document})
        text = json.dumps(document, indent=2, allow_nan=False)
    else:
        text = visible(answer.text, sys.stdout)
    if text:
        print(text, flush=True)


def visible(text: str, stream: TextIO) -> str:
    r"""The text with what a terminal would obey, or `stream` can't encode, spelled out.

    Example:
        >>> visible("a\x1b[2J", sys.stdout)
        'a\\x1b[2J'
    """
    safe = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    encoding = stream.encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def _plain(value: object) -> object:
    """The value as JSON has it; a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
