"""The table of tile sizes; it needs no triton."""

import doctest
import subprocess
import sys

import pytest

from lora_core.kernels.triton import configs
from lora_core.kernels.triton.configs import (
    KERNELS,
    LEAST_CAPABILITY,
    MAX_RANK,
    TABLE,
    config_for,
    padded_rank,
    splits_for,
)

FEW, MANY = {"rows": 77, "columns": 320}, {"rows": 4096, "columns": 4096}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", TABLE)
def test_tiles_are_powers_of_two_that_the_tensor_cores_take(capability, kernel):
    for itemsize in (2, 4):
        for size in (FEW, MANY):
            config = config_for(kernel, capability, itemsize=itemsize, **size)
            for extent in (config.rows, config.columns, config.depth):
                assert extent & (extent - 1) == 0
                assert extent == 0 or extent >= 16
            assert config.warps in (4, 8)
            assert config.stages >= 2


@pytest.mark.parametrize(
    ("capability", "known"),
    [
        ((8, 7), (8, 6)),
        ((9, 4), (9, 0)),
        ((10, 3), (10, 0)),
        ((11, 0), (10, 0)),
        ((13, 1), (12, 0)),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_unknown_capability_takes_the_nearest_lower_one(kernel, capability, known):
    assert config_for(kernel, capability, **MANY) == config_for(kernel, known, **MANY)


@pytest.mark.parametrize("capability", TABLE)
def test_small_products_are_cut_smaller(capability):
    few, many = (config_for("gemm_lora", capability, **size) for size in (FEW, MANY))
    assert few.rows * few.columns < many.rows * many.columns


def test_old_gpus_and_unknown_kernels_are_refused():
    message = (
        r"^`capability` must be at least \(8, 0\), but is \(7, 5\)\. "
        r"Use the path of plain products there\.$"
    )
    with pytest.raises(ValueError, match=message):
        config_for("gemm_lora", (7, 5), **FEW)
    assert min(TABLE) == LEAST_CAPABILITY
    with pytest.raises(
        ValueError, match=r"^`kernel` must be one of gemm_lora, .*, but is 'gem'\.$"
    ):
        config_for("gem", (8, 0), **FEW)


def test_the_rank_is_padded_to_the_next_width():
    widths = [padded_rank(rank) for rank in range(1, MAX_RANK + 1)]
    assert widths == [16] * 16 + [32] * 16 + [64] * 32


@pytest.mark.parametrize("rank", [0, -1, 65])
def test_ranks_outside_the_tile_are_refused(rank):
    message = (
        rf"^`rank` must be within 1 \.\. 64 for the Triton kernels, but is {rank}\. "
        r"Use the path of plain products for it\.$"
    )
    with pytest.raises(ValueError, match=message):
        padded_rank(rank)


def test_tokens_are_split_only_where_columns_alone_leave_a_gpu_idle():
    config = config_for("dab", (9, 0), rows=16, columns=640)
    assert splits_for(0, 320, 320, config) == 1
    assert splits_for(77, 768, 320, config) == 1
    assert splits_for(4096, 320, 320, config) == 16
    assert splits_for(2048, 4096, 11008, config) == 1
    splits = [splits_for(tokens, 320, 320, config) for tokens in range(0, 100_000, 997)]
    assert splits == sorted(splits)
    assert max(splits) <= 256


def test_the_table_and_the_package_import_no_triton():
    code = "import sys, lora_core.kernels.triton.configs; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_examples_are_right():
    found = doctest.testmod(configs)
    assert found.attempted > 3
    assert not found.failed
