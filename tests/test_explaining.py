"""What `explain` says of a call is what the layer does, and it refuses what the layer would."""

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import lora_core
from lora_core import ConfigError, LoRALinear, UnsupportedLayerError, explain, functional
from lora_core._layers import LoRAMixin, factors_of


class Own(nn.Linear):
    """A subclass with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def taken(monkeypatch) -> Callable[[nn.Module, Tensor], tuple[str, Tensor]]:
    """Calls a layer and says by what its update came in, by the functions that were entered."""
    seen: list[str] = []

    def watch(where: Any, name: str, form: str) -> None:
        found = getattr(where, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(form)
            return found(*args, **kwargs)

        monkeypatch.setattr(where, name, noted)

    watch(sys.modules["lora_core.kernels.linear"], "low_rank", "addmm")
    watch(sys.modules["lora_core.kernels.linear"], "merged", "merge")
    watch(sys.modules["lora_core.functional.linear"], "lora_linear", "composed")
    for name in ("lora_update", "conv_update", "embedding_update", "merged_weight"):
        watch(functional, name, "composed")

    def call(layer: nn.Module, x: Tensor) -> tuple[str, Tensor]:
        seen.clear()
        out = layer(x)
        assert len(set(seen)) <= 1, seen
        return (seen or ["frozen"])[0], out

    return call


class Raw(nn.Module):
    """A module with a parameter that is read, and no kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 4))


def adapted(host: nn.Module, *, trained: bool = True, **settings: Any) -> Any:
    """The layer itself, adapted where it is the whole of a model."""
    targets = settings.pop("targets", [type(host)])
    lora_core.inject(host, rank=2, targets=targets, **settings)
    layer = next(m for m in host.modules() if isinstance(m, LoRAMixin))
    if trained:
        with torch.no_grad():
            for p in lora_core.parameters(host):
                p.add_(0.3 * torch.randn_like(p))
    return layer.eval()


def wide() -> nn.Module:
    return nn.Linear(200, 160)


normal = torch.randn
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], str]] = {
    "few tokens": (lambda: adapted(wide()), lambda: normal(7, 200), "addmm"),
    "many tokens": (lambda: adapted(wide()), lambda: normal(4000, 200), "merge"),
    "small matrix": (lambda: adapted(nn.Linear(8, 6)), lambda: normal(7, 8), "merge"),
    "no tokens": (lambda: adapted(wide()), lambda: normal(0, 200), "addmm"),
    "one token": (lambda: adapted(wide()), lambda: normal(200), "addmm"),
    "dora": (lambda: adapted(wide(), dora=True), lambda: normal(7, 200), "composed"),
    "bias": (lambda: adapted(wide(), bias=True), lambda: normal(7, 200), "composed"),
    "pissa": (lambda: adapted(wide(), init="pissa"), lambda: normal(7, 200), "addmm"),
    "reserve": (lambda: adapted(wide(), reserve_rank=6), lambda: normal(7, 200), "addmm"),
    "gpt2": (lambda: adapted(conv1d()), lambda: normal(7, 8), "composed"),
    "own forward": (lambda: adapted(Own(8, 6)), lambda: normal(7, 8), "composed"),
    "conv": (lambda: adapted(nn.Conv2d(4, 6, 3)), lambda: normal(2, 4, 7, 7), "composed"),
    "conv, one": (lambda: adapted(nn.Conv2d(4, 6, 3)), lambda: normal(4, 7, 7), "composed"),
    "tucker": (
        lambda: adapted(nn.Conv1d(4, 6, 3), tucker=True),
        lambda: normal(2, 4, 7),
        "composed",
    ),
    "conv dora": (
        lambda: adapted(nn.Conv1d(4, 6, 3), dora=True, bias=True),
        lambda: normal(2, 4, 7),
        "composed",
    ),
    "embedding": (
        lambda: adapted(nn.Embedding(9, 4)),
        lambda: torch.randint(9, (2, 5)),
        "composed",
    ),
    "embedding, int32": (
        lambda: adapted(nn.Embedding(9, 4), dora=True),
        lambda: torch.randint(9, (5,), dtype=torch.int32),
        "composed",
    ),
    "a packed weight's rows": (
        lambda: adapted(nn.MultiheadAttention(8, 2), targets="k_proj_weight"),
        lambda: normal(24, 8),
        "composed",
    ),
    "a raw parameter": (
        lambda: adapted(Raw(), targets="weight"),
        lambda: normal(5, 3, 4),
        "composed",
    ),
}


def conv1d() -> nn.Module:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight = 6, nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    return Conv1D()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_form_is_the_one_that_the_call_takes(kind, gradients, taken):
    build, sample, form = KINDS[kind]
    layer, x = build(), sample()
    with nullcontext() if gradients else torch.no_grad():
        plan = explain(layer, x)
        assert plan.form == form
        how, out = taken(layer, x)
        assert how == form
        lora_core.scales(layer, default=0.0)
        base = layer(x)
    assert out.numel() == 0 or (out - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_is_what_adds_nothing(kind, taken):
    build, sample, _ = KINDS[kind]
    layer, x = build(), sample()
    assert explain(layer, x).form != "frozen"
    adapted_out = layer(x)
    with lora_core.disabled(layer):
        assert str(explain(layer, x)) == "frozen: no adapter is active"
        how, base = taken(layer, x)
        assert how == "frozen"
    if kind == "own forward":
        return
    if isinstance(layer, LoRAMixin) and layer.lora_kind.is_read:
        x = layer.lora_kind.home(layer)[0]._parameters[layer.lora_parameter]
    lora_core.merge(layer)
    assert str(explain(layer, x)) == "frozen: the adapters are merged into the weight"
    how, merged = taken(layer, x)
    assert how == "frozen"
    if not layer.lora_kind.is_read:
        assert_close(merged, adapted_out, atol=1e-4, rtol=1e-4)
        with lora_core.disabled(layer):
            assert "`disabled` shows the base" in str(explain(layer, x))
            assert torch.equal(taken(layer, x)[1], base)


STRENGTHS: dict[str, float | list[float]] = {
    "one": 0.5,
    "none": 0.0,
    "each": [0.5, 0.0, -2.0],
    "each, doubled": [0.5, 0.0, -2.0],
}


@pytest.mark.parametrize("strength", STRENGTHS)
def test_strengths_per_sample_take_the_low_rank_form_even_where_one_would_be_folded(
    strength, taken
):
    chosen = STRENGTHS[strength]
    layer = adapted(nn.Linear(8, 6))
    lora_core.scales(layer, default=chosen, guidance="doubled" in strength)
    x = torch.randn(6 if "doubled" in strength else 3, 5, 8)
    form = "addmm" if isinstance(chosen, list) else "merge"
    assert explain(layer, x).form == form
    how, out = taken(layer, x)
    assert how == form
    each = torch.tensor(chosen) if isinstance(chosen, list) else torch.full((3,), chosen)
    each = each.repeat(x.shape[0] // 3)[:, None, None]
    A, B = factors_of(layer, "default")
    assert_close(out, nn.functional.linear(x, layer.weight, layer.bias) + each * (x @ A.T @ B.T))
    lora_core.scales(layer, default=[1.0, 2.0])
    said = "Strengths per sample must fit the batch, but `scales` gave 2 and the input of a Linear"
    for call in (lambda: explain(layer, x), lambda: layer(x)):
        with pytest.raises(ConfigError, match=f"^{re.escape(said)} has shape"):
            call()


def test_several_adapters_are_one_form_if_they_drop_the_same_share(taken):
    layer = adapted(wide(), dropout=0.5)
    lora_core.inject(layer, rank=2, targets=[nn.Linear], name="b")
    lora_core.scales(layer, default=1.0, b=1.0)
    x = torch.randn(7, 200)
    assert explain(layer, x).form == taken(layer, x)[0] == "addmm"
    layer.train()
    plan = explain(layer, x)
    assert plan.form == taken(layer, x)[0] == "composed"
    assert "differ in dropout" in plan.why


@pytest.mark.parametrize("setting", ["dropout", "rank_dropout", "module_dropout"])
def test_explaining_draws_nothing_and_leaves_no_gradient(setting):
    layer = adapted(wide(), **{setting: 0.5}).train()
    x = torch.randn(7, 200, requires_grad=True)
    before = torch.get_rng_state()
    said = [explain(layer, x) for _ in range(3)]
    assert said[0] == said[1] == said[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None


@given(st.integers(1, 600), st.integers(129, 400), st.integers(129, 400), st.integers(1, 8))
def test_an_update_is_folded_in_where_the_tokens_outweigh_the_matrix(tokens, i, o, rank):
    # what the guide to the fused path promises: (in + out) numbers per token against the matrix's
    layer = LoRALinear(nn.Linear(i, o), rank=rank)
    form = "merge" if tokens * (i + o) > 4 * i * o else "addmm"
    assert explain(layer, torch.randn(tokens, i)).form == form
    half = LoRALinear(nn.Linear(i, o, dtype=torch.bfloat16), rank=rank)
    assert explain(half, torch.randn(tokens, i, dtype=torch.bfloat16)).form == "addmm"


FLOATS, INDICES = "a floating tensor", "a tensor of int64 or int32 indices"


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("few tokens", lambda: normal(7, 9), "`x` must have shape (..., 200), but has (7, 9)."),
        ("few tokens", lambda: normal(()), "`x` must have shape (..., 200), but has ()."),
        ("gpt2", lambda: normal(7, 6), "`x` must have shape (..., 8), but has (7, 6)."),
        (
            "few tokens",
            lambda: normal(7, 200).double(),
            "`x` must have the weight's dtype torch.float32, but has torch.float64. Cast it, or"
            " call under autocast.",
        ),
        (
            "conv",
            lambda: normal(2, 4, 7, 7).half(),
            "`x` must have the weight's dtype torch.float32, but has torch.float16. Cast it, or"
            " call under autocast.",
        ),
        (
            "conv",
            lambda: normal(2, 3, 7, 7),
            "`x` must have shape (batch, 4, size, size), or the same without batch, but has"
            " (2, 3, 7, 7).",
        ),
        (
            "tucker",
            lambda: normal(4),
            "`x` must have shape (batch, 4, size), or the same without batch, but has (4,).",
        ),
        (
            "a packed weight's rows",
            lambda: normal(8, 8),
            "`x` must have shape (24, 8), but has (8, 8).",
        ),
        ("few tokens", lambda: normal(7, 200).long(), f"`x` must be {FLOATS}, but is torch.int64."),
        ("conv", lambda: "a picture", f"`x` must be {FLOATS}, but is str."),
        ("embedding", lambda: normal(7), f"`x` must be {INDICES}, but is torch.float32."),
        ("embedding", lambda: normal(7) > 0, f"`x` must be {INDICES}, but is torch.bool."),
        ("embedding", lambda: [1, 2], f"`x` must be {INDICES}, but is list."),
    ],
)
def test_what_the_layer_cannot_be_called_with_is_refused(kind, wrong, message):
    layer = KINDS[kind][0]()
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        explain(layer, wrong())
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        layer(wrong())


def test_under_autocast_and_behind_a_hook_another_dtype_is_none_of_its_business():
    layer, x = adapted(wide()), torch.randn(7, 200, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(layer, x).form == "addmm"
        layer(x)
    handle = layer.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert layer(x).dtype == torch.float32
    explain(layer, x)
    handle.remove()
    with pytest.raises(ConfigError, match="^`x` must have the weight's dtype"):
        explain(layer, x)


def test_a_module_that_reads_its_parameters_says_where_its_adapters_are():
    model = nn.MultiheadAttention(8, 2)
    lora_core.inject(model, rank=2)
    said = (
        "`layer` must carry an adapter itself, but a MultiheadAttention reads its parameters"
        " through 'lora_at_q_proj_weight', 'lora_at_k_proj_weight', 'lora_at_v_proj_weight'. Pass"
        " one of these, and the parameter as `x`."
    )
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)}$"):
        explain(model, torch.randn(3, 2, 8))
    child = model.get_submodule("lora_at_q_proj_weight")
    assert explain(child, model._parameters["in_proj_weight"]).form == "composed"
