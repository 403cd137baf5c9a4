"""Encoders: what their tokens depend on, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lora_core.models import (
    EmbeddingEncoder,
    ImageEncoder,
    LabelEncoder,
    SemanticMapEncoder,
    TokenEncoder,
    UNet,
)


def encoders() -> list[tuple[nn.Module, torch.Tensor]]:
    return [
        (LabelEncoder(labels=10, dim=6), torch.tensor([1, 10])),
        (TokenEncoder(vocabulary=9, dim=6, max_tokens=5), torch.tensor([[1, 2, 8], [0, 0, 1]])),
        (ImageEncoder(channels=2, size=8, patch=4, dim=6), torch.randn(2, 2, 8, 8)),
        (SemanticMapEncoder(classes=5, size=8, patch=4, dim=6), torch.randint(5, (2, 8, 8))),
        (EmbeddingEncoder(embedding_dim=7, dim=6), torch.randn(2, 3, 7)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_every_encoder_feeds_the_unet_and_learns_from_it(index: int) -> None:
    encoder, condition = encoders()[index]
    unet = UNet(context_dim=6, channels=(8, 8), attention=(False, True))
    context = encoder(condition)
    assert (context.shape[0], context.shape[2]) == (2, 6)
    unet(torch.randn(2, 1, 6, 6), 3, context).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in encoder.parameters())


@pytest.mark.parametrize("index", range(5))
def test_samples_are_encoded_one_by_one_and_differently(index: int) -> None:
    encoder, condition = encoders()[index]
    context = encoder(condition)
    assert_close(torch.cat([encoder(condition[:1]), encoder(condition[1:])]), context)
    assert (context[0] - context[1]).abs().max() > 1e-3


def test_a_label_has_several_different_tokens() -> None:
    tokens = LabelEncoder(labels=10, dim=6, tokens=4)(torch.tensor([3]))[0]
    assert tokens.shape == (4, 6)
    assert torch.pdist(tokens).min() > 0


def test_the_null_context_is_that_of_the_null_label() -> None:
    encoder = LabelEncoder(labels=10, dim=6)
    assert encoder.null_label == 10
    assert_close(encoder.null(2), encoder(torch.tensor([10, 10])))


def test_tokens_know_their_place() -> None:
    encoder = TokenEncoder(vocabulary=9, dim=6)
    one, two = encoder(torch.tensor([[4, 4]]))[0]
    assert (one - two).abs().max() > 0


def test_patches_are_read_row_by_row() -> None:
    encoder = ImageEncoder(channels=1, size=4, patch=2, dim=6)
    image = torch.zeros(1, 1, 4, 4)
    blank = encoder(image)
    image[0, 0, 0, 3] = 1.0
    changed = (encoder(image) - blank).abs().sum(-1)[0] > 0
    assert changed.tolist() == [False, True, False, False]


def test_a_patch_is_read_channel_by_channel_then_row_by_row() -> None:
    encoder = ImageEncoder(channels=2, size=4, patch=2, dim=6)
    linear = encoder.projection[1]
    image = torch.randn(1, 2, 4, 4)
    tokens = encoder(image)[0] - encoder.position.weight
    for index, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        patch = image[0, :, top : top + 2, left : left + 2]
        assert_close(tokens[index], linear(patch.flatten()))


def test_a_map_token_is_blind_to_the_order_of_pixels_in_its_patch() -> None:
    encoder = SemanticMapEncoder(classes=5, size=4, patch=2, dim=6)
    maps = torch.randint(5, (1, 4, 4))
    turned = maps.clone()
    turned[:, :2, :2] = maps[:, :2, :2].flip(1, 2)
    assert_close(encoder(turned), encoder(maps))
    turned[:, :2, :2] = (maps[:, :2, :2] + 1) % 5
    assert (encoder(turned) - encoder(maps)).abs().max() > 0


def test_embeddings_of_the_right_width_pass_through_untouched() -> None:
    embeddings = torch.randn(2, 3, 6)
    assert EmbeddingEncoder(6, 6)(embeddings) is embeddings
    assert not torch.equal(EmbeddingEncoder(6, 6, project=True)(embeddings), embeddings)


@pytest.mark.parametrize(("label", "shown"), [(11, "11"), (-1, "-1")])
def test_a_label_out_of_range_is_refused(label: int, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^`labels` must be from 0 to 10, but is {shown}\.$"):
        LabelEncoder(labels=10, dim=6)(torch.tensor([0, label]))


def test_ids_and_classes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^`ids` must be from 0 to 8, but is 9\.$"):
        TokenEncoder(vocabulary=9, dim=6)(torch.tensor([[9]]))
    with pytest.raises(ValueError, match=r"^`maps` must be from 0 to 4, but is 5\.$"):
        SemanticMapEncoder(5, 4, 2, 6)(torch.full((1, 4, 4), 5))


def test_labels_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^`labels` must be int32 or int64, but has dtype"):
        LabelEncoder(labels=10, dim=6)(torch.tensor([1.0]))


def test_an_empty_batch_is_an_empty_context() -> None:
    empty = torch.empty(0, dtype=torch.long)
    assert LabelEncoder(labels=10, dim=6)(empty).shape == (0, 4, 6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    label, token, image, semantic, embedding = (encoder for encoder, _ in encoders())
    with pytest.raises(ValueError, match=r"^`labels` must have shape \(batch,\), but has \(2, 1\)"):
        label(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^`ids` must have shape \(batch, n\) with n at most 5"):
        token(torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^`images` must have shape \(batch, 2, 8, 8\), but has"):
        image(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^`maps` must have shape \(batch, 8, 8\), but has"):
        semantic(torch.zeros(2, 8, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^`embeddings` must have shape \(batch, n, 7\), but has"):
        embedding(torch.zeros(2, 7))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^`tokens` must be at least 1, but is 0\.$"):
        LabelEncoder(labels=10, dim=6, tokens=0)
    for build in (ImageEncoder, SemanticMapEncoder):
        with pytest.raises(ValueError, match=r"^`patch` must divide `size` = 8, but is 3\.$"):
            build(2, 8, 3, 6)
    with pytest.raises(ValueError, match=r"^`project` must be True or None when"):
        EmbeddingEncoder(7, 6, project=False)
