"""A small convolutional network that reads digits: the judge of what the diffusion model draws."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class DigitClassifier(nn.Module):
    """Tells which of ten digits an image shows.

    Shape:
        - images: ``(batch, 1, 28, 28)`` in [-1, 1], white ink on black
        - Output: logits, ``(batch, 10)``

    Example:
        >>> DigitClassifier()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(64)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64 * 3 * 3, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score each image for each digit."""
        h = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        h = F.max_pool2d(F.relu(self.norm2(self.conv2(h))), 2)
        h = F.max_pool2d(F.relu(self.norm3(self.conv3(h))), 2)
        logits: Tensor = self.head(self.dropout(h.flatten(1)))
        return logits


def load_classifier() -> DigitClassifier:
    """The trained classifier, in evaluation mode and float32.

    Example:
        >>> load_classifier().training
        False
    """
    classifier = DigitClassifier()
    state = load_file(WEIGHTS)
    classifier.load_state_dict(
        {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
    )
    return classifier.eval()


@torch.no_grad()
def recognised(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that `classifier` reads as the digit asked for.

    Shape:
        - images: ``(batch, 1, 28, 28)`` in [-1, 1]
        - labels: integers, ``(batch,)``
    """
    return float((classifier(images).argmax(dim=1) == labels).float().mean())
