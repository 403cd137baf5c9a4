"""A mix per sample in programs that write and draw, which repeat samples each in its own order."""

import copy

import pytest
import torch
from torch import nn

import lora_core
from lora_core import ConfigError

transformers = pytest.importorskip("transformers")


def adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    torch.manual_seed(1)
    lora_core.inject(model, rank=4, name="ink", targets=targets)
    for p in lora_core.parameters(model):
        p.data.normal_(0, 0.3)
    return model.eval()


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return adapted(transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "up_proj"])


@pytest.fixture
def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return adapted(transformers.T5ForConditionalGeneration(config), ["q", "v", "wi"])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_keep_the_mix_of_their_prompt(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    prompts = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    alone = []
    for prompt, strength in zip(prompts, (1.0, 0.0), strict=True):
        lora_core.scales(model, ink=strength)
        alone.append(model.generate(prompt[None], **settings)[0])
    assert not torch.equal(*(tokens[-6:] for tokens in alone))
    # the encoder sees each prompt once, what writes sees each three times
    lora_core.scales(model, ["ink", None], repeats=3)
    assert torch.equal(model.generate(prompts, **settings), torch.stack(alone))
    lora_core.scales(model, ["ink", None])
    with pytest.raises(ConfigError, match="say so: scales"):
        model.generate(prompts, **settings)


def test_pictures_of_a_prompt_under_guidance_keep_its_mix() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    adapted(unet, ["to_q", "to_k", "to_v"])
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=64,
                bos_token_id=0,
                eos_token_id=1,
            )
        ),
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    texts, none = torch.randn(2, 77, 16), torch.randn(2, 77, 16)
    latents = torch.randn(6, 4, 8, 8)
    settings = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 3}

    def draw(rows: slice) -> torch.Tensor:
        return pipe(
            prompt_embeds=texts[rows],
            negative_prompt_embeds=none[rows],
            latents=copy.deepcopy(latents[3 * rows.start : 3 * rows.stop]),
            **settings,
        ).images

    alone = []
    for i, strength in enumerate((1.0, 0.0)):
        lora_core.scales(unet, ink=strength)
        alone.append(draw(slice(i, i + 1)))
    lora_core.scales(unet, ["ink", None], guidance=True, repeats=3)
    torch.testing.assert_close(draw(slice(0, 2)), torch.cat(alone), rtol=1e-4, atol=1e-4)
    lora_core.scales(unet, ["ink", None], guidance=True)
    with pytest.raises(ConfigError, match="say so: scales"):
        draw(slice(0, 2))
