"""Small, complete reference models to adapt: a conditional diffusion U-Net and its parts.

They know nothing of adapters; everything else in the library works without them.
"""

from lora_core.models.attention import CrossAttention
from lora_core.models.diffusion import (
    Schedule,
    noise_prediction_loss,
    q_sample,
    sample_ddim,
    sample_ddpm,
)
from lora_core.models.encoders import (
    EmbeddingEncoder,
    ImageEncoder,
    LabelEncoder,
    SemanticMapEncoder,
    TokenEncoder,
)
from lora_core.models.pretrained import pretrained_encoder, pretrained_schedule, pretrained_unet
from lora_core.models.unet import UNet

__all__ = [
    "CrossAttention",
    "EmbeddingEncoder",
    "ImageEncoder",
    "LabelEncoder",
    "Schedule",
    "SemanticMapEncoder",
    "TokenEncoder",
    "UNet",
    "noise_prediction_loss",
    "pretrained_encoder",
    "pretrained_schedule",
    "pretrained_unet",
    "q_sample",
    "sample_ddim",
    "sample_ddpm",
]
