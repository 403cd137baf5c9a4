"""Ways to damage a file: pure functions of its bytes and a source of randomness."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]
Entries = list[tuple[str, Any]]

SIZES = (0, 1, 2, 3, 7, 8, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62)
ODD_NUMBERS = (*SIZES, 2**63, 2**64, 10**400, -1, -16, 0.5, 4.0, 1e308, -1e308, 5e-324, True, None)
DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64", "U16", "U32"),
    *("U64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3"),
    *("F6_E3M2", "Q4_K", "", "f32", "O"),
)
NAMES = (
    *(
        "",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "\0",
        "\n",
        "\x1b[31m",
        "\u202e",
        "é",
    ),
    *("x" * 70_000, "." * 3_000, "__metadata__", "__class__", "lora_core", "alpha", "bias"),
    *("weight", "lora_A", "lora_unet_", "lora_unet_.alpha", "base_model.model.", "{}", "%s", "*"),
)
LEAVES = (
    *(".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".scale", ".diff"),
    *(".diff_b", ".w_norm", ".b_norm", ".dora_scale", ".lora_A", ".lora_B", ".lora_A.weight"),
    *(".lora_B.weight", ".lora_B.bias", ".lora_A.default.weight", ".lora_magnitude_vector"),
    *(".lora_embedding_A", ".lora_embedding_B", ".weight", ".bias", ".base_layer.weight"),
    *(
        ".modules_to_save.weight",
        ".hada_w1_a",
        ".lokr_w1",
        ".lora.up.weight",
        ".to_q_lora.up.weight",
    ),
    *(
        ".lora_bias",
        ".lora_magnitude",
        ".lora_in_magnitude",
        ".lora_A0",
        ".lora_mid",
        ":up",
        ":down",
    ),
    ".parametrizations.weight.0.lora_A",
)
PATTERNS = (
    *(
        "a?" * 40 + "a" * 40,
        "(a+)+$",
        "(.*)*",
        "(.*.*)*x",
        "((((a|a)|a)|a)|a)",
        "[",
        "(",
        "(?",
        "*",
    ),
    *("(?P<n>.)(?P=n)", r"(.)\1", "a{65535}", "a{2,1}", "(?#", "(?=.*.*.*x)", "\\", "(?i:a)", "|"),
    *(".*" * 8 + "x", "(a|a)" * 40 + "b", "(?x:(a+)#c\n+)b", r"\\*" * 8 + "x", ""),
)
TEXTS = (*NAMES, *PATTERNS, "NaN", "1e400", "[" * 5_000, '{"a":' * 900, "LORA", "pissa", "none")
# floats of 2, 4 and 8 bytes that stand out, little-endian
FLOATS = (
    *(b"\x00\x7c", b"\x00\xfc", b"\x00\x7e", b"\xff\x7b", b"\x80\x7f", b"\xc0\x7f", b"\x01\x00"),
    *(struct.pack("<f", x) for x in (float("nan"), float("inf"), 3e38, -3e38, 1e-45, 0.0)),
    *(struct.pack("<d", x) for x in (float("nan"), float("-inf"), 1.7e308, -1.7e308, 5e-324)),
)


# -- bytes


def flip(rng: random.Random, data: bytes) -> bytes:
    """Other bits, in up to eight places."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_early(rng: random.Random, data: bytes) -> bytes:
    """Other bytes near the start, where lengths and structure are."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4) if data else 0):
        changed[rng.randrange(min(len(data), 512))] = rng.randrange(256)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """The end is gone: a byte, or any number of them."""
    return data[: rng.choice((rng.randint(0, len(data)), max(0, len(data) - rng.randint(1, 64))))]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Bytes of its own or of chance, anywhere."""
    at, size = rng.randint(0, len(data)), rng.choice((1, 2, 8, 64, 4096))
    start = rng.randint(0, len(data))
    new = rng.choice((rng.randbytes(size), bytes(size), data[start : start + size]))
    return data[:at] + new + data[at:]


def delete(rng: random.Random, data: bytes) -> bytes:
    """A piece is gone."""
    at = rng.randint(0, len(data))
    return data[:at] + data[at + rng.choice((1, 2, 8, 64, 4096)) :]


def overwrite_number(rng: random.Random, data: bytes) -> bytes:
    """Eight or four bytes are a size that programs stumble over."""
    if len(data) < 8:
        return data
    at = rng.choice((0, rng.randint(0, len(data) - 8), rng.randint(0, min(600, len(data) - 8))))
    value = rng.choice(SIZES)
    new = struct.pack("<Q", value) if rng.random() < 0.5 else struct.pack("<I", value % 2**32)
    return data[:at] + new + data[at + len(new) :]


def overwrite_float(rng: random.Random, data: bytes) -> bytes:
    """A number is none, infinite, or at the edge."""
    changed, new = bytearray(data), rng.choice(FLOATS)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, max(0, len(data) - len(new))) // len(new) * len(new)
        changed[at : at + len(new)] = new
    return bytes(changed)


def splicing(others: Sequence[bytes]) -> Mutation:
    """The start of one file and the end of another."""

    def splice(rng: random.Random, data: bytes) -> bytes:
        other = rng.choice(others)
        return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]

    return splice


BYTES: tuple[Mutation, ...] = (
    *(flip, flip_early, truncate, insert, delete, overwrite_number, overwrite_float),
)


# -- safetensors headers


def header_of(data: bytes) -> tuple[Entries, bytes] | None:
    """The entries of a header in their order, equal keys too, and the bytes behind it."""
    size = int.from_bytes(data[:8], "little")
    try:
        found = json.loads(data[8 : 8 + size], object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(e, tuple) for e in found):
        return None
    return [(key, _tree(value)) for key, value in found], data[8 + size :]


def with_header(entries: Entries, payload: bytes, pad: bytes = b"") -> bytes:
    """A file with these entries in its header, whatever they are."""
    text = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in entries)
    head = b"{" + text.encode() + b"}" + pad
    return struct.pack("<Q", len(head)) + head + payload


def change_length(rng: random.Random, data: bytes) -> bytes:
    """The header's length is another."""
    size = int.from_bytes(data[:8], "little")
    value = rng.choice((*SIZES, 100_000_000, 2**64 - 1, size - 1, size + 1, len(data)))
    return struct.pack("<Q", value % 2**64) + data[8:]


def change_text(rng: random.Random, data: bytes) -> bytes:
    """The header's text is damaged, its length is right."""
    size = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + size], data[8 + size :]
    for _ in range(rng.randint(1, 3)):
        text = rng.choice((flip, insert, delete, _insert_token))(rng, text)
    return struct.pack("<Q", len(text)) + text + rest


def _insert_token(rng: random.Random, text: bytes) -> bytes:
    at = rng.randint(0, len(text))
    tokens = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"1e999", b"-", b"\\ud800", b"NaN")
    return text[:at] + rng.choice(tokens) * rng.choice((1, 2, 3_000)) + text[at:]


def change_entries(rng: random.Random, data: bytes) -> bytes:
    """The header is well-formed, and lies."""
    parsed = header_of(data)
    if parsed is None or not parsed[0]:
        return change_text(rng, data)
    entries, payload = parsed
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        rng.choice(_ENTRY_CHANGES)(rng, entries)
        if not entries:
            break
    return with_header(entries, payload, rng.choice((*[b""] * 8, b" " * 9, b"\0", b"x")))


def _pick(rng: random.Random, entries: Entries) -> int:
    return rng.randrange(len(entries))


def _dtype(rng: random.Random, entries: Entries) -> None:
    n = _pick(rng, entries)
    if isinstance(entries[n][1], dict):
        entries[n][1]["dtype"] = rng.choice(DTYPES)


def _shape(rng: random.Random, entries: Entries) -> None:
    """Another shape, mostly of as many numbers."""
    about = entries[_pick(rng, entries)][1]
    shape = about.get("shape") if isinstance(about, dict) else None
    if not isinstance(shape, list):
        return
    kind = rng.randrange(6)
    if kind == 0:
        shape.reverse()
    elif kind == 1:
        shape.insert(rng.randint(0, len(shape)), 1)
    elif kind == 2 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(ODD_NUMBERS)
    elif kind == 3:
        flat = 1
        for size in shape:
            flat *= size if isinstance(size, int) else 1
        about["shape"] = [flat]
    elif kind == 4 and len(shape) > 1:
        about["shape"] = [shape[0] * shape[1] if None not in shape[:2] else 0, *shape[2:], 1]
    else:
        about["shape"] = rng.choice(([], [0], [0, 2**62], [2**62, 0], None, "x", [[1]], [1] * 100))


def _offsets(rng: random.Random, entries: Entries) -> None:
    about = entries[_pick(rng, entries)][1]
    if isinstance(about, dict):
        pair = about.get("data_offsets")
        if isinstance(pair, list) and pair and rng.random() < 0.7:
            pair[rng.randrange(len(pair))] = rng.choice(ODD_NUMBERS)
        else:
            about["data_offsets"] = rng.choice(([], [0], [0, 0], [8, 0], None, 3, "x", [0, 8, 16]))


def _swap_values(rng: random.Random, entries: Entries) -> None:
    a, b = _pick(rng, entries), _pick(rng, entries)
    (key, one), (other, two) = entries[a], entries[b]
    entries[a], entries[b] = (key, two), (other, one)


def _rename(rng: random.Random, entries: Entries) -> None:
    """Another name, mostly made of the old one or of another entry's."""
    n = _pick(rng, entries)
    key, value = entries[n]
    path, _, _ = key.partition(".")
    at, other = rng.randint(0, len(key)), entries[_pick(rng, entries)][0]
    names = (
        *(rng.choice(NAMES), path + rng.choice(LEAVES), key[:at] + rng.choice(NAMES) + key[at:]),
        *(key.rpartition(".")[0] + rng.choice(LEAVES), key.replace("_", "."), key.upper(), other),
        *(f"unet.{key}", f"base_model.model.{key}", key.replace(".weight", ""), key + key),
    )
    entries[n] = (rng.choice(names), value)


def _twice(rng: random.Random, entries: Entries) -> None:
    entries.insert(rng.randint(0, len(entries)), entries[_pick(rng, entries)])


def _drop(rng: random.Random, entries: Entries) -> None:
    entries.pop(_pick(rng, entries))


def _drop_most(rng: random.Random, entries: Entries) -> None:
    del entries[rng.randint(0, len(entries)) :]


def _extra(rng: random.Random, entries: Entries) -> None:
    about = rng.choice(
        (
            {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
            {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]},
            rng.choice(ODD_NUMBERS),
            rng.choice(TEXTS),
            [],
        )
    )
    entries.append((entries[_pick(rng, entries)][0] + rng.choice(LEAVES), about))


def _metadata(rng: random.Random, entries: Entries) -> None:
    """What stands beside the tensors: of another kind, contradicting, or nested JSON."""
    n = next((n for n, (key, _) in enumerate(entries) if key == "__metadata__"), None)
    if n is None:
        n = len(entries)
        entries.append(("__metadata__", {}))
    about = entries[n][1]
    kind = rng.randrange(4)
    if not isinstance(about, dict) or kind == 0:
        odd = (rng.choice(ODD_NUMBERS), rng.choice(TEXTS), [], {"a": 1}, {"a": {}}, {"": ""})
        entries[n] = ("__metadata__", rng.choice(odd))
    elif kind == 1:
        keys = ("lora_core", "lora_adapter_metadata", "format", "ss_network_module", *NAMES)
        about[rng.choice(keys)] = rng.choice((*TEXTS, "{}", "[]", '{"r": 4, "peft_type": "LORA"}'))
    elif about:
        key = rng.choice(list(about))
        about[key] = change_json(rng, str(about[key]).encode()).decode(errors="replace")


_ENTRY_CHANGES: tuple[Callable[[random.Random, Entries], None], ...] = (
    *(_dtype, _shape, _shape, _offsets, _swap_values, _rename, _rename, _twice, _drop, _drop_most),
    *(_extra, _metadata, _metadata),
)


# -- tensors: files that are whole, of contents that are not


def change_tensors(rng: random.Random, data: bytes) -> bytes:
    """Tensors are gone, renamed, of other shapes and kinds, and laid out as they should be."""
    parsed = header_of(data)
    if parsed is None:
        return change_text(rng, data)
    entries, payload = parsed
    about = [(key, value) for key, value in entries if key == "__metadata__"]
    held: list[_Held] = []
    for key, value in entries:
        try:
            start, end = value["data_offsets"]
            shape = [int(size) for size in value["shape"]]
            held.append((key, value["dtype"], shape, payload[start:end]))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    if held and rng.random() < 0.3:
        _metadata(rng, about)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        if held:
            rng.choice(_HELD_CHANGES)(rng, held)
    return laid_out(about, held)


def laid_out(about: Entries, held: "Sequence[_Held]") -> bytes:
    """A file of these tensors, each with as many bytes as it needs."""
    entries, payload = list(about), b""
    for key, dtype, shape, content in held:
        size = _BITS.get(dtype, 32)
        for length in shape:
            size *= length
        size = max(0, min(-(-size // 8), 2**20))
        filled = (content or b"\0") * (size // max(1, len(content)) + 1)
        offsets = [len(payload), len(payload) + size]
        entries.append((key, {"dtype": dtype, "shape": shape, "data_offsets": offsets}))
        payload += filled[:size]
    return with_header(entries, payload)


_Held = tuple[str, str, list[int], bytes]
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},  # noqa: PIE800
}


def _held_rename(rng: random.Random, held: list[_Held]) -> None:
    entries: Entries = [(key, rest) for key, *rest in held]
    _rename(rng, entries)
    held[:] = [(key, *rest) for key, rest in entries]


def _held_drop(rng: random.Random, held: list[_Held]) -> None:
    del held[rng.randrange(len(held))]


def _held_keep(rng: random.Random, held: list[_Held]) -> None:
    start = rng.randrange(len(held))
    held[:] = held[start : start + rng.randint(1, 12)]


def _held_dtype(rng: random.Random, held: list[_Held]) -> None:
    """One tensor's kind, or that of all."""
    dtype = rng.choice(list(_BITS))
    every, n = rng.random() < 0.4, rng.randrange(len(held))
    for m, (key, _, shape, content) in enumerate(held):
        if every or m == n:
            held[m] = (key, dtype, shape, content)


def _held_shape(rng: random.Random, held: list[_Held]) -> None:
    n = rng.randrange(len(held))
    key, dtype, shape, content = held[n]
    shape = list(shape)
    kind = rng.randrange(6)
    if kind == 0:
        shape.reverse()
    elif kind == 1:
        shape.insert(rng.randint(0, len(shape)), rng.choice((0, 1, 1, 1, 3)))
    elif kind == 2 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 5, 16, 300))
    elif kind == 3 and shape:
        shape.pop(rng.randrange(len(shape)))
    elif kind == 4:
        shape = rng.choice(([], [0], [2**62, 0], [0, 2**62], [1] * 70, [2], [1, 1], [1, 1, 1, 1]))
    else:
        shape = list(held[rng.randrange(len(held))][2])
    held[n] = (key, dtype, shape, content)


def _held_rank(rng: random.Random, held: list[_Held]) -> None:
    """The rank of all of one file, or of a module."""
    ranks = {min(shape[:2]) for _, _, shape, _ in held if len(shape) > 1}
    if not ranks:
        return
    old, new = rng.choice(sorted(ranks)), rng.choice((0, 1, 2, 7, 40, 400))
    path = held[rng.randrange(len(held))][0].partition(".")[0]
    for n, (key, dtype, shape, content) in enumerate(held):
        if rng.random() < 0.5 or key.startswith(path):
            held[n] = (key, dtype, [new if size == old else size for size in shape], content)


def _held_values(rng: random.Random, held: list[_Held]) -> None:
    n = rng.randrange(len(held))
    key, dtype, shape, content = held[n]
    width = _BITS.get(dtype, 32) // 8 or 1
    fitting = [f for f in FLOATS if len(f) == width] or [b"\xff" * width]
    held[n] = (key, dtype, shape, rng.choice(fitting) * (len(content) // width + 1))


def _held_copy(rng: random.Random, held: list[_Held]) -> None:
    key, dtype, shape, content = held[rng.randrange(len(held))]
    new = rng.choice(
        (key.partition(".")[0] + rng.choice(LEAVES), "x" + rng.choice(LEAVES), "unet." + key)
    )
    held.append((new, dtype, shape, content))


_HELD_CHANGES: tuple[Callable[[random.Random, list[_Held]], None], ...] = (
    *(_held_rename, _held_rename, _held_drop, _held_keep, _held_dtype, _held_shape, _held_shape),
    *(_held_rank, _held_values, _held_copy),
)
SAFETENSORS = (*BYTES, change_length, change_text, *[change_entries] * 5, *[change_tensors] * 12)


# -- JSON


def change_json(rng: random.Random, data: bytes) -> bytes:
    """A value, a key or the structure is another; the text mostly stays JSON."""
    try:
        tree = _tree(json.loads(data, object_pairs_hook=list))
    except (ValueError, RecursionError):
        return rng.choice(BYTES)(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = _change_tree(rng, tree)
    text = json.dumps(tree)
    if rng.random() < 0.15:
        text = rng.choice((text * 2, text[:-1], text + "]", text.replace("{", '{"version":1,', 1)))
    return text.encode()


def _tree(value: Any) -> Any:
    """Pairs as dicts, where that is what they are."""
    if isinstance(value, list) and value and all(isinstance(e, tuple) for e in value):
        return {k: _tree(v) for k, v in value}
    return [_tree(v) for v in value] if isinstance(value, list) else value


def _change_tree(rng: random.Random, tree: Any) -> Any:
    inside = [k for k, v in tree.items() if isinstance(v, dict | list)] if _is_dict(tree) else []
    if inside and rng.random() < 0.6:
        key = rng.choice(inside)
        tree[key] = _change_tree(rng, tree[key])
        return tree
    odd = rng.choice(
        (rng.choice(ODD_NUMBERS), rng.choice(TEXTS), [], {}, [1], {"a": 1}, ["x"] * 99, False)
    )
    if _is_dict(tree) and tree:
        key = rng.choice(list(tree))
        kind = rng.randrange(5)
        if kind == 0:
            tree[rng.choice((*TEXTS, f"unet.{key}"))] = tree.pop(key)
        elif kind == 1:
            del tree[key]
        elif kind == 2:
            value = {rng.choice(PATTERNS): rng.choice(ODD_NUMBERS) for _ in range(3)}
            tree[rng.choice((key, "alpha_pattern", "rank_pattern"))] = value
        else:
            tree[key] = odd
        return tree
    if isinstance(tree, list) and tree and rng.random() < 0.5:
        tree[rng.randrange(len(tree))] = odd
        return tree
    return odd


def _is_dict(tree: Any) -> bool:
    return isinstance(tree, dict)


JSON = (*[change_json] * 6, *BYTES)


# -- pickles


def change_member(rng: random.Random, data: bytes) -> bytes:
    """A member of an archive is damaged, and the archive is whole again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return rng.choice(BYTES)(rng, data)
    for _ in range(rng.choice((1, 1, 3))):
        pickles = [name for name in members if name.endswith("data.pkl")]
        name = rng.choice(pickles if pickles and rng.random() < 0.7 else list(members))
        change = rng.choice((*BYTES, change_pickle, change_pickle, change_pickle))
        members[name] = change(rng, members[name])
    if rng.random() < 0.1:
        members.pop(rng.choice(list(members)))
    if rng.random() < 0.1 and members:
        name = rng.choice(list(members))
        members[rng.choice(("../../x", "/tmp/x", name + "x", "archive/data.pkl"))] = members[name]
    packed = rng.choice((*[zipfile.ZIP_STORED] * 5, zipfile.ZIP_DEFLATED))
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", packed) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return into.getvalue()


def change_pickle(rng: random.Random, data: bytes) -> bytes:
    """An instruction of a pickle is another: a size, a name, a call."""
    at = rng.randint(0, len(data))
    pieces = (
        *(b"J" + struct.pack("<i", rng.choice((-1, 0, 2**31 - 1, 2**20))), b"K\xff", b"M\xff\xff"),
        *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
        *(b"(", b"t", b"R", b"}", b"]", b"u", b".", b"0", b"2", b"Q", b"e", b"\x85", b"\x86"),
        *(b"h" + bytes([rng.randrange(16)]), b"q" + bytes([rng.randrange(16)]), b"N", b"\x88"),
        *(
            b"\x8b" + struct.pack("<i", 400) + b"\x7f" * 400,
            b"X\xff\xff\xff\x7f",
            b"X\x03\0\0\0a.b",
        ),
        b"G" + struct.pack(">d", rng.choice((float("nan"), 1e308, 0.5))),
    )
    piece = rng.choice(pieces)
    return data[:at] + piece + data[at + rng.choice((0, 0, 1, len(piece))) :]


PICKLES = (*BYTES, *[change_member] * 8)


def mutate(
    rng: random.Random, data: bytes, ways: Sequence[Mutation], others: Sequence[bytes]
) -> bytes:
    """`data` after one to four mutations; half of the time after one that leaves it well-formed."""
    mild = [way for way in (change_tensors, change_json, change_member) if way in ways]
    if rng.random() < 0.5:
        return mild[0](rng, data)
    ways = (*ways, splicing(others))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(ways)(rng, data)
    return data
