"""The fixed tile sizes of the kernels: a table per architecture, never a search at run time.

This room imports no triton, so a plan can be made without it. The figures were chosen so that no
variant of a kernel spills registers or outgrows the shared memory of its architecture, which the
tests read off the compiled code; they were not timed.
"""

from typing import NamedTuple

KERNELS = ("gemm_lora", "gemm_expand", "gemm_expand_dropped", "shrink", "dab")
"""What a configuration can be asked for; the third is `gemm_expand` with a dropout mask."""

LEAST_CAPABILITY = (8, 0)
"""Older GPUs have no tensor-core instruction that Triton would use."""

MAX_RANK = 64
"""The widest rank that the kernels hold in one tile."""

_FULL = 96  # tiles of 128 x 128 from which the large tiles keep a GPU busy
_SPLIT_TARGET = 256  # programs of `dab` that do
_SPLIT_STEPS = 4  # steps that a split of `dab` takes at least


class Config(NamedTuple):
    """How one kernel is cut into programs.

    Attributes:
        rows: Rows of a tile, which are tokens; `dab` has none.
        columns: Columns of a tile; `shrink` has none, its tiles are as wide as the rank.
        depth: Step along the summed dimension, which are the tokens for `dab`.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Choice(NamedTuple):
    """The configurations of one kernel on one architecture.

    Attributes:
        large: For 16-bit products that fill the GPU with large tiles.
        small: For 16-bit products that would not.
        single: For float32, which is multiplied exactly, without tensor cores.
    """

    large: Config
    small: Config
    single: Config


def _one(config: Config, single: Config) -> Choice:
    return Choice(config, config, single)


_SINGLE = Config(32, 64, 16, 8, 2)
_NARROW = {
    "shrink": _one(Config(32, 0, 128, 4, 3), Config(32, 0, 32, 4, 2)),
    "dab": _one(Config(0, 64, 64, 4, 3), Config(0, 32, 16, 4, 2)),
}
_AMPERE = Choice(Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 3), _SINGLE)
# the gaming and workstation chips: 100 KB of shared memory rather than 164 or more
_LEAN = Choice(Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4), _SINGLE)
_HOPPER = Choice(Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4), _SINGLE)
_HOPPER_WIDE = _HOPPER._replace(large=Config(128, 256, 64, 8, 3))

TABLE: dict[tuple[int, int], dict[str, Choice]] = {
    capability: dict(zip(KERNELS, choices, strict=False)) | _NARROW
    for capability, choices in {
        (8, 0): (_AMPERE, _AMPERE, _AMPERE),
        (8, 6): (_LEAN, _LEAN, _LEAN),
        (8, 9): (_LEAN, _LEAN, _LEAN),
        (9, 0): (_HOPPER, _HOPPER_WIDE, _HOPPER),
        (10, 0): (_HOPPER, _HOPPER_WIDE, _HOPPER),
        (12, 0): (_LEAN, _LEAN, _LEAN),
    }.items()
}
"""Compute capability, then kernel."""


def padded_rank(rank: int) -> int:
    """The width that the rank takes in a tile: 16, 32 or 64.

    Raises:
        ValueError: If `rank` is not within ``1 .. MAX_RANK``.

    Example:
        >>> [padded_rank(rank) for rank in (1, 16, 17, 64)]
        [16, 16, 32, 64]
    """
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"`rank` must be within 1 .. {MAX_RANK} for the Triton kernels, but is {rank}. "
            "Use the path of plain products for it."
        )
    return max(16, 1 << (rank - 1).bit_length())


def config_for(
    kernel: str,
    capability: tuple[int, int],
    *,
    rows: int,
    columns: int,
    itemsize: int = 2,
) -> Config:
    """The configuration of one launch.

    It holds for every rank of ``1 .. MAX_RANK``. A capability that the table lacks takes the
    nearest lower one.

    Args:
        kernel: One of `KERNELS`.
        capability: Of the device, as torch reports it.
        rows: Rows of the result.
        columns: Columns of the result.
        itemsize: Bytes of an element of the input.

    Raises:
        ValueError: If the kernel is unknown, or the capability is below `LEAST_CAPABILITY`.

    Example:
        >>> config_for("gemm_lora", (9, 0), rows=4096, columns=4096)
        Config(rows=128, columns=128, depth=64, warps=8, stages=3)
        >>> config_for("gemm_lora", (9, 0), rows=77, columns=320).rows
        64
    """
    if kernel not in KERNELS:
        raise ValueError(f"`kernel` must be one of {', '.join(KERNELS)}, but is {kernel!r}.")
    if capability < LEAST_CAPABILITY:
        raise ValueError(
            f"`capability` must be at least {LEAST_CAPABILITY}, but is {capability}. "
            "Use the path of plain products there."
        )
    choice = TABLE[max(known for known in TABLE if known <= capability)][kernel]
    if itemsize > 2:
        return choice.single
    full = -(-rows // 128) * -(-columns // 128) >= _FULL
    return choice.large if full else choice.small


def splits_for(tokens: int, in_features: int, out_features: int, config: Config) -> int:
    """In how many parts `dab` sums the tokens: by the sizes alone, so always in the same order.

    Example:
        >>> dab = config_for("dab", (9, 0), rows=16, columns=640)
        >>> splits_for(77, 768, 320, dab), splits_for(4096, 320, 320, dab)
        (1, 16)
    """
    blocks = -(-in_features // config.columns) + -(-out_features // config.columns)
    longest = tokens // (_SPLIT_STEPS * config.depth)
    return max(1, min(_SPLIT_TARGET // max(blocks, 1), longest))
