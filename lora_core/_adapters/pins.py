"""Showing one thread what was chosen at a moment, whatever is chosen later."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager, contextmanager, nullcontext

from torch import nn

from lora_core._adapters.names import layers_with
from lora_core._layers import BARE, PINS, State, lock, pin_of


def pinned(model: nn.Module) -> _GeneratorContextManager[None]:
    """Keeps what is active now for the forwards of this thread, until the block ends.

    Without it a call of `model` in one thread, while another thread uses `scales`, may run its
    first layers under the earlier choice and the rest under the later one: a choice is seen whole
    by each layer. Within the block it is seen whole by the model. As a decorator,
    ``pinned(model)(run)``, it holds for every call, so also for one that a re-entrant checkpoint
    repeats in the backward.

    Raises:
        AdapterError: If the model has no adapter. A forward inside raises it if one that is
            pinned was ejected.
        ConfigError: If strengths are chosen inside, by this thread, or a compiled model is run.

    Example:
        >>> from lora_core import LoRALinear, scales
        >>> layer = LoRALinear(nn.Linear(3, 5), rank=2, name="style")
        >>> with pinned(layer):
        ...     pass  # y = layer(x), while other threads may call scales(layer, style=0.5)
    """
    return _shown(_now(model))


Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def checkpoint_context(model: nn.Module) -> Callable[[], Contexts]:
    """The ``context_fn`` with which checkpoints recompute under the strengths of the forward.

    A checkpoint runs its function again in the backward. Where the strengths have changed by then,
    because a `scales` block is over or another was chosen, this hands the second run the first
    one's; without it PyTorch raises CheckpointError, which shows shapes ``[0, N]`` that differ.

    Args:
        model: The model with adapters that is checkpointed, or that holds what is.

    Raises:
        AdapterError: If the model has no adapter, when a checkpoint begins.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> from lora_core import LoRALinear, scales
        >>> layer, x = LoRALinear(nn.Linear(3, 5), rank=2), torch.randn(4, 3)
        >>> again = checkpoint_context(layer)
        >>> with scales(layer, default=0.5):
        ...     y = checkpoint(layer, x, use_reentrant=False, context_fn=again)
        >>> y.sum().backward()  # with strength 0.5
    """

    def contexts() -> Contexts:
        return nullcontext(), _shown(_now(model))

    return contexts


def _now(model: nn.Module) -> dict[nn.Module, State]:
    layers = layers_with(model, None)
    with lock():
        bare: dict[nn.Module, State] = dict.fromkeys(model.modules(), BARE)
        now: dict[nn.Module, State] = {m: m.lora_state for m in layers.values()}
    known: dict[nn.Module, State] = {
        m: pin for m in layers.values() if PINS.blocks and (pin := pin_of(m)) is not None
    }
    return {**bare, **now, **known}


@contextmanager
def _shown(pins: dict[nn.Module, State]) -> Iterator[None]:
    before = PINS.blocks
    PINS.blocks = (*before, {**(before[-1] if before else {}), **pins})
    try:
        yield
    finally:
        PINS.blocks = before
