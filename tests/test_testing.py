"""The fixtures and laws that other projects use, tried in a project of its own."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_core
from lora_core import models
from lora_core._layers import updates
from lora_core._merging import verbs
from lora_core._merging.contact import Site, sum_of
from lora_core._merging.sums import Sum
from lora_core.testing import LawError, check_lora, laws


def unet_inputs(unet: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(2, unet.in_channels, 16, 16),
        torch.tensor([3, 700]),
        torch.randn(2, 3, unet.context_dim),
    )


def test_the_laws_hold_for_the_reference_models(
    tiny_unet: models.UNet, tiny_cross_attention: models.CrossAttention
) -> None:
    assert len(check_lora(tiny_unet, *unet_inputs(tiny_unet), rank=2).layers) >= 8
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 8)
    report = check_lora(tiny_cross_attention, x, context, rank=3, alpha=6)
    assert [layer.name for layer in report.layers] == ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_laws_hold_in_every_dtype(
    tiny_cross_attention: models.CrossAttention, dtype: torch.dtype
) -> None:
    block = tiny_cross_attention.to(dtype)
    check_lora(block, torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 3, 8, dtype=dtype))


@pytest.mark.slow
def test_the_laws_hold_for_the_pretrained_model(pretrained_unet: models.UNet) -> None:
    context = models.pretrained_encoder()(torch.tensor([4, 7])).detach()
    check_lora(pretrained_unet, torch.randn(2, 1, 28, 28), torch.tensor([10, 20]), context)


def test_a_model_with_adapters_is_refused_and_left_alone(lora_unet: models.UNet) -> None:
    before = lora_core.summary(lora_unet)
    with pytest.raises(lora_core.ConfigError, match="^`model` must be bare for the laws to be"):
        check_lora(lora_unet, *unet_inputs(lora_unet), rank=1, name="second")
    assert lora_core.summary(lora_unet) == before


def test_the_model_is_left_as_it_was_even_where_a_law_breaks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    model[1].weight.requires_grad_(False)
    before = [(p, p.requires_grad, p.detach().clone()) for p in model.parameters()]

    with pytest.raises(LawError, match="every adapted layer takes effect"):
        check_lora(Blind(model), torch.ones(2, 4), targets="1", rank=1)
    assert all(m.training for m in model.modules())
    assert [type(m) for m in model] == [nn.Linear] * 2
    for p, (q, flag, bits) in zip(model.parameters(), before, strict=True):
        assert p is q
        assert p.requires_grad == flag
        assert torch.equal(p, bits)


class Blind(nn.Module):
    """Reads the weight of a layer instead of calling it, in a way that code does not show."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner[0](x), self.inner[1].get_parameter("weight"))


def test_a_layer_without_effect_is_named() -> None:
    model = Blind(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    said = "^law broken: every adapted layer takes effect on these inputs; layer 'inner.1'$"
    with pytest.raises(LawError, match=said):
        check_lora(model, torch.ones(2, 4), targets=["0", "1"], rank=1)


def broken_merge(site: Site) -> Sum | None:
    found = sum_of(site)
    return found and found._replace(lora_B=2 * found.lora_B)


def then(verb: Callable[..., object], harm: Callable[[nn.Module], object]) -> Callable[..., object]:
    """A verb that does its work and then some harm to the model."""

    def broken(model: nn.Module, *args: object, **kwargs: object) -> object:
        result = verb(model, *args, **kwargs)
        harm(model)
        return result

    return broken


def nudge(p: Tensor) -> None:
    with torch.no_grad():
        p.view(-1)[0].add_(1.0)


@pytest.mark.parametrize(
    ("owner", "attribute", "broken", "said"),
    [
        (
            verbs,
            "sum_of",
            broken_merge,
            "^law broken: merging keeps the function; layer '0'$",
        ),
        (
            laws,
            "inject",
            then(laws.inject, lambda model: model[0].bias.requires_grad_(True)),
            "^law broken: only the adapter trains; layer '0.bias'$",
        ),
        (
            laws,
            "load",
            then(laws.load, lambda model: nudge(model[0].lora_A_default)),
            "^law broken: saving and loading is bit-exact; layer '0'$",
        ),
        (
            updates,
            "_per_sample",
            lambda layer, gain, order, x: (
                gain if x is None or gain.ndim == 0 else gain.repeat(len(x) // len(gain))
            ),
            "^law broken: each sample has a mix of its own; layer '0'$",
        ),
        (
            laws,
            "unmerge",
            then(laws.unmerge, lambda model: nudge(model[0].weight)),
            "^law broken: unmerging restores every bit; layer '0.weight'$",
        ),
        (
            laws,
            "eject",
            then(laws.eject, lambda model: model[0].weight.requires_grad_(False)),
            "^law broken: eject restores every requires_grad; layer '0.weight'$",
        ),
        (
            laws,
            "eject",
            then(laws.eject, lambda model: nudge(model[0].weight)),
            "^law broken: eject restores every bit; layer '0.weight'$",
        ),
        (
            laws,
            "eject",
            then(laws.eject, lambda model: model[0].counted.add_(1)),
            "^law broken: eject restores every bit; layer '0.counted'$",
        ),
        (
            laws,
            "eject",
            then(laws.eject, lambda model: model[0].__delattr__("counted")),
            "^law broken: eject restores every object; layer '0'$",
        ),
        (
            laws,
            "eject",
            then(laws.eject, lambda model: model.register_forward_hook(lambda *call: call[2] + 1)),
            r"^law broken: eject restores every bit; layer \"\(the model's output\)\"$",
        ),
        (
            lora_core.LoRALinear,
            "forward",
            lambda self, x: nn.functional.linear(x, self.weight, self.bias) + 1e-6,
            "^law broken: a fresh adapter changes nothing; layer '0'$",
        ),
    ],
)
def test_a_broken_library_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    attribute: str,
    broken: Callable[..., object],
    said: str,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("counted", torch.zeros(()))
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(LawError, match=said):
        check_lora(model, torch.ones(2, 4), targets="0", rank=2)


# a merge over a host that trains
@pytest.mark.parametrize("freeze", [True, False])
def test_the_laws_hold_whether_or_not_the_host_is_frozen(freeze: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    targets = ["0", "2"]
    for rows in (1, 7, 200):
        check_lora(model, torch.randn(rows, 64), targets=targets, rank=4, freeze=freeze)
    assert all(p.requires_grad for p in model.parameters())


class Counting(nn.Module):
    """Counts its calls in one buffer, keeps its last input in another, and has a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.full((2, 4), torch.nan))
        self.register_buffer("mask", torch.full((4,), -torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.inner(x)


def test_buffers_are_left_as_they_were() -> None:
    model = Counting()
    before = dict(model.named_buffers())
    check_lora(model, torch.ones(2, 4), targets="inner", rank=1)
    assert model.calls == 0
    assert model.last.isnan().all()
    assert all(b is before[name] for name, b in model.named_buffers())


def test_the_laws_hold_where_a_weight_is_tied() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    model[2].weight = model[0].weight
    report = check_lora(model, torch.tensor([[1, 5, 8]]), targets=["1", "2"], rank=2)
    assert [layer.name for layer in report.layers] == ["1", "2"]
    assert model[2].weight is model[0].weight


def test_inputs_may_go_by_keyword(tiny_cross_attention: models.CrossAttention) -> None:
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 8)
    assert check_lora(tiny_cross_attention, x, model_kwargs={"context": context}, rank=2).layers


def test_a_model_that_is_not_finite_by_itself_is_refused_before_any_law() -> None:
    model, ones = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    with pytest.raises(lora_core.ConfigError, match="^`model` must return numbers for the laws to"):
        check_lora(model, torch.nan * ones, targets="0", rank=1)
    for parameter, value in (("bias", torch.nan), ("weight", torch.inf)):
        broken = nn.Sequential(nn.Linear(4, 4))
        nn.init.constant_(broken.get_parameter(f"0.{parameter}"), value)
        said = f"^`model` must be finite for the laws to be checked, but '0.{parameter}' holds NaN"
        with pytest.raises(lora_core.ConfigError, match=said):
            check_lora(broken, ones, targets="0", rank=1)


@pytest.mark.slow
def test_a_scratch_project_uses_the_fixtures_and_laws(tmp_path: Path) -> None:
    (tmp_path / "test_scratch.py").write_text(
        textwrap.dedent(
            """
            import pytest, torch
            import lora_core
            from lora_core.testing import check_lora

            def test_fixtures(tiny_cross_attention, tiny_unet, lora_unet, adapter_file):
                bare = tiny_unet
                lora_core.load(bare, adapter_file)
                z, t = torch.randn(1, bare.in_channels, 16, 16), torch.tensor([5])
                context = torch.randn(1, 2, bare.context_dim)
                assert torch.equal(bare(z, t, context), lora_unet(z, t, context))
                assert tiny_cross_attention(torch.randn(1, 3, 16), torch.randn(1, 2, 8)).any()

            def test_pretrained(pretrained_unet):
                assert not pretrained_unet.training

            def test_law():
                check_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(2, 4),
                           targets="0", rank=2)

            def test_law_fails():
                class Dead(torch.nn.Sequential):
                    def forward(self, x):
                        return x + 0 * self[0](x)
                with pytest.raises(AssertionError, match="takes effect .* layer '0'"):
                    check_lora(Dead(torch.nn.Linear(4, 4)), torch.ones(2, 4), targets="0")
            """
        )
    )
    run = _pytest(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 passed" in run.stdout


def test_a_project_without_the_fixtures_does_not_pay_for_torch(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        textwrap.dedent(
            """
            import sys

            def test_nothing_heavy():
                assert "lora_core.testing.plugin" in sys.modules
                heavy = {"torch", "numpy", "einops", "safetensors", "matplotlib", "rich"}
                assert not heavy & sys.modules.keys()
            """
        )
    )
    run = _pytest(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


def _pytest(folder: Path) -> "subprocess.CompletedProcess[str]":
    # other plugins of this environment may import numpy: only ours is loaded
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    only = ["-p", "lora_core.testing.plugin", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, *only],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""},
        check=False,
    )


def test_the_tiny_unet_is_as_small_as_its_page_says(tiny_unet: models.UNet) -> None:
    page = (Path(__file__).parents[1] / "docs" / "testing.md").read_text()
    assert "an untrained UNet of about 61,000 parameters" in page
    assert round(sum(p.numel() for p in tiny_unet.parameters()), -3) == 61_000


def test_the_plugin_is_an_entry_point() -> None:
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="pytest11") if e.name == "lora_core"]
    assert [e.value for e in found] == ["lora_core.testing.plugin"]


def test_the_error_that_the_readme_shows_is_the_one_raised() -> None:
    with pytest.raises(lora_core.TargetError) as raised:
        lora_core.inject(models.UNet(), targets="to_qq")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"\nTargetError: {raised.value}\n" in readme


def test_the_table_of_dialects_in_the_docs_is_the_one_in_the_code() -> None:
    from lora_core._injection import DIALECTS

    page = (Path(__file__).parents[1] / "docs" / "dialects.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")][2:]
    for row, dialect in zip(rows, DIALECTS, strict=True):
        title, inputs, outputs, needs = (cell.strip() for cell in row.strip("|").split("|"))
        assert title == dialect.title
        assert inputs == ", ".join(f"`{name}`" for name in dialect.inputs)
        assert outputs == ", ".join(f"`{name}`" for name in dialect.outputs)
        assert needs == ("whole" if dialect.whole else "place" if dialect.place else "")


class Centred(nn.Module):
    """Changes its input and its layer's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= x.mean(0)
        h = self.to_q(x)
        h += x
        return h


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
        Centred(),
    ],
)
def test_a_model_that_works_in_place_or_normalises_passes_and_its_inputs_stay(model) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    kept = x.clone()
    check_lora(model, x, rank=2, targets=nn.Linear)
    assert torch.equal(x, kept)
