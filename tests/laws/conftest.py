"""Runs every law on every kind of the zoo."""

from collections.abc import Iterator

import pytest
import torch

from tests.laws.zoo import ZOO, Kind


@pytest.fixture(params=ZOO)
def kind(request: pytest.FixtureRequest) -> Kind:
    return ZOO[request.param]


@pytest.fixture(params=[False, True], ids=["in-place", "swapped"])
def swapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether a conversion swaps a Parameter's contents instead of its `.data`."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)
