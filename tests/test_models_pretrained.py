"""The shipped digit model draws digits, and one file holds all of it."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import lora_core.demo.classifier as reader
from lora_core.models import (
    UNet,
    noise_prediction_loss,
    pretrained_encoder,
    pretrained_schedule,
    pretrained_unet,
    sample_ddim,
)
from lora_core.models.pretrained import CHECKPOINT

STYLE = Path(reader.__file__).with_name("style.safetensors")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def style_images() -> tuple[torch.Tensor, torch.Tensor]:
    style = load_file(STYLE)
    return style["images"][:, None].float() / 127.5 - 1, style["labels"].long()


@pytest.mark.slow
def test_samples_are_read_as_the_digit_asked_for_at_a_mild_guidance() -> None:
    encoder, classifier = pretrained_encoder(), reader.load_classifier()
    labels = torch.arange(100) % 10
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        samples = sample_ddim(
            pretrained_unet(),
            pretrained_schedule(),
            encoder(labels),
            steps=20,
            guidance=1.5,
            null_context=encoder.null(1),
            generator=seeded(),
        )
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        read = classifier(samples).argmax(1)
    assert (read == labels).float().mean() >= 0.95


def test_it_predicts_the_noise_on_real_digits_far_better_than_an_untrained_model() -> None:
    images, labels = style_images()
    schedule, context = pretrained_schedule(), pretrained_encoder()(labels)
    with torch.no_grad():
        trained, untrained = (
            noise_prediction_loss(unet, schedule, images, context, generator=seeded())
            for unet in (pretrained_unet(), UNet())
        )
    assert trained < 0.25 * untrained
    assert trained < 0.25


def test_the_label_matters_to_the_prediction() -> None:
    images, labels = style_images()
    unet, schedule, encoder = pretrained_unet(), pretrained_schedule(), pretrained_encoder()
    with torch.no_grad():
        right, wrong = (
            noise_prediction_loss(unet, schedule, images, encoder(asked), generator=seeded())
            for asked in (labels, (labels + 5) % 10)
        )
    assert right < wrong


def test_the_classifier_reads_the_style_images() -> None:
    images, labels = style_images()
    with torch.no_grad():
        read = reader.load_classifier()(images).argmax(1)
    assert (read == labels).float().mean() >= 0.85


def test_every_call_gives_a_new_model_with_the_same_weights() -> None:
    for make in (pretrained_unet, pretrained_encoder):
        one, two = make(), make()
        assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
        with torch.no_grad():
            next(one.parameters()).add_(1.0)
        assert_close(make().state_dict(), two.state_dict(), rtol=0, atol=0)


def test_models_are_ready_to_use_and_to_train() -> None:
    for model in (pretrained_unet(), pretrained_encoder()):
        assert not model.training
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_unet_and_encoder_fit_each_other() -> None:
    unet, encoder = pretrained_unet(), pretrained_encoder()
    assert encoder.null(1).shape[2] == unet.context_dim
    assert encoder.null_label == 10


def test_the_file_is_small_and_holds_every_weight_once_in_half_precision() -> None:
    assert CHECKPOINT.stat().st_size <= 2_000_000
    with safe_open(CHECKPOINT, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    assert set(config) == {"unet", "encoder", "schedule"}
    expected = {f"unet.{name}" for name in pretrained_unet().state_dict()}
    expected |= {f"encoder.{name}" for name in pretrained_encoder().state_dict()}
    assert set(tensors) == expected
    assert {x.dtype for x in tensors.values()} == {torch.float16}
    assert all(x.isfinite().all() for x in tensors.values())


def test_loading_takes_less_than_a_second() -> None:
    # processor time, which a busy machine does not lengthen
    start = time.process_time()
    pretrained_unet()
    pretrained_encoder()
    pretrained_schedule()
    assert time.process_time() - start < 1.0


def test_style_images_are_64_bold_digits_of_all_classes() -> None:
    style = load_file(STYLE)
    assert style["images"].shape == (64, 28, 28)
    assert {x.dtype for x in style.values()} == {torch.uint8}
    assert set(torch.bincount(style["labels"].long(), minlength=10).tolist()) == {6, 7}
