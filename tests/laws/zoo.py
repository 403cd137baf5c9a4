"""The zoo: a small model for every kind of adapted layer, and what the laws ask of each.

A new kind is a row of `ZOO`; every law then holds for it too.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_core


class Conv1D(nn.Module):
    """A linear layer that stores its matrix (in, out), as GPT-2's does."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(x.size()[:-1] + (self.nf,))  # noqa: RUF005  # nothing iterates in a trace


class Doubled(nn.Linear):
    """A subclass with a forward and an attribute of its own."""

    def __init__(self, *sizes: int, factor: float = 2.0) -> None:
        super().__init__(*sizes)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


class Model(nn.Module):
    """The layer at `site`, and parameters and a buffer that no adapter touches."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.act = nn.PReLU()
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.call(x) + self.shift)

    def call(self, x: Tensor) -> Tensor:
        return self.site(x)


class Centred(nn.Conv2d):
    """A convolution with a kernel without its mean, of its input with a border."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(nn.functional.pad(x, (2, 0)), kernel, self.bias)


class Shifted(nn.Embedding):
    """A table whose rows are found by indices that are shifted, and multiplied."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids + 1)


class Reader(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight.tanh(), self.layer.bias)


class Attention(Model):
    """Self-attention at `site`."""

    def call(self, x: Tensor) -> Tensor:
        return self.site(x, x, x, need_weights=False)[0]


class Beside(Model):
    """Attention at `site` to keys and values of other widths, whose projections stand apart."""

    def call(self, x: Tensor) -> Tensor:
        return self.site(x, x[..., :4], x[..., :6], need_weights=False)[0]


class Twice(Model):
    """A layer of two inputs at `site`."""

    def call(self, x: Tensor) -> Tensor:
        return self.site(x, x[..., :4])


class Recurrent(Model):
    """A recurrent layer at `site`."""

    def call(self, x: Tensor) -> Tensor:
        return self.site(x)[0]


class Experts(nn.Module):
    """One matrix for each of several experts, as a parameter of its own."""

    def __init__(self, experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(experts, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("b n i, e o i -> b n e o", x, self.w).sum(2)


def vectors(batch: int) -> Tensor:
    return torch.randn(batch, 5, 8)


def pictures(*sizes: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 4, *sizes)


def indices(batch: int) -> Tensor:
    return torch.randint(1, 9, (batch, 5))


@dataclass(frozen=True)
class Kind:
    """One kind of adapted layer.

    Attributes:
        build: Makes a bare model in float32.
        options: What `inject` is called with.
        inputs: Makes an input of so many samples, the batch first.
        excused: What does not work, and why not.
        several: Whether it has several sites, which read their selections one after another.
    """

    build: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], Tensor] = vectors
    excused: Mapping[str, str] = field(default_factory=dict)
    several: bool = False

    def excuse(self, what: str) -> None:
        """Skips the test if a kind of layer does without this."""
        if what in self.excused:
            pytest.skip(f"{what}: {self.excused[what]}")

    def bare(self, seed: int = 7, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model without adapters; the same one for the same seed."""
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            return self.build().to(dtype)

    def inject(self, model: nn.Module, name: str = "default", seed: int = 3) -> nn.Module:
        """Adapts a model of this kind in place, and moves the adapter as training might."""
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            lora_core.inject(model, **{"rank": 2, "alpha": 3.0, **self.options}, name=name)
            with torch.no_grad():
                for p in lora_core.parameters(model, name):
                    p.add_(0.3 * torch.randn_like(p))
        return model

    def adapted(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with a trained adapter; the same one each time."""
        return self.inject(self.bare(dtype=dtype))

    def sample(self, batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """An input of so many samples; integers stay integers."""
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            x = self.inputs(batch)
        return x.to(dtype) if x.is_floating_point() else x


# what torch can't do with a bare layer either
RECURRENT = {"vmap": "torch has no rule for it", "compile": "torch refuses recurrent layers"}
# what can't be
FROM_VALUES = {"meta": "it is drawn from the weight's values"}

ZOO: dict[str, Kind] = {
    "linear": Kind(lambda: Model(nn.Linear(8, 6)), {"targets": "site"}),
    "linear-without-bias": Kind(
        lambda: Model(nn.Linear(8, 6, bias=False)),
        {"targets": "site", "rslora": True, "dropout": 0.25},
    ),
    "linear-subclass": Kind(
        lambda: Model(Doubled(8, 6)),
        {"targets": "site"},
    ),
    "conv-subclass": Kind(lambda: Model(Centred(4, 6, 3)), {"targets": "site"}, pictures(7, 6)),
    "embedding-subclass": Kind(lambda: Model(Shifted(10, 6)), {"targets": "site"}, indices),
    "read-by-another": Kind(lambda: Model(Reader(nn.Linear(8, 6))), {"targets": "layer"}),
    "read-as-asked": Kind(
        lambda: Model(nn.Linear(8, 6)),
        {"targets": "site.weight", "dora": True},
        excused=FROM_VALUES,
    ),
    "gpt2-conv1d": Kind(lambda: Model(Conv1D(6, 8)), {"targets": "site"}),
    "dora": Kind(
        lambda: Model(nn.Linear(8, 6)), {"targets": "site", "dora": True}, excused=FROM_VALUES
    ),
    "bias": Kind(lambda: Model(nn.Linear(8, 6)), {"targets": "site", "bias": True}),
    "rank-and-module-dropout": Kind(
        lambda: Model(nn.Linear(8, 6)),
        {"targets": "site", "rank_dropout": 0.25, "module_dropout": 0.05},
    ),
    "pissa": Kind(
        lambda: Model(nn.Linear(8, 6)), {"targets": "site", "init": "pissa"}, excused=FROM_VALUES
    ),
    "conv1d": Kind(lambda: Model(nn.Conv1d(4, 6, 3, padding=1)), {"targets": "site"}, pictures(7)),
    "conv2d-in-groups": Kind(
        lambda: Model(nn.Conv2d(4, 6, 3, stride=2, groups=2)), {"targets": "site"}, pictures(7, 6)
    ),
    "conv2d-reflecting-dora": Kind(
        lambda: Model(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        {"targets": "site", "dora": True},
        pictures(7, 6),
        FROM_VALUES,
    ),
    "conv_transpose": Kind(
        lambda: Model(nn.ConvTranspose2d(4, 6, 3, stride=2)), {"targets": "site"}, pictures(4, 5)
    ),
    "bilinear": Kind(lambda: Twice(nn.Bilinear(8, 4, 6)), {"targets": "site"}, vectors),
    "conv3d": Kind(lambda: Model(nn.Conv3d(4, 6, 2)), {"targets": "site"}, pictures(4, 3, 3)),
    "embedding": Kind(
        lambda: Model(nn.Embedding(9, 6, padding_idx=0)), {"targets": "site"}, indices
    ),
    "attention-packed": Kind(
        lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
        {"targets": ["q_proj_weight", "v_proj_weight", "out_proj"]},
        several=True,
    ),
    "attention-whole": Kind(
        lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
        {"targets": "in_proj_weight"},
    ),
    "attention-apart": Kind(
        lambda: Beside(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)),
        {"targets": ["k_proj_weight", "out_proj"]},
        several=True,
    ),
    "encoder-layer": Kind(
        lambda: Model(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)),
        {"targets": ["linear1", "in_proj_weight"]},
        several=True,
    ),
    "gru": Kind(
        lambda: Recurrent(nn.GRU(8, 6, batch_first=True)),
        {"targets": ["weight_ih_l0", "weight_hh_l0"]},
        excused=RECURRENT,
        several=True,
    ),
    "lstm": Kind(
        lambda: Recurrent(nn.LSTM(8, 6, batch_first=True)),
        {"targets": "weight_ih_l0"},
        excused=RECURRENT,
    ),
    "experts": Kind(lambda: Model(Experts(3, 6, 8)), {"targets": "site.w"}),
    "normalisation": Kind(
        lambda: Model(nn.LayerNorm(8)),
        {"targets": ["site.weight", "site.bias"], "rank": 1},
        several=True,
    ),
}


def adapter_keys(model: nn.Module) -> list[str]:
    """What a state dict holds of the adapters, what never trains included."""
    return [n for n in model.state_dict() if any(s.startswith("lora_") for s in n.split("."))]


def trained_keys(model: nn.Module) -> list[str]:
    """The names of the adapters' parameters, in the order of the model."""
    mine = {id(p) for p in lora_core.parameters(model)}
    return [n for n, p in model.named_parameters() if id(p) in mine]


def flags(model: nn.Module) -> dict[str, bool]:
    """Which parameters take a gradient."""
    return {n: p.requires_grad for n, p in model.named_parameters()}


def bits(model: nn.Module, *, adapters: bool = True) -> dict[str, Tensor]:
    """A copy of every value of the state dict, or of the host's alone."""
    mine = set() if adapters else set(adapter_keys(model))
    return {n: t.detach().clone() for n, t in model.state_dict().items() if n not in mine}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order, and equal values."""
    return list(left) == list(right) and all(torch.equal(t, right[n]) for n, t in left.items())


def loss_of(y: Tensor) -> Tensor:
    """A number whose gradient reaches every element, of an output of any dtype."""
    return y.double().square().sum() + y.double().sum()


def gradients(
    model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The adapters' gradients for one call from one seed; none is left behind."""
    torch.default_generator.manual_seed(5)
    factors = lora_core.parameters(model)
    loss_of(model(x) if call is None else call(x)).backward()
    found = [p.grad for p in factors]
    for p in model.parameters():
        p.grad = None
    assert all(g is not None for g in found), "a factor got no gradient"
    return found  # type: ignore[return-value]


def plain(kind: Kind, x: Tensor, seed: int = 7) -> Tensor:
    """What the bare model gives, its parameters frozen: torch takes other kernels if they are."""
    return kind.bare(seed).requires_grad_(requires_grad=False).eval()(x)


def host_gives(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a bare model and its layer give; where torch itself can't, the law is passed over.

    oneDNN has a kernel for bfloat16 in an LSTM only on processors with AVX-512.
    """
    try:
        return model(x), model.call(x)
    except RuntimeError as error:
        if not str(error).startswith("could not create a primitive descriptor"):
            raise
        pytest.skip(f"the bare host can't do it on this processor either: {error}")


def moves(model: nn.Module, x: Tensor) -> bool:
    """Whether the adapters change the output: no law may hold because they do nothing."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        adapted = twin(x)
        with lora_core.disabled(twin):
            return not torch.allclose(twin(x), adapted, rtol=1e-2, atol=1e-2)
