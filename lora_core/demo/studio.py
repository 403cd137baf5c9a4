"""Fine-tuning an injected adapter on a few images, with its progress, and drawing with it."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_core._adapters import parameters
from lora_core.models import (
    LabelEncoder,
    Schedule,
    UNet,
    noise_prediction_loss,
    pretrained_encoder,
    pretrained_schedule,
    sample_ddim,
)

Told = Callable[[int, float], object]
"""Told after each step its number, from 1, and its loss."""

STYLE = Path(__file__).with_name("style.safetensors")
_BATCH = 16
_RATE = 4e-3
_UNLABELLED = 0.1
_LARGEST_WEIGHT = 5.0
_GUIDANCE = 2.0
_LINES = 10  # of progress, where there is no terminal
_MEMORY = 0.95  # of the running mean


def style_images() -> tuple[Tensor, Tensor]:
    """The images to learn from, in [-1, 1], and their digits.

    Shape:
        - Output: ``(64, 1, 28, 28)`` and ``(64,)``
    """
    data = load_file(STYLE)
    return data["images"][:, None].float() / 127.5 - 1, data["labels"].long()


@dataclass(frozen=True)
class Studio:
    """What drawing and training need beside the U-Net; all of it stays as shipped.

    Attributes:
        encoder: Turns labels into contexts.
        schedule: The noise schedule of the checkpoint.
        steps: Sampling steps.
    """

    encoder: LabelEncoder
    schedule: Schedule
    steps: int

    @classmethod
    def open(cls, steps: int) -> "Studio":
        """The studio of the shipped checkpoint."""
        return cls(pretrained_encoder().requires_grad_(False), pretrained_schedule(), steps)

    def draw(self, unet: UNet, labels: Tensor, seed: int) -> Tensor:
        """Digits of `unet`, the same for the same weights, labels and seed.

        Shape:
            - labels: integers, ``(batch,)``
            - Output: ``(batch, 1, 28, 28)`` in [-1, 1]
        """
        return sample_ddim(
            unet,
            self.schedule,
            self.encoder(labels),
            steps=self.steps,
            guidance=_GUIDANCE,
            null_context=self.encoder.null(1),
            generator=torch.Generator().manual_seed(seed),
        )

    def loss(self, unet: UNet, z0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The loss that the checkpoint was trained with, some labels left out for guidance."""
        unlabelled = torch.rand(len(z0), generator=generator) < _UNLABELLED
        context = self.encoder(labels.masked_fill(unlabelled, self.encoder.null_label))
        return noise_prediction_loss(
            unet,
            self.schedule,
            z0,
            context,
            largest_weight=_LARGEST_WEIGHT,
            generator=generator,
        )


def train(
    studio: Studio,
    unet: UNet,
    steps: int,
    seed: int,
    told: Told,
) -> list[float]:
    """Trains the adapters of `unet` on the style images, *in place*.

    Args:
        studio: Encoder and schedule.
        unet: A U-Net with adapters; only they change.
        steps: Optimiser steps, 16 images each.
        seed: Decides every draw.
        told: Called after each step with its number, from 1, and its loss.

    Returns:
        The loss of each step.
    """
    images, labels = style_images()
    generator = torch.Generator().manual_seed(seed)
    factors = parameters(unet)
    optimiser = torch.optim.AdamW(factors, lr=_RATE, weight_decay=0.0)
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    for step in range(steps):
        # a short warm-up, then half a cosine down to a fiftieth
        falling = 0.51 + 0.49 * math.cos(math.pi * step / steps)
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 10) * falling
        if len(order) < _BATCH:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:_BATCH], order[_BATCH:]
        loss = studio.loss(unet, images[chosen], labels[chosen], generator)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimiser.step()
        losses.append(loss.item())
        told(step + 1, losses[-1])
    return losses


class RunningMean:
    """A mean of noisy losses that forgets slowly, corrected for its short past at the start.

    Example:
        >>> mean = RunningMean()
        >>> mean(2.0), mean(2.0)
        (2.0, 2.0)
    """

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def __call__(self, loss: float) -> float:
        """The mean so far, this loss included."""
        self._total = _MEMORY * self._total + (1 - _MEMORY) * loss
        self._weight = _MEMORY * self._weight + (1 - _MEMORY)
        return self._total / self._weight


@contextmanager
def progress(title: str, steps: int) -> Iterator[Told]:
    """Shows how far `steps` have come, with the loss and the time left."""
    shown = _bar if sys.stdout.isatty() else _lines
    mean = RunningMean()
    with shown(title, steps) as show:
        yield lambda step, loss: show(step, mean(loss))


@contextmanager
def _lines(title: str, steps: int) -> Iterator[Told]:
    start = time.monotonic()
    every = max(1, steps // _LINES)

    def show(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            left = (time.monotonic() - start) / step * (steps - step)
            print(f"{title}: step {step}/{steps}  loss {loss:.4f}  {left:.0f} s left", flush=True)

    yield show


@contextmanager
def _bar(title: str, steps: int) -> Iterator[Told]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeLeft(),
        TextColumn("left"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=steps, loss="-")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.4f}")
