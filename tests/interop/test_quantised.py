"""Models that torchao quantised: adapters train beside the codes, which nothing ever writes to."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_core
from lora_core import ConfigError, LoRAError, MergeError
from lora_core._layers import factors_of
from lora_core.testing import check_lora

quantization = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.interop

CONFIGS = {
    "weights": quantization.Int8WeightOnlyConfig,
    "weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
}


class Net(nn.Module):
    """Attention's projections and a head, which stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(32, 32))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)  # (b, n, 32)
        mix = torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, dim=-1)
        return self.head(self.to_out(mix @ v))


Make = Callable[[], nn.Module]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=CONFIGS)
def make(request, dtype) -> Make:
    """Makes the same quantised model each time."""

    def build() -> nn.Module:
        torch.manual_seed(7)
        model = Net().to(dtype).eval()
        quantization.quantize_(
            model,
            CONFIGS[request.param](),
            filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "head",
        )
        return model

    return build


@pytest.fixture
def x(dtype) -> Tensor:
    return torch.randn(2, 5, 32).to(dtype)


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for p in lora_core.parameters(model):
            p.add_(0.2 * torch.randn_like(p))


def codes(model: nn.Module) -> dict[str, Tensor]:
    """The codes and scales of every quantised weight, and the other values of the host."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            continue
        if hasattr(p, "qdata"):
            found |= {f"{name}.qdata": p.qdata.clone(), f"{name}.scale": p.scale.clone()}
        else:
            found[name] = p.detach().clone()
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


def test_the_weights_are_quantised_for_these_tests(make):
    model = make()
    assert sum(name.endswith("qdata") for name in codes(model)) == 4
    assert type(model.head.weight) is nn.Parameter


def test_an_adapter_changes_nothing_then_what_its_factors_say(make, x):
    model = make()
    plain, weight = model(x), model.to_q.weight
    report = lora_core.inject(model, rank=2, alpha=3.0)
    assert [layer.name for layer in report.layers] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert [(layer.in_features, layer.out_features) for layer in report.layers] == [(32, 32)] * 4
    assert model.to_q.weight is weight
    assert torch.equal(model(x), plain)
    perturb(model)
    with lora_core.disabled(model):
        base = model.to_q(x)
    A, B = (p.to(x.dtype) for p in factors_of(model.to_q, "default"))
    tolerance = 1e-5 if x.dtype is torch.float32 else 0.05
    assert_close(model.to_q(x), base + 1.5 * (x @ A.T @ B.T), atol=tolerance, rtol=tolerance)
    assert (model(x) - plain).abs().max() > 1e-2
    assert lora_core.explain(model.to_q, x).form == "composed"
    with lora_core.disabled(model):
        assert torch.equal(model(x), plain)


def test_it_learns_and_the_codes_stay(make, x):
    model = make()
    lora_core.inject(model, rank=4)
    before, goal = codes(model), model(x).detach() + 0.2
    assert all(p.dtype is torch.float32 for p in lora_core.parameters(model))
    optimiser = torch.optim.Adam(lora_core.parameters(model), lr=0.02)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = (model.train()(x).float() - goal.float()).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in lora_core.parameters(model))
    assert same(codes(model), before)


def test_a_file_brings_the_adapter_back_bit_for_bit(make, x, tmp_path: Path):
    model = make()
    lora_core.inject(model, rank=2)
    perturb(model)
    lora_core.save(model, tmp_path / "a.safetensors")
    twin = make()
    lora_core.load(twin, tmp_path / "a.safetensors")
    assert torch.equal(twin(x), model(x))
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    lora_core.eject(again)
    assert torch.equal(again(x), make()(x))


def test_an_adapter_that_learned_beside_codes_is_merged_into_the_model_they_were_made_from(
    make, x, dtype, tmp_path: Path
):
    model = make()
    lora_core.inject(model, rank=2)
    perturb(model)
    lora_core.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(7)
    whole = Net().to(dtype).eval()
    plain = whole(x)
    lora_core.load(whole, tmp_path / "a.safetensors")
    adapted = whole(x)
    assert (adapted - plain).abs().max() > 1e-2
    lora_core.merge(whole)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    assert_close(whole(x), adapted, atol=tolerance, rtol=tolerance)


def test_eject_gives_the_very_model_back(make, x):
    model = make()
    plain, before = model(x), codes(model)
    objects = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    lora_core.inject(model, rank=2)
    perturb(model)
    lora_core.eject(model)
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()} == objects
    assert [type(m) for m in model.modules()] == classes
    assert same(codes(model), before)
    assert torch.equal(model(x), plain)


REFUSED = (
    "A weight must be of plain floating numbers to be merged, but that of 'to_q', 'to_k', 'to_v',"
    " 'to_out.0' is quantised: rounding to its levels would lose the update. Merge into the model"
    " it was made from, or keep this one unmerged."
)


@pytest.mark.parametrize("options", [{}, {"untie": True}, {"reversible": False}], ids=str)
def test_merge_is_refused_and_changes_nothing(make, x, options):
    model = make()
    lora_core.inject(model, rank=2)
    perturb(model)
    before, adapted = codes(model), model(x)
    with pytest.raises(MergeError, match=f"^{re.escape(REFUSED)}$"):
        lora_core.merge(model, **options)
    assert same(codes(model), before)
    assert torch.equal(model(x), adapted)
    assert not lora_core.summary(model).adapters[0].merged


def test_the_laws_hold_up_to_the_merge_and_the_model_is_left_as_it_was(make, x):
    model = make()
    plain, before = model(x), codes(model)
    classes, flags = (
        [type(m) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(MergeError, match=f"^{re.escape(REFUSED)}$"):
        check_lora(model, x, rank=2)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert same(codes(model), before)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("setting", [{"dora": True}, {"init": "pissa"}, {"init": "olora"}], ids=str)
def test_what_needs_the_values_of_a_weight_is_refused(make, setting):
    model = make()
    before = codes(model)
    with pytest.raises(
        ConfigError, match=r"^A setting must fit its layer, but .* needs a weight of"
    ):
        lora_core.inject(model, rank=2, **setting)
    assert same(codes(model), before)
    assert type(model.to_q) is nn.Linear


def test_what_needs_no_values_is_not(make, x):
    for wishes in ({"bias": True}, {"init": "orthogonal"}, {"init": "eva", "samples": [x]}):
        model = make()
        plain = model(x)
        lora_core.inject(model, rank=2, **wishes)
        assert torch.equal(model(x), plain)
        perturb(model)
        assert (model(x) - plain).abs().max() > 1e-2
        report = lora_core.limit_norm(model, max_norm=0.5)
        assert "limited 4 of 4 layers" in str(report)


def test_compiled_as_one_graph_it_computes_and_learns_the_same(make, x):
    torch._dynamo.reset()
    model = make()
    lora_core.inject(model, rank=2)
    perturb(model)
    factors = lora_core.parameters(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tolerance = 1e-4 if x.dtype is torch.float32 else 0.1
    expected = model(x)
    assert_close(compiled(x), expected, atol=tolerance, rtol=tolerance)
    wanted = torch.autograd.grad(expected.float().square().mean(), factors)
    found = torch.autograd.grad(compiled(x).float().square().mean(), factors)
    assert all(bool((g != 0).any()) for g in wanted)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_strengths_of_one_and_of_each_sample_and_two_adapters_add_up(make, x):
    model = make()
    for name in ("a", "b"):
        lora_core.inject(model, rank=2, targets="to_q", name=name)
    perturb(model)
    layer, found = model.to_q, {}
    for strengths in ({"a": 0.0}, {"a": 0.5}, {"b": -1.0}, {"a": 0.5, "b": -1.0}):
        lora_core.scales(model, **strengths)
        found[tuple(strengths.items())] = layer(x).float()
    base, a, b, both = found.values()
    tolerance = 1e-5 if x.dtype is torch.float32 else 0.05
    assert (a - base).abs().max() > 1e-2
    assert_close(both, a + b - base, atol=tolerance, rtol=tolerance)
    lora_core.scales(model, a=[0.5, 0.0])
    assert_close(layer(x).float(), torch.stack([a[0], base[1]]), atol=tolerance, rtol=tolerance)


def test_quantising_an_adapted_model_keeps_the_adapter_or_is_refused(dtype, x):
    torch.manual_seed(7)
    model = Net().to(dtype).eval()
    lora_core.inject(model, rank=2, targets=["to_q", "to_k"])
    perturb(model)
    moved = model(x)
    with lora_core.disabled(model):
        base = model(x)
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: name in ("to_q", "to_k"),
    )
    assert hasattr(model.to_q.weight, "qdata")
    assert (model(x) - moved).abs().max() < 0.5 * (moved - base).abs().max()
    with pytest.raises(LoRAError):
        lora_core.merge(model)
    lora_core.eject(model)
    assert type(model.to_q) is nn.Linear
