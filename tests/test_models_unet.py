"""The U-Net: shapes, names, dependence on each input, and refusals."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lora_core.models import UNet
from lora_core.models.unet import TimeEmbedding


def small() -> UNet:
    torch.manual_seed(0)
    return UNet(in_channels=2, context_dim=6, channels=(8, 16), attention=(False, True), dim_head=4)


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    z, context = torch.randn(3, 2, height, width), torch.randn(3, 4, 6)
    return z, torch.tensor([0, 10, 999]), context


@pytest.mark.parametrize(("height", "width"), [(28, 28), (7, 9), (1, 1), (5, 16)])
def test_the_noise_has_the_shape_of_the_image_whatever_its_size(height: int, width: int) -> None:
    z, t, context = inputs(height, width)
    assert small()(z, t, context).shape == z.shape


def test_the_prediction_depends_on_image_time_and_context() -> None:
    unet, (z, t, context) = small(), inputs()
    out = unet(z, t, context)
    assert out.std() > 0
    for changed in (unet(z + 1, t, context), unet(z, t + 5, context), unet(z, t, context.neg())):
        assert (changed - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_what_the_coarser_resolutions_lose_comes_back_over_the_skip_connections() -> None:
    unet, (z, t, context) = small(), inputs()
    # nothing but the skip is left of the finest resolution
    for p in unet.upsamplers.parameters():
        nn.init.zeros_(p)
    out = unet(z, t, context)
    assert (unet(z + torch.randn_like(z), t, context) - out).abs().mean() > 1e-2


def test_the_up_blocks_read_the_matching_down_blocks_output() -> None:
    unet, (z, t, context) = small(), inputs()
    seen: dict[str, torch.Tensor] = {}
    for name in ("down_blocks.0", "down_blocks.1"):
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
    for name in ("up_blocks.0", "up_blocks.1"):
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    unet(z, t, context)
    for down, up in (("down_blocks.1", "up_blocks.0"), ("down_blocks.0", "up_blocks.1")):
        assert seen[down].abs().mean() > 1e-2
        assert torch.equal(seen[up].chunk(2, dim=1)[1], seen[down])


def test_the_time_embedding_is_sines_and_cosines_of_falling_rates() -> None:
    embedding = TimeEmbedding(frequencies=6, time_dim=12)
    waves: list[torch.Tensor] = []
    embedding.linear_1.register_forward_pre_hook(lambda module, args: waves.append(args[0]))
    embedding(torch.tensor([0.0, 3.0, 8.0]))
    sines, cosines = waves[0].chunk(2, dim=1)
    assert sines.shape == cosines.shape == (3, 6)
    assert_close(sines**2 + cosines**2, torch.ones(3, 6))
    assert_close(sines[0], torch.zeros(6))
    # of an angle a wave alone cannot tell t from -t or from pi - t; both together can
    angles = torch.atan2(sines[1], cosines[1])
    assert_close(angles[0], torch.tensor(3.0))
    assert (angles.diff() < 0).all()


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    unet, (z, t, context) = small(), inputs()
    alone = torch.cat([unet(z[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)])
    assert_close(unet(z, t, context), alone, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    unet, (z, t, context) = small(), inputs()
    unet(z, t, context).square().sum().backward()
    silent = [
        name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert silent == []


def test_one_timestep_serves_the_whole_batch() -> None:
    unet, (z, _, context) = small(), inputs()
    expected = unet(z, torch.tensor([7, 7, 7]), context)
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7.0, 7.0, 7.0])):
        assert_close(unet(z, t, context), expected)


def test_layers_carry_the_names_of_stable_diffusion() -> None:
    names = {name for name, module in UNet().named_modules() if isinstance(module, nn.Linear)}
    for name in (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
    ):
        assert name in names


def test_only_the_coarser_resolutions_have_attention() -> None:
    unet = UNet()
    counts = [len(block.attentions) for block in (*unet.down_blocks, *unet.up_blocks)]
    assert counts == [0, 1, 1, 1, 1, 0]


def test_no_two_layers_are_the_same_object() -> None:
    unet = UNet()
    everything = list(unet.named_modules(remove_duplicate=False))
    assert len(everything) == len(list(unet.modules()))


def test_the_default_fits_the_shipped_file_and_low_rank_updates_are_far_smaller() -> None:
    unet = UNet()
    count = sum(p.numel() for p in unet.parameters())
    assert 700_000 <= count <= 950_000
    update = sum(
        4 * 4 * (layer.in_features + layer.out_features)
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and (".attn1." in name or ".attn2." in name)
    )
    assert 12 * update < 2 * count


def test_the_same_seed_builds_the_same_model() -> None:
    assert_close(small().state_dict(), small().state_dict(), rtol=0, atol=0)


def test_inputs_that_do_not_fit_are_refused() -> None:
    unet, (z, t, context) = small(), inputs()
    with pytest.raises(
        ValueError,
        match=r"^`z` must have shape \(batch, 2, height, width\) with both at least 1, "
        r"but has \(3, 1, 8, 8\)\.$",
    ):
        unet(z[:, :1], t, context)
    with pytest.raises(ValueError, match=r"^`z` must have shape .*, but has \(3, 2, 0, 8\)\.$"):
        unet(z[:, :, :0], t, context)
    with pytest.raises(TypeError, match=r"^`context` must be a tensor, but is None\.$"):
        unet(z, t, None)
    with pytest.raises(
        ValueError, match=r"^`context` must have shape \(3, tokens, 6\), but has \(3, 4, 5\)\.$"
    ):
        unet(z, t, context[..., :5])
    with pytest.raises(ValueError, match=r"^`context` must have shape \(3, tokens, 6\), but has"):
        unet(z, t, context[:1])
    with pytest.raises(
        ValueError, match=r"^`t` must be one timestep or have shape \(3,\), but has \(2,\)\.$"
    ):
        unet(z, t[:2], context)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^`in_channels` must be at least 1, but is 0\.$"):
        UNet(in_channels=0)
    for size in ("context_dim", "heads", "dim_head", "time_dim", "groups"):
        with pytest.raises(ValueError, match=rf"^`{size}` must be at least 1, but is 0\.$"):
            UNet(**{size: 0})
    with pytest.raises(
        ValueError, match=r"^`channels` must be multiples of `groups` = 8, but is \(12, 64, 64\)\.$"
    ):
        UNet(channels=(12, 64, 64))
    with pytest.raises(ValueError, match=r"^`attention` must have one entry per width .* = 3, but"):
        UNet(attention=(True,))
