"""What a pickle would do, by its instructions, before anything follows them.

torch's restricted reader calls nothing but what builds tensors and plain values. Some of that costs
memory or time without end, and no file of tensors has it: a byte array of any length, and tuples
that hold each other many times over, which take for ever as keys of a dict.
"""

import pickletools
from typing import BinaryIO

_MOST = 2**20  # instructions: some forty for each tensor
# what torch's reader would call, beside what builds tensors
_NEVER = frozenset(
    (
        *(
            f"{room} {name}"
            for room in ("builtins", "__builtin__")
            for name in ("bytearray", "set")
        ),
        *("_codecs encode", "collections Counter"),
    )
)
# what is surely no tuple of tuples: text, a class, a container that is no key, what a call made
_SIMPLE = frozenset(
    (
        *("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "GLOBAL", "EMPTY_DICT", "EMPTY_LIST"),
        *("EMPTY_TUPLE", "REDUCE", "BINPERSID", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
    )
)


def check(stream: BinaryIO) -> None:
    """Follows one pickle from where the stream is to its end.

    Raises:
        ValueError: If it is none, or has what no file of tensors has.
    """
    simple: dict[object, bool] = {}
    before = ""
    for n, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if n >= _MOST:
            raise ValueError(f"it has more than {_MOST:,} instructions")
        if name == "GLOBAL" and argument in _NEVER:
            raise ValueError(f"it calls for {str(argument).replace(' ', '.')!a}")
        if name.endswith("PUT"):
            simple[argument] = before in _SIMPLE
        elif name.endswith("GET"):
            if not simple.get(argument):
                raise ValueError("it holds a tuple twice")
            before = "GLOBAL"
        else:
            before = name
