"""The attention projections of a model, by name and place."""

from collections.abc import Sequence

from torch import nn

from lora_core._injection.targets.dialects import DIALECTS
from lora_core._injection.targets.walking import Candidate
from lora_core._layers import PROJECTIONS, mixin_for


def attention_projections(candidates: Sequence[Candidate]) -> dict[str, str]:
    """The attention projections by first name, with the title of the dialect that found each."""
    by_name = {name: c for c in candidates for name in c.names}
    found: dict[str, str] = {}
    for name, block in by_name.items():
        if not isinstance(block.module, nn.Module):
            continue
        if isinstance(block.module, nn.MultiheadAttention):
            here = [_child(by_name, name, child) for child in (*PROJECTIONS, "out_proj")]
            found.update({c.name: "nn.MultiheadAttention" for c in here if c})
        children = block.module._modules
        for dialect in DIALECTS:
            if not any(child.partition(".")[0] in children for child in dialect.inputs):
                continue
            if dialect.place and not _says_attention(name, block.module):
                continue
            here = [_child(by_name, name, child) for child in dialect.inputs]
            if dialect.whole and not all(here):
                continue
            if any(here):
                here += [_child(by_name, name, child) for child in dialect.outputs]
                found.update({c.name: dialect.title for c in here if c})
    return found


def _child(by_name: dict[str, Candidate], block: str, child: str) -> Candidate | None:
    if child.startswith("../"):
        block, child = block.rpartition(".")[0], child.removeprefix("../")
        parent = by_name[block].module
        if not isinstance(parent, nn.Module) or not _says_attention(block, parent):
            return None
    candidate = by_name.get(f"{block}.{child}".lstrip("."))
    mixin = mixin_for(candidate.module) if candidate and candidate.adaptable else None
    return candidate if mixin and mixin.lora_kind in ("linear", "weight") else None


def _says_attention(name: str, module: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return "attn" in words or "attention" in words
