"""The pytest plugin: small models and an adapter file as fixtures.

Nothing heavy is imported before a fixture is used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lora_core.models import CrossAttention, UNet


def _seeded_unet() -> "UNet":
    import torch

    from lora_core.models import UNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(channels=(8, 16), attention=(True, True), context_dim=8, heads=2, dim_head=8)


@pytest.fixture
def tiny_cross_attention() -> "CrossAttention":
    """A cross-attention block: queries (b, n, 16), context (b, m, 8)."""
    import torch

    from lora_core.models import CrossAttention

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CrossAttention(16, context_dim=8, heads=2, dim_head=8)


@pytest.fixture
def tiny_unet() -> "UNet":
    """An untrained UNet of about 61,000 parameters."""
    return _seeded_unet()


@pytest.fixture
def pretrained_unet() -> "UNet":
    """The digit model that the package ships, in evaluation mode."""
    from lora_core import models

    return models.pretrained_unet()


@pytest.fixture
def lora_unet() -> "UNet":
    """The tiny UNet with a rank-2 adapter "default" whose update is not zero."""
    return _lora_unet()


@pytest.fixture
def adapter_file(tmp_path: Path) -> Path:
    """A file with the adapter of `lora_unet`; it loads into a `tiny_unet`."""
    import lora_core

    path = tmp_path / "adapter.safetensors"
    lora_core.save(_lora_unet(), path)
    return path


def _lora_unet() -> "UNet":
    import torch

    import lora_core
    from lora_core.testing.laws import train_pretend

    unet = _seeded_unet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lora_core.inject(unet, rank=2)
        train_pretend(unet, "default")
    return unet
