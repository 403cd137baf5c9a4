"""The shipped digit model: one float16 file that holds a U-Net, its encoder and its schedule."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lora_core.models.diffusion import Schedule
from lora_core.models.encoders import LabelEncoder
from lora_core.models.unet import UNet

CHECKPOINT = Path(__file__).with_name("digits.safetensors")


def pretrained_unet() -> UNet:
    """The U-Net that draws digits, 1 x 28 x 28 in [-1, 1].

    Returns:
        A new model in evaluation mode, float32, every parameter trainable.

    Example:
        >>> import torch
        >>> from lora_core.models import sample_ddim
        >>> labels = torch.arange(10)
        >>> context = pretrained_encoder()(labels)
        >>> images = sample_ddim(pretrained_unet(), pretrained_schedule(), context, steps=2)
        >>> images.shape
        torch.Size([10, 1, 28, 28])
    """
    config, state = _read("unet")
    unet = UNet(**config)
    unet.load_state_dict(state)
    return unet.eval()


def pretrained_encoder() -> LabelEncoder:
    """The encoder of the ten digits, and of the null label, that `pretrained_unet` listens to.

    Returns:
        A new encoder in evaluation mode, float32, every parameter trainable.

    Example:
        >>> pretrained_encoder().null_label
        10
    """
    config, state = _read("encoder")
    encoder = LabelEncoder(**config)
    encoder.load_state_dict(state)
    return encoder.eval()


def pretrained_schedule() -> Schedule:
    """The noise schedule that `pretrained_unet` was trained with.

    Example:
        >>> len(pretrained_schedule())
        1000
    """
    config, _ = _read("schedule")
    kinds = {"linear": Schedule.linear, "cosine": Schedule.cosine}
    return kinds[config.pop("kind")](**config)


def _read(part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of one part of the checkpoint, and its tensors in float32."""
    prefix = f"{part}."
    # `framework="pt"` hands out tensors of their own, not views of the mapped file
    with safe_open(CHECKPOINT, framework="pt") as file:
        config = json.loads(file.metadata()["config"])[part]
        state = {
            key.removeprefix(prefix): file.get_tensor(key).float()
            for key in file.keys()  # noqa: SIM118 - not a mapping
            if key.startswith(prefix)
        }
    return config, state
