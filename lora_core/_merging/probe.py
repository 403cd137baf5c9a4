"""Whether a host's output follows its weight, by its class or by trying."""

import inspect

import torch
from torch import Tensor, nn

from lora_core._errors import MergeError, listed
from lora_core._layers import addition, changing
from lora_core._merging.contact import Site


def probe(name: str, site: Site, new: Tensor) -> None:
    """Raises unless the host's own forward makes of a new weight what the update adds."""
    layer, weight = site.layer, site.own
    taken = list(inspect.signature(layer.lora_host_class.forward).parameters.values())
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    options = [str(p) for i, p in enumerate(taken) if i > 1 or p.kind not in plain]
    if options:
        raise MergeError(
            f"A host's forward must take its input alone to be merged, but that of"
            f" {layer.lora_host_class.__name__} at {name!r} takes {listed(options)}, with which the"
            " update might not follow. Nothing was changed; keep this layer unmerged."
        )
    x = layer.lora_kind.probe(layer, torch.Generator("cpu").manual_seed(0))
    with changing(layer):
        try:
            before = layer.lora_host_class.forward(layer, x)
            layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)
            after = layer.lora_host_class.forward(layer, x)
        finally:
            layer._parameters["weight"] = weight
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        raise MergeError(
            "A host must return a tensor to be merged, but"
            f" {layer.lora_host_class.__name__} at {name!r} returns"
            f" {type(before).__name__}. Nothing was changed; keep this layer unmerged."
        )
    asked, got = addition(layer, x, before), after.double() - before.double()
    eps = torch.finfo(weight.dtype).eps
    bound = 64 * eps * float(before.double().norm() + asked.norm())
    if not bool((asked - got).norm() <= bound):
        raise MergeError(
            f"A host's output must follow its weight to be merged, but the forward of"
            f" {layer.lora_host_class.__name__} at {name!r} makes something else of it. Nothing was"
            " changed; keep this layer unmerged."
        )
