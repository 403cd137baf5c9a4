"""What the inputs of layers look like on samples, for factors that are made from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core._errors import ConfigError, TargetError, listed
from lora_core._injection.candidates import Candidate
from lora_core._layers import kind_of
from lora_core._reports import Report
from lora_core.kernels.norms import sum_dtype


def sampled(
    model: nn.Module,
    report: Report,
    chosen: Sequence[Candidate],
    samples: Iterable[Any] | None,
) -> dict[str, Tensor]:
    """The covariance of the inputs of each layer that asks for it, by name; changes nothing.

    The model runs in evaluation mode, without gradients; each sample is a tensor, a tuple of
    arguments or a mapping of keywords.

    Shape:
        - Values: ``(in, in)``, not centred; float32 or wider
    """
    asking = {
        layer.name: candidate.module
        for layer, candidate in zip(report.layers, chosen, strict=True)
        if layer.config.starts_from == "inputs"
    }
    if not asking and samples is not None:
        raise ConfigError('`samples` must go with `init="eva"`, but nothing asks for them.')
    if not asking:
        return {}
    if samples is None or isinstance(samples, Tensor | Mapping | str):
        raise ConfigError(
            '`init="eva"` must have `samples`, a list of model inputs, but has'
            f" {type(samples).__name__}. Pass inject(..., samples=[batch, ...])."
        )
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = kind_of(layer).rows(layer, x.detach())
            rows = rows.to(sum_dtype(rows.dtype))
            with torch.autocast(rows.device.type, enabled=False):
                seen = rows.T @ rows
            found[name] = found[name] + seen if name in found else seen

        return note

    hooks = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in asking.items()
        if isinstance(module, nn.Module)
    ]
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            for sample in samples:
                _call(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    unseen = [name for name in asking if name not in found]
    if unseen:
        raise TargetError(
            f"Every layer must be called by `samples`, but {listed(unseen)} was not. Pass samples"
            " that reach it, or exclude it."
        )
    bad = [name for name, seen in found.items() if not bool(seen.isfinite().all())]
    if bad:
        raise ConfigError(
            f"`samples` must give finite inputs, but those of {listed(bad)} are not finite."
        )
    return found


def _call(model: nn.Module, sample: Any) -> None:
    if isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, tuple | list):
        model(*sample)
    else:
        model(sample)
