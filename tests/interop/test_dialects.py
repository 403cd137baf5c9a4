"""Real models of transformers and diffusers, tiny and untrained: `plan` finds their attention.

What is expected is read off the peers' own classes: every linear layer inside a class that they
call ``...Attention``. The names that lora_core looks for play no part in it.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_core
from lora_core import TargetError

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = pytest.mark.interop

Inputs = dict[str, Any]
NOTHING = "(?!)"


class Peer(NamedTuple):
    """A model class, the settings that make it tiny, and what it is called with.

    Attributes:
        model: Its name in its library.
        inputs: Makes the arguments of its forward.
        settings: Arguments of its config.
        besides: A regex of names inside an attention class that are no projection.
        unheard: A regex of projections whose result the model computes and throws away.
    """

    model: str
    inputs: Callable[[], Inputs]
    settings: dict[str, Any]
    besides: str = NOTHING
    unheard: str = NOTHING


def tokens() -> Inputs:
    return {"input_ids": torch.arange(1, 13).reshape(2, 6)}


def pair() -> Inputs:
    return {**tokens(), "decoder_input_ids": torch.arange(1, 9).reshape(2, 4)}


def pixels() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def sound() -> Inputs:
    return {"input_values": torch.randn(2, 400)}


def frames() -> Inputs:
    return {"input_features": torch.randn(2, 12, 32)}


def spectrum() -> Inputs:
    return {
        "input_features": torch.randn(2, 8, 16),
        "decoder_input_ids": torch.arange(1, 9).reshape(2, 4),
    }


def text(**settings: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 40,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**sizes, "max_position_embeddings": 32, **special, **settings}


def vision(**settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        **settings,
    }


def grouped(**settings: Any) -> dict[str, Any]:
    return text(num_key_value_heads=2, head_dim=8, **settings)


def two_sided(**settings: Any) -> dict[str, Any]:
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    both = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sizes.items()}
    return text(d_model=32, decoder_start_token_id=1, **both, **settings)


SPEECH = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
SHIFTED = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

TRANSFORMERS = {
    "ALBERT": Peer("AlbertModel", tokens, text(embedding_size=16)),
    "BART": Peer("BartModel", pair, two_sided()),
    "BERT": Peer("BertModel", tokens, text()),
    "BERT as a classifier": Peer("BertForSequenceClassification", tokens, text()),
    "BLIP vision": Peer("BlipVisionModel", pixels, vision()),
    "BLOOM": Peer("BloomModel", tokens, text(n_head=4, n_layer=2)),
    "CLIP text": Peer("CLIPTextModel", tokens, text()),
    "CLIP vision": Peer("CLIPVisionModel", pixels, vision()),
    "DeBERTa": Peer(
        "DebertaModel",
        tokens,
        text(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    ),
    "DeBERTa v2": Peer(
        "DebertaV2Model",
        tokens,
        text(relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=False),
    ),
    "CTRL": Peer("CTRLModel", tokens, text(n_embd=32, dff=48, n_layer=2, n_head=4)),
    "DeepSeek v3": Peer("DeepseekV3Model", tokens, text(**MLA)),
    "DINOv2": Peer("Dinov2Model", pixels, vision()),
    "DistilBERT": Peer("DistilBertModel", tokens, text(dim=32, hidden_dim=48)),
    "ELECTRA": Peer("ElectraModel", tokens, text(embedding_size=16)),
    "Falcon": Peer("FalconModel", tokens, text()),
    "Gemma": Peer("GemmaModel", tokens, grouped()),
    "GPT-2": Peer("GPT2LMHeadModel", tokens, text(n_embd=32, n_layer=2, n_head=4)),
    "GPT-J": Peer("GPTJModel", tokens, text(n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    "GPT-NeoX": Peer("GPTNeoXForCausalLM", tokens, text()),
    "InternVL vision": Peer(
        "InternVLVisionModel", pixels, vision(image_size=[32, 32], patch_size=[8, 8])
    ),
    "Llama": Peer("LlamaForCausalLM", tokens, grouped()),
    "Mistral": Peer("MistralModel", tokens, grouped()),
    "Mixtral": Peer("MixtralModel", tokens, grouped(**EXPERTS)),
    "ModernBERT": Peer("ModernBertModel", tokens, text()),
    "MPNet": Peer("MPNetModel", tokens, text()),
    "MPT": Peer("MptModel", tokens, text(d_model=32, n_heads=4, n_layers=2)),
    "OPT": Peer("OPTModel", tokens, text(ffn_dim=48, word_embed_proj_dim=32)),
    "Phi": Peer("PhiModel", tokens, text()),
    "Phi 3": Peer("Phi3Model", tokens, text(num_key_value_heads=2)),
    "ProphetNet": Peer(
        "ProphetNetModel",
        pair,
        {
            "hidden_size": 32,
            "vocab_size": 40,
            "decoder_start_token_id": 1,
            **{
                key.format(side): value
                for side in ("encoder", "decoder")
                for key, value in {
                    "num_{}_layers": 2,
                    "num_{}_attention_heads": 4,
                    "{}_ffn_dim": 48,
                }.items()
            },
        },
        besides="relative_pos_embeddings",
    ),
    "PVT v2": Peer(
        "PvtV2Model",
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
        {
            "hidden_sizes": [16, 16, 16, 32],
            "depths": [1] * 4,
            "num_attention_heads": [1, 2, 2, 4],
            "sr_ratios": [2, 2, 1, 1],
            "image_size": 64,
        },
    ),
    "Qwen 2": Peer("Qwen2Model", tokens, text(num_key_value_heads=2)),
    "Qwen 3": Peer("Qwen3Model", tokens, grouped()),
    "RoBERTa": Peer("RobertaForMaskedLM", tokens, text()),
    "Swin": Peer("SwinModel", pixels, SHIFTED),
    "Swin v2": Peer(
        "Swinv2Model",
        pixels,
        SHIFTED,
        besides=r".*continuous_position_bias_mlp.*",
    ),
    "T5": Peer("T5Model", pair, text(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
    "ViT": Peer("ViTModel", pixels, vision()),
    "ViT as a classifier": Peer("ViTForImageClassification", pixels, vision()),
    "VideoMAE": Peer(
        "VideoMAEModel",
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        vision(num_frames=4),
    ),
    "Wav2Vec2": Peer("Wav2Vec2Model", sound, text(**SPEECH)),
    "Wav2Vec2-BERT": Peer(
        "Wav2Vec2BertModel",
        frames,
        text(feature_projection_input_dim=32, position_embeddings_type="relative"),
    ),
    "Whisper": Peer(
        "WhisperModel",
        spectrum,
        two_sided(num_mel_bins=8, max_source_positions=8, max_target_positions=8),
    ),
    "XLM": Peer("XLMModel", tokens, text(emb_dim=32, n_layers=2, n_heads=4)),
}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def unet() -> Inputs:
    return {
        "sample": noise(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": noise(2, 5, 16),
    }


def sdxl() -> Inputs:
    sizes = torch.arange(12.0).reshape(2, 6)
    return {**unet(), "added_cond_kwargs": {"text_embeds": noise(2, 8), "time_ids": sizes}}


def pixart() -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": noise(2, 5, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit() -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def sd3() -> Inputs:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 16),
        "pooled_projections": noise(2, 16),
        "timestep": torch.tensor([3, 500]),
    }


def flux() -> Inputs:
    return {
        "hidden_states": noise(2, 16, 8),
        "encoder_hidden_states": noise(2, 5, 16),
        "pooled_projections": noise(2, 16),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": torch.arange(48).reshape(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def flux2() -> Inputs:
    return {
        "hidden_states": noise(2, 16, 8),
        "encoder_hidden_states": noise(2, 5, 16),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": torch.arange(64).reshape(16, 4),
        "txt_ids": torch.zeros(5, 4),
        "guidance": torch.ones(2),
    }


BLOCKS = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

DIFFUSERS = {
    "Stable Diffusion": Peer("UNet2DConditionModel", unet, {**BLOCKS, "attention_head_dim": 4}),
    "SDXL": Peer(
        "UNet2DConditionModel",
        sdxl,
        {
            **BLOCKS,
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 56,
        },
    ),
    "VAE": Peer(
        "AutoencoderKL",
        lambda: {"sample": noise(2, 3, 16, 16)},
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
    "DiT": Peer(
        "DiTTransformer2DModel",
        dit,
        {**HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 8, "norm_num_groups": 8},
    ),
    "PixArt": Peer(
        "PixArtTransformer2DModel",
        pixart,
        {
            **HEADS,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "norm_num_groups": 8,
        },
    ),
    "SD3": Peer(
        "SD3Transformer2DModel",
        sd3,
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        unheard=r"transformer_blocks\.1\.attn\.add_q_proj",
    ),
    "Flux": Peer(
        "FluxTransformer2DModel",
        flux,
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "Flux 2": Peer(
        "Flux2Transformer2DModel",
        flux2,
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
}
PEERS = {**TRANSFORMERS, **DIFFUSERS}


def build(peer: Peer) -> nn.Module:
    """The untrained model, ready to be called; the peers initialise some weights with zeros."""
    torch.manual_seed(0)
    if hasattr(diffusers, peer.model):
        model = getattr(diffusers, peer.model)(**peer.settings)
    else:
        kind = getattr(transformers, peer.model)
        model = kind(kind.config_class(**peer.settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def attention_layers(model: nn.Module, besides: str) -> set[str]:
    """Every linear layer inside a class that the peer calls an attention."""
    return {
        f"{name}.{inner}".lstrip(".")
        for name, block in model.named_modules()
        if type(block).__name__.endswith("Attention")
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear | conv1d) and not re.fullmatch(besides, inner)
    }


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    # by itself torch takes another kernel, with other last bits, once a frozen bias of the
    # attention (T5, Swin) needs no gradient
    with sdpa_kernel(SDPBackend.MATH):
        return model(**inputs)[0]


@pytest.mark.parametrize("name", PEERS)
def test_the_default_targets_are_the_attention_of_a_real_model_and_nothing_else(name):
    model = build(PEERS[name])
    expected = attention_layers(model, PEERS[name].besides)
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    kinds = nn.Linear | conv1d | nn.Embedding | convolutions
    adaptable = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    report = lora_core.plan(model)
    assert {layer.name for layer in report.layers} == expected
    assert set(report.left_out) == adaptable - expected
    assert expected


@pytest.mark.parametrize("name", PEERS)
def test_a_real_model_goes_through_the_life_of_an_adapter(name, perturb, portrait):
    model = build(PEERS[name])
    torch.manual_seed(2)
    inputs = PEERS[name].inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, plain = portrait(model), output(model, inputs)
    attention = {layer.name for layer in lora_core.inject(model).layers}
    fresh = output(model, inputs)
    assert torch.equal(fresh, plain)
    # an adapter that gets no gradient sits on a layer that is never called
    (fresh * torch.randn_like(fresh)).sum().backward()
    deaf = {n for n in attention if not model.get_submodule(n).lora_B_default.grad.any()}
    assert deaf == {n for n in attention if re.fullmatch(PEERS[name].unheard, n)}
    perturb(model)
    assert not torch.allclose(output(model, inputs), plain, rtol=1e-3, atol=1e-3)
    lora_core.eject(model)
    assert portrait(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(output(model, inputs), plain)


@pytest.mark.parametrize("name", ["MambaModel", "Mamba2Model", "ConvNextModel", "FNetModel"])
def test_a_real_model_without_attention_is_refused(name):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    with pytest.raises(TargetError, match=r"^The model must have attention projections .* Name"):
        lora_core.plan(model)


def test_attention_that_reads_its_weights_itself_is_adapted_where_it_reads(perturb):
    peer = Peer("WavLMModel", sound, text(**SPEECH))
    model, inputs = build(peer).eval(), peer.inputs()
    plain = output(model, inputs)
    report = lora_core.inject(model, rank=1)
    tails = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert {"q_proj", "k_proj", "v_proj", "out_proj"} <= tails
    assert torch.equal(output(model, inputs), plain)
    perturb(model)
    assert (output(model, inputs) - plain).abs().max() > 1e-4
