"""What trains, how fast, and how far it may go: the adapters as an optimiser meets them."""

from lora_core._training.choice import trainable
from lora_core._training.groups import parameter_groups
from lora_core._training.limit import limit_norm

__all__ = ["limit_norm", "parameter_groups", "trainable"]
