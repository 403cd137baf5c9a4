"""An adapter is a change of the weight, whoever reads it."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_core
from lora_core import ConfigError, TargetError, UnsupportedLayerError, inject, plan
from lora_core._injection.code import weights_read


class Causal(nn.Conv1d):
    """Pads its input, as causal convolutions of video and audio models do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


class Standardised(nn.Conv2d):
    """Standardises its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


class Strided(nn.ConvTranspose1d):
    """Drops the end of its output."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[..., :-1]


class Inner(nn.Conv1d):
    """Has torch's forward, and changes what that calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class Scaled(nn.Embedding):
    """Multiplies its rows, as Gemma's embedding does."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Positions(nn.Embedding):
    """Finds its rows by the place of a token, shifted by two, as OPT's positions do."""

    def forward(self, mask: Tensor, past: int = 0) -> Tensor:
        places = mask.cumsum(1) * mask - 1
        return super().forward(places[:, past:] + 2)


class Squared(nn.Linear):
    """Makes something else of its weight than a product."""

    def forward(self, x: Tensor) -> Tensor:  # its own name for the input
        return nn.functional.linear(x, self.weight.square(), self.bias)


class Optional(nn.Linear):
    """Takes an option that weighs its product."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * nn.functional.linear(x, self.weight, self.bias)


class Open(nn.Linear):
    """Takes whatever it is given."""

    def forward(self, *args: Any) -> Tensor:
        return sum(args[1:], 1.0) * nn.functional.linear(args[0], self.weight, self.bias)


class Flagged(nn.Linear):
    """Takes something else before its input."""

    def forward(self, flag: bool, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) if flag else x


class Named(nn.Linear):
    """Takes its input by name alone."""

    def forward(self, *, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input)


class Pair(nn.Linear):
    """Returns its product and its bias, as tensor-parallel layers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


class Joined(nn.Bilinear):
    """Takes both of its inputs side by side."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, : self.in1_features], x[:, self.in1_features :])


class Case:
    """A host, how it is called, and why its weight must read as the sum."""

    def __init__(self, make: Callable[[], nn.Module], why: str, *args: Any, **kwargs: Any) -> None:
        self.make, self.why, self.args, self.kwargs = make, why, args, kwargs

    def __call__(self, model: nn.Sequential) -> Tensor:
        out = model[0](*self.args, **self.kwargs)
        return torch.cat([t.flatten() for t in out]) if isinstance(out, tuple) else out


X = torch.linspace(-1, 1, 18).view(3, 6)
MORE, OTHER = "does more with the weight than torch's", "gives something else than torch's"
UNTRIED = "can't be tried with an input alone"
CASES = {
    "causal": Case(lambda: Causal(4, 6, 3), OTHER, torch.randn(2, 4, 9)),
    "standardised": Case(lambda: Standardised(3, 4, 3), MORE, torch.randn(1, 3, 8, 8)),
    "transposed": Case(lambda: Strided(4, 6, 3), OTHER, torch.randn(2, 4, 9)),
    "inner": Case(lambda: Inner(4, 6, 3), MORE, torch.randn(2, 4, 9)),
    "scaled": Case(lambda: Scaled(20, 8), MORE, torch.arange(5)),
    "positions": Case(
        lambda: Positions(20, 8),
        "takes 'past: int = 0' beside its input",
        torch.ones(2, 7, dtype=torch.long),
        past=1,
    ),
    "squared": Case(lambda: Squared(6, 6), MORE, X),
    "optional": Case(
        lambda: Optional(6, 6), "takes 'scale: float = 2.0' beside its input", X, scale=5.0
    ),
    "open": Case(lambda: Open(6, 6), "takes '*args: Any' beside its input", X, 2.0),
    "flagged": Case(lambda: Flagged(6, 6), "takes 'x: torch.Tensor' beside its input", True, X),
    "named": Case(lambda: Named(6, 6), "takes 'input: torch.Tensor' beside its input", input=X),
    "pair": Case(lambda: Pair(6, 6), OTHER, X),
    "joined": Case(lambda: Joined(2, 4, 5), UNTRIED, X),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def adapted(case: Case, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).eval()
    inject(model, targets="0", rank=2, **settings)
    for p in lora_core.parameters(model):
        p.data.normal_(std=0.3)
    return model


def test_the_plan_says_which_weights_read_as_the_sum_and_why(case: Case) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(case.make())
    report = plan(model, targets="0", rank=2)
    (layer,) = report.layers
    assert layer.config.read
    assert layer.form == "LoRA, read"
    forward = f"the forward of {type(model[0]).__name__}"
    assert layer.why == f"{forward} {case.why}"
    assert f"weights that read as the sum: 1 ({layer.why})" in str(report).splitlines()


def test_the_forward_the_merged_forward_and_the_gradient_are_of_one_weight(case: Case) -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(case.make()).eval()
    expected = case(bare)
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).eval()
    inject(model, targets="0", rank=2)
    assert torch.equal(case(model), expected)  # fresh
    for p in lora_core.parameters(model):
        p.data.normal_(std=0.3)
    for mode in (True, False):
        model.train(mode)
        out = case(model)
        assert (out - expected).abs().max() > 1e-3
        for p in lora_core.parameters(model):
            p.grad = None
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in lora_core.parameters(model))
    before = model[0]._parameters["weight"].clone()
    lora_core.merge(model)
    torch.testing.assert_close(case(model), out)
    lora_core.unmerge(model)
    assert torch.equal(model[0]._parameters["weight"], before)
    assert torch.equal(case(model), out)
    lora_core.merge(model, reversible=False)
    torch.testing.assert_close(case(model), out)


def test_files_and_copies_give_the_same_bits(case: Case, tmp_path: Path) -> None:
    model = adapted(case)
    out = case(model)
    path = tmp_path / "a.safetensors"
    lora_core.save(model, path)
    torch.manual_seed(0)
    other = nn.Sequential(case.make()).eval()
    lora_core.load(other, path)
    assert torch.equal(case(other), out)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(model[0])
        assert torch.equal(case(twin), out)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    assert torch.equal(case(torch.load(whole, weights_only=False)), out)
    host = type(case.make())
    lora_core.eject(model)
    assert type(model[0]) is host


def test_several_adapters_strengths_and_dora_are_of_one_weight(case: Case) -> None:
    model = adapted(case)
    alone = case(model)
    kind = type(model[0]).__mro__[2:]
    dora = not any(issubclass(k, nn.ConvTranspose1d) for k in kind)
    inject(model, targets="0", rank=1, name="other", dora=dora)
    assert torch.equal(case(model), alone) or dora
    torch.testing.assert_close(case(model), alone)
    for p in lora_core.parameters(model, "other"):
        p.data.add_(0.3 * torch.randn_like(p))
    with lora_core.scales(model, default=0.5, other=-0.25):
        out = case(model)
        lora_core.merge(model)
        torch.testing.assert_close(case(model), out)
        lora_core.unmerge(model)
    with lora_core.disabled(model):
        assert model[0].weight is model[0]._parameters["weight"]


class Same(nn.Linear):
    """Computes as torch does, in words of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_update_stands_beside_a_forward_that_computes_as_torchs(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(Same(6, 4), Squared(6, 4))
    first, second = plan(model, targets=["0", "1"], rank=2).layers
    assert (first.config.read, first.why) == (False, "")
    assert second.why == f"the forward of Squared {MORE}"


def test_a_host_is_tried_without_a_trace() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(Counting())
    model[0].register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state = torch.get_rng_state()
    report = plan(model, targets="0")
    assert not report.layers[0].why
    assert model[0].calls == 0
    assert torch.equal(torch.get_rng_state(), state)


class Mixer(nn.Module):
    """Reads the weights of layers in the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 4, 3, groups=4)
        self.list = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.inside = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.through = nn.Linear(4, 4)
        self.asked = nn.Linear(4, 4)
        self.told = nn.Linear(4, 4)
        self.at_start = nn.Linear(4, 4)
        self.called = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        self.at_start.weight.zero_()

    @property
    def turned(self) -> Tensor:
        return self.through.weight.T

    @torch.no_grad()
    def _slow(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, self.conv1d.weight, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self._slow(x.mT).mT.to(self.asked.weight.dtype)
        for i in range(2):
            x = nn.functional.linear(x, self.list[i].weight)
        x = sum([x @ self.inside.deep.weight for _ in range(1)])
        if isinstance(self.told.weight, nn.Parameter):
            x = self.told(x)
        return self.at_start(self.called(self.asked(x @ self.turned)))


def test_code_shows_whose_weights_a_module_reads() -> None:
    assert weights_read(Mixer) == {"conv1d", "list", "deep", "through"}
    report = plan(Mixer(), targets=[nn.Linear, nn.Conv1d], rank=1)
    assert [layer.name for layer in report.layers if layer.config.read] == [
        *("conv1d", "list.0", "list.1", "inside.deep", "through")
    ]
    assert {layer.why for layer in report.layers} == {"Mixer reads it", ""}


def test_every_layer_that_is_read_takes_effect() -> None:
    model, x = Mixer().eval(), torch.randn(2, 9, 4)
    inject(model, targets=[nn.Linear, nn.Conv1d], rank=1)
    for p in lora_core.parameters(model):
        p.data.normal_()
    out = model(x)
    for name in ("conv1d", "list.0", "list.1", "inside.deep", "through", "called"):
        with lora_core.disabled(model.get_submodule(name)):
            assert (model(x) - out).abs().max() > 1e-4, name
    with torch.no_grad():
        lora_core.merge(model)
        torch.testing.assert_close(model(x), out.detach())


def test_a_linear_layer_that_is_read_is_called_as_any_other() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    inject(model, targets="0", rank=2, read=True, dropout=0.5)
    inject(model, targets="0", rank=2, name="other", read=True, dropout=0.25)
    for p in lora_core.parameters(model):
        p.data.normal_()
    assert lora_core.explain(model[0], x).form == "composed"  # they differ in dropout
    assert not torch.equal(model(x), model(x))
    read = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(read, nn.functional.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(model.eval()(x), read)
    with lora_core.scales(model, default=1.0):
        alone = nn.functional.linear(x, model[0].weight, model[0].bias)
        assert lora_core.explain(model[0], x).form != "composed"
        torch.testing.assert_close(model(x), alone)
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager", fullgraph=True)(x), alone
        )


def test_a_layer_named_by_its_weight_reads_as_the_sum() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, targets="0.weight", rank=2)
    assert model[0].lora_is_read
    lora_core.parameters(model)[1].data.normal_()
    own = model[0]._parameters["weight"]
    delta = model[0].lora_B_default @ model[0].lora_A_default
    torch.testing.assert_close(model[0].weight, own + delta)
    assert isinstance(model[0].weight.grad_fn, object)


def test_a_file_remembers_that_a_weight_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, targets="0", rank=2, read=True)
    lora_core.parameters(model)[1].data.normal_()
    lora_core.save(model, path)
    other = nn.Sequential(nn.Linear(4, 4))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    report = lora_core.load(other, path)
    assert report.layers[0].why == "asked for"
    assert torch.equal(other[0].weight, model[0].weight)


READ = "A setting must fit its layer, but {} at '0'"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"dropout": 0.1}, "`dropout`"),
        ({"bias": True}, "`bias`"),
        ({"init": "eva"}, "`init='eva'`"),
    ],
)
def test_settings_that_need_an_output_are_refused(settings: dict[str, Any], what: str) -> None:
    model = nn.Sequential(Squared(4, 4))
    said = READ.format(f"{what} is for layers that are called, and the weight of this one is read")
    why = f" (the forward of Squared {MORE})."
    with pytest.raises(ConfigError, match=f"^{re.escape(said + why)}$"):
        inject(model, targets="0", **settings)
    assert type(model[0]) is Squared


def test_the_first_adapter_says_whether_a_weight_is_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, targets="0")
    said = READ.format(
        "`read=True` is for a layer's first adapter, and the first one here is not read"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}.$"):
        inject(model, targets="0", name="b", read=True)
    with pytest.raises(ConfigError, match="^`read` must be False for a layer that is made anew, b"):
        lora_core.LoRALinear(nn.Linear(4, 4), read=True)


def test_a_weight_that_is_computed_is_not_read() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    said = READ.format("`read=True` needs a weight that is a Parameter, and this one is computed")
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}.$"):
        inject(model, targets="0", read=True)


def test_a_call_reads_one_sum_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = adapted(CASES["standardised"]), []
    merged = lora_core.functional.merged_weight
    monkeypatch.setattr(
        lora_core.functional, "merged_weight", lambda *a: made.append(1) or merged(*a)
    )
    CASES["standardised"](model)
    assert made == [1]
    assert model[0].weight is not model[0].weight  # read apart from a call


def test_no_weight_answers_to_a_name_that_is_no_layers() -> None:
    with pytest.raises(
        TargetError, match="^`targets` must match a layer, but 'convd.weight' match"
    ):
        plan(Mixer(), targets="convd.weight")


class Tied(nn.Module):
    """Has a table under a second name, which no forward calls, as T5 has."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(9, 4)
        self.inner = nn.ModuleDict({"table": nn.Embedding(9, 4)})
        self.inner["table"].weight = self.shared.weight

    def first(self) -> nn.Module:
        return self.shared

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner["table"](ids)


class Reached(Tied):
    """Calls the second name by way of a method."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner["table"](ids) + self.first()(ids)


def test_a_second_name_that_is_never_called_is_refused_with_the_one_that_is() -> None:
    model = Tied()
    said = (
        "Every layer that `targets` names must be adaptable, but 'shared' (Embedding) is never"
        " called, and only lends its weight to 'inner.table'. Name that one instead, or exclude"
        " this one."
    )
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}$"):
        inject(model, targets="shared", rank=1)
    assert not lora_core.summary(model).adapters
    assert [layer.name for layer in plan(model, targets="table", rank=1).layers] == ["inner.table"]
    assert len(plan(Reached(), targets=nn.Embedding, rank=1).layers) == 2


class Noised(nn.Linear):
    """Does more with its weight, in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2 if self.training else self.weight
        return nn.functional.linear(x, weight, self.bias)


class Writing(nn.Linear):
    """Writes to what it computes with, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.seen: list[int] = []
        self.mean = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        self.mean += x.mean(0)
        self.norm(x)
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_trial_is_made_in_training_too_and_leaves_no_trace() -> None:
    model = nn.Sequential(Noised(4, 4), Writing())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    first, second = plan(model, targets=["0", "1"]).layers
    assert first.why == f"the forward of Noised {MORE} in training"
    assert second.config.read
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model[1].seen == []
    assert not model[1].mean.any()
    assert all(m.training for m in model.modules())


def test_a_forward_of_its_own_over_a_computed_weight_is_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(Squared(4, 4))
    said = (
        "has a forward of its own and a weight that is computed, so that nothing shows where an"
        " update belongs. Take the parametrization off, adapt, and put it back."
    )
    with pytest.raises(UnsupportedLayerError, match=re.escape(said)):
        inject(nn.Sequential(layer), targets="0")


class Slightly(nn.Linear):
    """Multiplies its output by a little less than one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_small_difference_is_seen_in_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(Slightly(6, 6), Same(6, 6)).to(dtype)
    first, second = plan(model, targets=["0", "1"], rank=2).layers
    assert first.why == f"the forward of Slightly {MORE}"
    assert not second.config.read
    assert {p.dtype for p in model.parameters()} == {dtype}
