"""Tiny real models of many families, bare and with random values, and what each is called with."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers as D
import torch
import transformers as T
from torch import Tensor, nn

Made = tuple[nn.Module, Mapping[str, Any]]

# what configurations call their sizes; each takes those that it has
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 32,
    "patch_size": 8,
}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 60, shape or (2, 9))


def text(model: str, config: str, **own: Any) -> Callable[[], Made]:
    """A model of tokens."""

    def make() -> Made:
        cls = getattr(T, config)
        known = vars(cls()) | dict.fromkeys(getattr(cls, "attribute_map", {}))
        named = getattr(cls, "attribute_map", {})
        small = {key: value for key, value in _SMALL.items() if key in known}
        small = {key: value for key, value in small.items() if named.get(key) not in own}
        return getattr(T, model)(cls(**{**small, **own})), {"input_ids": tokens()}

    return make


def seen(model: str, config: str, *sizes: int, **own: Any) -> Callable[[], Made]:
    """A model of pictures."""

    def make() -> Made:
        made, _ = text(model, config, **own)()
        return made, {"pixel_values": torch.randn(*(sizes or (2, 3, 32, 32)))}

    return make


def both(model: str, config: str, **own: Any) -> Callable[[], Made]:
    """A model of tokens to tokens."""

    def make() -> Made:
        made, inputs = text(model, config, **own)()
        return made, {**inputs, "decoder_input_ids": tokens()}

    return make


def drawn(model: str, inputs: Callable[[], Mapping[str, Any]], **own: Any) -> Callable[[], Made]:
    """A model of diffusers."""
    return lambda: (getattr(D, model)(**own), inputs())


MODELS: dict[str, Callable[[], Made]] = {
    # decoders
    "llama": text("LlamaForCausalLM", "LlamaConfig"),
    "mistral": text("MistralForCausalLM", "MistralConfig"),
    "qwen2": text("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": text("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma": text("GemmaForCausalLM", "GemmaConfig"),
    "gemma2": text("Gemma2ForCausalLM", "Gemma2Config"),
    "gemma3": text("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "gpt2": text("GPT2LMHeadModel", "GPT2Config"),
    "gpt_neox": text("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gptj": text("GPTJForCausalLM", "GPTJConfig", rotary_dim=4),
    "bloom": text("BloomForCausalLM", "BloomConfig"),
    "falcon": text("FalconForCausalLM", "FalconConfig"),
    "opt": text("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=32),
    "phi": text("PhiForCausalLM", "PhiConfig"),
    "phi3": text("Phi3ForCausalLM", "Phi3Config"),
    "olmo2": text("Olmo2ForCausalLM", "Olmo2Config"),
    "stablelm": text("StableLmForCausalLM", "StableLmConfig"),
    "cohere": text("CohereForCausalLM", "CohereConfig"),
    "granite": text("GraniteForCausalLM", "GraniteConfig"),
    "mpt": text("MptForCausalLM", "MptConfig"),
    # experts
    "mixtral": text("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    "qwen3_moe": text(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2
    ),
    "granitemoe": text("GraniteMoeForCausalLM", "GraniteMoeConfig", num_local_experts=4),
    # state-space and hybrid ones
    "mamba": text("MambaForCausalLM", "MambaConfig", state_size=4),
    "mamba2": text(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        state_size=8,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    ),
    "falcon_mamba": text("FalconMambaForCausalLM", "FalconMambaConfig", state_size=4),
    "bamba": text(
        "BambaForCausalLM",
        "BambaConfig",
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
        attn_layer_indices=[1],
    ),
    "recurrent_gemma": text(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", num_hidden_layers=3, lru_width=32
    ),
    "rwkv": text("RwkvForCausalLM", "RwkvConfig", attention_hidden_size=32, use_cache=False),
    "jamba": text(
        "JambaForCausalLM",
        "JambaConfig",
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    # encoders
    "bert": text("BertForMaskedLM", "BertConfig"),
    "roberta": text("RobertaForMaskedLM", "RobertaConfig"),
    "distilbert": text("DistilBertForMaskedLM", "DistilBertConfig", dim=32, hidden_dim=48),
    "albert": text("AlbertForMaskedLM", "AlbertConfig", embedding_size=16),
    "electra": text("ElectraModel", "ElectraConfig", embedding_size=16),
    "deberta": text(
        "DebertaV2Model", "DebertaV2Config", relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "modernbert": text("ModernBertModel", "ModernBertConfig"),
    "clip_text": text("CLIPTextModel", "CLIPTextConfig"),
    # encoders and decoders
    "t5": both("T5ForConditionalGeneration", "T5Config", d_kv=8),
    "bart": both("BartForConditionalGeneration", "BartConfig"),
    "m2m_100": both("M2M100ForConditionalGeneration", "M2M100Config"),
    # of sound
    "whisper": lambda: (
        text(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
        )()[0],
        {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tokens()},
    ),
    "wav2vec2": lambda: (
        text(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            conv_dim=(16, 16),
            conv_stride=(4, 2),
            conv_kernel=(8, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
        )()[0],
        {"input_values": torch.randn(2, 320)},
    ),
    # of pictures
    "vit": seen("ViTModel", "ViTConfig"),
    "dinov2": seen("Dinov2Model", "Dinov2Config"),
    "clip_vision": seen("CLIPVisionModel", "CLIPVisionConfig"),
    "swin": seen(
        "SwinModel",
        "SwinConfig",
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
        patch_size=4,
    ),
    "convnext": seen(
        "ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2
    ),
    "resnet": seen(
        "ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
    "bit": seen(
        "BitModel", "BitConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2
    ),
    "segformer": seen(
        "SegformerModel",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    "mobilenet": seen(
        "MobileNetV2Model",
        "MobileNetV2Config",
        depth_multiplier=0.25,
        min_depth=4,
        depth_divisible_by=4,
    ),
    # of diffusers
    "unet": drawn(
        "UNet2DConditionModel",
        lambda: {
            "sample": torch.randn(1, 4, 16, 16),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 7, 32),
        },
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "unet2d": drawn(
        "UNet2DModel",
        lambda: {"sample": torch.randn(1, 3, 16, 16), "timestep": torch.tensor([3])},
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "vae": drawn(
        "AutoencoderKL",
        lambda: {"sample": torch.randn(1, 3, 16, 16)},
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    ),
    "vae_wan": drawn(
        "AutoencoderKLWan",
        lambda: {"sample": torch.randn(1, 3, 5, 16, 16)},
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ),
    "vae_cogvideox": drawn(
        "AutoencoderKLCogVideoX",
        lambda: {"sample": torch.randn(1, 3, 5, 16, 16)},
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        temporal_compression_ratio=4,
    ),
    "flux": drawn(
        "FluxTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 32),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    "sd3": drawn(
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 64),
            "timestep": torch.tensor([3]),
        },
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ),
    "pixart": drawn(
        "PixArtTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 5, 16),
            "timestep": torch.tensor([3]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    ),
    "wan": drawn(
        "WanTransformer3DModel",
        lambda: {
            "hidden_states": torch.randn(1, 4, 2, 8, 8),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 5, 16),
        },
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    ),
}
