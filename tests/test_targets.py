"""Which layers are chosen: every dialect, every kind of pattern, and every refusal."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lora_core import ConfigError, TargetError, UnsupportedLayerError, inject, merge, plan, unmerge
from lora_core._injection import DIALECTS


class Conv1D(nn.Module):
    """A linear layer that stores its matrix (in, out), as GPT-2's does."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


class Tree(nn.Module):
    """A container with no meaning of its own."""


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def tree(*names: str, **leaves: nn.Module) -> nn.Module:
    """A model with a linear layer (or the one given) at each dotted name; "__" stands for a dot."""
    root = Tree()
    given = {name.replace("__", "."): leaf for name, leaf in leaves.items()}
    for name, leaf in [*((n, linear()) for n in names), *given.items()]:
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Tree())
            node = node._modules[parent]
        node.add_module(last, leaf)
    return root


def chosen(model: nn.Module, **wishes: object) -> list[str]:
    return [layer.name for layer in plan(model, rank=1, **wishes).layers]


def sentence(text: str) -> str:
    """A whole first sentence as an anchored pattern."""
    return f"^{re.escape(text)}( |$)"


# title of the dialect, the projections, and what stands beside them
FAMILIES = {
    "diffusers": (
        "Stable Diffusion",
        ["b.0.attn1.to_q", "b.0.attn1.to_k", "b.0.attn1.to_v", "b.0.attn1.to_out.0"],
        ["b.0.ff.net.0.proj", "b.0.ff.net.2", "b.0.proj_in", "b.0.proj_out", "time.linear_1"],
    ),
    "flux": (
        "Stable Diffusion",
        [
            *(f"b.0.attn.{n}" for n in ("to_q", "to_k", "to_v")),
            *(f"b.0.attn.add_{n}_proj" for n in "qkv"),
            *("b.0.attn.to_out.0", "b.0.attn.to_add_out"),
        ],
        ["b.0.norm1.linear", "b.0.ff_context.net.2", "x_embedder"],
    ),
    "fused": (
        "Stable Diffusion",
        [
            *("a.0.attn.to_qkv", "a.0.attn.to_added_qkv", "a.0.attn.to_out", "b.0.attn2.to_q"),
            *("b.0.attn2.to_kv", "c.0.attn.to_qkv_mlp_proj", "c.0.attn.to_out"),
        ],
        ["c.0.norm.linear"],
    ),
    "hidream": (
        "Stable Diffusion",
        [f"b.0.attn.to_{n}{side}" for n in ("q", "k", "v", "out") for side in ("", "_t")],
        ["b.0.ff_i.w1"],
    ),
    "kandinsky": (
        "Kandinsky",
        [f"b.0.self_attention.{n}" for n in ("to_query", "to_key", "to_value", "out_layer")],
        ["b.0.feed_forward.in_layer", "b.0.feed_forward.out_layer"],
    ),
    "one output": (
        "Stable Diffusion",
        ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out"],
        ["mlp.to_hidden"],
    ),
    "llama": (
        "Llama",
        [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"],
        [*(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")), "lm_head"],
    ),
    "clip": (
        "Llama",
        [f"l.0.self_attn.{n}_proj" for n in ("q", "k", "v", "out")],
        ["l.0.fc1", "l.0.fc2", "visual_projection"],
    ),
    **{
        f"llama with {output}": (
            "Llama",
            [*(f"l.0.attn.{n}_proj" for n in "qkv"), f"l.0.attn.{output}"],
            ["l.0.mlp.dense", "l.0.mlp.proj", "l.0.mlp.Wo"],
        )
        for output in ("output_proj", "dense", "proj", "projection_layer", "Wo")
    },
    "deepseek": (
        "DeepSeek",
        [
            *("l.0.self_attn.q_a_proj", "l.0.self_attn.q_b_proj", "l.0.self_attn.kv_b_proj"),
            *("l.0.self_attn.kv_a_proj_with_mqa", "l.0.self_attn.o_proj"),
        ],
        ["l.0.mlp.gate_proj", "l.0.self_attn.indexer.weights_proj"],
    ),
    "gemma 4": (
        "Gemma 4",
        [f"l.0.self_attn.{n}.linear" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "post")],
        ["l.0.mlp.gate_proj.linear", "l.0.self_attn.relative_k_proj"],
    ),
    "phi3": ("Llama", ["l.0.attn.qkv_proj", "l.0.attn.o_proj"], ["l.0.mlp.gate_up_proj"]),
    "bert": (
        "BERT",
        [
            *(f"layer.0.attention.self.{n}" for n in ("query", "key", "value")),
            "layer.0.attention.output.dense",
        ],
        ["layer.0.intermediate.dense", "layer.0.output.dense", "pooler.dense"],
    ),
    # a block straight under the layer: what "../output.dense" finds there is the mlp's
    "albert": (
        "BERT",
        [f"layer.0.attention.{n}" for n in ("query", "key", "value", "dense")],
        ["layer.0.output.dense", "layer.0.ffn"],
    ),
    **{
        f"bert with {output}": (
            "BERT",
            [f"layer.0.attention.{n}" for n in ("query", "key", "value", output)],
            ["layer.0.mlp.fc1", "pooler.dense"],
        )
        for output in ("output", "out_proj", "proj", "proj_attn")
    },
    "deberta": (
        "DeBERTa",
        [
            *(
                f"layer.0.attention.self_attention.{n}"
                for n in ("in_proj", "pos_proj", "pos_q_proj")
            ),
            "layer.0.attention.output.dense",
        ],
        ["layer.0.intermediate.dense", "layer.0.output.dense", "layer.1.mixer.in_proj"],
    ),
    "deberta 2": (
        "DeBERTa",
        [
            *(f"layer.0.attention.self_attention.{n}_proj" for n in ("query", "key", "value")),
            *(f"layer.0.attention.self_attention.pos_{n}_proj" for n in ("query", "key")),
            "layer.0.attention.output.dense",
        ],
        ["layer.0.intermediate.dense", "layer.0.output.dense"],
    ),
    "prophetnet": (
        "DeBERTa",
        [f"l.0.self_attn.{n}_proj" for n in ("query", "key", "value", "out")],
        ["l.0.feed_forward.output"],
    ),
    "deformable": (
        "DeBERTa",
        [f"l.0.encoder_attn.{n}_proj" for n in ("value", "output")],
        ["l.0.encoder_attn.sampling_offsets", "l.0.encoder_attn.attention_weights"],
    ),
    "t5": (
        "T5",
        [f"block.0.layer.0.SelfAttention.{n}" for n in "qkvo"],
        ["block.0.layer.1.DenseReluDense.wi", "block.0.layer.1.DenseReluDense.wo"],
    ),
    "t5 with proj": ("T5", [f"b.0.attn.{n}" for n in ("q", "k", "v", "proj")], ["b.0.mlp.fc1"]),
    "blip": ("timm", ["l.0.self_attn.qkv", "l.0.self_attn.projection"], ["l.0.mlp.fc1"]),
    "timesformer": (
        "timm",
        ["l.0.attention.attention.qkv", "l.0.attention.output.dense"],
        ["l.0.intermediate.dense", "l.0.output.dense"],
    ),
    "ctrl": (
        "MPT",
        [f"h.0.multi_head_attention.{n}" for n in ("Wq", "Wk", "Wv", "dense")],
        ["h.0.ffn.0", "h.0.ffn.2"],
    ),
    "conformer": (
        "Wav2Vec2-BERT",
        [f"l.0.self_attn.linear_{n}" for n in ("q", "k", "v", "pos", "out")],
        ["l.0.ffn1.intermediate_dense", "l.0.ffn1.output_dense"],
    ),
    "timm": (
        "timm",
        ["blocks.0.attn.qkv", "blocks.0.attn.proj"],
        ["blocks.0.mlp.fc1", "patch_embed.proj", "head"],
    ),
    "mpt": ("MPT", ["b.0.attn.Wqkv", "b.0.attn.out_proj"], ["b.0.ffn.up_proj"]),
    "modernbert": ("MPT", ["b.0.attn.Wqkv", "b.0.attn.Wo"], ["b.0.mlp.Wi", "b.0.mlp.Wo"]),
    "gpt2": (
        "GPT-2",
        ["h.0.attn.c_attn", "h.0.attn.c_proj"],
        ["h.0.mlp.c_fc", "h.0.mlp.c_proj", "lm_head"],
    ),
    "gpt2 cross": (
        "GPT-2",
        ["h.0.crossattention.c_attn", "h.0.crossattention.q_attn", "h.0.crossattention.c_proj"],
        ["h.0.mlp.c_fc"],
    ),
    "distilbert": (
        "DistilBERT",
        [f"layer.0.attention.{n}_lin" for n in ("q", "k", "v", "out")],
        ["layer.0.ffn.lin1", "layer.0.ffn.lin2"],
    ),
    "neox": (
        "GPT-NeoX",
        ["l.0.attention.query_key_value", "l.0.attention.dense"],
        ["l.0.mlp.dense_h_to_4h", "l.0.mlp.dense_4h_to_h", "embed_out"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_dialects_projections_are_found_and_nothing_else(family):
    _, projections, others = FAMILIES[family]
    model = tree(*projections, *others)
    report = plan(model, rank=1)
    assert sorted(layer.name for layer in report.layers) == sorted(projections)
    assert dict(report.left_out) == dict.fromkeys(others, "no attention projection")


def test_every_name_of_every_dialect_stands_in_a_family():
    for dialect in DIALECTS:
        rows = [rows for title, rows, _ in FAMILIES.values() if dialect.title.startswith(title)]
        names = {".".join(r.split(".")[-n:]) for row in rows for r in row for n in (1, 2)}
        mine = {name.removeprefix("../") for name in (*dialect.inputs, *dialect.outputs)}
        assert mine <= names, dialect.title


@pytest.mark.parametrize(
    "names",
    [
        ["layer.q", "layer.k"],  # no v
        ["layer.query", "layer.value"],  # no key
        ["layer.o", "layer.wo"],  # an output without inputs
        ["attn.proj", "attn.out_proj", "attn.dense", "attn.c_proj"],
        ["backbone.qkv", "backbone.proj"],  # nothing says attention
        ["patch_embed.proj", "head"],
        ["to_queue", "my_to_q_x", "xq_proj"],  # names that only contain one
        ["mixer.in_proj", "mixer.out_proj", "policy.value_proj"],  # no attention by name
        ["attention.self.query", "attention.output.dense"],  # an output beside half a block
    ],
)
def test_near_negatives_are_no_attention(names):
    rule = "The model must have attention projections that `inject` knows by name and place"
    message = f"{rule}, but none of its {len(names)} adaptable layers is one."
    with pytest.raises(TargetError, match=f"{sentence(message)}Name layers with `targets=`: "):
        plan(tree(*names))


def test_a_qkv_counts_under_a_class_that_says_attention():
    class WindowAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = linear(), linear()

    assert chosen(nn.ModuleList([WindowAttention()])) == ["0.qkv", "0.proj"]


def test_an_o_counts_only_beside_all_three_inputs():
    model = tree("a.q", "a.k", "a.v", "a.o", "b.o", "c.q", "c.o")
    assert chosen(model) == ["a.q", "a.k", "a.v", "a.o"]


def test_a_projection_that_is_no_linear_is_passed_over():
    model = tree("attn.q_proj", attn__k_proj=nn.Embedding(4, 4), attn__v_proj=nn.Conv2d(4, 4, 1))
    assert chosen(model) == ["attn.q_proj"]


def test_two_dialects_in_one_model_are_both_found():
    model = tree("unet.attn.to_q", "text.self_attn.q_proj", "text.mlp.fc1")
    assert chosen(model) == ["unet.attn.to_q", "text.self_attn.q_proj"]


def test_a_root_that_is_the_attention_block_is_found():
    assert chosen(tree("to_q", "to_k", "mlp")) == ["to_q", "to_k"]


def test_no_linear_layers_at_all_is_an_error():
    with pytest.raises(TargetError, match="but none of its 0 adaptable layers is one\\.$"):
        plan(nn.Sequential(nn.ReLU()))


def test_multihead_attention_is_adapted_where_its_weights_are_read():
    model = nn.TransformerEncoderLayer(8, 2, 8)
    assert chosen(model) == [
        "self_attn.q_proj_weight",
        "self_attn.k_proj_weight",
        "self_attn.v_proj_weight",
        "self_attn.out_proj",
    ]


class Pool(nn.Module):
    """Attention that hands the weights of its layers over and calls only the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (linear() for _ in range(4))
        self.gate = linear()

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        out, _ = nn.functional.multi_head_attention_forward(
            *(x, x, x, 4, 1, None, torch.cat([p.bias for p in projections]), None, None),
            *(False, 0.0, self.c_proj.weight, self.c_proj.bias),
            use_separate_proj_weight=True,
            **{f"{n}_proj_weight": p.weight for n, p in zip("qkv", projections, strict=True)},
        )
        return out * self.gate(x)


def test_attention_that_reads_its_weights_itself_is_adapted_where_it_reads(perturb):
    model, x = tree(pool=Pool()), torch.randn(3, 2, 4)
    report = inject(model, rank=1)
    names = ["pool.q_proj", "pool.k_proj", "pool.v_proj"]
    assert [layer.name for layer in report.layers] == names
    plain = model.pool(x)
    for name in names:
        perturb(model.get_submodule(name))
        assert (model.pool(x) - plain).abs().max() > 1e-6
        plain = model.pool(x)


def test_a_layer_that_such_attention_does_call_may_be_named(perturb):
    model, x = Pool(), torch.randn(3, 2, 4)
    plain = model(x)
    inject(model, rank=1, targets="gate")
    perturb(model)
    assert (model(x) - plain).abs().max() > 0.01


MODEL = ("down.0.attn.to_q", "down.0.attn.to_out.0", "down.1.attn.to_q", "mid.to_q_extra", "head")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("to_q", ["down.0.attn.to_q", "down.1.attn.to_q"]),
        ("to_out.0", ["down.0.attn.to_out.0"]),
        ("0", ["down.0.attn.to_out.0"]),
        ("attn.to_q", ["down.0.attn.to_q", "down.1.attn.to_q"]),
        ("down.0.*", ["down.0.attn.to_q", "down.0.attn.to_out.0"]),
        ("down.*.to_q", ["down.0.attn.to_q", "down.1.attn.to_q"]),
        ("*to_q*", ["down.0.attn.to_q", "down.1.attn.to_q", "mid.to_q_extra"]),
        ("to_?", ["down.0.attn.to_q", "down.1.attn.to_q"]),
        ("down.[1-9].*", ["down.1.attn.to_q"]),
        ("head", ["head"]),
        ("*", list(MODEL)),
        (re.compile(r"down\.\d+\.attn\.to_q"), ["down.0.attn.to_q", "down.1.attn.to_q"]),
        (re.compile(r".*to_q"), ["down.0.attn.to_q", "down.1.attn.to_q"]),
        (nn.Linear, list(MODEL)),
        (nn.Module, list(MODEL)),
        (lambda name, module: name.startswith("mid"), ["mid.to_q_extra"]),
        (lambda name, module: module.in_features == 4 and "1" in name, ["down.1.attn.to_q"]),
        (["head", re.compile("mid.*")], ["mid.to_q_extra", "head"]),
        (("head", "head"), ["head"]),
    ],
    # a function's own text has an address in it, which each worker process would see otherwise
    ids=lambda value: str(getattr(value, "__qualname__", value)),
)
def test_patterns_mean_what_they_say(pattern, expected):
    if callable(pattern) and not isinstance(pattern, type):
        original = pattern

        def pattern(name: str, module: nn.Module) -> bool:
            return isinstance(module, nn.Linear) and original(name, module)

    assert sorted(chosen(tree(*MODEL), targets=pattern)) == sorted(expected)


def test_a_regex_must_match_the_whole_name():
    model = tree(*MODEL)
    message = (
        "`targets` must match a layer, but the regex 'to_q' matches none of 5 adaptable layers."
    )
    with pytest.raises(TargetError, match=sentence(message)):
        plan(model, targets=re.compile("to_q"))


def test_a_glob_begins_at_a_dot():
    with pytest.raises(TargetError, match=r"^`targets` must match a layer, but 'o_q' matches none"):
        plan(tree(*MODEL), targets="o_q")


def test_layers_are_reported_in_the_order_of_the_model():
    model = tree(*MODEL)
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert chosen(model, targets=list(reversed(MODEL))) == order


@pytest.mark.parametrize("what", ["targets", "exclude"])
def test_a_pattern_that_matches_nothing_names_near_misses(what):
    model = tree("a.to_q", "a.to_k", "head")
    kind = "adaptable layers" if what == "targets" else "chosen layers"
    wishes = {"targets": "*", what: ["to_q", "to_qq"]}
    message = (
        f"`{what}` must match a layer, but 'to_qq' matches none of 3 {kind}. Did you mean 'to_q'"
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}"):
        plan(model, **wishes)


def test_a_pattern_like_no_name_is_answered_with_the_names():
    message = (
        "`targets` must match a layer, but 'zzz' matches none of 3 adaptable layers."
        " Their names end in 'head', 'to_k', 'to_q'."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        plan(tree("a.to_q", "a.to_k", "head"), targets="zzz")


def test_a_predicate_that_matches_nothing_is_named():
    def mine(name: str, module: nn.Module) -> bool:
        return False

    message = "`targets` must match a layer, but mine matches none of 1 adaptable layers."
    with pytest.raises(TargetError, match=sentence(message)):
        plan(tree("a"), targets=mine)


@pytest.mark.parametrize("empty", [[], (), set()])
def test_empty_targets_are_an_error(empty):
    message = "`targets` must hold a pattern, but is empty."
    with pytest.raises(ConfigError, match=f"{sentence(message)}Leave it out"):
        plan(tree("to_q"), targets=empty)


@pytest.mark.parametrize("wrong", [3, [None], "", ["to_q", ""], int, linear()], ids=str)
@pytest.mark.parametrize("what", ["targets", "exclude"])
def test_a_pattern_of_no_known_kind_is_an_error(what, wrong):
    rule = (
        f"`{what}` must hold glob strings, compiled regexes, module classes or predicates"
        " (name, module), but holds "
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}"):
        plan(tree("to_q"), **{"targets": "to_q", what: wrong})


def test_naming_a_container_says_how_to_name_what_it_holds():
    message = (
        "`targets` must match an adaptable layer or parameter, but 'down' matches only Tree at"
        " 'down'. It holds 'down.0.attn.to_q', 'down.0.attn.to_out.0', 'down.1.attn.to_q':"
        " write 'down.*'."
    )
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(message)}$"):
        plan(tree(*MODEL), targets="down")


class Mixer(nn.Module):
    """A matrix and a bias of a module that is no kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))


def test_naming_another_kind_of_layer_is_an_error():
    model = tree("to_q", up=Mixer())
    rule = "`targets` must match an adaptable layer or parameter, but "
    kind = "matches only Mixer at 'up'. It holds 'up.weight', 'up.bias': write 'up.weight'."
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(rule)}'up' {re.escape(kind)}$"):
        plan(model, targets=["to_q", "up"])
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(rule)}Mixer "):
        plan(model, targets=Mixer)


def patched() -> nn.Module:
    layer = linear()
    layer.forward = lambda x: x
    return layer


def whole_numbers() -> nn.Module:
    layer = linear().requires_grad_(False)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


RULE = "Every layer that `targets` names must be adaptable, but "


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        (
            lambda: tree(a=nn.LazyLinear(4)),
            "a",
            "'a' (LazyLinear) is lazy and has no shape yet.",
        ),
        (
            lambda: tree(a=patched()),
            "a",
            "'a' (Linear) has a `forward` patched onto the instance (offloading hooks do this),"
            " which would bypass the adapter.",
        ),
        (
            lambda: tree(a=whole_numbers()),
            "a",
            "'a' (Linear) has a weight that is no floating-point tensor.",
        ),
    ],
    ids=["lazy", "patched", "int8"],
)
@pytest.mark.parametrize("verb", [plan, inject])
def test_a_layer_on_which_an_adapter_would_do_nothing_is_refused(
    verb, model, pattern, message, portrait
):
    built = model()
    before = portrait(built)
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(RULE + message)} "):
        verb(built, rank=1, targets=pattern)
    assert portrait(built) == before


def test_an_unsupported_layer_may_be_excluded():
    model = tree("a", b=patched())
    report = plan(model, rank=1, targets="*", exclude="b")
    assert [layer.name for layer in report.layers] == ["a"]
    assert report.left_out == {"b": "excluded by 'b'"}


def test_the_default_passes_over_a_projection_that_cannot_be_adapted_and_says_so():
    report = plan(tree("attn.to_q", attn__to_k=patched()), rank=1)
    assert [layer.name for layer in report.layers] == ["attn.to_q"]
    assert report.left_out["attn.to_k"].startswith("has a `forward` patched onto the instance")


def test_exclude_wins_over_targets_and_says_why():
    report = plan(tree(*MODEL), rank=1, targets="*", exclude=["to_q", re.compile("he.d")])
    assert sorted(layer.name for layer in report.layers) == [
        "down.0.attn.to_out.0",
        "mid.to_q_extra",
    ]
    assert report.left_out == {
        "down.0.attn.to_q": "excluded by 'to_q'",
        "down.1.attn.to_q": "excluded by 'to_q'",
        "head": "excluded by the regex 'he.d'",
    }


def test_excluding_everything_is_an_error():
    message = "`exclude` must leave a layer, but takes away all 2."
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        plan(tree("a.to_q", "b.to_q", "head"), exclude="to_q")


def test_excluding_what_was_not_chosen_is_an_error():
    message = "`exclude` must match a layer, but 'head' matches none of 1 chosen layers."
    with pytest.raises(TargetError, match=sentence(message)):
        plan(tree("a.to_q", "head"), exclude="head")


def test_a_rule_that_matches_nothing_is_an_error():
    message = "`rules` must match a layer, but 'head' matches none of 1 chosen layers."
    with pytest.raises(TargetError, match=sentence(message)):
        plan(tree("a.to_q", "head"), rules={"head": {"rank": 2}})


def test_a_rule_that_sets_something_unknown_is_an_error():
    message = (
        "`rules` must set 'rank', 'alpha', 'dropout', 'dtype', 'rslora', 'dora', 'bias', 'tucker',"
        " 'rank_dropout', 'module_dropout', 'init', 'read', 'reserve_rank', but 'to_q' sets"
        " 'ranks', 'name'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plan(tree("a.to_q"), rules={"to_q": {"ranks": 2, "name": "x"}})


def test_the_last_rule_wins_setting_by_setting():
    model = tree("a.to_q", "a.to_k", "b.to_q")
    rules = {
        "to_*": {"rank": 2, "alpha": 6.0},
        "to_q": {"rank": 3},
        "b.*": {"rank": 1, "dropout": 0.5, "dtype": torch.bfloat16},
    }
    report = inject(model, rank=4, alpha=1.0, targets="*", rules=rules)
    found = {
        layer.name: (layer.rank, layer.alpha, layer.scale, layer.config.dropout)
        for layer in report.layers
    }
    assert found == {
        "a.to_q": (3, 6.0, 2.0, 0.0),
        "a.to_k": (2, 6.0, 3.0, 0.0),
        "b.to_q": (1, 6.0, 6.0, 0.5),
    }
    assert model.b.to_q.lora_A_default.dtype == torch.bfloat16
    assert model.a.to_q.lora_A_default.shape == (3, 4)
    reverse = plan(model, targets="*", rules=dict(reversed(rules.items())), name="other")
    assert [layer.rank for layer in reverse.layers] == [2, 2, 2]


def test_a_rank_too_large_names_the_layer():
    message = "`rank` must be at most min(in_features, out_features) = 2, but is 3 at 'small'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plan(tree("big", small=nn.Linear(4, 2)), rank=3, targets="*")


def test_a_model_must_be_a_module():
    message = "`model` must be an nn.Module, but is dict."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plan({"to_q": linear()})


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    attn = Tree()
    attn.c_attn, attn.c_proj = Conv1D(12, 4), Conv1D(4, 4)
    model = Tree()
    model.attn, model.fc = attn, Conv1D(6, 4)
    return model


def test_a_transposed_layer_is_adapted_by_its_own_sizes():
    model = gpt2()
    report = inject(model, rank=2)
    first = report.layers[0]
    assert (first.name, first.kind, first.in_features, first.out_features) == (
        "attn.c_attn",
        "Conv1D",
        4,
        12,
    )
    assert [layer.name for layer in report.layers] == ["attn.c_attn", "attn.c_proj"]
    assert isinstance(model.attn.c_attn, Conv1D)
    assert type(model.fc) is Conv1D


def test_a_transposed_layers_forward_gradient_and_merge_agree(perturb):
    model = gpt2().double()
    layer = model.attn.c_attn
    x = torch.randn(2, 3, 4).double()
    plain = layer(x)
    inject(model, rank=2, alpha=3.0)
    assert torch.equal(layer(x), plain)
    perturb(model)
    A, B = layer.lora_A_default, layer.lora_B_default
    adapted = layer(x)
    assert_close(adapted, plain + 1.5 * x @ A.T @ B.T)
    assert (adapted - plain).abs().max() > 0.01
    adapted.sum().backward()
    assert A.grad.abs().max() > 0
    before = layer.weight.clone()
    model.eval()
    merge(model)
    assert_close(layer.weight, before + 1.5 * (B @ A).T)
    assert_close(layer(x), adapted)
    unmerge(model)
    assert torch.equal(layer.weight, before)
