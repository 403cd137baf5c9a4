"""Ways to combine dense updates that are no plain sum: what to drop first, and who outvotes whom.

Shape notes: N = number of updates, the rest is one update's shape.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def trimmed(update: Tensor, density: float) -> Tensor:
    """The largest entries of an update, zero elsewhere; at least one of them stays.

    Args:
        update: Any tensor.
        density: The share of the entries that stays.

    Example:
        >>> trimmed(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5)
        tensor([ 0., -3.,  2.,  0.])
    """
    flat = update.reshape(-1)
    kept = torch.topk(flat.abs(), max(1, int(density * flat.numel())), sorted=False).indices
    out = torch.zeros_like(flat)
    out[kept] = flat[kept]
    return out.view(update.shape)


def dropped_entries(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries of an update dropped at random, the others made larger: the same on average.

    Args:
        update: Any tensor.
        density: The probability that an entry stays.
        generator: What draws, on the CPU.

    Example:
        >>> dropped_entries(torch.ones(3), 1.0, torch.Generator())
        tensor([1., 1., 1.])
    """
    kept = torch.bernoulli(torch.full(update.shape, float(density)), generator=generator)
    return update * kept.to(update) / density


def elected(updates: Tensor) -> Tensor:
    """The mean, at every entry, of those updates that have the sign of the entry's sum.

    Shape:
        - updates: ``(N, ...)``
        - Output: ``(...)``, zero where no update is of the elected sign

    Reference:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, section 3.

    Example:
        >>> elected(torch.tensor([[1.0, 2.0], [3.0, -6.0]]))
        tensor([ 2., -6.])
    """
    sign = torch.where(updates.sum(0) >= 0, 1, -1)
    agree = updates.sign() == sign
    return (updates * agree).sum(0) / agree.sum(0).clamp(min=1)


def _ties(updates: Tensor, density: float, _: torch.Generator) -> Tensor:
    return elected(torch.stack([trimmed(update, density) for update in updates]))


def _dare(updates: Tensor, density: float, generator: torch.Generator) -> Tensor:
    return torch.stack([dropped_entries(u, density, generator) for u in updates]).sum(0)


def _magnitude_prune(updates: Tensor, density: float, _: torch.Generator) -> Tensor:
    return torch.stack([trimmed(update, density) for update in updates]).sum(0)


METHODS: Mapping[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "ties": _ties,
    "dare": _dare,
    "magnitude_prune": _magnitude_prune,
}
"""By name, what makes one dense update of several weighted ones."""
