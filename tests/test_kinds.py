"""Every kind of layer under the laws that hold of all of them, with each setting it can have."""

import copy
import dataclasses
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_core
from lora_core import functional
from lora_core._errors import ConfigError, MergeError, UnsupportedLayerError
from lora_core._layers import delta_of, factors_of
from lora_core.testing import check_lora


class Experts(nn.Module):
    """Several matrices as one raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.w)


class Own(nn.Linear):
    """A subclass with its own forward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return nn.functional.linear(input, self.weight, self.bias)


Zoo = tuple[Callable[[], nn.Module], dict[str, Any], Callable[[], tuple[Tensor, ...]]]


def images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


ZOO: dict[str, Zoo] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5)), {"targets": "0"}, images(3, 6)),
    "own": (lambda: nn.Sequential(Own(6, 5)), {"targets": "0"}, images(3, 6)),
    "root": (lambda: nn.Linear(6, 5), {"targets": nn.Linear}, images(3, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3)), {"targets": "0"}, images(2, 4, 9)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2)),
        {"targets": "0"},
        images(2, 4, 7, 7),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3)), {"targets": "0"}, images(2, 4, 4, 5, 6)),
    "conv_transpose1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)),
        {"targets": "0"},
        images(2, 4, 9),
    ),
    "conv_transpose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=1, dilation=2, groups=2)),
        {"targets": "0"},
        images(2, 4, 7, 7),
    ),
    "conv_transpose3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(4, 6, 2)),
        {"targets": "0"},
        images(2, 4, 3, 4, 5),
    ),
    "bilinear": (
        lambda: nn.Bilinear(5, 4, 6),
        {"targets": nn.Bilinear},
        lambda: (torch.randn(3, 2, 5), torch.randn(3, 2, 4)),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(20, 6, padding_idx=0)),
        {"targets": "0"},
        lambda: (torch.tensor([[1, 2, 0], [3, 4, 5]]),),
    ),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {}, lambda: (torch.randn(3, 2, 8),) * 3),
    "attention, unpacked": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
        {},
        lambda: (torch.randn(3, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4)),
    ),
    "attention, whole": (
        lambda: nn.MultiheadAttention(8, 2),
        {"targets": "in_proj_weight"},
        lambda: (torch.randn(3, 2, 8),) * 3,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        {},
        images(2, 3, 8),
    ),
    "gru": (lambda: nn.Sequential(nn.GRU(5, 6)), {"targets": nn.GRU}, images(4, 2, 5)),
    "experts": (Experts, {"targets": "w"}, images(2, 5)),
}
CALLED = ("linear", "own", "root", "conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
EXTRA: list[tuple[str, dict[str, Any]]] = [
    *((kind, extra) for kind in ZOO for extra in ({}, {"init": "pissa"}, {"reserve_rank": 3})),
    *((kind, {"dora": True}) for kind in (*CALLED, "bilinear", "embedding")),
    *((kind, {"dora": True, "bias": True}) for kind in (*CALLED, "bilinear")),
    *((kind, {"bias": True}) for kind in (*CALLED, "bilinear", *TRANSPOSED)),
    *((kind, {"tucker": True}) for kind in CALLED if kind.startswith("conv")),
    *(
        (kind, {"init": "olora"})
        for kind in ("linear", "conv2d", "bilinear", "embedding", "gru", *TRANSPOSED)
    ),
]
cases = pytest.mark.parametrize(
    ("kind", "extra"), EXTRA, ids=[f"{k}-{'-'.join(map(str, e)) or 'plain'}" for k, e in EXTRA]
)


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def built(kind: str) -> tuple[nn.Module, dict[str, Any], tuple[Tensor, ...]]:
    torch.default_generator.manual_seed(0)
    make, options, inputs = ZOO[kind]
    return make().eval(), {"rank": 2, **options}, inputs()


def trained(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            key = name.rpartition(".")[2]
            if key.startswith(("lora_B_", "lora_mid", "lora_mag", "lora_bias")):
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)


@cases
def test_it_takes_effect_in_training_and_evaluation_with_gradients_and_without(kind, extra):
    model, options, inputs = built(kind)
    plain = first(model(*inputs))
    lora_core.inject(model, **options, **extra)
    assert torch.equal(first(model(*inputs)), plain)
    trained(model)
    moved = first(model(*inputs))
    assert (moved - plain).abs().max() > 1e-3
    for training, gradients in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(gradients):
            assert_close(first(model.train(training)(*inputs)), moved)


@cases
def test_merging_keeps_the_function_and_unmerging_every_bit(kind, extra):
    model, options, inputs = built(kind)
    lora_core.inject(model, **options, **extra)
    trained(model)
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        adapted = first(model(*inputs))
        lora_core.merge(model)
        assert_close(first(model(*inputs)), adapted)
        with lora_core.disabled(model):
            assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
        assert_close(first(model(*inputs)), adapted)
        lora_core.unmerge(model)
        assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
        lora_core.merge(model, reversible=False)
        lora_core.eject(model)
        assert_close(first(model(*inputs)), adapted)


@cases
def test_a_file_and_a_copy_give_the_same_bits(kind, extra, tmp_path: Path):
    model, options, inputs = built(kind)
    bare = copy.deepcopy(model)
    lora_core.inject(model, **options, **extra)
    trained(model)
    lora_core.save(model, tmp_path / "a.safetensors")
    narrow = copy.deepcopy(bare)
    lora_core.load(bare, tmp_path / "a.safetensors", reserve_rank=extra.get("reserve_rank"))
    again = pickle.loads(pickle.dumps(model))
    for twin in (bare.eval(), copy.deepcopy(model), again):
        assert torch.equal(first(twin(*inputs)), first(model(*inputs)))
    # without the room the ranks are fewer: a sum of two numbers is no sum of two and a zero, and
    # torch may round it otherwise
    lora_core.load(narrow, tmp_path / "a.safetensors")
    assert_close(first(narrow.eval()(*inputs)), first(model(*inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [5, 13])
def test_a_file_gives_a_single_row_the_same_bits(size, dtype, tmp_path: Path):
    # of factors that don't begin at a multiple of 16 bytes torch rounds such a product otherwise
    for rank in range(1, 5):
        host, x = nn.Linear(size, 7, dtype=dtype), torch.randn(1, size, dtype=dtype)
        bare, model = nn.Sequential(host), nn.Sequential(copy.deepcopy(host))
        lora_core.inject(model, rank=rank, targets="0", bias=True, dtype=dtype)
        trained(model)
        lora_core.save(model, tmp_path / "a.safetensors")
        lora_core.load(bare, tmp_path / "a.safetensors")
        assert torch.equal(bare.eval()(x), model.eval()(x))


@cases
def test_eject_leaves_what_was_there(kind, extra, portrait):
    model, options, inputs = built(kind)
    before, plain = portrait(model), first(model(*inputs))
    lora_core.inject(model, **options, **extra)
    trained(model)
    assert set(copy.deepcopy(model).state_dict()) > set(ZOO[kind][0]().state_dict())
    lora_core.eject(model)
    assert portrait(model) == before
    assert torch.equal(first(model(*inputs)), plain)


@pytest.mark.parametrize("kind", [k for k in ZOO if k != "encoder layer"])
def test_the_laws_hold_of_every_kind(kind):
    model, options, inputs = built(kind)
    check_lora(model, *inputs, **options)


@pytest.mark.parametrize("kind", ZOO)
def test_two_adapters_are_the_sum_of_their_updates(kind):
    model, options, _ = built(kind)
    for name in ("a", "b"):
        lora_core.inject(model, **options, name=name)
    trained(model)
    layer = next(m for m in model.modules() if hasattr(m, "lora_state"))
    deltas = []
    for strengths in ({"a": 0.5}, {"b": -2.0}, {"a": 0.5, "b": -2.0}):
        lora_core.scales(model, **strengths)
        deltas.append(delta_of(layer).detach())
    assert_close(deltas[0] + deltas[1], deltas[2])


@pytest.mark.parametrize("kind", ["linear", "own", "conv1d", "conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize("doubled", [False, True])
def test_each_sample_has_a_mix_of_its_own(kind, doubled):
    model, options, (x,) = built(kind)
    x = x[:2]
    for name in ("a", "b"):
        lora_core.inject(model, **options, name=name)
    trained(model)
    rows = []
    for i, strengths in enumerate(({"a": 1.0, "b": 0.0}, {"a": -0.5, "b": 2.0})):
        lora_core.scales(model, **strengths)
        rows.append(model(x[i : i + 1]))
    expected = torch.cat(rows)
    lora_core.scales(model, a=torch.tensor([1.0, -0.5]), b=[0.0, 2.0], guidance=doubled)
    many = torch.cat([x, x]) if doubled else x
    assert_close(model(many), torch.cat([expected, expected]) if doubled else expected)
    lora_core.scales(model, ["a", {"a": -0.5, "b": 2.0}])
    assert_close(model(x), expected)
    gradients = torch.autograd.grad(model(x).square().sum(), lora_core.parameters(model, "b"))
    assert all(bool((g.to_dense() != 0).any()) for g in gradients)


def in_order(rows: Tensor, guidance: bool, repeats: int) -> Tensor:
    """What programs make of a batch: each of it several times in a row, and all of that twice."""
    return torch.cat([rows.repeat_interleave(repeats, 0)] * (1 + guidance))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize(("guidance", "repeats"), [(False, 2), (False, 3), (True, 1), (True, 3)])
def test_samples_that_a_program_repeats_keep_their_mix(kind, guidance, repeats):
    model, options, (x,) = built(kind)
    x = x[:2]
    lora_core.inject(model, **options, name="a")
    trained(model)
    rows = []
    for i, strength in enumerate((1.0, -0.5)):
        lora_core.scales(model, a=strength)
        rows.append(model(x[i : i + 1]))
    expected = torch.cat(rows)
    receipt = lora_core.scales(model, a=[1.0, -0.5], guidance=guidance, repeats=repeats)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)).double().float()):
        for g, r in ((False, 1), (guidance, 1), (False, repeats), (guidance, repeats)):
            assert_close(copied(in_order(x, g, r)), in_order(expected, g, r))
    said = "guidance=True" * guidance, f"repeats={repeats}" * (repeats > 1)
    assert repr(receipt) == f"scales({', '.join(['a=(1, -0.5)', *filter(None, said)])})"


def test_an_order_of_samples_is_never_guessed():
    model, options, (x,) = built("linear")
    lora_core.inject(model, **options, name="a")
    x = torch.cat([x[:2], x[:2]])
    lora_core.scales(model, ["a", None])
    said = (
        f"Strengths per sample must fit the batch, but `scales` gave 2 and the input of a Linear"
        f" has shape {tuple(x.shape)}. Give as many strengths as samples; where a batch holds them"
        " twice for guidance, or each several times in a row, say so: scales(..., guidance=True,"
        " repeats=n)."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        model(x)
    lora_core.scales(model, ["a", None], guidance=True, repeats=2)
    said = "A batch must have one order, but with `guidance` and `repeats=2` the input of a Linear"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        model(x)
    assert model(torch.cat([x, x])).shape[0] == 8


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"a": 1.0, "repeats": 2}, "`guidance` and `repeats` must go with a strength for each"),
        ({"a": 1.0, "guidance": True}, "`guidance` and `repeats` must go with a strength for each"),
        ({"a": [1.0], "repeats": 0}, "`repeats` must be a whole number of at least 1, but is 0."),
        ({"a": [1.0], "repeats": True}, "`repeats` must be a whole number of at least 1, but is T"),
        ({"a": [1.0], "guidance": 2}, "`guidance` must be True or False, but is 2"),
    ],
)
def test_an_order_that_says_nothing_is_refused(asked, message):
    model, options, _ = built("linear")
    lora_core.inject(model, **options, name="a")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        lora_core.scales(model, **asked)
    for name in ("guidance", "repeats"):
        with pytest.raises(ConfigError, match=r"^`name` must be none of 'guidance', 'repeats', wh"):
            lora_core.inject(model, **options, name=name)


def test_another_order_is_another_choice():
    model, options, (x,) = built("linear")
    lora_core.inject(model, **options, name="a")
    trained(model)
    with lora_core.scales(model, a=[1.0, 0.0], repeats=2):
        first = model(in_order(x[:2], False, 2))
        with lora_core.scales(model, a=[1.0, 0.0], guidance=True):
            assert not torch.equal(model(in_order(x[:2], True, 1)), first)
        assert torch.equal(model(in_order(x[:2], False, 2)), first)


def test_strengths_per_sample_must_fit_the_call_and_the_adapter():
    model, options, (x,) = built("linear")
    lora_core.inject(model, **options, name="a")
    lora_core.scales(model, a=[1.0, 2.0])
    with pytest.raises(
        ConfigError, match=r"^Strengths per sample must fit the batch, but `scales`"
    ):
        model(x)
    with pytest.raises(MergeError, match=r"^A weight must be merged at one strength, but '0' has"):
        lora_core.merge(model)
    attention, options, _ = built("attention")
    lora_core.inject(attention, **options, name="a")
    with pytest.raises(UnsupportedLayerError, match=r"^A strength per sample must go to layers"):
        lora_core.scales(attention, a=[1.0, 2.0])


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_a_dora_adapter_at_strength_zero_is_the_base(kind):
    model, options, (x,) = built(kind)
    plain = model(x)
    lora_core.inject(model, **options, dora=True)
    trained(model)
    lora_core.scales(model, default=0.0)
    assert torch.equal(model(x), plain)


def test_dropout_of_ranks_and_of_whole_updates_is_for_training():
    model, options, (x,) = built("linear")
    lora_core.inject(model, **options, rank_dropout=0.5, module_dropout=0.5)
    trained(model)
    plain = model(x)
    assert torch.equal(model(x), plain)
    model.train()
    seen = {tuple(model(x).flatten().tolist()) for _ in range(40)}
    with lora_core.disabled(model):
        base = tuple(model(x).flatten().tolist())
    assert base in seen
    assert len(seen) > 5


def test_sample_inputs_decide_the_first_factors():
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(3, 4, 3, padding=1, dilation=1, stride=2))
    batch = torch.randn(5, 3, 6) * torch.tensor([9.0, 1, 1, 1, 1, 1])
    report = lora_core.inject(model, rank=1, targets="*", init="eva", samples=[batch])
    direction = model[0].lora_A_default.detach()[0].abs()
    assert direction.argmax() == 0
    assert direction[0] > 0.95
    seen = nn.functional.pad(model[0](batch), (1, 1)).unfold(2, 3, 2)  # (5, 3, 3, kernel)
    rows = seen.movedim(1, 2).reshape(-1, 9).detach()
    top = torch.linalg.eigh((rows.T @ rows).double()).eigenvectors[:, -1].float()
    assert_close(model[1].lora_A_default.detach().flatten().abs(), top.abs(), atol=1e-4, rtol=1e-4)
    assert "first factors from sample inputs on 2 layers" in str(report)
    said = r'^`init="eva"` must have `samples`, a list of model inputs, but has NoneType\.'
    with pytest.raises(ConfigError, match=said):
        lora_core.inject(model, name="b", rank=1, targets="0", init="eva")


def test_a_plain_file_of_twice_the_rank_holds_what_is_subtracted(tmp_path: Path):
    model, options, (x,) = built("linear")
    bare = copy.deepcopy(model)
    lora_core.inject(model, **options, init="pissa", alpha=3.0)
    trained(model)
    lora_core.save(model, tmp_path / "p.safetensors", plain=True)
    report = lora_core.load(bare, tmp_path / "p.safetensors")
    assert report.layers[0].rank == 4
    assert_close(bare(x), model(x))


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("embedding", {"dropout": 0.1}, "`dropout` drops numbers of an input, and this one is of"),
        ("experts", {"dora": True}, "`dora` is for layers that are called, and this parameter is"),
        ("linear", {"tucker": True}, "`tucker` needs a convolution at '0'."),
    ],
)
def test_a_setting_that_a_layer_cannot_have_is_refused(kind, setting, said):
    model, options, _ = built(kind)
    with pytest.raises(ConfigError, match=f"^A setting must fit its layer, but {said}"):
        lora_core.inject(model, **options, **setting)


def test_an_embedding_that_rewrites_its_weight_is_refused():
    model = nn.Sequential(nn.Embedding(20, 6, max_norm=1.0))
    with pytest.raises(UnsupportedLayerError, match=r"has a `max_norm`, which rewrites rows"):
        lora_core.inject(model, rank=2, targets="0")


def test_a_raw_parameter_is_found_by_its_own_name_alone():
    model = nn.ModuleDict({"experts": Experts(), "proj": nn.Linear(5, 5)})
    assert [c.name for c in lora_core.plan(model, rank=1, targets="*").layers] == ["proj"]
    report = lora_core.plan(model, rank=1, targets="experts.w")
    assert [c.name for c in report.layers] == ["experts.w"]
    assert report.parameters == 3 * (6 + 5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_a_merged_convolution_is_the_adapted_one(mode, groups, stride, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, (3, 1), stride, (2, 0), dilation, groups, padding_mode=mode).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    lora_core.inject(conv, rank=2, targets=nn.Conv2d)
    trained(conv)
    adapted = conv(x)
    lora_core.merge(conv)
    conv.eval()
    assert_close(conv(x), adapted)


def test_a_layer_is_made_from_a_plain_host_of_its_kind():
    made = [
        lora_core.LoRAConv1d(nn.Conv1d(4, 8, 3), rank=2, dora=True),
        lora_core.LoRAConv3d(nn.Conv3d(4, 8, 3), rank=2, tucker=True),
        lora_core.LoRAEmbedding(nn.Embedding(9, 4), rank=2, name="style"),
    ]
    assert made[0].lora_magnitude_default.shape == (8,)
    assert made[1].lora_mid_default.shape == (2, 2, 3, 3, 3)
    assert made[2].lora_A_style.shape == (2, 9)
    assert functional.delta_norm(*factors_of(made[2], "style")) == 0


def test_a_packed_weight_is_adapted_whole_or_by_its_parts():
    said = (
        r"^A parameter must be adapted as a whole or by its parts, but 'in_proj_weight' and"
        r" 'q_proj_weight' are both\. Choose one of them\.$"
    )
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(UnsupportedLayerError, match=said):
        lora_core.inject(model, rank=2, targets=["in_proj_weight", "q_proj_weight"])
    lora_core.inject(model, rank=2, targets="q_proj_weight")
    with pytest.raises(UnsupportedLayerError, match=said):
        lora_core.inject(model, rank=2, targets="in_proj_weight", name="b")


def cast(kind: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any], tuple[Tensor, ...]]:
    model, options, inputs = built(kind)
    return (
        model.to(dtype),
        options,
        tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs),
    )


# how far a merged model's output may be from the adapted one's, relative to the largest number
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@cases
@dtypes
@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_adapter_changes_no_bit_in_any_dtype_or_mode(kind, extra, dtype, training):
    model, options, inputs = cast(kind, dtype)
    model.train(training)
    plain = first(model(*inputs))
    lora_core.inject(model, **options, **extra)
    assert torch.equal(first(model(*inputs)), plain)


@cases
@dtypes
def test_merged_weights_are_rounded_once_and_come_back_in_any_dtype(kind, extra, dtype):
    model, options, inputs = cast(kind, dtype)
    lora_core.inject(model, **options, **extra)
    trained(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = first(model(*inputs)).double()
    layers = [m for m in model.modules() if hasattr(m, "lora_state")]
    sums = [(m.weight.double() + delta_of(m).double()).to(dtype) for m in layers]
    lora_core.merge(model)
    eps = torch.finfo(dtype).eps
    for layer, exact in zip(layers, sums, strict=True):
        off = (layer.weight.double() - exact.double()).abs()
        if dtype in (torch.float16, torch.bfloat16):
            assert (off > 0).double().mean() <= 0.01
        assert off.max() <= 4 * eps * exact.double().abs().max()
    error = (first(model(*inputs)).double() - adapted).abs().max()
    assert error <= DTYPES[dtype] * adapted.abs().max()
    lora_core.unmerge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["conv2d", "embedding", "attention", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_adapters_merged_in_turn_and_far_larger_than_the_weight_leave_no_trace(kind, dtype):
    model, options, _ = cast(kind, dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for cycle in range(20):
        lora_core.inject(model, **options, name=f"a{cycle % 3}")
        with torch.no_grad():
            for p in lora_core.parameters(model):
                p.copy_(3 * torch.randn_like(p))
        lora_core.merge(model)
        lora_core.unmerge(model)
        lora_core.eject(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", [k for k in ZOO if k not in ("root", "encoder layer")])
def test_the_gradients_of_every_kind_are_the_numerical_ones(kind):
    model, options, inputs = cast(kind, torch.float64)
    if kind == "embedding":  # the entry at `padding_idx` is looked up, but learns nothing
        inputs = (inputs[0].clamp_min(1),)
    lora_core.inject(model, **options)
    trained(model)
    parameters = dict(model.named_parameters())
    names = [n for n in parameters if n.rpartition(".")[2].startswith("lora_")]
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]

    def call(*values: Tensor) -> Tensor:
        given = values[len(names) :] or inputs
        own = dict(zip(names, values, strict=False))
        return first(torch.func.functional_call(model, own, given))

    factors = [parameters[n].detach().requires_grad_() for n in names]
    assert len(factors) >= 2
    assert torch.autograd.gradcheck(call, (*factors, *leaves), fast_mode=True)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_factors_of_another_dtype_come_back_from_a_file_in_it(kind, stored, tmp_path: Path):
    model, options, inputs = built(kind)
    bare = copy.deepcopy(model)
    lora_core.inject(model, **options, dtype=stored)
    trained(model)
    lora_core.save(model, tmp_path / "a")
    lora_core.load(bare, tmp_path / "a")
    factors = lora_core.parameters(model)
    for mine, theirs in zip(factors, lora_core.parameters(bare), strict=True):
        assert mine.dtype is theirs.dtype is stored
        assert torch.equal(mine, theirs)
    assert torch.equal(first(bare(*inputs)), first(model(*inputs)))


@pytest.mark.parametrize("kind", [*TRANSPOSED, "bilinear"])
def test_the_algebra_and_checkpoint_files_know_a_kind_of_its_own_layout(kind, tmp_path):
    model, options, inputs = built(kind)
    bare = copy.deepcopy(model)
    lora_core.inject(model, **options)
    trained(model)
    expected = first(model(*inputs))
    lora_core.save(model, tmp_path / "a.safetensors")
    adapter = lora_core.read(tmp_path / "a.safetensors")
    twice = lora_core.combine([adapter, adapter], [0.5, 0.5])
    for found in (twice, lora_core.resize(adapter, rank=2)):
        other = copy.deepcopy(bare)
        lora_core.load(other, found)
        assert_close(first(other(*inputs)), expected, rtol=1e-4, atol=1e-4)
    whole = nn.ModuleDict({"layer": bare}) if kind == "bilinear" else bare
    moved = lora_core.adapter_of(
        nn.ModuleDict({"layer": model}) if kind == "bilinear" else model, "default"
    )
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "base.safetensors")
    lora_core.merge_file(tmp_path / "base.safetensors", moved, tmp_path / "merged.safetensors")
    merged = copy.deepcopy(whole)
    merged.load_state_dict(safetensors.torch.load_file(tmp_path / "merged.safetensors"))
    out = merged["layer"](*inputs) if kind == "bilinear" else merged(*inputs)
    assert_close(first(out), expected, rtol=1e-4, atol=1e-4)
    again = lora_core.extract(whole, merged, rank=2)
    assert {layer.kind for layer in again.layers.values()} == {kind.rstrip("123d")}
    lora_core.load(whole, dataclasses.replace(again, notes=()))
    out = whole["layer"](*inputs) if kind == "bilinear" else whole(*inputs)
    assert_close(first(out), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [*TRANSPOSED, "bilinear"])
def test_a_kind_of_our_own_layout_is_refused_by_other_formats(kind, tmp_path):
    model, options, _ = built(kind)
    lora_core.inject(model, **options)
    words = "a bilinear layer" if kind == "bilinear" else "a transposed convolution"
    with pytest.raises(ConfigError, match=f"{words}"):
        lora_core.save({"unet": model}, tmp_path / "a", format="peft")


@pytest.mark.parametrize("dora", [False, True])
def test_two_inputs_may_be_given_by_name_in_any_order(dora):
    model, options, (x, z) = built("bilinear")
    lora_core.inject(model, **options, dora=dora)
    trained(model)
    expected = model(x, z)
    for out in (
        model(x, input2=z),
        model(input1=x, input2=z),
        model(input2=z, input1=x),
    ):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_a_transposed_convolution_may_be_told_the_size_of_its_output(kind):
    model, options, (x,) = built(kind)
    layer = model[0]
    size = [n + 1 for n in layer(x).shape[2:]] if max(layer.stride) > 1 else layer(x).shape[2:]
    size = list(layer(x).shape[2:]) if layer.output_padding[0] else list(size)
    lora_core.inject(model, **options)
    trained(model)
    expected = layer(x, output_size=size)
    assert torch.equal(layer(x, size), expected)
    lora_core.merge(model)
    assert_close(layer(x, output_size=size), expected, rtol=1e-4, atol=1e-4)
