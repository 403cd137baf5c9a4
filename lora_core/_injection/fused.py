"""Projections that a model fused into one, and calls no more: diffusers' `fuse_qkv_projections`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_core._errors import UnsupportedLayerError, listed
from lora_core._layers import LoRAMixin

FUSE = "fuse_projections"  # the method of a block that can
_FUSED = "fused_projections"  # its attribute while it has
# the projection that is called -> those whose weights it was made of
_MADE_OF: Mapping[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def _is_fused(block: nn.Module) -> bool:
    """Whether a block calls what it has fused; those that can't undo it say so by a processor."""
    own = vars(block)
    processor = type(own.get("processor", block._modules.get("processor"))).__name__
    undone = hasattr(type(block), "unfuse_projections")
    return own.get(_FUSED) is True and (undone or "Fused" in processor)


def fused_in(block: nn.Module) -> dict[nn.Module, str]:
    """The projections of a block that are not called, and the name of the one that is instead."""
    if not _is_fused(block):
        return {}
    own = block._modules
    return {
        layer: made
        for made, parts in _MADE_OF.items()
        if own.get(made) is not None
        for part in parts
        if (layer := own.get(part)) is not None
    }


def refuse_fused(block: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001  # torch's
    """A forward pre-hook of a block with adapted projections that may be fused.

    Raises:
        UnsupportedLayerError: If they were: nothing calls their adapters.
    """
    if not getattr(block, _FUSED, False):
        return
    adapted = {made for layer, made in fused_in(block).items() if isinstance(layer, LoRAMixin)}
    if adapted:
        raise UnsupportedLayerError(
            "Adapted projections must be called to take effect, but this"
            f" {type(block).__name__} fused them into {listed(sorted(adapted))}, of their bare"
            " weights. Call `unfuse_qkv_projections()`; or eject, fuse and adapt again."
        )
