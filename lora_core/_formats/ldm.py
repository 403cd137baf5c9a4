"""The two spellings of one UNet: diffusers' names of its modules, and those of LDM and SGM.

Both number the same blocks of two layers each (three on the way up); which of them hold attention
differs between Stable Diffusion 1, 2 and XL, and the rules don't ask.
"""

import re
from collections.abc import Collection

# diffusers, LDM; whole segments at the start of a path
_TOP = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_DOWN = re.compile(r"down_blocks\.(\d{1,3})\.(resnets|attentions)\.(\d{1,3})\.(.+)")
_DOWNSAMPLER = re.compile(r"down_blocks\.(\d{1,3})\.downsamplers\.0\.conv")
_UP = re.compile(r"up_blocks\.(\d{1,3})\.(resnets|attentions)\.(\d{1,3})\.(.+)")
_UPSAMPLER = re.compile(r"up_blocks\.(\d{1,3})\.upsamplers\.0\.conv")
_INPUT = re.compile(r"input_blocks\.(\d{1,3})\.([01])\.(.+)")
_OUTPUT = re.compile(r"output_blocks\.(\d{1,3})\.([012])\.(.+)")
_SLOTS = ("resnets", "attentions")


def other_names(paths: Collection[str]) -> dict[str, str]:
    """What the other spelling calls a UNet's modules; nothing for a model that is none.

    Example:
        >>> other_names(["down_blocks.1.resnets.0.conv1"])
        {'down_blocks.1.resnets.0.conv1': 'input_blocks.4.0.in_layers.2'}
    """
    names: dict[str, str | None] = {}
    if any(path.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for path in paths):
        deep = {path.split(".")[1] for path in paths if re.match(r"up_blocks\.\d+\.att", path)}
        names = {path: _to_ldm(path, deep) for path in paths}
    elif any(path.startswith(("input_blocks.", "output_blocks.")) for path in paths):
        names = {path: _to_diffusers(path) for path in paths}
    return {path: name for path, name in names.items() if name is not None}


def _to_ldm(path: str, deep: Collection[str]) -> str | None:
    """LDM's name; `deep` are the blocks on the way up that hold attention."""
    if found := _DOWN.fullmatch(path):
        block, slot, layer, rest = found.groups()
        place = f"input_blocks.{3 * int(block) + int(layer) + 1}.{_SLOTS.index(slot)}"
        return f"{place}.{_inside(rest, slot, 1)}"
    if found := _UP.fullmatch(path):
        block, slot, layer, rest = found.groups()
        place = f"output_blocks.{3 * int(block) + int(layer)}.{_SLOTS.index(slot)}"
        return f"{place}.{_inside(rest, slot, 1)}"
    if found := _DOWNSAMPLER.fullmatch(path):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op"
    if found := _UPSAMPLER.fullmatch(path):
        return f"output_blocks.{3 * int(found[1]) + 2}.{2 if found[1] in deep else 1}.conv"
    return _swapped(path, 0, 1)


def _to_diffusers(path: str) -> str | None:
    if top := _swapped(path, 1, 0):
        return top
    if found := _INPUT.fullmatch(path):
        block, layer = divmod(int(found[1]) - 1, 3)
        if found[3] == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        slot = _SLOTS[int(found[2])]
        return f"down_blocks.{block}.{slot}.{layer}.{_inside(found[3], slot, 0)}"
    if found := _OUTPUT.fullmatch(path):
        block, layer = divmod(int(found[1]), 3)
        if found[3] == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        slot = _SLOTS[min(int(found[2]), 1)]
        return f"up_blocks.{block}.{slot}.{layer}.{_inside(found[3], slot, 0)}"
    return None


def _swapped(path: str, this: int, other: int) -> str | None:
    for pair in _TOP:
        if path == pair[this]:
            return pair[other]
        if path.startswith(f"{pair[this]}."):
            slot = "resnets" if "resnets" in pair[0] else ""
            return f"{pair[other]}.{_inside(path[len(pair[this]) + 1 :], slot, other)}"
    return None


def _inside(rest: str, slot: str, other: int) -> str:
    """A module within a block: attention is spelled alike, the parts of a resnet are not."""
    if slot != "resnets":
        return rest
    return next((pair[other] for pair in _RESNET if pair[1 - other] == rest), rest)
