"""PEFT's `add_weighted_adapter`, where its definitions are those of `combine`.

They are for "cat" (the exact sum), "svd" (the best approximation of it), "magnitude_prune_svd" and
"dare_linear_svd"; and for "ties_svd" where all weights are equal and positive: PEFT elects the
signs before it weighs the updates, and `combine` after.
"""

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lora_core import Adapter, combine
from lora_core._config import AdapterConfig
from lora_core._formats import AdapterLayer
from lora_core._reports import LayerResult

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.interop

NAMES = ("first", "second", "third")
RANKS = {"first": 3, "second": 2, "third": 4}


class Net(nn.Module):
    """A layer of each kind that PEFT combines."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 10)
        self.only = nn.Linear(9, 11, bias=False)
        self.conv = nn.Conv2d(4, 8, 3)
        self.emb = nn.Embedding(20, 9)


@pytest.fixture
def model() -> Any:
    """The net with three adapters of PEFT's, the first one on one more layer."""
    torch.manual_seed(0)
    made = None
    for name in NAMES:
        targets = ["lin", "conv", "emb", *(["only"] if name == "first" else [])]
        config = peft.LoraConfig(
            r=RANKS[name],
            lora_alpha=2 * RANKS[name] - 1,
            target_modules=targets,
            use_rslora=name == "second",
        )
        if made is None:
            made = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    assert made is not None
    with torch.no_grad():
        for key, p in made.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape))
    return made


def adapter_of(model: Any, name: str) -> Adapter:
    """One of PEFT's adapters in the neutral form."""
    layers, config = {}, model.peft_config[name]
    settings = AdapterConfig(
        config.r, float(config.lora_alpha), 0.0, torch.float32, rslora=config.use_rslora
    )
    for key, module in model.base_model.model.named_modules():
        for kind, down, up in (
            ("linear", "lora_A", "lora_B"),
            ("embedding", "lora_embedding_A", "lora_embedding_B"),
        ):
            held = getattr(module, down, {})
            if name in held:
                A, B = (getattr(module, part)[name] for part in (down, up))
                parts = {
                    "lora_A": getattr(A, "weight", A).detach().clone(),
                    "lora_B": getattr(B, "weight", B).detach().clone(),
                }
                what = "conv" if parts["lora_A"].ndim == 4 else kind
                layers[key] = AdapterLayer(what, settings, parts)
    return Adapter(name, layers)


def delta(layer: AdapterLayer) -> Tensor:
    """The update in the weight's own layout."""
    A, B = (layer.parts[part].double().flatten(1) for part in ("lora_A", "lora_B"))
    dense = layer.settings.scale * (B @ A)
    if layer.kind == "conv":
        return dense.reshape(len(B), *layer.parts["lora_A"].shape[1:])
    return dense.T if layer.kind == "embedding" else dense


def theirs(model: Any, weights: list[float], **options: Any) -> dict[str, Tensor]:
    """By layer, the update that PEFT makes of all three."""
    model.add_weighted_adapter(list(NAMES), weights, "mixed", **options)
    return {
        key: module.get_delta_weight("mixed").detach().double()
        for key, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_alike(model: Any, found: Adapter, expected: dict[str, Tensor]) -> None:
    assert found.layers.keys() == expected.keys()
    for name, layer in found.layers.items():
        assert_close(delta(layer), expected[name], rtol=1e-4, atol=1e-4)


def test_the_exact_sum_is_pefts_cat(model: Any) -> None:
    weights = [0.7, -0.5, 2.0]
    ours = combine([adapter_of(model, name) for name in NAMES], weights)
    assert_alike(model, ours, theirs(model, weights, combination_type="cat"))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_best_approximation_is_pefts_svd(model: Any, rank: int) -> None:
    weights, told = [0.7, -0.5, 2.0], list[LayerResult]()
    family = [adapter_of(model, name) for name in NAMES]
    ours = combine(family, weights, rank, told=told.append)
    expected = theirs(model, weights, combination_type="svd", svd_rank=rank)
    assert_alike(model, ours, expected)
    exact = combine(family, weights)
    for said in told:
        asked = delta(exact.layers[said.name])
        measured = (expected[said.name] - asked).norm() / asked.norm()
        assert said.error == pytest.approx(float(measured), abs=1e-5)


@pytest.mark.parametrize(
    ("method", "kind", "weights"),
    [
        ("magnitude_prune", "magnitude_prune_svd", [0.7, -0.5, 2.0]),
        ("ties", "ties_svd", [0.6, 0.6, 0.6]),
    ],
)
def test_methods_on_dense_updates_are_pefts(
    model: Any, method: Any, kind: str, weights: list[float]
) -> None:
    family = [adapter_of(model, name) for name in NAMES]
    ours = combine(family, weights, 6, method=method, density=0.4)
    options = {"combination_type": kind, "svd_rank": 6, "density": 0.4}
    assert_alike(model, ours, theirs(model, weights, **options))


def test_the_same_seed_drops_what_peft_drops(model: Any) -> None:
    weights, family = [0.7, -0.5, 2.0], [adapter_of(model, name) for name in NAMES]
    ours = combine(family, weights, 6, method="dare", density=0.4, seed=3)
    layer = model.base_model.model.lin
    torch.manual_seed(3 ^ zlib.crc32(b"lin"))
    A, B = model.base_model._svd_generalized_task_arithmetic_weighted_adapter(
        "dare_linear_svd", list(NAMES), weights, 6, layer, None, None, 0.4, "total"
    )
    assert_close(delta(ours.layers["lin"]), (B @ A).double(), rtol=1e-4, atol=1e-4)
