"""One model, or several of a pipeline by name: what `save` and `load` are given."""

from collections.abc import Mapping

from torch import nn

from lora_core._errors import ConfigError


def as_models(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The models by the part of a pipeline that each is; "" for one that is given alone.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    if not isinstance(model, Mapping) or not model:
        raise ConfigError(
            "`model` must be an nn.Module, or modules by part as in {'unet': unet}, but is"
            f" {type(model).__name__ if not isinstance(model, Mapping) else 'an empty mapping'}."
        )
    odd = [f"{n!a}: {type(m).__name__}" for n, m in model.items() if not _is_part(n, m)]
    if odd:
        raise ConfigError(
            "`model` must map parts of a pipeline to modules, as in {'unet': unet}, but holds"
            f" {', '.join(odd)}."
        )
    return dict(model)


def _is_part(name: object, model: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and isinstance(model, nn.Module)


def whole(models: Mapping[str, nn.Module]) -> nn.Module:
    """One module for all of them, in which each has its part's name; it changes none of them."""
    if set(models) == {""}:
        return models[""]
    host = nn.Module()
    host._modules.update(models)
    return host
