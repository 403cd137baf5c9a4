"""What must stand above adapted layers so that nothing passes them by in silence.

- `load_state_dict` refuses a merged model, and a merged model's dict, before it copies anything.
- The fused evaluation of `nn.TransformerEncoder(Layer)`, which reads weights and calls no layer,
  is switched off for the very objects that hold an adapted layer; where nothing seen calls the
  layer, an unseen one may hold it, and the layer itself says that it must be called.
- A block that can fuse its projections refuses to run where it has fused adapted ones.
"""

from collections.abc import Iterator

from torch import nn

from lora_core._injection.fused import FUSE, refuse_fused
from lora_core._layers import LoRAMixin, call_me, refuse_merged

# class -> the attribute, and its value, that torch's own check takes for a reason to call layers
_SWITCHES: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
# a class with one of these forwards holds layers that another may call
_HOLD = (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward, nn.Sequential.forward)
_SWITCHED = "lora_switched"  # attribute: what the switch stood at before


def settle(model: nn.Module) -> None:
    """Puts guards on every module above an adapted layer, and takes them off all others."""
    above: dict[nn.Module, bool] = {}
    _search(model, above)
    for module, guarded in above.items():
        if not (guarded or module._load_state_dict_pre_hooks or _SWITCHED in vars(module)):
            continue
        hooks = [
            key
            for key, hook in module._load_state_dict_pre_hooks.items()
            if getattr(hook, "hook", None) is refuse_merged
        ]
        if guarded and not hooks:
            module.register_load_state_dict_pre_hook(refuse_merged)  # type: ignore[no-untyped-call]
        for key in () if guarded else hooks:
            del module._load_state_dict_pre_hooks[key]
        if hasattr(type(module), FUSE):
            _watch(module, watched=guarded)
        for name, slow in _switches(module):
            own = vars(module)
            if guarded and _SWITCHED not in own:
                own |= {_SWITCHED: own[name], name: slow}
            elif not guarded and _SWITCHED in own:
                own[name] = own[_SWITCHED]
                del own[_SWITCHED]
    for layer in _uncalled(model):
        if call_me not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(call_me)


def _watch(block: nn.Module, *, watched: bool) -> None:
    """Puts a look for fused projections on a block, or takes it off."""
    there = [k for k, hook in block._forward_pre_hooks.items() if hook is refuse_fused]
    if watched and not there:
        block.register_forward_pre_hook(refuse_fused)
    for key in () if watched else there:
        del block._forward_pre_hooks[key]


def is_guarded(model: nn.Module) -> bool:
    """Whether a guard stands in `model`, be it of a layer that was ejected by itself."""
    hooks = (h for m in model.modules() for h in m._load_state_dict_pre_hooks.values())
    return any(getattr(hook, "hook", None) is refuse_merged for hook in hooks)


def _uncalled(model: nn.Module) -> list[LoRAMixin]:
    """The adapted layers that are reached through mere holders: what calls them is not seen."""
    found, seen, left = [], set[nn.Module](), [model]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, LoRAMixin):
            found.append(module)
        elif getattr(type(module), "forward", None) in _HOLD:  # a scripted class has none
            left += [child for child in module._modules.values() if child is not None]
    return found


def _search(module: nn.Module, above: dict[nn.Module, bool]) -> bool:
    """Notes for each module whether an adapted layer is below; whether one is here or below."""
    if module not in above:
        above[module] = False  # a module may contain itself
        for child in module._modules.values():
            if child is not None and _search(child, above):
                above[module] = True
    return above[module] or isinstance(module, LoRAMixin)


def _switches(module: nn.Module) -> Iterator[tuple[str, object]]:
    for kind, (name, slow) in _SWITCHES.items():
        if isinstance(module, kind) and name in vars(module):
            yield name, slow
