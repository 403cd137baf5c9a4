"""How families of models name the projections of their attention."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of models names the projections of an attention block.

    Attributes:
        title: The families that use it.
        inputs: Names of the input projections, relative to the block.
        outputs: Names of the output projections; they count only beside an input. One that begins
            with "../" is relative to the block's parent, which then must say attention.
        whole: Whether all the inputs must be there, for names too short to mean attention alone.
        place: Whether the block's own name or class must say attention.
        heads: The children of a block of which it must have one.
    """

    title: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    whole: bool = False
    place: bool = False
    heads: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        heads = frozenset(name.partition(".")[0] for name in self.inputs)
        object.__setattr__(self, "heads", heads)


DIALECTS = (
    Dialect(
        "Stable Diffusion, SDXL, SD3, Flux (diffusers, LDM)",
        (
            *("to_q", "to_k", "to_v", "to_kv", "to_qkv", "to_qkv_mlp_proj"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv"),
            *("to_q_t", "to_k_t", "to_v_t"),
        ),
        ("to_out.0", "to_out", "to_add_out", "to_out_t"),
    ),
    Dialect("Kandinsky 5", ("to_query", "to_key", "to_value"), ("out_layer",), whole=True),
    Dialect(
        "Llama, Mistral, Qwen, Gemma, Phi, OPT, CLIP, Whisper, ViT since transformers 5",
        ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        ("o_proj", "out_proj", "output_proj", "dense", "proj", "projection_layer", "Wo"),
    ),
    Dialect(
        "DeepSeek, with latent attention",
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        ("o_proj",),
    ),
    Dialect(
        "Gemma 4 vision and audio, Moshi",
        ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
        ("o_proj.linear", "post.linear"),
    ),
    Dialect(
        "BERT, RoBERTa, Swin, ALBERT, PVT",
        ("query", "key", "value"),
        ("../output.dense", "dense", "output", "out_proj", "proj", "proj_attn"),
        whole=True,
    ),
    Dialect(
        "DeBERTa, ProphetNet, Deformable DETR",
        (
            *("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"),
            *("in_proj", "pos_proj", "pos_q_proj"),
        ),
        ("../output.dense", "out_proj", "output_proj"),
        place=True,
    ),
    Dialect("T5, MPNet", ("q", "k", "v"), ("o", "proj"), whole=True),
    Dialect("timm ViT, BLIP", ("qkv",), ("proj", "projection", "../output.dense"), place=True),
    Dialect("MPT, ModernBERT, CTRL", ("Wqkv", "Wq", "Wk", "Wv"), ("Wo", "out_proj", "dense")),
    Dialect("GPT-2", ("c_attn", "q_attn"), ("c_proj",)),
    Dialect("DistilBERT, XLM", ("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    Dialect("GPT-NeoX, BLOOM, Falcon", ("query_key_value",), ("dense",)),
    Dialect(
        "Wav2Vec2-BERT, SeamlessM4T",
        ("linear_q", "linear_k", "linear_v", "linear_pos"),
        ("linear_out",),
    ),
)

# the names that a projection may have in its parent
LAST_NAMES = {
    name.rpartition("/")[2].rpartition(".")[2] for d in DIALECTS for name in d.inputs + d.outputs
}
