"""Tiny models and the few questions that several rooms' tests ask of them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lora_core._layers import LoRAMixin


class Attention(nn.Module):
    """Self-attention with one head and the names of diffusers."""

    def __init__(self, dim: int = 8, context: int = 8) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context, dim, bias=False)
        self.to_v = nn.Linear(context, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)  # (b, n, dim)
        mix = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return self.to_out(mix @ v)


class Block(nn.Module):
    """Attention and an mlp, each with a residual."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """A few blocks and a head."""

    def __init__(self, blocks: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    # `torch.manual_seed` takes a hundred times as long where there is no accelerator: it writes
    # the stack down for each kind that might still come
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    # tiny products gain nothing from threads, and sums stay in one order
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_net() -> Callable[..., Net]:
    """Builds the same small attention net each time."""

    def make(blocks: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32) -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return Net(blocks, dim).to(dtype)

    return make


@pytest.fixture
def net(make_net: Callable[..., Net]) -> Net:
    return make_net()


@pytest.fixture
def x() -> Tensor:
    """An input for the net, (batch, tokens, dim)."""
    return torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def perturb() -> Callable[..., None]:
    """Gives the factors of an adapter (None: of all) values as training might."""

    def fill(model: nn.Module, name: str | None = None, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        for key, p in model.named_parameters():
            last = key.rpartition(".")[2]
            if last.startswith(("lora_A_", "lora_B_")) and name in (None, last[7:]):
                values = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
                with torch.no_grad():
                    p.copy_(values)

    return fill


@pytest.fixture(scope="session")
def portrait() -> Callable[[nn.Module], object]:
    """Everything that inject and eject may touch, host objects by identity."""

    def look(model: nn.Module) -> object:
        seen: list[object] = []
        for name, module in model.named_modules():
            parameters = [
                (
                    key,
                    None if p is None else tuple(p.shape) if "lora_" in key else id(p),
                    None if p is None else p.requires_grad,
                    None if p is None or p.grad is None else id(p.grad),
                )
                for key, p in module._parameters.items()
            ]
            adapters: tuple[object, ...] = (vars(module).get("lora_frozen"),)
            if isinstance(module, LoRAMixin):
                state = module.lora_state
                names, strengths, _, bank, _ = state.selection
                floats = [term.gain.tolist() for term in bank if term.name in names]
                adapters += (state.configs, names, strengths, floats, state.merged)
            seen.append((name, id(module), type(module), list(vars(module)), parameters, adapters))
            seen.append([(key, id(b)) for key, b in module._buffers.items()])
            seen.append((list(module._modules), module.training))
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            seen.append((list(map(id, hooks)), len(module._load_state_dict_pre_hooks)))
        return seen

    return look
